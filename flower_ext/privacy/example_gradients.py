"""Clipped sums of gradients per example, with a bound that rounding cannot break.

The server picks the weights, and so the terms that cancel in a gradient. Three rules
keep an example from moving a sum by more than the clipping norm even so:

* a norm is that of the very numbers that are added up. It is never derived from
  products of inputs and backpropagated gradients (Gram matrices), in which rounding can
  lose a norm of any size;
* norms and sums are in float64;
* what is computed twice counts with the larger norm.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

# By parameter.
Gradients = dict[Tensor, Tensor]
Sampler = Callable[[nn.Module, list[Tensor], Tensor], Gradients]

#: Of the clipping norm, left for the rounding of a float64 sum of 100,000 examples.
SLACK = 1e-6
# Numbers of a layer's gradients per example that are computed at a time: 16 MB.
_AT_A_TIME = 2**22
# Of those, numbers that are float64 at a time: what a processor's cache holds.
_IN_CACHE = 2**17


class Part(Protocol):
    """The gradients of a batch's examples, by some parameters of a model.

    Where users are clipped and not examples, those of its users.
    """

    def norms(self) -> Gradients:
        """Return each parameter's gradient norms, float64 of shape ``(batch,)``."""

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return the sum over examples in float64; those of weight 0 are left out."""


class Explicit:
    """Gradients per example that are looked up, or computed, a few at a time.

    Parameters
    ----------
    parameters : sequence of Parameter
        Whose gradients they are.
    size : int
        Examples in the batch.
    of : callable
        ``slice of examples -> {parameter: gradients}``, shapes ``(examples, *shape)``.
    kept : bool (default: False)
        Whether ``of`` gives the same numbers again. What it computes anew may round
        differently, and counts with the larger norm.
    most : int (default: 1)
        Gradients that ``of`` needs for one of those that it gives.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        size: int,
        of: Callable[[slice], Gradients],
        *,
        kept: bool = False,
        most: int = 1,
    ) -> None:
        self._parameters, self._size = parameters, size
        self._of, self._kept, self._most = of, kept, most
        self._norms: Gradients = {
            p: torch.zeros(size, dtype=torch.float64, device=p.device)
            for p in parameters
        }
        for rows, found in self._pieces():
            for p, flat in found.items():
                self._norms[p][rows] = _norms(flat)

    def _pieces(self) -> Iterator[tuple[slice, Gradients]]:
        numbers = self._most * sum(p.numel() for p in self._parameters)
        step = max(1, _AT_A_TIME // max(1, numbers))
        for low in range(0, self._size, step):
            rows = slice(low, min(low + step, self._size))
            found = self._of(rows)
            yield rows, {p: g.reshape(len(g), p.numel()) for p, g in found.items()}

    def norms(self) -> Gradients:
        """Return each parameter's gradient norms."""
        return self._norms

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return the sum over examples."""
        total: Gradients = {}
        total |= {p: torch.zeros_like(p, dtype=torch.float64) for p in self._parameters}
        for rows, found in self._pieces():
            for p, flat in found.items():
                used, first = weights[rows], self._norms[p][rows]
                if not self._kept:
                    # The weights are for the norms found before: where this one is
                    # larger, what is added is scaled down to that.
                    now = _norms(flat)
                    used = used * torch.where(now > first, first / now, 1.0)
                    used = torch.where(now.isfinite(), used, 0.0)
                total[p] += _weighted_sum(used, flat).view_as(p)
        return total


def explicit(
    parameters: Sequence[nn.Parameter],
    size: int,
    of: Callable[[slice], Gradients],
    counts: Tensor | None = None,
    *,
    kept: bool = False,
) -> Explicit:
    """Return gradients per example, or their sums over the examples of each user.

    Parameters
    ----------
    parameters, size, of, kept
        See :class:`Explicit`.
    counts : Tensor, optional
        Examples of each user, side by side, shape ``(users,)``; each at least 1.
    """
    if counts is None:
        return Explicit(parameters, size, of, kept=kept)
    ends = [0, *accumulate(counts.tolist())]

    def of_users(rows: slice) -> Gradients:
        found = of(slice(ends[rows.start], ends[rows.stop]))
        return {
            # The sum first, then its norm: examples that cancel may add up to little.
            p: torch.segment_reduce(
                g.reshape(len(g), p.numel()).double(), "sum", lengths=counts[rows]
            )
            for p, g in found.items()
        }

    return Explicit(parameters, len(counts), of_users, most=int(counts.max()))


def _blocks(flat: Tensor) -> Iterator[Tensor]:
    for block in flat.split(max(1, _IN_CACHE // len(flat)), dim=1):  # type: ignore[no-untyped-call]
        yield block.double()


def _norms(flat: Tensor) -> Tensor:
    # Float64 before squaring: large float32 gradients would overflow, tiny ones vanish.
    squares = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    for block in _blocks(flat):
        squares += block.square().sum(dim=1)
    return squares.sqrt()


def _weighted_sum(weights: Tensor, flat: Tensor) -> Tensor:
    used = weights > 0
    if not used.all():  # 0 times infinity is no 0
        weights, flat = weights[used], flat[used]
    if not len(flat):
        return torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
    return torch.cat([weights @ block for block in _blocks(flat)])


class OuterProducts:
    """Gradients of a Linear layer that sees one vector an example: never formed.

    The norm of an outer product is the product of the norms, so that nothing cancels.
    """

    def __init__(self, layer: nn.Linear, inputs: Tensor, backprops: Tensor) -> None:
        self._layer, self._inputs = layer, inputs
        self._backprops = backprops.double()
        self._lengths = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float64)

    def norms(self) -> Gradients:
        """Return each parameter's gradient norms."""
        layer, found = self._layer, {}
        outer = self._backprops.norm(dim=1)
        if layer.weight.requires_grad:
            found[layer.weight] = outer * self._lengths
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = outer
        return found

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return the sum over examples."""
        inputs, backprops, used = self._inputs, self._backprops, weights > 0
        if not used.all():  # 0 times infinity is no 0
            inputs, backprops, weights = inputs[used], backprops[used], weights[used]
        outer = weights[:, None] * backprops
        layer, total = self._layer, {}
        if layer.weight.requires_grad:
            total[layer.weight] = self._product(outer, inputs)
        if layer.bias is not None and layer.bias.requires_grad:
            total[layer.bias] = outer.sum(dim=0)
        return total

    def _product(self, outer: Tensor, inputs: Tensor) -> Tensor:
        return outer.T @ inputs.double()


class Rows:
    """Gradients of an Embedding: sums over an example's tokens of one kind, kept."""

    def __init__(
        self,
        layer: nn.Embedding,
        tokens: Tensor,
        backprops: Tensor,
        counts: Tensor | None = None,
    ) -> None:
        self._weight = layer.weight
        tokens = tokens.reshape(len(tokens), -1)
        owners = torch.arange(len(tokens), device=tokens.device)
        if counts is not None:
            owners = owners[: len(counts)].repeat_interleave(counts)
        self._size = len(tokens) if counts is None else len(counts)
        owners = owners[:, None].expand_as(tokens)
        pairs = torch.stack([owners, tokens], dim=-1).view(-1, 2)
        # One row for each token of each example, or user: a token that one has twice
        # adds up before the norm is taken.
        (self._pairs, places) = torch.unique(pairs, dim=0, return_inverse=True)
        width = backprops.shape[-1]
        self._sums = backprops.new_zeros(
            len(self._pairs), width, dtype=torch.float64
        ).index_add_(0, places, backprops.reshape(-1, width).double())

    def norms(self) -> Gradients:
        """Return the gradient norms of the table."""
        squares = self._sums.new_zeros(self._size)
        squares.index_add_(0, self._pairs[:, 0], self._sums.square().sum(dim=1))
        return {self._weight: squares.sqrt()}

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return the sum over examples."""
        used = weights[self._pairs[:, 0], None]
        rows = torch.where(used > 0, used * self._sums, 0.0)
        total = torch.zeros_like(self._weight, dtype=torch.float64)
        return {self._weight: total.index_add_(0, self._pairs[:, 1], rows)}


@torch.no_grad()
def clipped_sum(parts: Iterable[Part], size: int, clipping_norm: float) -> Gradients:
    """Return the sum of gradients, each scaled down to the clipping norm, in float64.

    Parameters
    ----------
    parts : iterable of Part
        The gradients; every parameter is in one part at most.
    size : int
        Examples in the batch, at least 1.
    clipping_norm : float
        C, finite. An example moves the sum by no more than C over all parameters; one
        whose gradient is not finite does not move it.
    """
    parts = list(parts)
    norms = [norm for part in parts for norm in part.norms().values()]
    if not norms:
        return {}
    device = norms[0].device
    total = torch.stack([norm.to(device) for norm in norms]).norm(dim=0)
    weights = clipping_weights(total, clipping_norm)
    found: Gradients = {}
    for part in parts:
        found |= part.weighted_sum(weights)
    return found


def clipping_weights(norms: Tensor, clipping_norm: float) -> Tensor:
    """Return what to multiply by, for each float64 norm; 0 where it is not finite."""
    # A norm of 0 gives infinity, which is 1 after clamping.
    weights = (clipping_norm * (1 - SLACK) / norms).clamp(max=1.0)
    return torch.where(norms.isfinite(), weights, 0.0)


class Call(NamedTuple):
    """One use of a layer: what came in, and the gradient of what went out."""

    module: nn.Module
    inputs: Sequence[Tensor]
    backprops: Tensor


@torch.no_grad()
def parts_of_calls(
    calls: Iterable[Call],
    sampler: Callable[[nn.Module], Sampler],
    counts: Tensor | None = None,
) -> list[Part]:
    """Return the gradients of a backward pass, from what its layers have seen.

    Parameters
    ----------
    calls : iterable of Call
        All uses of layers with trained parameters. Where some share a parameter (tied
        weights, a layer that is used twice) an example's gradient is their sum.
    sampler : callable
        What computes a layer's gradients per example, as Opacus has it.
    counts : Tensor, optional
        See :func:`explicit`.
    """
    groups: list[tuple[dict[nn.Parameter, None], list[Call]]] = []
    for call in calls:
        trained = [p for p in call.module.parameters() if p.requires_grad]
        # Calls that share a parameter, be it through a third one, are one group: the
        # norm of their sum cannot be told from their norms.
        own, members, others = dict.fromkeys(trained), [call], []
        for group in groups:
            if group[0].keys() & own.keys():
                own, members = {**group[0], **own}, [*group[1], *members]
            else:
                others.append(group)
        groups = [*others, (own, members)]
    return [_part(list(own), members, sampler, counts) for own, members in groups]


def _part(
    parameters: Sequence[nn.Parameter],
    calls: Sequence[Call],
    sampler: Callable[[nn.Module], Sampler],
    counts: Tensor | None,
) -> Part:
    module, inputs, backprops = calls[0]
    # The short cuts hold for a layer that is used once, and for one vector an example.
    if len(calls) == 1 and isinstance(module, nn.Embedding):
        return Rows(module, inputs[0], backprops, counts)
    one = len(calls) == 1 and counts is None
    if one and isinstance(module, nn.Linear) and inputs[0].ndim == 2:
        return OuterProducts(module, inputs[0], backprops)

    if counts is not None and all(type(x.module) is nn.Linear for x in calls):
        # A user's vectors in a row: a Linear layer adds them up as it does tokens.
        calls, counts = [_in_a_row(call, counts.tolist()) for call in calls], None
    of = partial(gradients_of_calls, calls, sampler)
    return explicit(parameters, len(calls[0].backprops), of, counts)


def _in_a_row(call: Call, counts: list[int]) -> Call:
    """Put the examples of each user into one, as long as the longest; the rest is 0."""

    def rows(values: Tensor) -> Tensor:
        pieces = list(torch.split(values, counts))
        return nn.utils.rnn.pad_sequence(pieces, batch_first=True)

    module, inputs, backprops = call
    return Call(module, [rows(value) for value in inputs], rows(backprops))


def gradients_of_calls(
    calls: Sequence[Call], sampler: Callable[[nn.Module], Sampler], rows: slice
) -> Gradients:
    """Return the gradients of some examples, formed, over all uses of layers."""
    total: Gradients = {}
    for module, inputs, backprops in calls:
        piece = [value[rows] for value in inputs]
        found = sampler(module)(module, piece, backprops[rows])
        for p, gradients in found.items():
            if p.requires_grad:
                total[p] = total[p] + gradients if p in total else gradients
    return total
