"""Whole pairs: the reference pairs, and the check of a pair that is there."""
