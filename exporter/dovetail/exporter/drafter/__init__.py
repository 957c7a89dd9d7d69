"""Exports a drafter checkpoint as ONNX graphs."""
