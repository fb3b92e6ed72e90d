"""What methods need to take part in a training loop that is not ours."""

import weakref
from collections.abc import Callable, Mapping

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from flower_ext.client.half import trainable

# At most one a model: an app may train the same one for every message.
_WATCHED: weakref.WeakKeyDictionary[nn.Module, RemovableHandle]
_WATCHED = weakref.WeakKeyDictionary()


def before_steps(
    model: nn.Module, change: Callable[[Mapping[str, nn.Parameter]], None]
) -> None:
    """Call a function before every step of an optimizer on a model, whoever takes it.

    The gradients are those that the step is taken with: accumulated, unscaled and,
    under Opacus, clipped and noisy.

    Parameters
    ----------
    model : torch.nn.Module
        What is trained. A later call for the same model replaces this one.
    change : callable
        Takes the trained parameters that the optimizer steps, by their names in the
        model, and may change their gradients. It must not keep the model.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)
    >>> before_steps(model, lambda parameters: print(list(parameters)))
    >>> model.weight.grad = torch.ones(1, 1)
    >>> torch.optim.SGD(model.parameters(), lr=0.1).step()
    ['weight']
    """
    # The hook is on all optimizers of the process, and stays when a loop fails: it must
    # not keep the model in memory.
    watched = weakref.ref(model)

    def before(optimizer: Optimizer, *_: object) -> None:
        if (found := watched()) is None:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {n: p for n, p in trainable(found).items() if id(p) in stepped}
        if own:
            change(own)

    if model in _WATCHED:
        _WATCHED.pop(model).remove()
    handle = register_optimizer_step_pre_hook(before)
    _WATCHED[model] = handle
    weakref.finalize(model, handle.remove)
