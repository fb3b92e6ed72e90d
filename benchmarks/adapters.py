"""Pretrained models: start of 10 clients on 2 workers, and a round of a language model.

For the start it shows how long each client waits for its model, and how much memory the
model adds to the worker, compared with loading it anew with transformers and peft. Then
SmolLM2 (135 M parameters) is trained for one round on four roles of Shakespeare, once
by dense LoRA, once by FLASC. The first time the model is fetched and converted, for
which the package gguf must be installed.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache

import psutil
import torch
from flwr.app import ArrayRecord, Context, MetricRecord, UserConfig
from torch import Tensor, nn

from flower_ext import Tracker, client_app
from flower_ext.client.adapters import AdapterModel, adapter_task, load_tokenizer
from flower_ext.client.task import evaluate
from flower_ext.data import load, model_folder
from flower_ext.server.optimizers import Adam
from flower_ext.server.tracking import read_metrics
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FLASC, FLASCClient

CLIENTS = 5
ROLES = 4
WINDOW, WINDOWS = 64, 10  # tokens, of which each role has so many texts
LOCAL = {"learning-rate": 1.0, "local-steps": 2, "batch-size": 4}


def lora() -> object:
    from peft import LoraConfig

    return LoraConfig(
        r=8,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
        inference_mode=False,
    )


def anew(_: UserConfig) -> nn.Module:
    """Load base and adapter as a script without us does."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(
        model_folder("minilm"), num_labels=6
    )
    return get_peft_model(base, lora())


def worker(name: str) -> list[tuple[float, float]]:
    """Return seconds and MB of each client; all models are kept, as the worst case."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    make: Callable[[UserConfig], nn.Module] = anew
    if name == "shared":
        make = AdapterModel(model_folder("minilm"), lora(), num_labels=6)  # type: ignore[arg-type]
    process = psutil.Process()
    kept, found = [], []
    for _ in range(CLIENTS):
        before, begun = process.memory_info().rss, time.perf_counter()
        model = make({})
        # Weights are memory-mapped: only what has been read counts as memory in use.
        sum(float(p.detach().sum()) for p in model.parameters())
        kept.append(model)
        seconds = time.perf_counter() - begun
        found.append((seconds, (process.memory_info().rss - before) / 1e6))
    return found


@lru_cache(maxsize=1)
def windows() -> list[Tensor]:
    """Return the first tokens of four long roles, ``(WINDOWS, WINDOW)`` each."""
    data = load("shakespeare")["train"]
    said: dict[str, list[str]] = {}
    for role, text in zip(data["client"], data["text"], strict=True):
        said.setdefault(role, []).append(text)
    longest = sorted(said, key=lambda role: -sum(map(len, said[role])))[:ROLES]
    tokenizer = load_tokenizer(model_folder("smollm2"))
    size = WINDOW * WINDOWS
    return [
        torch.tensor(tokenizer("\n\n".join(said[role]))["input_ids"][:size]).view(
            WINDOWS, WINDOW
        )
        for role in longest
    ]


def role(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return eight windows of a role for training, and the last two for testing."""
    ids = windows()[int(context.node_config["partition-id"])]
    return {"input_ids": ids[:-2]}, {"input_ids": ids[-2:]}


def language_model() -> None:
    """Run a round by dense LoRA and by FLASC; print bytes, seconds and losses."""
    from peft import LoraConfig

    torch.set_num_threads(1)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    begun = time.perf_counter()
    model = AdapterModel(model_folder("smollm2"), config, "causal-lm")
    task = adapter_task(model, role)
    initial = ArrayRecord(model({}).state_dict())
    test = {"input_ids": torch.cat([ids[-2:] for ids in windows()])}
    seconds = time.perf_counter() - begun
    size = sum(x.numpy().size for x in initial.values())
    print(f"\nSmolLM2: loaded in {seconds:.1f} s, {size:,} parameters are trained")

    def central(_: int, arrays: ArrayRecord) -> MetricRecord:
        # Unmasked: the first round's mask leaves out LoRA's B, which was all zeros.
        trained = model({})
        trained.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(dict(evaluate(task, trained, test)))

    densities = {"dense LoRA": (1.0, 1.0), "FLASC": (1 / 4, 1 / 16)}
    for name, (down, up) in densities.items():
        strategy = FLASC(
            download_density=down,
            upload_density=up,
            precision="exact" if down == 1 else "bfloat16",
            server_optimizer=Adam(5e-3, bias_correction=True, initial_accumulator=0.0),
            fraction_evaluate=0.0,
        )

        with tempfile.TemporaryDirectory() as folder:
            grid = LocalGrid(client_app(task, FLASCClient), ROLES, dict(LOCAL))
            result = strategy.start(
                grid,
                initial,
                num_rounds=1,
                evaluate_fn=central,
                tracker=Tracker(folder, tensorboard=False),
            )
            row = read_metrics(folder)[-1]
        losses = [m["loss"] for m in result.evaluate_metrics_serverapp.values()]
        print(
            f"{name:10} {row['bytes/down']:>10,} bytes down, {row['bytes/up']:>9,} up, "
            f"{row['seconds/train']} s, test loss {losses[0]:.3f} to {losses[-1]:.3f}"
        )


def main() -> None:
    """Start clients both ways, on two workers each; then train."""
    for name in ("shared", "anew"):
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for i, found in enumerate(pool.map(worker, [name, name], chunksize=1)):
                cells = ", ".join(f"{s:.2f} s {mb:.0f} MB" for s, mb in found)
                print(f"{name:6} worker {i}: {cells}")
    language_model()


if __name__ == "__main__":
    main()
