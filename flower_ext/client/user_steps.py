"""Steps that clip and draw users: by gradients, or by what local training changes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from flower_ext.client.half import ClientHalf, Local, trainable
from flower_ext.client.noisy_steps import (
    GradSampleMode,
    NoisePlan,
    NoisySteps,
    PrivateSteps,
    word,
)
from flower_ext.client.seeds import seed_all
from flower_ext.client.task import Batch, LocalOptimizer
from flower_ext.client.trainer import Steps, batch_norms
from flower_ext.client.users import runs_of
from flower_ext.core.errors import refuse
from flower_ext.privacy.example_gradients import clipping_weights


class UserSteps(NoisySteps):
    """The steps of ULS: a user's mean gradient is clipped, added up and noised.

    Parameters
    ----------
    local, half, plan, mode
        See :class:`~flower_ext.client.noisy_steps.NoisySteps`. Each user's examples are
        side by side.
    user : str
        The column of users.
    """

    def __init__(
        self,
        local: Local,
        half: ClientHalf,
        plan: NoisePlan,
        mode: GradSampleMode,
        user: str,
    ) -> None:
        self._user = user
        self._places = runs_of(local.train[user])[0].cpu()
        super().__init__(local, half, plan, mode)

    def rows_of(self, chosen: Tensor) -> Tensor:
        """Return all examples of the users that were drawn."""
        return torch.isin(self._places, chosen).nonzero()[:, 0]

    def counts(self, batch: Batch) -> Tensor | None:
        """Return the examples of each user in the batch."""
        counts = runs_of(batch[self._user])[1]
        # One each is DP-SGD, to the bit.
        return None if (counts == 1).all() else counts


class UpdateSteps(PrivateSteps):
    r"""The rounds of DP-FedAvg inside a silo, whose clients are its users.

    Every step starts each drawn user from the model as it is, takes that user's own
    steps with an optimizer of their own, and adds up the clipped changes.

    Parameters
    ----------
    local, half
        See :class:`~flower_ext.client.trainer.Steps`.
    plan : NoisePlan
        ``bound`` is that of a user's change over all trained parameters.
    user : str
        The column of users, whose examples are side by side.
    """

    def __init__(
        self, local: Local, half: ClientHalf, plan: NoisePlan, user: str
    ) -> None:
        self.local, self.half, self.plan, self._user = local, half, plan, user
        self._places = runs_of(local.train[user])[0].cpu()
        self._trained = trainable(local.model)
        if not self._trained:
            refuse("model", type(local.model).__name__, "one with parameters to train")
        local.model.train()
        if layers := [x for x in batch_norms(local.model) if x.training]:
            cause = "a user may have one example; GroupNorm and LayerNorm can take that"
            refuse("layer", type(layers[0]).__name__, "no BatchNorm", cause)
        if isinstance(local.task.optimizer, LocalOptimizer):
            cause = "what it remembers of one user would go into the next one's change"
            name = type(local.task.optimizer).__name__
            refuse("Task.optimizer", name, "a function, not a LocalOptimizer", cause)
        self.optimizer = self.own_optimizer()

    def batches(self) -> Iterator[Batch]:
        """Draw the users of every step."""
        for step, chosen in enumerate(self.draws()):
            # Each user's draws are its own, whoever else is there.
            first = [self.dropout_seed(), step]
            self._seeds = [[*first, user] for user in chosen.tolist()]
            rows = torch.isin(self._places, chosen).nonzero()[:, 0]
            yield {k: column[rows] for k, column in self.local.train.items()}

    @torch.no_grad()
    def take(self, batch: Batch) -> float:
        """Add up the users' clipped changes, add noise; return the mean objective.

        What it returns is the sum of the users' means over the expected users.
        """
        plan, model = self.plan, self.local.model
        start = {n: x.clone() for n, x in _tensors(model).items()}
        total = {n: torch.zeros_like(p).double() for n, p in self._trained.items()}
        loss = 0.0
        for seed, own in zip(self._seeds, self._users(batch), strict=True):
            loss += self._train(own, seed)
            change = {
                n: p.double() - start[n].double() for n, p in self._trained.items()
            }
            norms = torch.stack([x.norm().cpu() for x in change.values()])
            weight = float(clipping_weights(norms.norm(), plan.bound))
            for name in total if weight else ():
                total[name] += weight * change[name]
            # The next user starts anew. What layers remember of this one is gone, too.
            for name, x in _tensors(model).items():
                x.copy_(start[name])
        expected, drawn = plan.rate * plan.drawn_from, self.next_noise()
        for name, p in self._trained.items():
            noisy = total[name] + torch.from_numpy(drawn[name]).to(p.device)
            # Rounding to the parameter's own type comes after the noise.
            p.copy_(start[name].double() + noisy / expected)
        return loss / expected

    def _users(self, batch: Batch) -> Iterator[Batch]:
        counts = runs_of(batch[self._user])[1].tolist()
        parts = {k: torch.split(column, counts) for k, column in batch.items()}
        for i in range(len(counts)):
            yield {k: pieces[i] for k, pieces in parts.items()}

    @torch.enable_grad()
    def _train(self, own: Batch, seed: list[int]) -> float:
        """Train as a client that has one user's examples; return the mean objective."""
        words = np.random.SeedSequence(seed).generate_state(2)
        seed_all(word(words.tobytes()) % 2**63)
        steps = _OwnSteps(replace(self.local, train=own, epoch_size=0), self.half)
        while steps.advance():
            steps.step()
        return steps.mean if steps.count else 0.0


class _OwnSteps(Steps):
    """One user's steps; the half's ``after_step`` comes after the noisy one."""

    def step(self) -> None:
        assert self.batch is not None
        self.total += self.take(self.batch)
        self.count += 1


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all that training changes: parameters and buffers, also unsaved ones."""
    return {
        **{n: p for n, p in model.named_parameters() if p.requires_grad},
        **dict(model.named_buffers()),
    }
