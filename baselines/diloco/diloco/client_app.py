"""The worker: the task, with the inner optimizer that the server names."""

from collections.abc import Mapping

import torch
from torch import nn

from diloco.dataset import worker_data
from diloco.model import loss, make_model
from flower_ext import Task, client_app
from flower_ext.client import MuonAdamW
from flower_ext.client.half import Local
from flower_ext.client.task import LocalOptimizer
from flower_ext.strategies import DiLoCoClient

INNER_KEY = "inner-optimizer"
BETAS = (0.9, 0.95)


class Inner(LocalOptimizer):
    """Makes AdamW, Muon with AdamW, or plain SGD, by the round's configuration."""

    def make(
        self, parameters: Mapping[str, nn.Parameter], local: Local
    ) -> torch.optim.Optimizer:
        """Return the optimizer of one local training."""
        kind, settings = local.config[INNER_KEY], local.settings
        rate, decay = settings.learning_rate, settings.weight_decay
        if kind == "muon":
            return MuonAdamW(betas=BETAS).make(parameters, local)
        if kind == "adamw":
            return torch.optim.AdamW(
                parameters.values(), lr=rate, betas=BETAS, weight_decay=decay
            )
        return torch.optim.SGD(parameters.values(), lr=rate)


task = Task(make_model, worker_data, loss, optimizer=Inner())
app = client_app(task, DiLoCoClient)
