"""How a client takes its steps."""

import copy
import math

import torch
from torch import nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.seeds import same_generators, seed_all
from flower_ext.client.task import num_examples


def train(local: Local, half: ClientHalf) -> float:
    """Train in place and return the mean objective over the steps.

    Parameters
    ----------
    local : Local
        Model, data and settings.
    half : ClientHalf
        Its ``begin`` is called first.

    Returns
    -------
    float
        NaN without a step.

    Notes
    -----
    BatchNorm has nothing to normalise a single example with. Where it would raise, the
    last example of an epoch goes into the batch before it, and a client that has one
    example only trains with the statistics that it received.
    """
    local.needs_two = _needs_two(local)
    half.begin(local)
    optimizer = half.optimizer(local)
    local.model.train()
    if local.needs_two and num_examples(local.train) == 1:
        for layer in _batch_norms(local.model):
            layer.eval()
    total, steps = 0.0, 0
    # Dropout has no generator of its own: it draws from torch's global one.
    with same_generators():
        seed_all(local.seed(stream=1))
        for batch in half.batches(local):
            total += half.step(local, optimizer, batch)
            steps += 1
    return total / steps if steps else math.nan


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [
        x for x in model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)
    ]


@torch.no_grad()
def _needs_two(local: Local) -> bool:
    """Whether there is a batch of one, on which the model's BatchNorm raises."""
    examples, size = num_examples(local.train), local.settings.batch_size
    alone = examples == 1 or (size > 1 and examples % size == 1)
    if not alone or not _batch_norms(local.model):
        return False
    tried = copy.deepcopy(local.model).train()
    one = {name: column[:1] for name, column in local.train.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            local.task.loss(tried, one)
        except ValueError:  # torch: more than 1 value per channel
            return True
    return False
