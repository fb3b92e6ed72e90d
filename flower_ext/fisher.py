r"""Diagonal Fisher estimators of a trained torch model.

The diagonal (empirical) Fisher of a model :math:`p_\theta` on data is
:math:`F_j = \mathbb{E}\,(\partial_j \log p_\theta(y \mid x))^2`. From minibatch
gradients it comes for free but about ``1/batch_size`` of its size near an optimum;
per example it costs one more pass.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.hooks import RemovableHandle

from flower_ext.errors import whole

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


class SquaredGradients:
    """Mean of squared minibatch gradients, collected while a model trains.

    Fed either by :meth:`add` after each backward pass, or, in a training loop that is
    not ours, by hooks (:meth:`watch`).

    Parameters
    ----------
    model : torch.nn.Module
        Its trainable parameters are looked at; one that a pass does not reach has a
        gradient of 0 there. Sums are kept in float32.
    window : int
        Number of passes that count, at least 1. The sums start anew every ``window``
        passes: with the number of batches in an epoch, what is there after training
        for whole epochs is that of the last one. Gradients must be zeroed before each
        backward pass, as is usual.
    skip : int (default: 0)
        Passes to ignore before the first window.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> squares = SquaredGradients(model, window=2).watch()
    >>> for x in (5.0, 1.0, 3.0, 2.0):  # two epochs of two batches
    ...     model.zero_grad()
    ...     model(torch.tensor([x])).backward()
    >>> squares.mean()  # (3**2 + 2**2) / 2
    {'weight': tensor([[6.5000]])}
    """

    def __init__(self, model: nn.Module, window: int, skip: int = 0) -> None:
        whole("window", window, 1, "a loader without batches?")
        whole("skip", skip, 0)
        self._parameters = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }
        self._sums = {
            name: torch.zeros_like(p, dtype=torch.float32)
            for name, p in self._parameters.items()
        }
        self._passes = -skip
        self._window = window
        self._outdated = set(self._sums)  # sums that hold no pass of this window
        self._seen: set[str] = set()  # parameters that this pass has reached
        self._hooks: list[RemovableHandle] = []

    def add(self) -> None:
        """Take in the gradients of one backward pass."""
        self._next_pass()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._take(name, parameter.grad)

    def watch(self) -> "SquaredGradients":
        """Take in gradients from now on as they are computed; returns itself."""
        for name, parameter in self._parameters.items():
            self._hooks.append(
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p, name=name: self._on_gradient(name, p.grad)
                )
            )
        return self

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        # Nothing says where a pass begins but a parameter that comes a second time.
        if not self._seen or name in self._seen:
            self._next_pass()
        self._seen.add(name)
        self._take(name, gradient)

    def _next_pass(self) -> None:
        self._seen.clear()
        if self._passes >= 0 and self._passes % self._window == 0:
            self._outdated.update(self._sums)
        self._passes += 1

    def _take(self, name: str, gradient: Tensor) -> None:
        if self._passes <= 0:
            return
        gradient = gradient.detach().float()
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if self._sums[name].device != gradient.device:
            self._sums[name] = torch.zeros_like(gradient)
        if name in self._outdated:
            self._outdated.discard(name)
            torch.mul(gradient, gradient, out=self._sums[name])
        else:
            self._sums[name].addcmul_(gradient, gradient)

    def mean(self) -> dict[str, Tensor]:
        """Stop watching; return the mean over the last window, float32 by name."""
        while self._hooks:
            self._hooks.pop().remove()
        counted = (self._passes - 1) % self._window + 1 if self._passes > 0 else 1
        return {
            name: torch.zeros_like(total) if name in self._outdated else total / counted
            for name, total in self._sums.items()
        }

    def record(self) -> ArrayRecord:
        """Stop watching; return the mean as the record a reply carries."""
        return tensor_record(self.mean())


def tensor_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return named tensors as an ArrayRecord."""
    return ArrayRecord(OrderedDict((name, t.cpu()) for name, t in tensors.items()))


def per_example(
    model: nn.Module, loss: Loss, data: Iterator[Batch]
) -> dict[str, Tensor]:
    """Return the mean over examples of squared per-example gradients, float32.

    Parameters
    ----------
    model : torch.nn.Module
        Where to take the gradients; run in evaluation mode.
    loss : callable
        ``(model, batch) -> losses`` of shape ``(batch,)``, minus the log-likelihood.
    data : iterator of batches
        One pass over the data.

    Notes
    -----
    Gradients of a batch come from one vectorised pass (``torch.func``), or, where a
    layer cannot be vectorised (recurrent ones), from one pass per example.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = [{"x": torch.tensor([[1.0], [2.0]])}, {"x": torch.tensor([[3.0]])}]
    >>> per_example(model, lambda model, batch: model(batch["x"])[:, 0], iter(data))
    {'weight': tensor([[4.6667]])}
    """
    was_training = model.training
    model.eval()
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    sums = {
        name: torch.zeros_like(p, dtype=torch.float32) for name, p in trainable.items()
    }
    wrapped = _Loss(model, loss)

    def example_loss(
        parameters: dict[str, Tensor], example: dict[str, Tensor]
    ) -> Tensor:
        batch = {name: column.unsqueeze(0) for name, column in example.items()}
        named = {f"model.{name}": p for name, p in parameters.items()}
        return functional_call(wrapped, named, (batch,)).squeeze()  # type: ignore[no-any-return]

    one = grad(example_loss)
    many = vmap(one, in_dims=(None, 0), randomness="different")
    vectorised = not any(isinstance(m, nn.RNNBase) for m in model.modules())
    count = 0
    for batch in data:
        size = len(next(iter(batch.values())))
        found: Iterable[dict[str, Tensor]] = ()
        if vectorised:
            try:
                found = [many(trainable, dict(batch))]
            except RuntimeError:  # recurrent cells, a loss that calls ``item()``
                vectorised = False
        if not vectorised:
            found = (
                one(trainable, {name: column[i] for name, column in batch.items()})
                for i in range(size)
            )
        for gradients in found:
            for name, g in gradients.items():
                sums[name] += g.float().square().sum_to_size(sums[name].shape)
        count += size
    model.train(was_training)
    return {name: total / max(count, 1) for name, total in sums.items()}


class _Loss(nn.Module):
    """A module whose output is the loss, for ``functional_call``."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)
