"""The clients of the GPU benchmark: random data, a ClientApp that says where it ran.

Workers import this module.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from _models import make_model
from flwr.app import ConfigRecord, Context, Message, UserConfig
from torch import Tensor, nn

from flower_ext import Stacked, Task, client_app
from flower_ext.client.adapters import AdapterModel, causal_lm_loss
from flower_ext.client.task import Batch
from flower_ext.strategies import FedFishClient, FLASCClient, MaxFLClient

BATCH = 32
LEARNING_RATE = 0.05
WORDS, TIME = 1_000, 64  # of a text
LORA = "lora"
AT_ONCE = 100

_devices: set[str] = set()  # of the batches of this process


@cache
def columns(name: str, client: int, examples: int) -> dict[str, Tensor]:
    """Return a client's images and labels, or texts, made once in a process."""
    draw = torch.Generator().manual_seed(client)
    if name == LORA:
        return {"input_ids": torch.randint(WORDS, (examples, TIME), generator=draw)}
    return {
        "x": torch.randn(examples, 1, 28, 28, generator=draw),
        "y": torch.randint(0, 10, (examples,), generator=draw),
    }


def save_base(folder: Path) -> None:
    """Save a random language model of four layers, 4 million parameters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TIME,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


def initial_model(name: str, base: str) -> nn.Module:
    """Return the model that every client starts from."""
    if name == LORA:
        from peft import LoraConfig

        targets = ["q_proj", "v_proj"]
        adapter = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
        return AdapterModel(base, adapter, "causal-lm")({})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model(name)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each example."""
    if "input_ids" in batch:
        return causal_lm_loss(model, batch)
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def _model(config: UserConfig) -> nn.Module:
    return initial_model(str(config["model"]), str(config["base"]))


def _data(context: Context) -> tuple[Batch, Batch]:
    client, config = int(context.node_config["partition-id"]), context.run_config
    data = columns(str(config["model"]), client, int(config["examples"]))
    return data, data


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    # Where the computation takes place, not where the client was told to compute.
    devices = {x.device for x in (*batch.values(), *model.parameters())}
    _devices.update(map(str, devices))
    return losses(model, batch)


def witness(
    message: Message, context: Context, call_next: Callable[..., Message]
) -> Message:
    """Add to the reply where the client ran and what GPU memory it took."""
    _devices.clear()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reply = call_next(message, context)
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    reply.content["seen"] = ConfigRecord(
        {
            "devices": " ".join(sorted(_devices)),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "pid": os.getpid(),
            "mib": peak / 2**20,
        }
    )
    return reply


task = Task(_model, _data, _loss)
_HALVES = (FedFishClient, FLASCClient, MaxFLClient)
app = client_app(task, *_HALVES, mods=[witness])
stacked = client_app(task, *_HALVES, trainer=Stacked(AT_ONCE))
