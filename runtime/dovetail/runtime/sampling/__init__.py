"""Choosing a token from the target's logits."""
