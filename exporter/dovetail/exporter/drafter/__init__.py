"""A drafter checkpoint becomes ONNX graphs."""
