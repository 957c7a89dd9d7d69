"""Exports a checkpoint as an OpenVINO IR with its tokenizer."""
