"""The `dovetail-run` command."""
