"""Strategies of LoRA for models without: clients adapt their linear layers."""

import dataclasses

import numpy as np
import peft
from torch import nn

from flower_ext import strategies
from flower_ext.core.lora import RANK_KEY

RANK, ALPHA = 2, 3


class _Sending:
    """A model that sends all but the frozen layers."""

    def state_dict(self, *args, **options):
        found = super().state_dict(*args, **options)
        return {name: x for name, x in found.items() if ".base_layer." not in name}

    def load_state_dict(self, arrays, **options):
        unknown = arrays.keys() ^ self.state_dict().keys()
        assert not unknown, unknown
        return super().load_state_dict(arrays, strict=False)


def with_adapter(model, rank):
    """Return a model with LoRA on its linear layers; all else is trained as before."""
    layers = [name for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=layers)
    model = peft.inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        p.requires_grad = ".base_layer." not in name
    kind = type(model)
    model.__class__ = type(kind.__name__, (_Sending, kind), {})
    return model


def start(model, strategy):
    """Return what a strategy starts from, of the arrays of a model without adapters."""
    found, rng = {}, np.random.default_rng(0)
    layers = [n[: -len(".weight")] for n, x in model.items() if x.ndim == 2]
    for name, x in model.items():
        layer, _, kind = name.rpartition(".")
        if layer not in layers:
            found[name] = x
        elif kind == "weight":
            out, width = x.shape
            a = rng.uniform(-0.5, 0.5, (RANK, width))
            found[f"{layer}.lora_A.default.weight"] = a.astype(x.dtype)
            b = np.zeros((out, RANK), x.dtype)
            found[f"{layer}.lora_B.default.weight"] = b
    return found


class _Adapted:
    def make_model(self, task, run_config, config):
        def adapted(run_config):
            return with_adapter(task.model(run_config), run_config[RANK_KEY])

        own = dataclasses.replace(task, model=adapted)
        return super().make_model(own, run_config, config)


class StackedLoRAClient(_Adapted, strategies.StackedLoRAClient):
    pass


class FlexLoRAClient(_Adapted, strategies.FlexLoRAClient):
    pass


class FedExLoRAClient(_Adapted, strategies.FedExLoRAClient):
    pass


class StackedLoRA(strategies.StackedLoRA):
    client_half = StackedLoRAClient


class FlexLoRA(strategies.FlexLoRA):
    client_half = FlexLoRAClient


class FedExLoRA(strategies.FedExLoRA):
    client_half = FedExLoRAClient
