"""What is shown of the comparison, and what was chosen for each method."""

from dataclasses import dataclass

from flwr.app import UserConfig

COLUMNS = {
    "central/accuracy": "accuracy",
    "central/loss": "loss",
}
PANELS = ["central/accuracy", "central/loss"]


@dataclass(frozen=True)
class Setting:
    """What is chosen for a method.

    Parameters
    ----------
    rate : float
        Learning rate of the server's optimizer.
    norm : float
        Clipping norm, of a user's preconditioned change, of its gradient, or of an
        example's.
    tau : float
        Added to the roots of second moments, for AdaDPS and DP2.
    group_size : int
        Most examples of a user, for ELS and ULS.
    """

    rate: float
    norm: float
    tau: float = 0.0
    group_size: int = 0


# By data, epsilon and method, found on validation data, see the README; "-in-silos" are
# several silos.
CHOSEN: dict[str, dict[float, dict[str, Setting]]] = {
    "mails": {
        1.0: {
            "none": Setting(1.0, 1.0),
            "dp-fedavg": Setting(1.0, 0.1),
            "dp-fedadam": Setting(0.03, 0.3),
            "layers-lamb": Setting(0.1, 0.1),
            "dp-ftrl": Setting(1.0, 0.1),
            "ada-dps": Setting(1.0, 0.3, tau=0.02),
            "ada-dps-words": Setting(1.0, 0.3, tau=0.06),
            "dp2": Setting(1.0, 0.1, tau=0.03),
            "els": Setting(1.0, 0.3, group_size=6),
            "uls": Setting(3.0, 0.3, group_size=20),
            "els-in-silos": Setting(1.0, 0.3, group_size=6),
            "uls-in-silos": Setting(3.0, 0.3, group_size=20),
        },
        4.0: {
            "none": Setting(1.0, 1.0),
            "dp-fedavg": Setting(1.0, 0.3),
            "dp-fedadam": Setting(0.03, 0.1),
            "layers-lamb": Setting(0.1, 0.1),
            "dp-ftrl": Setting(1.0, 0.3),
            "ada-dps": Setting(3.0, 0.3, tau=0.02),
            "ada-dps-words": Setting(1.0, 0.3, tau=0.2),
            "dp2": Setting(1.0, 0.3, tau=0.003),
            "els": Setting(10.0, 0.3, group_size=6),
            "uls": Setting(10.0, 0.3, group_size=20),
            "els-in-silos": Setting(10.0, 0.3, group_size=6),
            "uls-in-silos": Setting(10.0, 0.3, group_size=20),
        },
    },
    "images": {
        1.0: {
            "none": Setting(1.0, 0.3),
            "dp-fedavg": Setting(0.3, 0.3),
            "dp-fedadam": Setting(0.03, 0.3),
            "layers-lamb": Setting(0.05, 0.3),
            "dp-ftrl": Setting(0.3, 0.3),
            "ada-dps": Setting(0.3, 0.3, tau=0.01),
            "dp2": Setting(0.3, 0.3, tau=0.001),
            "els": Setting(3.0, 0.3, group_size=60),
            "uls": Setting(10.0, 0.1, group_size=60),
            "els-in-silos": Setting(3.0, 0.3, group_size=60),
            "uls-in-silos": Setting(10.0, 0.1, group_size=60),
        },
    },
}


def setting(method: str, config: UserConfig) -> Setting:
    """Return the setting of a method; what the run config has above 0 goes first.

    What was chosen is that for the nearest epsilon that was looked at.
    """
    of_data = CHOSEN[str(config["data"])]
    nearest = min(of_data, key=lambda x: abs(x - float(config["epsilon"])))
    several = int(config["silos"]) > 1
    name = f"{method}-in-silos" if several else method
    if name not in of_data[nearest]:
        where = f"for data={config['data']!r}: leave it out of methods"
        raise ValueError(f"methods={method!r} must be one with a setting {where}")
    found = of_data[nearest][name]
    return Setting(
        float(config["server-learning-rate"]) or found.rate,
        float(config["clipping-norm"]) or found.norm,
        float(config["tau"]) or found.tau,
        int(config["group-size"]) or found.group_size,
    )
