"""Training a drafter: text, features, fit, evaluation."""
