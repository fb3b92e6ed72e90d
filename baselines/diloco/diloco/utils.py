"""What is shown of the comparison."""

COLUMNS = {
    "central/loss": "loss",
    "central/tokens": "tokens",
    "bytes/up": "up a round",
    "bytes/down": "down a round",
}
