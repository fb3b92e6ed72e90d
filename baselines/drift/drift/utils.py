"""What is shown of the comparison."""

#: Before the metrics of the mean of a round's model and the one before.
AVERAGE = "average-"
COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "bytes/down": "down a round",
    "bytes/up": "up a round",
}
PANELS = ["central/loss", "central/accuracy"]
