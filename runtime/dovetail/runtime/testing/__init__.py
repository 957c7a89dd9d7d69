"""Sessions without engines: for tests, and for programs that embed the loop."""
