"""Accuracy under poisoning: rankings that are reversed, changes that are turned round.

Ten clients share 1,437 of scikit-learn's digits, unevenly by label, and learn a network
of two hidden layers without biases. Attackers know what all attackers have trained.
Under FRL each sends the reverse of the ranking that theirs add up to; under FedAvg each
sends their mean change, turned round and as many times as large as it says. Printed is
the accuracy on the other 360 digits after the last round, mean and standard deviation
over seeds.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from sklearn.datasets import load_digits
from torch import nn

from flower_ext import AdditiveStrategy, LocalGrid, Task, client_app
from flower_ext.core.arrays import Arrays, from_record, to_record
from flower_ext.strategies import FederatedRankLearning, FederatedRankLearningClient
from flower_ext.strategies.federated_rank_learning import RANKING, places_of
from flower_ext.wire import Permutation

CLIENTS, TRAINED_ON = 10, 1437
ROUNDS, SEEDS, WIDTH = 20, 3, 64
CONFIG = {"batch-size": 8, "local-epochs": 2, "momentum": 0.9}
RATES = {FederatedRankLearning: 0.4, AdditiveStrategy: 0.1}

Columns = dict[str, torch.Tensor]
# (contents of the attackers' replies, model) -> what each of them sends instead.
Attack = Callable[[Sequence[RecordDict], Arrays], RecordDict]


def reverse(contents: Sequence[RecordDict], model: Arrays) -> RecordDict:
    """Return the reverse of the ranking that the attackers' own add up to."""
    like = {name: np.zeros(x.shape, np.int32) for name, x in model.items()}
    votes = [Permutation().decode(content[RANKING], like) for content in contents]
    places = {
        name: places_of(-sum(vote[name] for vote in votes)).astype(np.int32)
        for name in like
    }
    return RecordDict({**contents[0], RANKING: Permutation().encode(places)})


def turn_round(times: float) -> Attack:
    """Return the attack that sends minus so many times the attackers' mean change."""

    def attack(contents: Sequence[RecordDict], model: Arrays) -> RecordDict:
        trained = [from_record(content["arrays"]) for content in contents]
        sent = {
            name: x - np.float32(times) * np.mean([t[name] - x for t in trained], 0)
            for name, x in model.items()
        }
        return RecordDict({**contents[0], "arrays": to_record(sent)})

    return attack


class Attacked(LocalGrid):
    """A grid whose first clients are attackers."""

    attackers: int = 0
    attack: Attack

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the attackers agree on what they send."""
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        nodes = set(sorted(self.get_node_ids())[: self.attackers])
        own = [
            x for x in replies if x.metadata.src_node_id in nodes and x.has_content()
        ]
        if own and messages[0].metadata.message_type == "train":
            model = from_record(messages[0].content["arrays"])
            sent = self.attack([reply.content for reply in own], model)
            for reply in own:
                reply.content = sent
        return replies


@dataclass
class Digits:
    """The clients' data of a seed."""

    seed: int
    width: int = WIDTH
    test: Columns = field(init=False)

    def __post_init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        draws = np.random.default_rng(self.seed)
        order = draws.permutation(len(labels))
        x = torch.tensor(images[order] / 16, dtype=torch.float32)
        y = torch.tensor(labels[order])
        # Of each label the clients have other shares, one of each at the least.
        shares = draws.dirichlet(np.ones(CLIENTS), 10)
        owners = [draws.choice(CLIENTS, p=shares[label]) for label in y[:TRAINED_ON]]
        owners[:CLIENTS] = range(CLIENTS)
        mine = torch.tensor(owners)
        self._parts = [
            {"x": x[:TRAINED_ON][mine == i], "y": y[:TRAINED_ON][mine == i]}
            for i in range(CLIENTS)
        ]
        self.test = {"x": x[TRAINED_ON:], "y": y[TRAINED_ON:]}

    def data(self, context: Context) -> tuple[Columns, Columns]:
        """Return a client's own, and the test images."""
        return self._parts[int(context.node_config["partition-id"])], self.test

    def net(self, config: object = None) -> nn.Module:
        """Return the network that a run starts from."""
        torch.manual_seed(self.seed)
        width = self.width
        return nn.Sequential(
            nn.Linear(64, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, 10, bias=False),
        )


def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
    """Return the cross entropy of each image."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(
    kind: type[AdditiveStrategy],
    attack: Attack | None,
    attackers: int,
    *,
    digits: Digits,
    rounds: int = ROUNDS,
) -> float:
    """Return the accuracy of a run's last model."""
    strategy = kind(fraction_evaluate=0.0)
    found = [0.0]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = digits.net()
        if isinstance(strategy, FederatedRankLearning):
            strategy.model(model)
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            hits = model(digits.test["x"]).argmax(1) == digits.test["y"]
        found.append(float(hits.double().mean()))
        return MetricRecord({"accuracy": found[-1]})

    task = Task(digits.net, digits.data, loss)
    app = client_app(task, FederatedRankLearningClient)
    config = {**CONFIG, "lr": RATES[kind], "seed": digits.seed}
    grid = Attacked(app, CLIENTS, config)
    if attack is not None:
        grid.attackers, grid.attack = attackers, attack
    initial = ArrayRecord(digits.net().state_dict())
    strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=evaluate)
    return found[-1]


RUNS: list[tuple[str, type[AdditiveStrategy], Attack | None, int]] = [
    ("FedAvg", AdditiveStrategy, None, 0),
    ("FedAvg, 2 of 10 turn round", AdditiveStrategy, turn_round(1), 2),
    ("FedAvg, 2 of 10 turn round, 10 times", AdditiveStrategy, turn_round(10), 2),
    ("FRL", FederatedRankLearning, None, 0),
    ("FRL, 2 of 10 reverse", FederatedRankLearning, reverse, 2),
    ("FRL, 4 of 10 reverse", FederatedRankLearning, reverse, 4),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name, kind, attack, attackers in RUNS:
        found = [
            accuracy(
                kind, attack, attackers, digits=Digits(seed), rounds=options.rounds
            )
            for seed in range(options.seeds)
        ]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        mean = statistics.mean(found)
        print(f"{name}: {100 * mean:.1f} ± {100 * spread:.1f} %", flush=True)


if __name__ == "__main__":
    main()
