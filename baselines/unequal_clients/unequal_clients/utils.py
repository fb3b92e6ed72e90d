"""What is shown of the comparison, and what a training step costs."""

import torch
from flwr.app import UserConfig
from torch.utils.flop_counter import FlopCounterMode

from unequal_clients.model import loss, make_model

COLUMNS = {
    "evaluate/accuracy-width-1": "whole model",
    "evaluate/accuracy-width-0.25": "quarter",
    "bytes/down": "down a round",
    "bytes/up": "up a round",
}
PANELS = ["evaluate/accuracy-width-1", "evaluate/accuracy-width-0.25"]


def training_flops(width: float, config: UserConfig) -> int:
    """Return the floating-point operations of one image in training, both passes."""
    model = make_model({**config, "width": width})
    batch = {"x": torch.zeros(1, 1, 28, 28), "y": torch.zeros(1, dtype=torch.int64)}
    with FlopCounterMode(display=False) as counter:
        loss(model, batch).sum().backward()
    return int(counter.get_total_flops())
