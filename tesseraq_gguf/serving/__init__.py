"""A file at work: chat in the terminal, and a server."""
