"""What is shown of the comparison."""

COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "bytes/up": "up a round",
    "bytes/down": "down a round",
}
PANELS = ["central/loss", "central/accuracy"]
