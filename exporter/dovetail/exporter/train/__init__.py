"""Trains a drafter: text, features, fit, evaluation."""
