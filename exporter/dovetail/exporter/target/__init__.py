"""A checkpoint becomes an OpenVINO IR with its tokenizer."""
