"""A small decoder of characters, with the layers of Llama."""

from flwr.app import UserConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flower_ext.data.tensors import CHARACTERS


def make_model(run_config: UserConfig) -> nn.Module:
    """Make the model with random weights."""
    width = int(run_config["hidden-size"])
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CHARACTERS,
            hidden_size=width,
            intermediate_size=int(2.75 * width),
            num_hidden_layers=int(run_config["layers"]),
            num_attention_heads=4,
            max_position_embeddings=int(run_config["window"]),
            use_cache=False,
        )
    )


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each window's mean cross-entropy, in nats a character."""
    text = batch["text"].long()
    logits = model(input_ids=text[:, :-1]).logits.transpose(1, 2)
    return nn.functional.cross_entropy(logits, text[:, 1:], reduction="none").mean(1)
