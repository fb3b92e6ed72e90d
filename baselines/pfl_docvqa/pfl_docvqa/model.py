"""A small causal model, trained on public documents, and what of it is trained then."""

import json
import tempfile
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from flwr.app import UserConfig
from peft import LoraConfig
from torch import nn

from flower_ext.client.adapters import AdapterModel, question_answering_loss
from flower_ext.client.task import batches
from flower_ext.data.cache import cache_root
from pfl_docvqa.dataset import TOKENS, VOCABULARY, tensors

KIND = "question-answering"
FULL = "full"  # the method that trains all weights
_SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_RATE, _BATCH, _SEED = 3e-3, 32, 0


def make_model(name: str, run_config: UserConfig) -> AdapterModel:
    """Return what a method trains.

    Parameters
    ----------
    name : str
        See :func:`pfl_docvqa.strategy.make_strategy`.
    run_config : UserConfig
        With ``base-steps``, ``rank`` and ``seed``.
    """
    folder = base_model(int(run_config["base-steps"]))
    seed = int(run_config["seed"])
    if name == FULL:
        return AdapterModel(folder, "all", KIND, seed=seed)
    rank = int(run_config["rank"])
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="QUESTION_ANS",
    )
    return AdapterModel(folder, lora, KIND, seed=seed)


@lru_cache(maxsize=1)
def base_model(steps: int) -> Path:
    """Return the folder of the model that all methods start from.

    It is a Llama of two layers with a head that marks the answer, trained on the
    public documents with Adam; made once, and kept in the cache of data sets.

    Parameters
    ----------
    steps : int
        Steps on batches of 32 questions.
    """
    made = json.dumps([_SIZE, TOKENS, VOCABULARY, _RATE, _BATCH, _SEED, steps])
    name = f"pfl-docvqa-{sha256(made.encode()).hexdigest()[:12]}"
    folder = cache_root() / "models" / name
    if not (folder / "config.json").is_file():
        model = _train(_new(), steps)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as tmp:
            new = Path(tmp) / "new"
            model.save_pretrained(str(new))  # type: ignore[operator]
            if not folder.exists():  # another process may have been faster
                new.replace(folder)
    return folder


def _new() -> nn.Module:
    from transformers import LlamaConfig, LlamaForQuestionAnswering

    config = LlamaConfig(
        **_SIZE,
        intermediate_size=2 * _SIZE["hidden_size"],
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model: nn.Module = LlamaForQuestionAnswering(config)
    return model


def _train(model: nn.Module, steps: int) -> nn.Module:
    """Train all weights on the public documents, epoch after epoch."""
    data = tensors("public")
    optimizer = torch.optim.Adam(model.parameters(), _RATE)
    generator = torch.Generator().manual_seed(_SEED)
    done = 0
    model.train()
    while done < steps:
        for batch in batches(data, _BATCH, generator):
            if done == steps:
                break
            optimizer.zero_grad()
            question_answering_loss(model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
    return model
