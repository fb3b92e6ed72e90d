"""What is shown of the comparison."""

COLUMNS = {
    "evaluate/gm-appeal-seen": "appeal, seen",
    "evaluate/gm-appeal-unseen": "unseen",
    "evaluate/accuracy-seen": "accuracy, seen",
    "evaluate/accuracy-unseen": "unseen",
    "evaluate/preferred-accuracy-seen": "preferred, seen",
    "evaluate/preferred-accuracy-unseen": "unseen",
    "evaluate/finetuned-accuracy-unseen": "fine-tuned, unseen",
}
PANELS = ["evaluate/gm-appeal", "evaluate/accuracy"]
