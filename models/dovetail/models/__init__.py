"""Torch modules: what is trained. Drafters, their layers, and the formats of their checkpoints."""
