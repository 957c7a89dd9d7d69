"""The artifact: a pair folder and its manifest."""
