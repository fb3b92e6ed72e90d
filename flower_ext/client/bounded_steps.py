"""Steps of DP-SGD whose noisy sums are bounded, or of which an account is kept."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.noisy_steps import GradSampleMode, NoisePlan, NoisySteps
from flower_ext.client.task import Batch, num_examples
from flower_ext.core.errors import refuse
from flower_ext.core.typing import Floats
from flower_ext.privacy.bounded import BoundedGaussian
from flower_ext.privacy.example_gradients import Gradients, Part, clipped_sum
from flower_ext.privacy.instances import GAUSSIAN, InstanceAccount, InstanceReport


class BoundedSteps(NoisySteps):
    """Noisy sums in an interval, and what they say of single examples.

    Parameters
    ----------
    local, half, plan, mode
        See :class:`~flower_ext.client.noisy_steps.NoisySteps`.
    noise : BoundedGaussian, optional
        Rectified, with bounds in clipping norms.
    instances : InstanceReport, optional
        Of which examples an account is kept.
    """

    def __init__(
        self,
        local: Local,
        half: ClientHalf,
        plan: NoisePlan,
        mode: GradSampleMode,
        noise: BoundedGaussian | None,
        instances: InstanceReport | None,
    ) -> None:
        self._noise_bounds = GAUSSIAN
        if noise is not None:
            scaled = noise.lower * plan.bound, noise.upper * plan.bound
            self._noise_bounds = BoundedGaussian(*scaled)
        self._account: InstanceAccount | None = None
        if instances is not None:
            _require_known(instances, local, plan)
            self._path = instances.path(local.client)
            self._account = InstanceAccount.load(self._path, instances.examples)
        super().__init__(local, half, plan, mode)

    def rows_of(self, chosen: Tensor) -> Tensor:
        """Note which examples were drawn."""
        self._drawn = chosen.tolist()
        return super().rows_of(chosen)

    def noised(self, total: Tensor) -> Tensor:
        """Keep a noisy sum in the interval, which looks at no data."""
        return total.clamp(self._noise_bounds.lower, self._noise_bounds.upper)

    def summed(self, batch: Batch) -> tuple[float, Gradients]:
        """Return the clipped sum; note what of it is an example's that is watched."""
        if self._account is None:
            return super().summed(batch)
        size, bound = num_examples(batch), self.plan.bound
        total, parts = self._backward(batch) if size else (0.0, [])
        found = clipped_sum(parts, size, bound)
        self._account.steps += 1
        for example in self._account.examples:
            if example in self._drawn:
                place = self._drawn.index(example)
                alone = [_Of(part, place) for part in parts]
                self._account.add(
                    example,
                    with_it=self._flat(found),
                    own=self._flat(clipped_sum(alone, size, bound)),
                    deviation=self.plan.noise_multiplier * bound,
                    noise=self._noise_bounds,
                )
        return total, found

    def _flat(self, found: Gradients) -> Floats:
        """Return all coordinates, of parameters without a gradient zeros."""
        every: Sequence[Tensor] = [
            found.get(p, torch.zeros_like(p, dtype=torch.float64))
            for p in self._trained.values()
        ]
        return np.concatenate([x.detach().cpu().numpy().ravel() for x in every])

    def end(self) -> None:
        """Write the account; take Opacus' hooks off the model."""
        super().end()
        if self._account is not None and self._account.steps:
            self._account.save(self._path)


class _Of:
    """One example's share of a part of a sum."""

    def __init__(self, part: Part, place: int) -> None:
        self._part, self._place = part, place

    def norms(self) -> Gradients:
        """Return the norms of all: they decide how the example is scaled."""
        return self._part.norms()

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return what the example adds to the sum."""
        own = torch.zeros_like(weights)
        own[self._place] = weights[self._place]
        return self._part.weighted_sum(own)


def _require_known(instances: InstanceReport, local: Local, plan: NoisePlan) -> None:
    """Refuse examples that are not there, and sums without noise."""
    size = num_examples(local.train)
    if max(instances.examples) >= size:
        refuse("examples", instances.examples, f"below the {size} of the silo")
    if not plan.noise_multiplier:
        cause = "without noise a sum says all of every example"
        refuse("noise_multiplier", plan.noise_multiplier, "> 0 with instances", cause)
