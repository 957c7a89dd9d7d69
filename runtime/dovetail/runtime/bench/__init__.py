"""Plain against speculative decoding, measured."""
