"""The last layers of MiniLM with a head for the six topics, and LoRA on them.

What is below is frozen for all methods. Its output is computed once, as data, and the
layers that are adapted are a model of their own: the same function, at a third of the
time.
"""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from flwr.app import UserConfig
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModel

from flower_ext.client.adapters import AdapterModel
from flower_ext.data import model_folder

TOPICS = 6


def make_model(name: str, run_config: UserConfig) -> AdapterModel:
    """Return what a method trains; made once per process.

    Parameters
    ----------
    name : str
        See :func:`federated_lora.strategy.make_strategy`.
    run_config : UserConfig
        With ``layers``, ``rank``, ``lora-alpha`` and ``seed``.
    """
    keys = ("layers", "rank", "lora-alpha", "seed")
    return _make(name == "ffa", *(int(run_config[key]) for key in keys))


@cache
def _make(ffa: bool, layers: int, rank: int, alpha: int, seed: int) -> AdapterModel:
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    frozen = ("lora_A",) if ffa else ()
    folder = last_layers(layers)
    return AdapterModel(folder, lora, num_labels=TOPICS, frozen=frozen, seed=seed)


def last_layers(layers: int) -> Path:
    """Return the folder of a model that is the last of MiniLM's six layers."""
    whole = model_folder("minilm")
    folder = whole.with_name(f"minilm-last-{layers}")
    if not folder.exists():
        model = AutoModel.from_pretrained(whole, local_files_only=True)
        own, below = model.encoder.layer[-layers:], model.encoder.layer[-layers - 1]
        # An embedding adds positions and types and normalises. These add nothing, and
        # this is the norm with which the layer below ends: see `below`.
        model.embeddings.position_embeddings.weight.data.zero_()
        model.embeddings.token_type_embeddings.weight.data.zero_()
        model.embeddings.LayerNorm.load_state_dict(below.output.LayerNorm.state_dict())
        model.encoder.layer = own
        model.config.num_hidden_layers = layers
        model.resize_token_embeddings(1)  # tokens are not looked up
        partial = Path(tempfile.mkdtemp(dir=whole.parent))
        model.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return folder


@torch.no_grad()
def below(mails: dict[str, Tensor], layers: int) -> Tensor:
    """Return what the last layers read, normalised, of shape (mails, tokens, width)."""
    model = AutoModel.from_pretrained(model_folder("minilm"), local_files_only=True)
    model.encoder.layer = model.encoder.layer[:-layers]
    norm = model.eval().encoder.layer[-1].output.LayerNorm
    inputs = {name: mails[name] for name in ("input_ids", "attention_mask")}
    pieces = zip(*(x.split(64) for x in inputs.values()), strict=True)
    found = [model(*piece).last_hidden_state for piece in pieces]
    return (torch.cat(found) - norm.bias) / norm.weight
