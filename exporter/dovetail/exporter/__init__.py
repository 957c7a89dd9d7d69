"""Builds what the runtime runs: targets, drafters, and the pair folders that hold both."""
