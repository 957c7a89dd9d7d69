"""Builds a folder in stages and puts the finished folder in place in one step."""
