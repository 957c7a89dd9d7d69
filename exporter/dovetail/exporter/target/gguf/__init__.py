"""Reads GGUF files: header, configuration, tokenizer, weights."""
