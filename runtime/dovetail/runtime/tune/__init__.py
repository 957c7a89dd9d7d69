"""Measured costs of passes on this machine, kept in the cache."""
