"""The machine, its files, and switches for the libraries that Dovetail loads."""
