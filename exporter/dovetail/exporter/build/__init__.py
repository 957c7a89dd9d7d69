"""How a folder is built: in stages, and exchanged as a whole."""
