"""What is shown of the comparison."""

from pathlib import Path
from statistics import fmean

from flower_ext.privacy import InstanceAccount

#: How the model of a method reads mails.
KINDS = {
    "scratch": "words",
    "lora": "layers",
    "lora-ffa": "layers",
    "probe": "features",
}
COLUMNS = {
    "central/accuracy": "accuracy",
    "central/loss": "loss",
    "train/example-epsilon": "epsilon",
    "bytes/up": "up a round",
}


def told(folder: Path, watched: int, delta: float) -> str:
    """Return what the silos' accounts of single mails say, on average and at most.

    A deployed silo keeps its accounts where it runs.
    """
    examples = tuple(range(watched))
    accounts = [
        InstanceAccount.load(path, examples)
        for path in sorted(folder.glob("instances-*.json"))
    ]
    if not accounts:
        return f"single mails: no accounts in {folder}, but with the silos"
    pairs = [(x, i) for x in accounts for i in examples]
    epsilons = [x.epsilon(i, delta) for x, i in pairs]
    unbounded = [x.unbounded_epsilon(i, delta) for x, i in pairs]
    losses = [x.fisher_information_loss(i) for x, i in pairs]
    return (
        f"{len(pairs)} single mails: epsilon {fmean(epsilons):.3f} on average, "
        f"{max(epsilons):.3f} at most; {fmean(unbounded):.3f} and {max(unbounded):.3f} "
        f"of the same sums without bounds; Fisher information loss {fmean(losses):.3f}"
    )
