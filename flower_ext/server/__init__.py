"""The server: strategies, rounds, server optimizers, checkpoints and callbacks."""
