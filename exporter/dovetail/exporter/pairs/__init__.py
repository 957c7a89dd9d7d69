"""Whole pairs: builds the reference pairs, and checks a finished pair."""
