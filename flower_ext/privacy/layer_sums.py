r"""Clipped sums of one layer's gradients per example, formed at most once.

Where each layer has a clipping norm of its own, an example's factor is known as soon as
its gradient in that layer is: a few examples are computed, clipped, added up and
forgotten. The rules are those of :mod:`flower_ext.privacy.example_gradients`, but for
two kinds of layers: on sequences a bound of the norm is enough, and where a layer sees
one vector an example a bound of the sum's rounding is.

**Linear layers on sequences.** An example's gradient is
:math:`G = \sum_t b_t a_t^T` over its places t, with inputs :math:`a_t` and
backpropagated gradients :math:`b_t`. It need not be formed:
:math:`\|G\|^2 = \sum_{s,t} \langle a_s, a_t \rangle \langle b_s, b_t \rangle`. That sum
may cancel under the weights that a server picks, and then rounding decides what is left
of it. So it is computed in float64, and what rounding can have taken is added:

.. math:: \hat N^2 = \sum_{s,t} \langle a_s, a_t \rangle \langle b_s, b_t \rangle
   + 2 u (p + d + T^2 + 10) S^2, \qquad S = \sum_t \|a_t\| \|b_t\|,

where u is float64's unit, p and d are the lengths of a and b, and T is the number of
places: sums of k products err by less than :math:`k u` times the sum of absolute values
(to first order; the factor 2 covers the rest), and those are at most
:math:`\|a_s\| \|a_t\| \|b_s\| \|b_t\|`, the sum of which is :math:`S^2`. Then
:math:`\hat N \ge \|G\|` for every input.

The clipped sum is one product of matrices, of terms that may cancel as well. Its
rounding is at most :math:`k u \sum_i w_i S_i` for k additions to a number, so that
:math:`w_i S_i` must be bounded. :math:`\hat N` is therefore at least
:math:`S / \kappa`, with :math:`\kappa` such that rounding stays within half of the
share of the clipping norm that is left for it. With 64 examples of a thousand places
:math:`\kappa` is in the thousands: only what cancels to less than that part of itself
is clipped by more than its norm.

**Linear layers on one vector an example.** Gradients are outer products
:math:`b_i a_i^T`, so that nothing cancels within an example: its norm is
:math:`\|a_i\| \|b_i\|`, in float64. The sum of products with the factors
:math:`w_i \le C' / (\|a_i\| \|b_i\|)` may be taken in float32, which halves its price,
if what rounding makes of it fits beside an example's share. It is taken over m of the n
examples at a time, and over these pieces in float64. In a piece each term is rounded
with :math:`w_i b_i`, as a product, and in at most m - 1 additions, in whatever order.
With float32's unit :math:`v = 2^{-24}` the error of the sum, in Frobenius norm, is then
at most (Higham 2002, section 3.1)

.. math:: \frac{(m + 1) v}{1 - (m + 1) v} \sum_i w_i \|a_i\| \|b_i\|
   \le \frac{(m + 1) v}{1 - (m + 1) v} \, n C'.

Of two batches that differ in one example both err, each by as much at most. With
:math:`C' = (1 - s) C` and :math:`2 n (m + 1) v \le s` the example moves the sum by no
more than :math:`(1 - s)(1 + 1.0001 s) C`. For s = 1 % nearly :math:`10^{-4} C` are left
for float64's rounding and for what float32 loses near 0, less than :math:`2^{-126}` at
a time. The bound is one of how the sum is taken, and not of the factors. So where it
would not hold (batches too large for pieces that pay, inputs out of range, a processor
that may multiply matrices in TF32 or bfloat16, as GPUs do) the same sum is taken in
float64, whatever decides that.

References
----------
Higham 2002, "Accuracy and stability of numerical algorithms", second edition.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from flower_ext.privacy.example_gradients import (
    SLACK,
    Call,
    Explicit,
    Gradients,
    OuterProducts,
    Rows,
    Sampler,
    clipped_sum,
    gradients_of_calls,
)

#: Expected examples of a batch up to which sums of outer products are float32.
SINGLE_BATCH = 1024
#: Of a layer's clipping norm, left for their rounding.
SINGLE_SLACK = 0.01

_UNIT = 2.0**-53
_SINGLE_UNIT = 2.0**-24
# Examples of a piece below which float64 is as fast.
_FEW = 64
# Where underflow is far below the slack, and no sum overflows.
_CLIPPING_NORMS = (2.0**-20, 2.0**100)
_LONGEST = 2.0**30
# Numbers in float64 that are worked on at a time: 8 MB.
_AT_A_TIME = 2**20
# Numbers of gradients that are formed at a time, if one example's are not more.
_IN_CACHE = 2**18
# Numbers of one example's gradient from which on examples are added one by one.
_LARGE = 2**13


class Sequences:
    """Gradients of a Linear layer that sees several vectors an example: never formed.

    Parameters
    ----------
    layer : Linear
        Whose gradients they are.
    inputs, backprops : Tensor
        Shapes ``(examples, places, p)`` and ``(examples, places, d)``, float64.
    examples, additions : int
        Examples of the batch, and the most additions to one number of its sum.
    """

    def __init__(
        self,
        layer: nn.Linear,
        inputs: Tensor,
        backprops: Tensor,
        examples: int,
        additions: int,
    ) -> None:
        self._layer, self._inputs, self._backprops = layer, inputs, backprops
        self._examples, self._additions = examples, additions
        self._bias = layer.bias is not None and layer.bias.requires_grad
        self._sums = backprops.sum(dim=1) if self._bias else None

    def norms(self) -> Gradients:
        """Return each parameter's gradient norms, or more than them."""
        layer, found = self._layer, {}
        if layer.weight.requires_grad:
            found[layer.weight] = self._bounds()
        if self._sums is not None:
            found[layer.bias] = self._sums.norm(dim=1)
        return found

    def _bounds(self) -> Tensor:
        a, b = self._inputs, self._backprops
        places = a.shape[1]
        of_a, of_b = a @ a.mT, b @ b.mT
        lengths = [g.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for g in (of_a, of_b)]
        most = (lengths[0] * lengths[1]).sum(dim=1)
        squares = (of_a * of_b).sum(dim=(1, 2)).clamp(min=0)
        lost = 2 * _UNIT * (a.shape[2] + b.shape[2] + places**2 + 10)
        kappa = SLACK / (4 * _UNIT * self._additions * self._examples)
        return torch.maximum((squares + lost * most.square()).sqrt(), most / kappa)

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return the sum over examples."""
        layer, total = self._layer, {}
        a, b, sums = self._inputs, self._backprops, self._sums
        used = weights > 0
        if not used.all():  # 0 times infinity is no 0
            a, b, weights = a[used], b[used], weights[used]
            sums = None if sums is None else sums[used]
        if layer.weight.requires_grad:
            scaled = (b * weights[:, None, None]).flatten(0, 1)
            total[layer.weight] = scaled.T @ a.flatten(0, 1)
        if sums is not None:
            total[layer.bias] = weights @ sums
        return total


class SingleProducts(OuterProducts):
    """Outer products whose sum is in float32, where that is provably enough."""

    def _product(self, outer: Tensor, inputs: Tensor) -> Tensor:
        size = len(inputs)
        most = int(SINGLE_SLACK / (2 * _SINGLE_UNIT * max(1, size))) - 1
        # Not "all below": what is not finite has weight 0 and is no longer here.
        long = bool((self._lengths > _LONGEST).any())
        sure = inputs.device.type == "cpu" and _multiplies_in_single()
        if most < min(_FEW, size) or long or not sure:
            return super()._product(outer, inputs)
        pieces = max(1, math.ceil(size / most))
        rows = zip(
            outer.float().tensor_split(pieces),
            inputs.tensor_split(pieces),
            strict=True,
        )
        with torch.autocast(inputs.device.type, enabled=False):
            sums = (b.T @ a for b, a in rows)
            total = next(sums)
            for found in sums:
                total = found.double().add_(total)
        return total


def _multiplies_in_single() -> bool:
    """Whether products of float32 matrices on a CPU round to float32 and no more."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    setting = (
        torch.get_float32_matmul_precision()
        if matmul is None  # torch before 2.9
        else matmul.fp32_precision
    )
    return setting in ("highest", "ieee", "none") and _tried()


