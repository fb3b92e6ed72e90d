"""The trainings of one message under DP-SGD: charged to the silo before they begin.

The session is the same whatever is clipped and drawn, examples or users. Its trainer
says what a unit may add to a step and how steps are taken.
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.noisy_steps import NoisePlan, word
from flower_ext.client.personal import PERSONAL
from flower_ext.client.task import (
    Batch,
    batches,
    example_losses,
    example_metrics,
    num_examples,
)
from flower_ext.client.tensors import Tensors, read_tensors
from flower_ext.client.trainer import Session, Steps, batch_norms
from flower_ext.client.users import num_users
from flower_ext.core.errors import refuse, whole
from flower_ext.core.protocol import Metrics
from flower_ext.core.several import stack
from flower_ext.core.typing import Floats
from flower_ext.privacy.private_evaluation import EvaluationSum, PrivateEvaluation
from flower_ext.privacy.selection import noisy_least
from flower_ext.privacy.silo_account import SiloAccount, ledger_path
from flower_ext.privacy.silo_budget import (
    SiloBudgetExhausted,
    StepLedger,
    noise_for_steps,
)

if TYPE_CHECKING:
    from flower_ext.client.dp_sgd import DPSGD

EXAMPLE_EPSILON = "example-epsilon"
EXAMPLE_DELTA = "example-delta"
USER_EPSILON = "user-epsilon"
USER_DELTA = "user-delta"
SPENT = (EXAMPLE_EPSILON, EXAMPLE_DELTA, USER_EPSILON, USER_DELTA)

TRAIN_LOSS = "train-loss"
#: With a client's personal state: that no other trainer has left it there.
PRIVATE = "trained-privately"

#: As good as no clipping, and 0 times it is 0.
NO_CLIPPING = 1e30


class PrivateSession(Session):
    """All trainings of one client for one message, charged before the first.

    Parameters
    ----------
    trainer : DPSGD
        What is promised.
    local : Local
        The client; its training data are cut to ``max_examples_per_user``.
    num_trainings : int
        Models that are trained, which are charged together.
    planned_steps : callable, optional
        See :meth:`~flower_ext.client.half.ClientHalf.planned_steps`.
    """

    def __init__(
        self,
        trainer: "DPSGD",
        local: Local,
        num_trainings: int,
        planned_steps: Callable[[Local], int | None] = lambda local: None,
    ) -> None:
        self._trainer = trainer
        self._privacy = trainer.privacy(local.context)
        if self._privacy.evaluation and trainer.release_evaluation:
            cause = "exact means beside noisy ones"
            refuse("release_evaluation", True, "False with evaluation", cause)
        self._trainings = whole("num_trainings", num_trainings, 1)
        self._shift = trainer.sensitivity(self._privacy)
        self._take_data(local)
        self._planned = planned_steps(local)
        # What the server may choose and the half may use, before the half has seen it.
        self._told = b"" if self._privacy.seed is None else _digest_of_told(local)
        # What was kept before: if that is private, what this message keeps is, too.
        self._personal = local.personal
        self._kept = sorted(set(local.personal) - {PRIVATE})
        marked = local.personal.numbers(PRIVATE)
        self._state = local.context.state
        self._before_all = mark_of(self._state)
        self._sound = not self._kept or marked == self._before_all
        # The message's own, which no half can replace by that of another model.
        path = self._privacy.ledger
        self._account = SiloAccount(
            None if path is None else ledger_path(path),
            local.context.state,
            client=local.client,
            server_round=local.server_round,
            run=local.run,
        )
        self._phase = local.phase
        self._choices = 0
        self._plan: NoisePlan | None = None
        self._spent = 0.0
        # Steps of the silo before this message, steps of it, and those still to come.
        self._before, self._taken, self._left = 0, 0, 0

    def steps(self, local: Local, half: ClientHalf) -> Steps:
        """Refuse what cannot be private; charge all trainings before the first."""
        self._trainer.refuse_settings(local.settings)
        self._take_data(local)
        count = self._trainer.num_releases(local)
        found: Steps
        if self._plan is not None:
            found = self._further(local, half, self._plan)
        else:
            with self._account.locked():
                found = self._charged(local, half, self._account)
        self._taken += count
        self._left -= count
        return found

    def _charged(self, local: Local, half: ClientHalf, account: SiloAccount) -> Steps:
        """Plan the message, see that it can be trained, and charge its steps."""
        privacy, count = self._privacy, self._trainer.num_releases(local)
        kept, ledger = self._known(account)
        if not count:
            self._spent = ledger.epsilon(privacy.delta)
            return _NoSteps(local, half)
        account.require(kept)
        self._warn_of_delta(local.train)
        rate = self._trainer.rate(local, privacy)
        # All models at once: a budget that ends between two of them would leave one
        # that is trained, spent and never sent.
        planned = self._steps_of_message(local)
        always = self._always(local, rate)
        noise_multiplier = self._calibrated(kept, planned, rate, always)
        charged = ledger.add(rate, noise_multiplier, planned, always)
        spent = self._affordable(local, ledger, charged)
        plan = NoisePlan(
            count,
            rate,
            self._trainer.num_drawn(local.train, privacy),
            min(privacy.clipping_norm, NO_CLIPPING),
            noise_multiplier,
        )
        self._before = ledger.total
        found = self._noisy(local, half, plan)
        # Charged before the first step: a training that breaks off has cost its steps.
        account.write(self._record(charged, noise_multiplier))
        self._plan, self._left, self._spent = plan, planned, spent
        return found

    def _steps_of_message(self, local: Local) -> int:
        """Return the steps of all trainings that this message is charged for."""
        # At least its own: what is taken is charged, whatever a half says.
        count = self._trainer.num_releases(local)
        return max(count, self._planned or self._trainings * count)

    def _known(self, account: SiloAccount) -> tuple[ConfigRecord | None, StepLedger]:
        """Return the account, and refuse to send what was not kept privately."""
        kept = account.read()
        ledger = StepLedger.read(kept, self._privacy, self._shift)
        # Also where nothing is trained: a half may send what it has kept.
        if not self._sound:
            refuse(
                "personal state",
                self._kept,
                "kept under DPSGD",
                "what a training that was not private has left would leave the silo "
                "with the next models",
            )
        return kept, ledger

    def _affordable(
        self, local: Local, ledger: StepLedger, charged: StepLedger
    ) -> float:
        """Return epsilon after a charge, or refuse it."""
        privacy = self._privacy
        spent = charged.epsilon(privacy.delta)
        # Not "spent > limit": NaN must count as exceeding.
        if privacy.limit is not None and not spent <= privacy.limit:
            raise SiloBudgetExhausted(
                f"round {local.server_round} would exceed max_epsilon={privacy.limit} "
                f"at delta={privacy.delta}: {ledger.epsilon(privacy.delta):.6g} is "
                f"spent, it would be {spent:.6g}; nothing was computed"
            )
        return spent

    def _record(self, charged: StepLedger, noise_multiplier: float) -> ConfigRecord:
        record = charged.record()
        if target := self._target:
            record["noise-multiplier"] = noise_multiplier
            record["target"] = target
        return record

    def choose(self, local: Local, models: Sequence[Tensors]) -> int:
        """Choose privately, and charge it; see ``SiloPrivacy``.

        An evaluation that is withheld tells nothing of its choice, and chooses without
        noise.
        """
        privacy = self._privacy
        due = self._trainer.release_evaluation or self._evaluation(local) is not None
        if self._phase == "evaluate" and not due:
            return super().choose(local, models)
        if privacy.selection_epsilon is None or privacy.loss_cap is None:
            refuse(
                "selection_epsilon",
                None,
                "given, with loss_cap",
                "a choice among models reads the silo's data: SiloPrivacy(..., "
                "selection_epsilon=0.1, loss_cap=4.0)",
            )
        if not num_examples(local.train):
            return 0
        with self._account.locked():
            self._charge_choice(local, self._account)
        cap = privacy.loss_cap
        scores = [_capped_sum(local, arrays, cap) for arrays in models]
        scale = privacy.group_size * cap / privacy.selection_epsilon
        return noisy_least(scores, scale, self._uniforms(local, models))

    def _charge_choice(self, local: Local, account: SiloAccount) -> None:
        """Charge a choice, if the training after it can be paid for, too."""
        privacy = self._privacy
        kept, ledger = self._known(account)
        account.require(kept)
        self._choices += 1
        planned = self._steps_of_message(local)
        rate = self._trainer.rate(local, privacy)
        charged = ledger.add(1.0, self._choice_noise, 1)
        # That of a round also where an evaluation is the first to ask for it.
        always = self._always(local, rate)
        noise_multiplier = self._calibrated(kept, planned, rate, always)
        coming = planned if self._phase == "train" else 0
        together = charged.add(rate, noise_multiplier, coming, always)
        self._affordable(local, ledger, together)
        self._before = ledger.total
        account.write(self._record(charged, noise_multiplier))

    def _uniforms(self, local: Local, models: Sequence[Tensors]) -> Floats:
        """Draw secret numbers in (0, 1), one a model."""
        seed, count = self._privacy.seed, len(models)
        if seed is None:
            words = np.frombuffer(os.urandom(8 * count), np.uint64)
        else:
            digest = _digest(
                [self._told, "choice", self._privacy, local.settings],
                chain(stack(models).items(), sorted(local.train.items())),
            )
            sources = [seed, local.client, local.server_round, self._before]
            sequence = np.random.SeedSequence([*sources, self._choices, word(digest)])
            words = sequence.generate_state(count, np.uint64).view(np.uint64)
        # 52 bits and a half: with one bit more, the largest would be rounded to 1.
        return (np.asarray(words >> np.uint64(12), np.float64) + 0.5) * 2.0**-52

    def _further(self, local: Local, half: ClientHalf, plan: NoisePlan) -> Steps:
        """Return the steps of a further model, of those that are charged."""
        count, rate = self._trainer.num_releases(local), plan.rate
        own = self._trainer.rate(local, self._privacy)
        if count > self._left or (count and own != rate):
            raise ValueError(
                f"a further model of {count} steps at a sampling rate of {own:.3g} is "
                f"not charged: {self._left} at {rate:.3g} are left of the "
                f"num_trainings={self._trainings} that the client half says it trains; "
                "all must have the data and the settings of the first"
            )
        if not count:
            return _NoSteps(local, half)
        return self._noisy(local, half, replace(plan, count=count))

    def _noisy(self, local: Local, half: ClientHalf, plan: NoisePlan) -> Steps:
        steps = self._trainer.steps(local, half, plan, self._privacy)
        return steps.seeded(self._secret_keys(local, plan))

    def _always(self, local: Local, rate: float) -> float:
        size = self._trainer.num_drawn(local.train, self._privacy)
        return self._trainer.always(self._privacy, rate * size)

    @property
    def _target(self) -> list[float] | None:
        """What noise is sought for, if it is."""
        privacy = self._privacy
        if privacy.epsilon is None or privacy.num_rounds is None:
            return None
        rounds, shift = float(privacy.num_rounds), float(self._shift)
        target = [privacy.epsilon, privacy.delta, rounds, shift]
        if self._choices:
            target += [float(self._choices), self._choice_noise]
        if privacy.evaluation:
            target += [*map(float, privacy.evaluations)]
        return target

    @property
    def _choice_noise(self) -> float:
        return self._privacy.choice_noise(self._shift)

    def _calibrated(
        self, kept: ConfigRecord | None, planned: int, rate: float, always: float
    ) -> float:
        """Return the noise multiplier: given, kept, or sought for the target."""
        privacy = self._privacy
        if privacy.noise_multiplier is not None:
            return float(privacy.noise_multiplier)
        if kept is not None and kept.get("target") == self._target:
            return cast(float, kept["noise-multiplier"])
        assert privacy.epsilon is not None and privacy.num_rounds is not None
        # An evaluation that is told of makes its choices, too.
        choices = (privacy.num_rounds + privacy.evaluations[0]) * self._choices
        noise = self._choice_noise if choices else math.inf
        if privacy.evaluation:  # one release that tells as much as all of both
            count, own = privacy.evaluations
            squares = count * (privacy.group_size / own) ** 2
            squares += choices * (self._shift / noise) ** 2 if noise else math.inf
            choices, noise = 1, self._shift / math.sqrt(squares)
        return noise_for_steps(
            privacy.epsilon,
            privacy.delta,
            privacy.num_rounds * max(planned, 1),
            rate,
            self._shift,
            choices,
            noise,
            always,
        )

    def _secret_keys(self, local: Local, plan: NoisePlan) -> Sequence[int] | None:
        """Return keys of batches, noise and dropout, or None without a seed.

        They depend on whatever decides what the training computes. So the same noise
        comes again in the same reply only, and never on another model or on other data,
        where the difference of two replies would be free of it.
        """
        seed = self._privacy.seed
        if seed is None:
            return None
        manner = self._trainer.manner(local.train, self._privacy)
        digest = _digest(
            [self._told, plan, local.settings, local.branch, *manner],
            chain(
                local.model.named_parameters(),
                local.model.named_buffers(),
                sorted(local.train.items()),
            ),
        )
        done = self._before + self._taken
        sources = [seed, local.client, local.server_round, done, word(digest)]
        children = np.random.SeedSequence(sources).spawn(3)
        return [word(child.generate_state(4).tobytes()) for child in children]

    def _take_data(self, local: Local) -> None:
        """Let the client see at most G examples of every user."""
        trainer, privacy = self._trainer, self._privacy
        local.train = trainer.admitted(local.train, privacy)
        drawn = trainer.num_drawn(local.train, privacy)
        # Of what an epoch draws each once, where that is not examples.
        local.epoch_size = drawn if drawn != num_examples(local.train) else 0

    def _warn_of_delta(self, data: Batch) -> None:
        privacy, unit = self._privacy, "example"
        size = num_examples(data)
        if privacy.unit:
            unit, size = "user", num_users(data, privacy.user)
        if privacy.delta >= 1 / size:
            warnings.warn(
                f"delta={privacy.delta} should be < 1 / {unit}s={1 / size:.3g}: "
                f"publishing all there is of one {unit} would satisfy it",
                stacklevel=5,
            )

    def measures(self, *, tests: bool = False) -> None:
        """Refuse to show a half a loss, but for what is withheld or of test data."""
        if self._phase == "evaluate":
            exact, noisy = self._trainer.release_evaluation, self._privacy.evaluation
            if (exact or noisy) and not tests:
                refuse(
                    "release_evaluation" if exact else "evaluation",
                    exact or noisy,
                    ("False" if exact else "left out") + " with this client half",
                    "its evaluation reads the silo's training data, and the metrics "
                    "would tell what they say, without noise",
                )
        else:
            raise ValueError(
                "loss_of, mean_loss, measure and the gradient of all examples read the "
                "silo's data without noise: under DPSGD a client half may not use them "
                "in training"
            )

    def report(self, metrics: Metrics) -> Metrics:
        """Add what is spent so far; withhold the loss, unless it was asked for."""
        users = self._privacy.max_examples_per_user is not None
        epsilon, delta = (
            (USER_EPSILON, USER_DELTA) if users else (EXAMPLE_EPSILON, EXAMPLE_DELTA)
        )
        kept = {
            name: value
            for name, value in metrics.items()
            if name != TRAIN_LOSS or self._trainer.release_train_loss
        }
        return {**kept, epsilon: self._spent, delta: self._privacy.delta}

    def report_evaluation(
        self, metrics: Metrics, local: Local, own: Tensors | None
    ) -> Metrics:
        """Withhold all but the number of examples and means with noise.

        Unless all was asked for.
        """
        if self._trainer.release_evaluation:
            return metrics
        found: Metrics = {"num-examples": metrics["num-examples"]}
        plan = self._evaluation(local)
        if plan is None:
            return found
        tests = self._trainer.admitted(local.test, self._privacy)
        if not num_examples(tests):
            return found
        model = local.model if own is None else local.with_arrays(own)
        for name, layer in model.named_modules():
            if layer in batch_norms(model) and layer.running_mean is None:
                cause = "each test example is to count by itself"
                refuse("layer", name, "a layer that does not mix examples", cause)
        measured = [*example_metrics(local.task, model, tests)]
        if unknown := sorted(plan.bounds.keys() - measured[0].keys()):
            refuse("bounds", unknown, f"of metrics, which are {sorted(measured[0])}")
        with self._account.locked():
            self._charge_evaluation(local, self._account)
        size, seed = num_examples(tests), self._privacy.seed
        noisy = EvaluationSum(
            plan,
            planned=size,  # which is public
            cohort=size,
            noise_multiplier=self._privacy.evaluations[1],
            seed=None if seed is None else self._evaluation_seed(local, model, tests),
        )
        rows = (
            dict(zip(batch, numbers, strict=True))
            for batch in measured
            for numbers in torch.stack([*batch.values()], 1).tolist()
        )
        return found | noisy.release(plan.every, rows)

    def _evaluation(self, local: Local) -> PrivateEvaluation | None:
        """Return the plan of evaluations in the rounds that have one."""
        plan = self._privacy.evaluation
        return plan if plan and local.server_round % plan.every == 0 else None

    def _charge_evaluation(self, local: Local, account: SiloAccount) -> None:
        """Charge an evaluation before it is made; one beyond the plan is refused."""
        kept, ledger = self._known(account)
        account.require(kept)
        planned, noise = self._privacy.evaluations
        # By what a unit moves the sum.
        noise /= self._privacy.group_size
        done = sum(
            count
            for (rate, z, size), count in ledger.steps.items()
            if rate == 1 and math.isclose(z, size * noise, rel_tol=1e-9)
        )
        if done >= planned:
            raise SiloBudgetExhausted(
                f"round {local.server_round} would have an evaluation more than the "
                f"{planned} that are planned: SiloPrivacy(num_rounds=..., "
                "evaluation=PrivateEvaluation(every=...))"
            )
        charged = ledger.add(1.0, self._shift * noise, 1)
        self._spent = self._affordable(local, ledger, charged)
        self._before = ledger.total
        record = charged.record()
        for key in ("noise-multiplier", "target"):  # sought once, for the training
            if kept is not None and key in kept:
                record[key] = kept[key]
        account.write(record)

    def _evaluation_seed(self, local: Local, model: nn.Module, tests: Batch) -> int:
        """Return what comes again with the same model and data only."""
        digest = _digest(
            [self._told, "evaluation", self._privacy, local.settings],
            chain(model.state_dict().items(), sorted(tests.items())),
        )
        sources = [self._privacy.seed or 0, local.client, local.server_round]
        sequence = np.random.SeedSequence([*sources, self._before, word(digest)])
        return word(sequence.generate_state(4).tobytes())

    def end(self) -> None:
        """Note with the personal state, if there is any, that it was kept here.

        Raises
        ------
        ValueError
            If an evaluation has changed it.
        """
        # What was not private before does not become so by a message that trains
        # nothing. An evaluation may look at losses, since it does not tell them.
        if self._phase == "evaluate" and mark_of(self._state) != self._before_all:
            raise ValueError(
                "under DPSGD an evaluation may not change personal state: what it has "
                "seen of the data would leave the silo with a later round"
            )
        if self._sound and set(self._personal) - {PRIVATE}:
            self._personal.save(**{PRIVATE: mark_of(self._state)})


def mark_of(state: RecordDict) -> dict[str, float]:
    """Return what tells personal state from any other: a digest, in words."""
    own = {k: x for k, x in state.items() if k.startswith(PERSONAL)}
    own.pop(PERSONAL + PRIVATE, None)
    hashed = sha256()
    for key, record in sorted(own.items()):
        if isinstance(record, ArrayRecord):
            for name, array in record.items():
                form = array.dtype, tuple(array.shape)
                hashed.update(repr((key, name, form)).encode())
                hashed.update(sha256(array.data).digest())
        else:
            hashed.update(repr((key, sorted(record.items()))).encode())
    octets = hashed.digest()
    return {f"word-{i}": word(octets[6 * i : 6 * i + 6]) for i in range(5)}


@torch.no_grad()
def _capped_sum(local: Local, arrays: Tensors, cap: float) -> float:
    """Return the sum of a model's losses on the examples, each from 0 to the cap."""
    model = copy.deepcopy(local.model)
    model.load_state_dict(arrays)
    model.eval()
    total = 0.0
    for batch in batches(local.train, 256):
        losses = example_losses(local.task, model, batch).double()
        # One that is not a number must not count for more than one that is bad.
        total += float(losses.nan_to_num(nan=cap).clamp(0.0, cap).sum())
    return total


class _NoSteps(Steps):
    """The steps of a client without examples."""

    def batches(self) -> Iterator[Batch]:
        return iter(())


def _digest_of_told(local: Local) -> bytes:
    """Return a digest of what was received and of what the client has kept."""
    context = local.context
    numbers = {key: {**x} for key, x in sorted(context.state.metric_records.items())}
    groups = {
        "": local.loaded,
        **local.received,
        **{key: read_tensors(x) for key, x in context.state.array_records.items()},
    }
    return _digest(
        [sorted(context.run_config.items()), sorted(local.config.items()), numbers],
        (
            (f"{key}/{name}", tensor)
            for key, group in groups.items()
            for name, tensor in group.items()
        ),
    )


def _digest(values: object, tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    hashed = sha256(repr(values).encode())
    for name, tensor in tensors:
        octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        hashed.update(octets.numpy().data)
    return hashed.digest()
