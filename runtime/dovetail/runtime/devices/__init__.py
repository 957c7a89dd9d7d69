"""Devices that run graphs: find them, open sessions there, and move arrays; each failure in one line."""
