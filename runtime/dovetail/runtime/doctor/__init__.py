"""Estimate what a machine can run, before any model is loaded."""
