"""Local training with FedFish's client half against plain local training.

Limit: 1.15 times, for an LSTM and for a CNN, with the Fisher of the last epoch.
"""

import torch
from _timing import medians, report
from flwr.app import ConfigRecord, Context, RecordDict, UserConfig
from torch import Tensor, nn

from flower_ext.client.half import ClientHalf, Local, LocalSettings
from flower_ext.client.task import Batch, Task
from flower_ext.strategies import FedFishClient

LIMIT = 1.15


class CharLSTM(nn.Module):
    """Predicts the next of 96 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 16)
        self.lstm = nn.LSTM(16, 96, batch_first=True)
        self.out = nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, characters, time)``."""
        out: Tensor = self.out(self.lstm(self.embedding(x))[0])
        return out.transpose(1, 2)


def cnn() -> nn.Module:
    """Return a small convolutional network for 28x28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["x"][:, :-1])
    return nn.functional.cross_entropy(
        logits, batch["x"][:, 1:], reduction="none"
    ).mean(1)


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def measure(name: str, model: nn.Module, task: Task, data: Batch, epochs: int) -> None:
    """Time both and print the ratio."""

    def run(half: ClientHalf) -> None:
        local = Local(
            task=task,
            model=model,
            train=data,
            test=data,
            settings=LocalSettings(
                learning_rate=0.05, local_epochs=epochs, batch_size=16
            ),
            config=ConfigRecord(),
            context=Context(1, 1, {"partition-id": 0}, RecordDict(), {}),
            device=torch.device("cpu"),
        )
        local.session.train(local, half)
        half.records(local)

    ours, plain = medians(lambda: run(FedFishClient()), lambda: run(ClientHalf()))
    report(f"FedFish half, {name}, {epochs} epoch(s)", ours, plain, LIMIT)


def main() -> None:
    """Measure both models, for one local epoch (the worst case) and for four."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = {"x": torch.randint(0, 96, (320, 65))}
    images = {"x": torch.randn(320, 1, 28, 28), "y": torch.randint(0, 10, (320,))}

    def unused(_: UserConfig) -> nn.Module:
        raise AssertionError

    def no_data(_: Context) -> tuple[Batch, Batch]:
        raise AssertionError

    for epochs in (1, 4):
        measure("LSTM", CharLSTM(), Task(unused, no_data, text_loss), text, epochs)
        measure("CNN", cnn(), Task(unused, no_data, image_loss), images, epochs)


if __name__ == "__main__":
    main()
