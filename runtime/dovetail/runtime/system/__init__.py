"""The machine, its files, and what libraries do unasked."""
