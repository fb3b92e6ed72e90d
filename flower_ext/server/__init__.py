"""The server: the rounds, the sum, the server optimizer, checkpoints and tracking."""
