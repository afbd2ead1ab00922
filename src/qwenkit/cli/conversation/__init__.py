"""A conversation in the terminal, with a model here or behind a URL: state, commands, screen, and the two kinds of backend."""
