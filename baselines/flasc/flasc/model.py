"""MiniLM with a head for the six topics, and what of it is trained."""

from functools import cache

from flwr.app import UserConfig
from peft import LoraConfig

from flower_ext.client.adapters import AdapterModel
from flower_ext.data import model_folder

TOPICS = 6


def make_model(name: str, run_config: UserConfig) -> AdapterModel:
    """Return what a method trains; made once per process.

    Parameters
    ----------
    name : str
        See :func:`flasc.strategy.make_strategy`.
    run_config : UserConfig
        With ``rank`` and ``seed``.
    """
    return _make(
        name.removesuffix("+"), int(run_config["rank"]), int(run_config["seed"])
    )


@cache
def _make(name: str, rank: int, seed: int) -> AdapterModel:
    options = {"num_labels": TOPICS, "seed": seed}
    if name in ("full", "probe"):
        trains = "all" if name == "full" else "head"
        return AdapterModel(model_folder("minilm"), trains, **options)
    rank = 1 if name == "low-rank" else rank
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank / 2,  # the head needs larger steps than the adapters
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    frozen = ("lora_A",) if name == "ffa" else ()
    return AdapterModel(model_folder("minilm"), lora, frozen=frozen, **options)
