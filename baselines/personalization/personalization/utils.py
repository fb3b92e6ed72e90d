"""What is shown of the comparison."""

COLUMNS = {
    "evaluate/accuracy-seen": "accuracy, seen",
    "evaluate/accuracy-unseen": "unseen",
    "evaluate/accuracy-seen-p10": "tenth worst",
    "evaluate/received-accuracy-seen": "shared model, seen",
    "evaluate/received-accuracy-unseen": "unseen",
    "evaluate/accuracy-seen-hurt": "hurt",
    "bytes/up": "up a round",
}
PANELS = [
    "evaluate/accuracy-seen",
    "evaluate/accuracy-unseen",
    "evaluate/accuracy-seen-p10",
]
