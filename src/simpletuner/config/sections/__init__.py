"""The options, one section a file."""