@cache
def _tried() -> bool:
    """Try it: environment variables may say otherwise as well."""
    size, number = 128, 1 + 2.0**-12  # which TF32 and bfloat16 round to 1
    values = torch.full((size, size), number)
    with torch.autocast("cpu", enabled=False):
        error = (values @ values).double() - size * number**2
    return bool(error.abs().max() <= 2 * size**2 * _SINGLE_UNIT)


@torch.no_grad()
def clipped_layer(
    calls: Sequence[Call],
    sampler: Callable[[nn.Module], Sampler],
    clipping_norm: float,
    *,
    single: bool = False,
) -> Gradients:
    """Return the sum of a layer's gradients, each scaled down to the clipping norm.

    Parameters
    ----------
    calls : sequence of Call
        All uses of the layer and of those that share parameters with it, of one batch.
    sampler : callable
        What computes a layer's gradients per example, as Opacus has it.
    clipping_norm : float
        Of an example's gradient over all parameters of these layers, finite.
    single : bool (default: False)
        Whether float32 may do for a sum of outer products; their clipping norm is
        smaller by :data:`SINGLE_SLACK` then. It must not depend on the batch.

    Returns
    -------
    dict[Parameter, Tensor]
        In float64; in float32 where all of a sum is.
    """
    module, inputs, backprops = calls[0]
    size, alone = len(backprops), len(calls) == 1
    if alone and isinstance(module, nn.Embedding):
        return clipped_sum([Rows(module, inputs[0], backprops)], size, clipping_norm)
    if alone and isinstance(module, nn.Linear):
        if inputs[0].ndim == 2:
            kind = OuterProducts
            if single and _may_be_single(inputs[0], backprops, clipping_norm):
                kind, clipping_norm = SingleProducts, clipping_norm * (1 - SINGLE_SLACK)
            part = kind(module, inputs[0], backprops)
            return clipped_sum([part], size, clipping_norm)
        if _without_forming(inputs[0], backprops):
            return _sequences(module, inputs[0], backprops, clipping_norm)
    numbers = sum(p.numel() for p in {p for call in calls for p in _trained(call)})
    step = max(1, _IN_CACHE // max(1, numbers))
    add = _add_one_by_one if numbers >= _LARGE else _add_together
    total: Gradients = {}
    for low in range(0, size, step):
        rows = slice(low, min(low + step, size))
        found = gradients_of_calls(calls, sampler, rows)
        for p in found.keys() - total.keys():
            total[p] = torch.zeros_like(p, dtype=torch.float64)
        add(total, found, clipping_norm)
    return total


def _may_be_single(inputs: Tensor, backprops: Tensor, clipping_norm: float) -> bool:
    """Whether it may, as far as no example has a say in it."""
    # Nor does the device: with a seed the same noise may come on another one.
    low, high = _CLIPPING_NORMS
    return low <= clipping_norm <= high and all(
        x.dtype == torch.float32 for x in (inputs, backprops)
    )


def _trained(call: Call) -> list[nn.Parameter]:
    return [p for p in call.module.parameters() if p.requires_grad]


def _add_one_by_one(total: Gradients, found: Gradients, clipping_norm: float) -> None:
    """Add examples of which each fills a processor's cache."""
    for example in zip(*found.values(), strict=True):
        rows = [g.double().flatten() for g in example]
        norm = math.sqrt(sum(float(row @ row) for row in rows))
        if math.isfinite(norm):
            factor = min(1.0, clipping_norm * (1 - SLACK) / norm) if norm else 1.0
            for p, row in zip(found, rows, strict=True):
                total[p].view(-1).add_(row, alpha=factor)


def _add_together(total: Gradients, found: Gradients, clipping_norm: float) -> None:
    """Add small gradients of many examples."""
    own = [p for p in found if isinstance(p, nn.Parameter)]
    size = len(next(iter(found.values())))

    def of(rows: slice) -> Gradients:
        return {p: g[rows] for p, g in found.items()}

    part = Explicit(own, size, of, kept=True)
    for p, clipped in clipped_sum([part], size, clipping_norm).items():
        total[p] += clipped


def _without_forming(inputs: Tensor, backprops: Tensor) -> bool:
    """Whether products of a layer's inputs cost well below its gradients."""
    places = inputs[0].numel() // inputs.shape[-1]
    p, d = inputs.shape[-1], backprops.shape[-1]
    return 8 * places * (p + d) <= p * d


def _sequences(
    layer: nn.Linear, inputs: Tensor, backprops: Tensor, clipping_norm: float
) -> Gradients:
    size, a, b = len(inputs), inputs.flatten(1, -2), backprops.flatten(1, -2)
    step = max(1, _AT_A_TIME // (a[0].numel() + b[0].numel()))
    additions = step * a.shape[1] + math.ceil(size / step)
    total: Gradients = {}
    for low in range(0, size, step):
        of_a, of_b = (x[low : low + step].double() for x in (a, b))
        part = Sequences(layer, of_a, of_b, size, additions)
        for p, found in clipped_sum([part], len(of_a), clipping_norm).items():
            # In place: a sum is as large as the layer.
            total[p] = total[p].add_(found) if p in total else found
    return total
