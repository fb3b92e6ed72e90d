"""The methods that are compared, as settings of FLASC."""

from flwr.app import UserConfig

from flower_ext.core.sampling import UniformSampler
from flower_ext.core.schedules import Decay
from flower_ext.server.optimizers import Adam
from flower_ext.strategies.flasc import FLASC, Tier

DENSE = {"download_density": 1.0, "upload_density": 1.0}
NAMES = (
    "lora",
    "lora-bfloat16",
    "lora-nf4",
    "flasc",
    "low-rank",
    "ffa",
    "sparse-adapter",
    "adapter-lth",
    "fed-select",
    "het-lora",
    "full",
    "probe",
)


def make_strategy(name: str, run_config: UserConfig) -> FLASC:
    """Make a strategy, with the same cohorts, seeds and server optimizer as others.

    Parameters
    ----------
    name : str
        One of :data:`NAMES`; ``+`` at the end is error feedback.
    run_config : UserConfig
        See ``pyproject.toml``.
    """
    # Every method is a setting of FLASC: what is downloaded and uploaded, whether
    # clients freeze the weights that they did not download, and whether the mask may
    # change.
    down = float(run_config["download-density"])
    settings = {
        "lora": DENSE,
        "lora-bfloat16": {**DENSE, "precision": "bfloat16"},
        "lora-nf4": {**DENSE, "precision": "nf4"},
        "low-rank": DENSE,
        "ffa": DENSE,
        "full": DENSE,
        "probe": DENSE,
        "flasc": {
            "download_density": down,
            "upload_density": float(run_config["upload-density"]),
            "precision": str(run_config["precision"]),
        },
        "sparse-adapter": {
            "download_density": down,
            "upload_density": 1.0,
            "client_freeze": True,
            "fixed_mask_after": 1,
        },
        "adapter-lth": {
            "download_density": Decay(1.0, 0.9),
            "upload_density": 1.0,
            "client_freeze": True,
        },
        "fed-select": {
            "download_density": down,
            "upload_density": 1.0,
            "client_freeze": True,
        },
        "het-lora": {**DENSE, "tiers": (Tier(rank=1), Tier(rank=2), Tier())},
    }
    kind = name.removesuffix("+")
    if kind not in settings:
        raise ValueError(f"strategies={name!r} must name some of {NAMES}")
    return FLASC(
        server_optimizer=Adam(
            float(run_config["server-learning-rate"]),
            tau=1e-8,
            initial_accumulator=0.0,
            bias_correction=True,
        ),
        sampler=UniformSampler(int(run_config["seed"])),
        fraction_train=float(run_config["fraction-train"]),
        fraction_evaluate=0.0,
        dense=(),  # the head is masked, too, as in the paper's code
        error_feedback=name.endswith("+"),
        **settings[kind],
    )
