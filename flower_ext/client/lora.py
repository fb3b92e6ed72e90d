"""The client's end of LoRA that is aggregated exactly: ranks, and a base that changes.

What clients' adapters add up to may have more ranks than an adapter. The rest is then a
change of the frozen weights, which comes with the model and is put into the client's
own copy of them: :class:`LoRAClient` is the part of a half that does it.
"""

from collections.abc import Mapping
from copy import deepcopy
from operator import attrgetter
from typing import ClassVar

import numpy as np
import torch
from flwr.app import ConfigRecord, UserConfig
from torch import Tensor, nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Task
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import refuse
from flower_ext.core.lora import (
    RANK_KEY,
    SCALING_KEY,
    change_of,
    layers_of,
    require_adapter,
    split_base,
)


class LoRAClient(ClientHalf):
    """Trains an adapter of the rank that the server tells, on the server's base.

    ``Task.model`` is given the rank as ``run_config["lora-rank"]``;
    :class:`~flower_ext.client.adapters.AdapterModel` knows it. Frozen weights that
    clients share are never written to: a change of the base is in the client's own
    model only, and goes with it.
    """

    post_processing: ClassVar[bool] = True

    def make_model(
        self, task: Task, run_config: UserConfig, config: ConfigRecord
    ) -> nn.Module:
        """Return a model of the rank that was told, of the client's own."""
        rank = config.get(RANK_KEY)
        if not isinstance(rank, int):
            refuse(f"config[{RANK_KEY!r}]", rank, "a rank")
        model = task.model({**run_config, RANK_KEY: rank})
        # Tasks may hand out one model again and again, which must keep its base.
        return deepcopy(model, _frozen(model))

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Change the base, and return what the model begins with."""
        own, base = split_base(arrays)
        _require_fit(local)
        change_base(local.model, base)
        return own


def _frozen(model: nn.Module) -> dict[int, object]:
    """Return a memo with which ``deepcopy`` keeps the tensors that are not trained."""
    return {id(p): p for p in model.parameters() if not p.requires_grad}


def _require_fit(local: Local) -> None:
    """Refuse a model whose adapter is not the one that the server counts on."""
    state = {n: np.empty(x.shape, np.float32) for n, x in local.end.items()}
    pairs, rank = require_adapter(state)
    told = int(local.number(RANK_KEY, rank))
    if rank != told:
        cause = f"Task.model must make it of run_config[{RANK_KEY!r}]"
        refuse("rank of the adapter", rank, f"{told}, as the server tells", cause)
    expected = local.number(SCALING_KEY, 1.0)
    for pair in pairs:
        layer = attrgetter(pair.layer)(local.model)
        adapter = pair.a.split(".lora_A.")[1].partition(".")[0]
        found = getattr(layer, "scaling", {}).get(adapter, expected)
        if abs(found - expected) > 1e-6 * abs(expected):
            bound = f"{expected:g}, as the server counts on"
            cause = "lora_alpha and use_rslora of the strategy and of LoraConfig differ"
            refuse(f"scaling of {pair.layer}", found, bound, cause)
        if variant := getattr(layer, "lora_variant", {}).get(adapter):
            cause = "what it adds is no scaled product"
            refuse("LoraConfig", type(variant).__name__, "of plain LoRA", cause)


@torch.no_grad()
def change_base(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Put changes of the frozen weights into a model.

    The weights are replaced and not written to: other models that share them keep them.

    Parameters
    ----------
    model : torch.nn.Module
        With peft's LoRA layers.
    base : dict[str, Tensor]
        As :func:`~flower_ext.core.lora.add_to_base` makes them.

    Raises
    ------
    ValueError
        If the model has no such layers, or theirs are of other shapes.
    """
    for layer in layers_of(base):
        try:
            wrapper = attrgetter(layer)(model)
            owner = wrapper.base_layer
            old = owner.weight
        except AttributeError:
            bound = "a layer of peft's LoRA in this model"
            refuse("change of the base", layer, bound)
        factors = [x.to(old.device, torch.float64) for x in change_of(base, layer)]
        change = factors[0] @ factors[1] if len(factors) == 2 else factors[0]
        if getattr(wrapper, "fan_in_fan_out", False):
            change = change.T
        if change.shape != old.shape:
            bound = f"{tuple(old.shape)}, as the weight"
            refuse(f"change of {layer}", tuple(change.shape), bound)
        new = (old.to(torch.float64) + change).to(old.dtype)
        owner.weight = nn.Parameter(new, requires_grad=False)


def load_whole(model: nn.Module, arrays: Tensors) -> None:
    """Load adapter, head and changes of the base into a new model.

    For evaluations at the server, with what a strategy's ``whole`` returns::

        trained = model({})
        load_whole(trained, strategy.whole(arrays).to_torch_state_dict())

    Parameters
    ----------
    model : torch.nn.Module
        A new one, as :class:`~flower_ext.client.adapters.AdapterModel` makes it.
    arrays : dict[str, Tensor]
        Of the model, and of changes of its base.
    """
    own, base = split_base(arrays)
    change_base(model, base)
    model.load_state_dict(own)
