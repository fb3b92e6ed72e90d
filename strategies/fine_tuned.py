r"""Fine-tuning: FedAvg's model, which every client trains further before it uses it.

The simplest of the personal methods, and often the best of them (Wu, Li, Charles, Xiao,
Liu, Xu and Smith 2022, "Motley: benchmarking heterogeneity and personalization in
federated learning", arXiv 2206.09262).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Unpack

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.personalization import fine_tuned
from flower_ext.client.task import evaluate
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import positive, whole
from flower_ext.core.protocol import RECEIVED, Config, Metrics, Reply, Round
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.personal import PersonalStrategy, spread

EPOCHS_KEY = "tuning-epochs"
STEPS_KEY = "tuning-steps"
RATE_KEY = "tuning-learning-rate"
# Metrics after one of several epochs: "epoch-2-loss".
EPOCH = "epoch-{}-"


class FineTunedClient(ClientHalf):
    """Trains as with FedAvg; evaluates a copy of the received model, trained further.

    Nothing is kept: in every evaluation the copy is made anew.
    """

    name = "fine-tuned"
    post_processing = True  # sent is the trained model, and nothing is kept
    compares = True

    def __init__(self) -> None:
        self._by_epoch: Metrics = {}

    def model_to_evaluate(self, local: Local) -> Tensors | None:
        """Return the copy, after the last epoch; None without any."""
        epochs = int(local.number(EPOCHS_KEY, 0))
        steps = int(local.number(STEPS_KEY, 0))
        if not epochs and not steps:
            return None
        tuned = fine_tuned(
            local,
            epochs=epochs,
            steps=steps,
            learning_rate=local.number(RATE_KEY, local.settings.learning_rate),
            after_epoch=self._measure if epochs > 1 and not steps else None,
        )
        if epochs > 1 and not steps and not tuned.num_steps:
            for epoch in range(1, epochs + 1):  # without examples it stays as it came
                self._measure(epoch, tuned)
        return tuned.end

    def evaluate(self, local: Local) -> Metrics:
        """Return the metrics after every epoch, where there are several."""
        return self._by_epoch

    def _measure(self, epoch: int, local: Local) -> None:
        found = evaluate(local.task, local.model, local.test)
        prefix = EPOCH.format(epoch)
        self._by_epoch |= {prefix + name: value for name, value in found.items()}


class FineTuned(PersonalStrategy):
    r"""Federated averaging with fine-tuning at every client before its model is used.

    Training is that of FedAvg, bit for bit. An evaluation trains a copy of the shared
    model on the client's training data first,
    :math:`v_k = \mathrm{Train}_k(w)`, and tests it on its test data. Works with the
    client half :class:`FineTunedClient`; a loop of one's own trains in its evaluate
    function.

    Parameters
    ----------
    tuning_epochs : int (default: 1)
        Epochs of fine-tuning; 0 is FedAvg. With several, clients are evaluated after
        each, see the notes.
    tuning_steps : int (default: 0)
        Steps instead of epochs; 0 means epochs.
    tuning_learning_rate : float, optional
        :math:`> 0`. By default, and for all other settings, that of local training,
        from the run config or ``train_config``, unless ``evaluate_config`` has others.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    Metrics are those of :class:`~flower_ext.server.personal.PersonalStrategy`, after
    the last epoch. With several epochs there are all of them after each as well, as
    ``epoch-1-loss`` and the like, and ``best-epochs``: the number, 0 included, with the
    smallest mean loss over the clients. That is one number for all, as a deployment has
    it (Motley's *fixed* epochs); it is chosen on the clients' test data, so that its
    loss is a little too good.

    Clients that never trained fine-tune as the others do: all they need are training
    data of their own. Nothing is kept, and an evaluation changes nothing; it costs as
    many steps as a training of the same epochs. A mechanism protects the shared model.
    Fine-tuned models stay where they are, but for their metrics, which a mechanism
    withholds. Under ``DPSGD`` fine-tuning is private too, and each evaluation is
    charged to the silo.

    Examples
    --------
    >>> strategy = FineTuned(fraction_train=0.1, tuning_epochs=5)
    """

    client_half = FineTunedClient
    drop_in = DropIn(
        fill_in="in the evaluate function: test the received model, for metrics that\n"
        "begin with received-, then train it further, and test it again",
        silent=True,
    )

    def __init__(
        self,
        *flowers: object,
        tuning_epochs: int = 1,
        tuning_steps: int = 0,
        tuning_learning_rate: float | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.tuning_epochs = whole("tuning_epochs", tuning_epochs, 0, "0 is FedAvg")
        self.tuning_steps = whole("tuning_steps", tuning_steps, 0, "0 means epochs")
        self.tuning_learning_rate = tuning_learning_rate
        if tuning_learning_rate is not None:
            cause = "None is that of local training, tuning_epochs=0 FedAvg"
            positive("tuning_learning_rate", tuning_learning_rate, cause)

    def tell(self, round: Round) -> Config:
        """Tell clients how much they fine-tune."""
        rate = self.tuning_learning_rate
        return {
            EPOCHS_KEY: self.tuning_epochs,
            STEPS_KEY: self.tuning_steps,
            **({} if rate is None else {RATE_KEY: float(rate)}),
        }

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the spread after the last epoch and after each, and the best."""
        rows = self.measured(replies, round)
        several = self.tuning_epochs > 1 and not self.tuning_steps
        epochs = range(1, self.tuning_epochs + 1 if several else 1)
        found = spread(
            (kind, {k: x for k, x in own.items() if not k.startswith("epoch-")})
            for kind, own in rows
        )
        for epoch in epochs:
            prefix = EPOCH.format(epoch)
            after = spread((kind, _after(own, prefix)) for kind, own in rows)
            own = {k: x for k, x in after.items() if not k.startswith(RECEIVED)}
            found |= {prefix + name: value for name, value in own.items()}
        tested = [own for _, own in rows if RECEIVED + "loss" in own]
        if epochs and tested:
            # Who has no loss there, after training that diverged, has the worst.
            found["best-epochs"] = min(
                (0, *epochs),
                key=lambda i: fmean(
                    own.get(f"{EPOCH.format(i) if i else RECEIVED}loss", math.inf)
                    for own in tested
                ),
            )
        return found

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        rate = self.tuning_learning_rate
        return {
            "Fine-tuning": f"{self.tuning_steps} steps"
            if self.tuning_steps
            else f"{self.tuning_epochs} epochs",
            "Learning rate of it": "as of training" if rate is None else rate,
            **super().settings(),
        }


def _after(own: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return a client's metrics as if it had stopped after that epoch."""
    received = {k: x for k, x in own.items() if k.startswith(RECEIVED)}
    later = {k.removeprefix(prefix): x for k, x in own.items() if k.startswith(prefix)}
    return {**received, **later} if later else {}
