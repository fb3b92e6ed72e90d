"""What is shown of the comparison."""

COLUMNS = {
    "evaluate/gm-appeal": "appeal",
    "evaluate/gm-appeal-seen": "seen",
    "evaluate/gm-appeal-unseen": "unseen",
    "evaluate/accuracy": "accuracy",
    "evaluate/preferred-accuracy": "preferred",
}
PANELS = ["evaluate/gm-appeal", "evaluate/accuracy"]
