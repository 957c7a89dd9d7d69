"""Whole pairs: builds the reference pairs, checks a finished pair, and moves pairs to and from the Hub."""
