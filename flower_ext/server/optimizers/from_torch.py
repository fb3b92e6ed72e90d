"""Any optimizer of torch on the server."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from flower_ext.core.arrays import Arrays, is_parameter
from flower_ext.core.errors import refuse
from flower_ext.server.optimizers.base import ServerOptimizer, apply_direction, working

if TYPE_CHECKING:
    import torch


class TorchOptimizer(ServerOptimizer):
    """Any optimizer of ``torch.optim`` on the server.

    Parameters
    ----------
    factory : callable
        ``parameters -> torch.optim.Optimizer``, for example
        ``functools.partial(torch.optim.AdamW, lr=1e-3)``. An optimizer that needs a
        closure (LBFGS) does not fit. A factory that is picklable (no lambda) keeps
        the strategy picklable.

    Examples
    --------
    >>> import functools, numpy as np, torch
    >>> optimizer = TorchOptimizer(functools.partial(torch.optim.SGD, lr=0.5))
    >>> optimizer.step({"w": np.ones(2)}, {"w": np.array([1.0, -1.0])})
    {'w': array([1.5, 0.5])}
    """

    def __init__(
        self,
        factory: "Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]",
    ) -> None:
        super().__init__()
        if not callable(factory):
            refuse("factory", factory, "callable: parameters -> torch.optim.Optimizer")
        self.factory = factory

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model, see :meth:`ServerOptimizer.step`."""
        import torch

        parameters = {}
        for name, array in sent.items():
            if is_parameter(name, array):
                work = working(array)
                parameter = torch.nn.Parameter(torch.tensor(array.astype(work)))
                # The optimizer minimises: the direction is the negative gradient.
                parameter.grad = -torch.tensor(direction.pop(name).astype(work))
                parameters[name] = parameter
        # A new optimizer each round, which continues from the state kept by name:
        # between rounds no parameters are held, and checkpoints look like those of the
        # others.
        optimizer = self.factory(parameters.values())
        self._restore(optimizer, parameters)
        optimizer.step()
        # The moments of arrays that do not move in this round stay as they are.
        for name, parameter in parameters.items():
            for slot, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    self.state.setdefault(slot, {})[name] = value.numpy()
        return {
            name: parameters[name].detach().numpy().astype(array.dtype)
            if name in parameters
            else apply_direction(array, direction.pop(name))
            for name, array in sent.items()
        }

    def _restore(
        self,
        optimizer: "torch.optim.Optimizer",
        parameters: "dict[str, torch.nn.Parameter]",
    ) -> None:
        import torch

        for slot, arrays in self.state.items():
            for name in arrays.keys() & parameters.keys():
                kept = torch.from_numpy(np.array(arrays[name]))
                optimizer.state[parameters[name]][slot] = kept

    @property
    def kind(self) -> str:
        """Which optimizer the moments belong to, see :attr:`ServerOptimizer.kind`."""
        factory = getattr(self.factory, "func", self.factory)
        name = getattr(factory, "__name__", type(factory).__name__)
        return f"{type(self).__name__}({name})"

    def __repr__(self) -> str:
        """Name the optimizer and its settings, for ``summary()``."""
        import torch

        # Only an optimizer that has been made knows its defaults.
        optimizer = self.factory([torch.nn.Parameter(torch.zeros(1))])
        settings = "".join(
            f", {k}={v}"
            for k, v in optimizer.defaults.items()
            if isinstance(v, int | float | tuple)
        )
        kind = type(optimizer)
        return f"TorchOptimizer({kind.__module__}.{kind.__qualname__}{settings})"
