"""Says what a comparison on images has shown: ``python fedfish/words.py RESULTS``."""

import sys
from pathlib import Path

from flower_ext.runs.report import read_summary

ACCURACY, BARRIER, UP = (
    "central/accuracy",
    "evaluate/client-server-barrier",
    "bytes/up",
)

NEXT = """\
Try next:
  make report                            this run as a web page
  make help                              the rest
  docs/tutorial.md                       FedFish in an app of your own, in ten minutes
  baselines/fedfish/README.md            over seeds and local epochs, and where it does
                                         not win: on text by speaker, for one\
"""


def words(results: Path) -> str:
    """Compare FedFish with FedAvg in sentences."""
    runs = read_summary(results)["runs"]
    average, fish = runs["fedavg"], runs["fedfish"]
    gap = 100 * (fish[ACCURACY] - average[ACCURACY])
    barriers = fish[BARRIER], average[BARRIER]
    return (
        "What you saw: clients that each know few of ten kinds of clothes. The model "
        f"averaged by\nFedFish names {100 * fish[ACCURACY]:.1f} % of all test images "
        f"rightly, FedAvg's {100 * average[ACCURACY]:.1f} %: {abs(gap):.1f} points "
        f"{'more' if gap > 0 else 'less'}.\nReplacing their own models by it costs the "
        f"clients {barriers[0]:.2f} nats instead of {barriers[1]:.2f}.\nThe price: "
        f"{fish[UP] / average[UP]:.1f} times the bytes up, for the Fisher information "
        f"beside the model.\n\n{NEXT}"
    )


if __name__ == "__main__":
    print(words(Path(sys.argv[1])))
