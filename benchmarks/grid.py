"""What a round of the in-process grid costs compared with a bare loop.

Each client costs two messages and their records; each megabyte of a model is turned
into records and back, both ways, and added up. The bare loop is what a person would
write without Flower. The costs are differences between runs of two sizes, so that what
is the same in both cancels out.
"""

import logging

import numpy as np
from _timing import medians
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy, LocalGrid

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Add one to the model."""
    arrays = message.content.array_records["arrays"]
    moved = {name: Array(array.numpy() + 1) for name, array in arrays.items()}
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
    return Message(content, reply_to=message)


def measure(parameters: int, clients: int) -> tuple[float, float]:
    """Return the seconds of a round, ours and the bare loop's."""
    start = np.zeros(parameters, np.float32)
    record = ArrayRecord({"w": Array(start)})
    strategy = AdditiveStrategy(
        fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
    )
    grid = LocalGrid(app, clients)

    def ours() -> None:
        strategy.start(grid, record, num_rounds=1)

    def bare() -> None:
        total = np.zeros_like(start)
        for _ in range(clients):
            total += start + 1
        total /= clients

    grid_seconds, bare_seconds = medians(ours, bare)
    return grid_seconds, bare_seconds


def main() -> None:
    """Print the cost per client and per megabyte."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    few, bare_few = measure(10, 10)
    many, bare_many = measure(10, 110)
    each = (many - few) / 100
    bare_each = (bare_many - bare_few) / 100
    print(f"Fixed cost of a run of one round: {few - 10 * each:.2g} s")
    print(f"Per client: {each * 1e6:.0f} us, bare loop {bare_each * 1e6:.1f} us")
    large, bare_large = measure(2_500_000, 10)
    small, bare_small = measure(250_000, 10)
    megabytes = 10 * 9.0  # ten clients, 9 MB between the two sizes
    per_mb = (large - small) / megabytes
    bare_mb = (bare_large - bare_small) / megabytes
    print(
        f"Per client and MB: {per_mb * 1e3:.2f} ms, bare loop {bare_mb * 1e3:.2f} ms, "
        f"ratio {per_mb / bare_mb:.1f}"
    )


if __name__ == "__main__":
    main()
