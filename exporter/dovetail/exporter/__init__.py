"""Builds the runtime's input: targets, drafters, and the pair folders that hold both."""
