"""The methods that are compared: what is trained, under the same epsilon and steps."""

from flwr.app import UserConfig

from flower_ext.client.dp_sgd import worst_silo
from flower_ext.strategies import PublicRepresentations

#: What is trained and travels.
TRAINED = {
    "scratch": "*",
    "lora": ("*.lora_A.*", "*.lora_B.*", "head.*"),
    "lora-ffa": ("*.lora_B.*", "head.*"),
    "probe": "head.*",
}
#: The best of 1, 3 and 10, or of 3, 10 and 30 where 10 is the best of these, on seed 4.
LEARNING_RATES = {
    "scratch": 10.0,
    "lora": 3.0,
    "lora-ffa": 3.0,
    "probe": 10.0,
}


def make_strategy(name: str, run_config: UserConfig) -> PublicRepresentations:
    """Make the strategy of a method.

    Parameters
    ----------
    name : str
        ``scratch``: a small model of words. ``lora``, ``lora-ffa``: LoRA on MiniLM's
        last layer, with both factors or with frozen A, and a head.
        ``probe``: the head alone; ``probe@64``: on 64 public directions.
    run_config : UserConfig
        See ``pyproject.toml``.
    """
    kind = name.partition("@")[0]
    if kind not in TRAINED:
        raise ValueError(f"strategies={name!r} must name some of {[*TRAINED]}")
    return PublicRepresentations(
        head=TRAINED[kind], fraction_evaluate=0.0, train_metrics_aggr_fn=worst_silo
    )


def learning_rate(name: str, run_config: UserConfig) -> float:
    """Return the learning rate of a method; that of the run config, if there is one."""
    own = float(run_config["learning-rate"])
    return own or LEARNING_RATES[name.partition("@")[0]]
