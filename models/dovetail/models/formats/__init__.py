"""Drafter checkpoints of every format that Dovetail reads: one file a format, and a registry."""
