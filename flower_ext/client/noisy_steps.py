"""The steps of DP-SGD on one model: gradients per example, clipped, added, noised.

Opacus computes the gradients, or says what each layer has seen; clipping, sum and noise
are ours.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from logging import ERROR
from types import SimpleNamespace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.half import ClientHalf, Local, trainable
from flower_ext.client.seeds import seed_torch
from flower_ext.client.task import Batch, example_losses, num_examples, per_example
from flower_ext.client.trainer import Steps
from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import refuse
from flower_ext.privacy.example_gradients import (
    Call,
    Gradients,
    Part,
    Sampler,
    clipped_sum,
    explicit,
    parts_of_calls,
)
from flower_ext.privacy.factorizations.factorization import Identity
from flower_ext.privacy.noise import NoiseStream

GradSampleMode = Literal["hooks", "ghost"]

_PROBES = 8


@dataclass(frozen=True)
class NoisePlan:
    """How one model is trained.

    Attributes
    ----------
    count : int
        Steps, at least 1.
    rate : float
        Probability with which an example is in a batch.
    drawn_from : int
        Number of the examples; of users, where those are drawn.
    bound : float
        Clipping norm of an example's gradient, finite.
    noise_multiplier : float
        Standard deviation of the noise on a sum of gradients, by ``bound``.
    """

    count: int
    rate: float
    drawn_from: int
    bound: float
    noise_multiplier: float


class PrivateSteps(Steps):
    """Steps whose batches and noise are drawn from keys, or from the system.

    Attributes
    ----------
    plan : NoisePlan
        Steps, batches and noise.
    """

    plan: NoisePlan
    _keys: Sequence[int] | None = None

    def seeded(self, keys: Sequence[int] | None) -> "PrivateSteps":
        """Draw batches, noise and dropout from keys, or from the operating system."""
        self._keys = keys
        self._noise = NoiseStream(
            Identity(self.plan.count),
            {n: tuple(p.shape) for n, p in trainable(self.local.model).items()},
            seed=None if keys is None else keys[1],
            secure=keys is None,
            dtype="float64",
        )
        return self

    def next_noise(self) -> Arrays:
        """Return the noise on the next sum."""
        bound, multiplier = self.plan.bound, self.plan.noise_multiplier
        # "and": 0 noise of infinite scale is no noise.
        return self._noise.next(multiplier and multiplier * bound)

    def draws(self) -> Iterator[Tensor]:
        """Draw for every step whom it is of: each independently, maybe none."""
        plan, keys = self.plan, self._keys
        coins = None if keys is None else np.random.Generator(np.random.SFC64(keys[0]))
        for _ in range(plan.count):
            yield torch.from_numpy(_poisson(plan.drawn_from, plan.rate, coins))

    def own_optimizer(self) -> torch.optim.Optimizer:
        """Return the half's optimizer, if it steps what is trained and no more."""
        found = self.half.optimizer(self.local)
        stepped = {p for group in found.param_groups for p in group["params"]}
        if stepped != set(trainable(self.local.model).values()):
            raise ValueError(
                "Task.optimizer must train the parameters that it is given and no "
                "other: those have gradients that are not private"
            )
        return found

    def dropout_seed(self) -> int:
        """Return a seed of torch's generator."""
        # With a public seed the server would know which example had which mask.
        return word(os.urandom(8)) if self._keys is None else self._keys[2] % 2**63


