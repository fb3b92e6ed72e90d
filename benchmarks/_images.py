"""The clients of the simulation benchmark: small images, one epoch, two models.

A ClientApp as a user would write it: model and data stay in the process, and nothing
else is done for speed. Workers import this module.
"""

import torch
from _models import make_model
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flower_ext.simulation import packed

EXAMPLES = 50
BATCH = 10
LEARNING_RATE = 0.1

app = ClientApp(mods=[packed])
_models: dict[str, nn.Module] = {}
_data: dict[int, tuple[Tensor, Tensor]] = {}


def resident_model(name: str) -> nn.Module:
    """Return the model of this process."""
    if name not in _models:
        _models[name] = make_model(name)
    return _models[name]


def images(client: int) -> tuple[Tensor, Tensor]:
    """Return a client's images and labels, made once in a process."""
    if client not in _data:
        generator = torch.Generator().manual_seed(client)
        _data[client] = (
            torch.randn(EXAMPLES, 1, 28, 28, generator=generator),
            torch.randint(0, 10, (EXAMPLES,), generator=generator),
        )
    return _data[client]


def fit(model: nn.Module, client: int) -> None:
    """Train for one epoch."""
    x, y = images(client)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for start in range(0, EXAMPLES, BATCH):
        optimizer.zero_grad()
        batch = slice(start, start + BATCH)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train, or send the model back as it came."""
    torch.set_num_threads(1)
    arrays = message.content.array_records["arrays"]
    name = str(message.content.config_records["config"]["model"])
    if name in ("mlp", "cnn"):
        model = resident_model(name)
        model.load_state_dict(arrays.to_torch_state_dict())
        fit(model, int(context.node_config["partition-id"]))
        arrays = ArrayRecord(model.state_dict())
    else:  # the transport alone is timed: arrays are decoded and encoded once
        arrays = ArrayRecord(arrays.to_torch_state_dict())
    content = RecordDict(
        {"arrays": arrays, "metrics": MetricRecord({"num-examples": EXAMPLES})}
    )
    return Message(content, reply_to=message)
