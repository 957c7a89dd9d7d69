"""The pair folder and its manifest."""
