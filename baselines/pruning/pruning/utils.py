"""What is shown of the comparison."""

COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "bytes/down": "down a round",
    "bytes/up": "up a round",
}
PANELS = ["central/loss", "central/accuracy"]
