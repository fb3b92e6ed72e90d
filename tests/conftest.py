"""Scripted clients, and a small task with clients that really train."""

import os
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext.client.app import client_app
from flower_ext.client.task import Task
from flower_ext.core.arrays import to_record
from flower_ext.simulation.local import LocalGrid


def pytest_collection_modifyitems(items):
    """Put slow tests first, which mostly wait: of two workers, one computes meanwhile.

    One worker has them all, and with them the only Ray; no long one is left to the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def reply():
    """Make the content of a reply: arrays, a weight and metrics."""

    def make(arrays=None, weight=1.0, **metrics):
        content = RecordDict()
        if arrays is not None:
            content["arrays"] = to_record(arrays)
        content["metrics"] = MetricRecord({"num-examples": weight, **metrics})
        return content

    return make


@pytest.fixture(scope="session")
def scripted():
    """Make a grid whose client i answers every message with ``contents[i]``.

    An exception in its place is raised in the client.
    """

    def make(contents, kind=LocalGrid):
        def answer(message, context):
            content = contents[context.node_config["partition-id"]]
            if isinstance(content, Exception):
                raise content
            return Message(content, reply_to=message)

        app = ClientApp()
        app.train()(answer)
        app.evaluate()(answer)
        return kind(app, len(contents))

    return make


@pytest.fixture(scope="session")
def exchange(scripted):
    """Let a strategy ask scripted clients; return their replies, not yet aggregated."""

    def run(strategy, sent, contents, server_round=1, phase="train"):
        grid = scripted(contents)
        configure = getattr(strategy, f"configure_{phase}")
        messages = configure(server_round, to_record(sent), ConfigRecord(), grid)
        return list(grid.send_and_receive(messages))

    return run


@pytest.fixture(scope="session")
def aggregate(exchange):
    """Run one training round; return the new arrays, or None, and the metrics."""

    def run(strategy, sent, contents, server_round=1):
        replies = exchange(strategy, sent, contents, server_round)
        record, metrics = strategy.aggregate_train(server_round, replies)
        if record is None:
            return None, metrics
        return {name: array.numpy() for name, array in record.items()}, metrics

    return run


class _Net(nn.Module):
    """Parameters, a 0-d one, BatchNorm's statistics and counter, and dropout."""

    def __init__(self, width=1.0):
        super().__init__()
        units = int(4 * width)
        self.hidden = nn.Linear(3, units)
        self.norm = nn.BatchNorm1d(units)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(units, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.scale * self.out(self.drop(torch.relu(self.norm(self.hidden(x)))))


def _data(context):
    client = context.node_config["partition-id"]
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(12 + 4 * client, 3, generator=generator)
    columns = {"x": x, "y": (x[:, 0] > x[:, 1]).long()}
    return columns, {name: column[:8] for name, column in columns.items()}


def _loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def _metrics(model, batch):
    return {"accuracy": (model(batch["x"]).argmax(-1) == batch["y"]).float()}


@pytest.fixture(scope="session")
def task():
    """Make the small task: a net with BatchNorm and dropout, 12 examples and more."""
    return Task(lambda config: _Net(config.get("width", 1.0)), _data, _loss, _metrics)


@pytest.fixture(scope="session")
def initial(task):
    """Return the initial model of the small task, as a record."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = task.model({}).state_dict()
    return to_record({name: tensor.numpy() for name, tensor in state.items()})


@pytest.fixture
def grid(task):
    """Return six clients of the small task."""
    return LocalGrid(client_app(task), 6, {"batch-size": 4, "lr": 0.1})


@pytest.fixture(scope="session")
def cluster():
    """Start, when it is first needed, the Ray of all tests of this process.

    A head of 4 CPUs and 4 made-up GPUs, of no more processes than it takes; a test may
    add a machine for a while, and a process of its own may join by ``address``.
    """
    import ray
    from ray.cluster_utils import Cluster

    found = []

    def start():
        if not found:
            head = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 4,
                    "num_gpus": 4,
                    "object_store_memory": 2**30,
                    "include_dashboard": False,
                    "include_log_monitor": False,
                    "no_monitor": True,
                    # A machine that has left refuses connections; that five in a row
                    # say so takes 15 s by default.
                    "_system_config": {"health_check_period_ms": 300},
                },
            )
            found.append(head)
            app = str(Path(__file__).parent / "simulation" / "app")
            paths = os.pathsep.join([app, *filter(None, sys.path)])
            ray.init(
                head.address,
                logging_level="ERROR",
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
            )
        return found[0]

    yield start
    if found:
        ray.shutdown()
        found[0].shutdown()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Save a random BERT encoder of two layers and its tokenizer; return the folder."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
