"""How much to draft and to verify."""