class NoisySteps(PrivateSteps):
    """The steps of one training by DP-SGD.

    Making them sees that the model can be trained so, and draws nothing.

    Parameters
    ----------
    local, half
        See :class:`~flower_ext.client.trainer.Steps`.
    plan : NoisePlan
        Steps, batches and noise.
    mode : str
        How gradients per example are found.
    """

    def __init__(
        self, local: Local, half: ClientHalf, plan: NoisePlan, mode: GradSampleMode
    ) -> None:
        self.local, self.half, self.plan, self._mode = local, half, plan, mode
        # The gradient of a step is divided by it: an average must not tell how many
        # examples were drawn.
        self._expected = plan.rate * plan.drawn_from
        self._opacus = _import_opacus()
        local.model.train()
        _refuse_layers(local.model, self._opacus)
        self._trained = trainable(local.model)
        if not self._trained:
            refuse("model", type(local.model).__name__, "one with parameters to train")
        for name, p in self._trained.items():
            if p.dtype not in (torch.float32, torch.float64):
                refuse(
                    f"parameter {name!r}",
                    p.dtype,
                    "torch.float32 or torch.float64",
                    "what one example adds to a half-precision gradient is lost or "
                    "grows in rounding; freeze it, or train it in float32",
                )
        self._buffers = {n: b.clone() for n, b in local.model.named_buffers()}
        with self._explained(tells=True):
            self._wrapped = self._opacus.wrap[mode](local.model, loss_reduction="sum")
        try:
            with self._explained(tells=False):
                self._probe()
            self.optimizer = self.own_optimizer()
        except BaseException:
            self.end()
            raise

    @contextmanager
    def _explained(self, *, tells: bool) -> Iterator[None]:
        """Say what Opacus could not do; to the client alone where it saw the data."""
        try:
            yield
        except (IndexError, RuntimeError, TypeError) as error:
            said: object = error
            if not tells:
                log(ERROR, "the model has no gradient per example", exc_info=True)
                said = "the log of the client says what, which may quote its data"
            raise ValueError(
                f"the model has no gradient per example in mode={self._mode!r}: "
                f"{type(error).__name__}: {said}"
            ) from (error if tells else None)

    def batches(self) -> Iterator[Batch]:
        """Draw every step's batch: each example independently, maybe none."""
        data = self.local.train
        seed_torch(self.dropout_seed())
        for chosen in self.draws():
            rows = self.rows_of(chosen)
            yield {k: column[rows] for k, column in data.items()}
        self._keep_buffers()

    def rows_of(self, chosen: Tensor) -> Tensor:
        """Return the examples of those that were drawn: themselves."""
        return chosen

    def counts(self, batch: Batch) -> Tensor | None:
        """Return the examples of each that is clipped; None where it is one."""
        return None

    def take(self, batch: Batch) -> float:
        """Clip, add up, add noise and step; return the summed objective over q n.

        Algorithm 1 of Abadi et al. (2016), divided by the expected size of a batch.
        """
        model = self.local.model
        total, clipped = self.summed(batch)
        drawn = self.next_noise() if self.plan.noise_multiplier else {}
        # No hook after this one sees a gradient that is not noisy.
        self._wrapped.zero_grad(set_to_none=True)
        for name, p in self._trained.items():
            noisy = clipped.pop(p, None)
            if name in drawn:
                noise = torch.from_numpy(drawn[name]).to(p.device)
                noisy = noise if noisy is None else noise.add_(noisy)
            elif noisy is None:
                noisy = torch.zeros_like(p)
            # Rounding to the parameter's own type comes after the noise.
            p.grad = self.noised(noisy).to(p.dtype)
            p.grad /= self._expected
        # It knows no data: clipped, it would take room from the examples' gradients.
        extra = self._add_gradient(self.half.regularizer(model))
        self.half.after_backward(model)
        self.optimizer.step()
        return total / self._expected + extra

    def summed(self, batch: Batch) -> tuple[float, Gradients]:
        """Return the summed objective, and what float64 noise is added to."""
        size = num_examples(batch)
        total, parts = self._backward(batch) if size else (0.0, [])
        return total, clipped_sum(parts, size, self.plan.bound)

    def noised(self, total: Tensor) -> Tensor:
        """Return what is made of a noisy sum, before it is divided and rounded."""
        return total

    def _add_gradient(self, extra: Tensor | None) -> float:
        """Add the gradient of a term that knows no data."""
        if extra is None:
            return 0.0
        trained = list(self._trained.values())
        found = torch.autograd.grad(extra, trained, allow_unused=True)
        for p, gradient in zip(trained, found, strict=True):
            if gradient is not None and p.grad is not None:
                p.grad += gradient
        return float(extra.detach())

    def end(self) -> None:
        """Take Opacus' hooks off the model."""
        self._wrapped.to_standard_module()

    def _probe(self) -> None:
        """Compare with autograd: a gradient that hooks do not see is not clipped."""
        data = self.local.train
        size = num_examples(data)
        with torch.random.fork_rng(devices=[]):
            norms = []
            for i in range(min(size, _PROBES)):
                example = {name: c[i : i + 1] for name, c in data.items()}
                norms.append(self._seen_norm(example))
                if 0 < norms[-1] < math.inf:
                    break
            if not any(map(math.isfinite, norms)):
                raise ValueError(
                    f"no gradient of the first {len(norms)} examples is finite: has "
                    "the received model diverged?"
                )
            if size > 2:
                # Both batches have the same shape, so that dropout is the same.
                one, other = (self._losses_of(torch.tensor([0, i])) for i in (1, 2))
                terms = [self._term_after(torch.tensor([i])) for i in (0, 1, size - 1)]
                if not torch.allclose(terms[0], torch.stack(terms), equal_nan=True):
                    raise ValueError(
                        "a regularizer must know no data, since it is added after the "
                        "noise: that of the client half changes with what the model, "
                        "or the half, has seen"
                    )
                if not torch.allclose(one[0], other[0], rtol=1e-3, equal_nan=True):
                    raise ValueError(
                        "the loss of an example must not depend on the other examples "
                        "of its batch: a layer, Task.loss or the client half's "
                        "objective mixes them"
                    )
        self._wrapped.zero_grad(set_to_none=True)
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        """Refuse buffers that the data have changed: they are sent, without noise."""
        for name, buffer in self.local.model.named_buffers():
            if not torch.equal(buffer, self._buffers[name]):
                raise ValueError(
                    f"buffer {name!r} changed in training and is not private: a "
                    "layer keeps statistics of the data"
                )

    def _objective(self, batch: Batch) -> Tensor:
        losses = example_losses(self.local.task, self.local.model, batch)
        return per_example("objective", self.half.objective(losses, batch), batch)

    @torch.no_grad()
    def _losses_of(self, chosen: Tensor) -> Tensor:
        seed_torch(0)
        data = self.local.train
        return self._objective({name: column[chosen] for name, column in data.items()})

    @torch.no_grad()
    def _term_after(self, chosen: Tensor) -> Tensor:
        """Return the regularizer once the model has seen some examples."""
        self._losses_of(chosen)
        seed_torch(0)
        extra = self.half.regularizer(self.local.model)
        return torch.zeros(()) if extra is None else extra.detach().reshape(()).cpu()

    def _seen_norm(self, example: Batch) -> float:
        """Return the gradient norm of one example, which Opacus must see as well."""
        _, parts = self._backward(example)
        real = {
            name: 0.0 if p.grad is None else float(p.grad.double().norm())
            for name, p in self._trained.items()
        }
        total = math.hypot(*real.values())
        norms = {p: float(n) for part in parts for p, n in part.norms().items()}
        for name, p in self._trained.items() if math.isfinite(total) else ():
            seen = norms.get(p, 0.0)
            if not abs(seen - real[name]) <= 1e-3 * real[name] + 1e-5 * total:
                # Without the norms: the server reads it, and they are of raw data.
                raise ValueError(
                    f"parameter {name!r}: Opacus does not see all of an example's "
                    "gradient: Task.loss must use parameters through model(...) and "
                    "its layers only, with the batch as their first dimension"
                )
        return total

    def _backward(self, batch: Batch) -> tuple[float, list[Part]]:
        """Return the summed objective and the gradients of the examples."""
        self._wrapped.zero_grad(set_to_none=True)
        losses, counts = self._objective(batch), self.counts(batch)
        if counts is not None:  # of each user the mean
            losses = losses / counts.repeat_interleave(counts)
        self.backward(losses)
        return float(losses.detach().sum()), self._parts(len(losses), counts)

    def backward(self, losses: Tensor) -> None:
        """Go back through the model."""
        with _quiet():
            losses.sum().backward()  # type: ignore[no-untyped-call]

    def _parts(self, size: int, counts: Tensor | None) -> list[Part]:
        """Return the gradients that the backward pass has left."""
        if self._mode == "ghost":
            calls = self._wrapped.calls
            for call in calls:
                for value in (call.backprops, *call.inputs):
                    self._require_batch(call.module.parameters(), value, size)
            return parts_of_calls(calls, self._opacus.sampler, counts)
        parts: list[Part] = []
        for p in self._trained.values():
            found = p.grad_sample  # type: ignore[attr-defined]
            if found is not None:
                self._require_batch([p], found, size)
                of = partial(_rows_of, p, found)
                parts.append(explicit([p], size, of, counts, kept=True))
        return parts

    def _require_batch(
        self, parameters: Iterable[nn.Parameter], values: Tensor, size: int
    ) -> None:
        """Require values for every example of the batch."""
        if len(values) != size:
            names = {p: name for name, p in self._trained.items()}
            name = next(names[p] for p in parameters if p in names)
            raise ValueError(
                f"parameter {name!r} has gradients for {len(values)} examples in a "
                f"batch of {size}: the batch must be the first dimension in every layer"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch about hooks on layers whose input needs no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _refuse_layers(model: nn.Module, opacus: SimpleNamespace) -> None:
    """Refuse layers that mix examples or keep statistics of them."""
    mixing = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        problems: list[object] = []
        for kind, check in opacus.validators.items():
            # Opacus looks at trained layers only; a frozen BatchNorm mixes as well.
            mixes = isinstance(module, mixing) and module.training
            if isinstance(module, kind) and (trains or mixes):
                problems += check(module)
        if trains and _needed_inputs(module) > 1:
            problems.append("its forward needs more than one input, as DoRA's does")
        if getattr(module, "max_norm", None) is not None:
            problems.append("max_norm changes rows that the data choose, without noise")
        if trains and not problems and any(True for _ in module.buffers()):
            problems.append("a trained layer with buffers, which are not private")
        if problems:
            raise ValueError(
                f"layer {name or 'model'!r} ({type(module).__name__}) cannot be "
                f"trained with example-level privacy: {problems[0]}"
            )


def _needed_inputs(module: nn.Module) -> int:
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return sum(
        p.default is Parameter.empty and p.kind not in kinds
        for p in signature(module.forward).parameters.values()
    )


def _rows_of(p: Tensor, gradients: Tensor, rows: slice) -> Gradients:
    return {p: gradients[rows]}


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _is_trained(p: Tensor) -> bool:
    return p.requires_grad


def word(octets: bytes) -> int:
    """Return the integer that octets are."""
    return int.from_bytes(octets, "little")


def _poisson(
    size: int, rate: float, coins: np.random.Generator | None
) -> np.typing.NDArray[np.intp]:
    """Return the indices that fall into a batch."""
    if coins is not None:
        return np.flatnonzero(coins.random(size) < rate)
    words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
    return np.flatnonzero((words >> np.uint64(11)) * 2.0**-53 < rate)


def _import_opacus() -> SimpleNamespace:
    """Import what is used of Opacus."""
    try:
        from opacus.grad_sample import GradSampleModule
        from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
        from opacus.validators import ModuleValidator
    except ImportError as error:
        raise ImportError(
            "example-level privacy needs Opacus: pip install 'flower-ext[dp]'"
        ) from error

    class Remembering(GradSampleModule):  # type: ignore[misc]
        """Keeps what layers have seen instead of gradients per example."""

        def __init__(self, model: nn.Module, *, loss_reduction: str) -> None:
            super().__init__(model, loss_reduction=loss_reduction)
            self.calls: list[Call] = []
            self._taker: Callable[[Call], None] | None = None
            self._trained: set[nn.Module] = set()

        @contextmanager
        def handing_over(self, taker: Callable[[Call], None]) -> Iterator[None]:
            """Hand over what layers have seen, as the backward pass leaves them.

            Also of layers whose parameters have no gradients within.
            """
            every = self._module.modules()
            self._taker = taker
            self._trained = {x for x in every if any(map(_is_trained, _own(x)))}
            try:
                yield
            finally:
                self._taker = None

        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none)
            self.calls = []

        def capture_backprops_hook(
            self,
            module: nn.Module,
            _forward_input: object,
            forward_output: Sequence[Tensor],
            loss_reduction: str,
            batch_first: bool,
        ) -> None:
            inputs, backprops = self.rearrange_grad_samples(
                module=module,
                backprops=forward_output[0].detach(),
                loss_reduction=loss_reduction,
                batch_first=batch_first,
            )
            call = Call(module, inputs, backprops)
            (self._taker or self.calls.append)(call)

        def capture_activations_hook(
            self, module: nn.Module, forward_input: Sequence[Tensor], output: Tensor
        ) -> Tensor | None:
            if self._taker is None:
                super().capture_activations_hook(module, forward_input, output)
                return None
            awaited = module.training and torch.is_grad_enabled()
            if not (awaited and module in self._trained):
                return None
            cast("list[object]", module.activations).append(
                [x.detach() for x in forward_input]
            )
            # Else the pass would not come to a layer whose input needs no gradient.
            return output if output.requires_grad else output.requires_grad_()

    def sampler(module: nn.Module) -> Sampler:
        known = GradSampleModule.GRAD_SAMPLERS
        return cast(Sampler, known.get(type(module), ft_compute_per_sample_gradient))

    return SimpleNamespace(
        wrap={"hooks": GradSampleModule, "ghost": Remembering},
        sampler=sampler,
        validators=ModuleValidator.VALIDATORS,
    )
