"""How a token is chosen from the target's logits."""
