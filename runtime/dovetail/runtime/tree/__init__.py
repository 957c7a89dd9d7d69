"""Draft trees: their nodes, their limits and their growth."""
