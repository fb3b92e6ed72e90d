"""What it costs that clients keep something: seconds of a round, disk and memory.

Every client keeps an array and changes it whenever it is asked, one cohort after the
other, until all have one; then the first are asked again. The peer writes such arrays
to files in a loop, and later reads, changes and writes them. The default, 1,000 clients
of a megabyte, takes 1 GB of disk.
"""

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from _timing import Peak
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy, LocalGrid
from flower_ext.core.sampling import Purpose, Sampler

AGAIN = 10  # rounds in which clients are asked for the second time
MODEL = ArrayRecord({"w": Array(np.zeros(10, np.float32))})

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Keep zeros, or add one to what is kept; send the model back."""
    own = np.zeros(int(context.run_config["size"]) // 4, np.float32)
    if "own" in context.state:
        own = context.state.array_records["own"]["w"].numpy() + 1
    context.state["own"] = ArrayRecord({"w": Array(own)})
    arrays = message.content.array_records["arrays"]
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class InTurn(Sampler):
    """Asks one cohort after the other, and begins again."""

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return the cohort of a round."""
        first = (server_round - 1) * size % len(clients)
        return list(clients[first : first + size])


def ours(
    clients: int, cohort: int, size: int, folder: Path, *, saves: bool
) -> tuple[list[float], int]:
    """Return the seconds of all rounds, and the bytes that are free in the end."""
    times: list[float] = []
    tempfile.tempdir = str(folder)  # where the grid keeps them
    grid = LocalGrid(app, clients, {"size": size})
    AdditiveStrategy(
        sampler=InTurn(), fraction_train=cohort / clients, fraction_evaluate=0.0
    ).start(
        grid,
        MODEL,
        num_rounds=clients // cohort + AGAIN,
        evaluate_fn=lambda number, arrays: times.append(time.perf_counter()),
        checkpoint=folder / "saved" if saves else None,
    )
    tempfile.tempdir = None
    free = shutil.disk_usage(folder).free  # the files go with the grid
    return [b - a for a, b in zip(times, times[1:], strict=False)], free


def peer(clients: int, cohort: int, size: int, folder: Path) -> tuple[list[float], int]:
    """Return the same of a loop over files."""
    seconds = []
    for server_round in range(clients // cohort + AGAIN):
        begun = time.perf_counter()
        for place in range(cohort):
            file = folder / f"{(server_round * cohort + place) % clients}.npy"
            own = np.zeros(size // 4, np.float32)
            if file.exists():
                own = np.load(file) + 1
            np.save(file, own)
        seconds.append(time.perf_counter() - begun)
    return seconds, shutil.disk_usage(folder).free


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--size", type=int, default=1_000_000, help="bytes of each")
    chosen = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    sizes = chosen.clients, chosen.cohort, chosen.size
    systems = {
        "files in a loop": peer,
        "in process": partial(ours, saves=False),
        "with a checkpoint": partial(ours, saves=True),
    }
    print(f"{'':18} {'new, s':>9} {'again, s':>9} {'disk, GB':>9} {'memory, MiB':>12}")
    for name, run in systems.items():
        with tempfile.TemporaryDirectory() as temporary, Peak() as peak:
            free = shutil.disk_usage(temporary).free
            seconds, left = run(*sizes, Path(temporary))
        new, again = map(statistics.median, (seconds[:-AGAIN], seconds[-AGAIN:]))
        disk, memory = (free - left) / 1e9, peak.bytes / 2**20
        print(f"{name:18} {new:9.3f} {again:9.3f} {disk:9.2f} {memory:12.0f}")


if __name__ == "__main__":
    main()
