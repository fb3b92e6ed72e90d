"""What is shown of the comparison."""

COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "evaluate/client-server-barrier": "barrier",
    "bytes/up": "up a round",
}
PANELS = ["central/loss", "central/accuracy"]
