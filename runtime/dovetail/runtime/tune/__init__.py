"""What passes cost on this machine, measured and kept."""
