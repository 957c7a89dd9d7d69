"""Measure plain against speculative decoding."""
