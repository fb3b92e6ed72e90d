"""Start of clients with a pretrained model: 10 clients on 2 workers.

Shown are the time until each client has its model, and what it adds to the memory of
its worker, beside loading the model anew with transformers and peft.
"""

import multiprocessing
import time
from collections.abc import Callable

import psutil
import torch
from flwr.app import UserConfig
from torch import nn

from flower_ext.adapters import AdapterModel
from flower_ext.data import model_folder

CLIENTS = 5


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
        sum(
            float(p.detach().sum()) for p in model.parameters()
        )  # touch all of the memory
        kept.append(model)
        seconds = time.perf_counter() - begun
        found.append((seconds, (process.memory_info().rss - before) / 1e6))
    return found


def main() -> None:
    """Run both ways, one after the other, on two workers each."""
    for name in ("shared", "anew"):
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for i, found in enumerate(pool.map(worker, [name, name], chunksize=1)):
                cells = ", ".join(f"{s:.2f} s {mb:.0f} MB" for s, mb in found)
                print(f"{name:6} worker {i}: {cells}")


if __name__ == "__main__":
    main()
