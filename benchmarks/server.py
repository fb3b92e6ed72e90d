"""Adding up 100 replies of 10 million float32 parameters.

Limits: at most 2 times the bare numpy loop over arrays that are already decoded, and at
most 3 model copies of memory beside the replies.
"""

import numpy as np
from _timing import Peak, medians, report
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy, LocalGrid
from flower_ext.core.arrays import view

PARAMETERS = 10_000_000
REPLIES = 100
DISTINCT = 10  # replies share the bytes of so many models, to fit in memory


def main() -> None:
    """Measure time and memory of ``aggregate_train``."""
    rng = np.random.default_rng(0)
    layers = (PARAMETERS // 10,) * 10
    model = ArrayRecord(
        {f"layer{i}": Array(rng.random(n, np.float32)) for i, n in enumerate(layers)}
    )
    distinct = [
        ArrayRecord(
            {
                f"layer{i}": Array(rng.random(n, np.float32))
                for i, n in enumerate(layers)
            }
        )
        for _ in range(DISTINCT)
    ]
    # A round as the strategy runs it, without clients: messages are answered by hand.
    strategy = AdditiveStrategy(min_train_nodes=REPLIES, min_available_nodes=REPLIES)
    grid = LocalGrid(ClientApp(), REPLIES)
    messages = list(strategy.configure_train(1, model, ConfigRecord(), grid))
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": distinct[i % DISTINCT],
                    "metrics": MetricRecord({"num-examples": 10 + i}),
                }
            ),
            reply_to=message,
        )
        for i, message in enumerate(messages)
    ]
    decoded = [{name: view(a) for name, a in record.items()} for record in distinct]

    def ours() -> None:
        strategy.aggregate_train(1, replies)

    def bare() -> None:
        total = {f"layer{i}": np.zeros(n, np.float32) for i, n in enumerate(layers)}
        weight = 0.0
        for i in range(REPLIES):
            for name, array in decoded[i % DISTINCT].items():
                total[name] += array * np.float32(10 + i)
            weight += 10 + i
        for array in total.values():
            array /= np.float32(weight)

    seconds = medians(ours, bare, repeats=3)
    report(f"Sum of {REPLIES} replies of {PARAMETERS:,} parameters", *seconds, limit=2)
    with Peak() as peak:
        ours()
    report(
        "Peak memory beside the replies",
        peak.bytes / 2**20,
        PARAMETERS * 4 / 2**20,
        3,
        "MiB",
    )


if __name__ == "__main__":
    main()
