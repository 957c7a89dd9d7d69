"""Sessions without engines, for tests and for whoever embeds the loop."""
