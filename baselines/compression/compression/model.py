"""A small GRU of characters, and MiniLM with LoRA for mails."""

from functools import cache

from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext.client.adapters import AdapterModel
from flower_ext.data import model_folder
from flower_ext.data.char_gru import CharGRU, next_characters

TOPICS = 6


def make_gru(run_config: UserConfig) -> nn.Module:
    """Make the model of Shakespeare."""
    return CharGRU(int(run_config["hidden-size"]))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each window's mean cross-entropy, in nats."""
    logits, targets = next_characters(model, batch)
    return nn.functional.cross_entropy(logits, targets, reduction="none").mean(1)


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each window's share of right predictions."""
    logits, targets = next_characters(model, batch)
    return {"accuracy": (logits.argmax(1) == targets).float().mean(1)}


def make_lora(run_config: UserConfig) -> nn.Module:
    """Make the model of mails, of which the adapters and the head are trained."""
    return _lora(int(run_config["rank"]), int(run_config["seed"]))(run_config)


@cache
def _lora(rank: int, seed: int) -> AdapterModel:
    from peft import LoraConfig  # for mails only

    lora = LoraConfig(
        r=rank,
        lora_alpha=rank / 2,  # the head needs larger steps than the adapters
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    return AdapterModel(model_folder("minilm"), lora, num_labels=TOPICS, seed=seed)
