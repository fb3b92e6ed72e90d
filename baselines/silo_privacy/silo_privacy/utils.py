"""What is shown of the comparison."""

COLUMNS = {
    "evaluate/mse": "MSE",
    "evaluate/received-mse": "of the mean",
    "evaluate/mse-seen-p90": "90 % of schools",
}
PANELS = ["evaluate/mse", "train/example-epsilon"]
