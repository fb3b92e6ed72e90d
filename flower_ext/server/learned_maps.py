"""Maps from a large model to a small one that a server learns on public data."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from flower_ext.client.task import Batch, Task, tied_names
from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import refuse
from flower_ext.core.submodels import SliceMap, block

Kernels = dict[str, Tensor]


def band(kernel: Tensor, small: int, large: int) -> Tensor:
    r"""Return convolutions as matrices of shape ``(kernels, small, large)``.

    Row j holds the kernel from column j on::

        k0 k1 k2  .  .
         . k0 k1 k2  .
         .  . k0 k1 k2

    Parameters
    ----------
    kernel : Tensor
        Of shape ``(kernels, large - small + 1)``.

    Examples
    --------
    >>> band(torch.tensor([[1, 2]]), 2, 3)[0].tolist()
    [[1, 2, 0], [0, 1, 2]]
    """
    place = torch.arange(large) - torch.arange(small)[:, None]
    inside = (place >= 0) & (place < kernel.shape[1])
    return torch.where(inside, kernel[:, place.clamp(0, kernel.shape[1] - 1)], 0)


class ConvolutionMap:
    """A map to a small model and back by convolutions along each axis that shrinks.

    At first the kernels are 1 and then zeros, which is the map of slices. Axes that are
    whole stay as they are, and so do arrays that are not trained. There is a kernel for
    each axis and for each position of a convolutional filter.

    Parameters
    ----------
    slices : SliceMap
        The shapes of both models.
    names : iterable of str
        Of the arrays that are trained.
    """

    def __init__(self, slices: SliceMap, names: Iterable[str]) -> None:
        self.slices = slices
        self.kernels: Kernels = {}  # by way, name and axis
        for name in names:
            small, large = slices.small[name], slices.large[name]
            if small[2:] != large[2:]:
                cause = "of further axes no convolution is learned: keep them whole"
                refuse(f"shape of {name!r}", small, f"(..., *{large[2:]})", cause)
            for axis in range(min(len(small), 2)):
                if small[axis] < large[axis]:
                    size = large[axis] - small[axis] + 1
                    first = torch.zeros(int(np.prod(small[2:])), size).double()
                    first[:, 0] = 1.0
                    for way in ("down", "up"):
                        self.kernels[f"{way}/{name}/{axis}"] = first.clone()

    def of(self, way: str) -> list[Tensor]:
        """Return the kernels of ``down``, or of ``up``."""
        return [x for key, x in self.kernels.items() if key.startswith(f"{way}/")]

    def apply(self, way: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return arrays on the way, in float64; kernels get gradients if they may."""
        down = way == "down"
        goal = self.slices.small if down else self.slices.large
        return {
            name: self._apply(way, name, x, goal[name]) for name, x in arrays.items()
        }

    def _apply(self, way: str, name: str, x: Tensor, goal: tuple[int, ...]) -> Tensor:
        if x.shape == goal:
            return x
        small, large = self.slices.small[name], self.slices.large[name]
        planes = x.double().reshape(*x.shape[:2], *[1] * (2 - x.ndim), -1)
        if not any(f"{way}/{name}/{axis}" in self.kernels for axis in range(2)):
            # A statistic, or a counter.
            return x[block(small)] if way == "down" else _around(x, goal)
        for axis in range(2):
            kernel = self.kernels.get(f"{way}/{name}/{axis}")
            if kernel is not None:
                matrix = band(kernel, small[axis], large[axis])
                matrix = matrix if way == "down" else matrix.transpose(1, 2)
                equation = ("pij,jkp->ikp", "pij,kjp->kip")[axis]
                planes = torch.einsum(equation, matrix, planes)
        return planes.reshape(goal)

    def down(self, arrays: Arrays) -> Arrays:
        """Return the small model."""
        if not self.kernels:
            return self.slices.down(arrays)
        found = self.apply("down", tensors_of(arrays))
        return {name: x.numpy().astype(arrays[name].dtype) for name, x in found.items()}

    def up(self, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the change of the large model."""
        return self.apply("up", change)


class PublicLoss(nn.Module):
    """The mean loss of a task's model on public data, in evaluation mode.

    Parameters
    ----------
    task : Task
        Whose loss it is.
    model : Module
        Of the task; only its structure counts.
    public : dict[str, Tensor]
        The data.
    """

    def __init__(self, task: Task, model: nn.Module, public: Batch) -> None:
        super().__init__()
        self.model = model.eval()
        self._task, self._public = task, public
        self._left_out = frozenset(tied_names(model))

    def forward(self) -> Tensor:
        """Return the loss of the module as it is."""
        return self._task.loss(self.model, self._public).mean()

    def of(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the loss with these arrays; gradients flow through parameters."""
        own, trained = self.model.state_dict(), dict(self.model.named_parameters())
        values = {
            f"model.{name}": (x if name in trained else x.detach()).to(own[name].dtype)
            for name, x in arrays.items()
            if name in own and name not in self._left_out
        }
        found: Tensor = torch.func.functional_call(self, values, ())
        return found


def fit(
    loss: Callable[[], Tensor], parameters: list[Tensor], steps: int, rate: float
) -> tuple[float, float]:
    """Train tensors in place with Adam; keep the best of all steps, the start too.

    Parameters
    ----------
    loss : callable
        Of the tensors as they are.
    parameters : list of Tensor
        What is trained.
    steps : int
        How many; with 0 nothing changes.
    rate : float
        Adam's learning rate.

    Returns
    -------
    tuple of float
        The loss at the start, and the least.
    """
    if not steps:
        with torch.no_grad():
            found = float(loss())
        return found, found
    best = [x.clone() for x in parameters]
    with torch.enable_grad():
        adam = torch.optim.Adam([x.requires_grad_() for x in parameters], rate)
        value = loss()
        first = least = float(value.detach())
        for _ in range(steps):
            adam.zero_grad()
            torch.autograd.backward(value)
            adam.step()
            value = loss()
            if float(value.detach()) < least:
                least = float(value.detach())
                best = [x.detach().clone() for x in parameters]
    put(parameters, best)
    return first, least


def tensors_of(arrays: Arrays) -> dict[str, Tensor]:
    """Return copies as tensors."""
    return {name: torch.tensor(x) for name, x in arrays.items()}


def arrays_of(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return tensors as arrays."""
    return {name: x.numpy() for name, x in tensors.items()}


def put(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Put values into tensors, which want no gradients any more."""
    for x, value in zip(tensors, values, strict=True):
        x.requires_grad_(False).copy_(value)


def _around(x: Tensor, goal: tuple[int, ...]) -> Tensor:
    large = torch.zeros(goal, dtype=x.dtype)
    large[block(tuple(x.shape))] = x
    return large
