"""The HTTP server: OpenAI's routes over one AsyncEngine."""
