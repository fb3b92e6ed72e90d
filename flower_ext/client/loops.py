"""What methods need to take part in a training loop that is not ours."""

import weakref
from collections.abc import Callable, Mapping

import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from flower_ext.client.fisher import spellings
from flower_ext.client.half import trainable
from flower_ext.core.errors import refuse

NO_STEPS = (
    "the app trains without a step of a torch optimizer, in which the strategy could "
    "take part: write it out in the loop"
)

StepArguments = tuple[tuple[object, ...], dict[str, object]]

# At most one a model: an app may train the same one for every message.
_WATCHED: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]]
_WATCHED = weakref.WeakKeyDictionary()


def on_steps(act: Callable[[Optimizer], None]) -> list[RemovableHandle]:
    """Call a function before every step of this process' torch optimizers.

    With a closure the gradients are there only once it was evaluated, and the function
    is called after each evaluation.

    Parameters
    ----------
    act : callable
        Takes the optimizer.

    Returns
    -------
    list of RemovableHandle
        To be removed.
    """
    # A step may call that of its base class, or those of optimizers of a part of its
    # parameters, and other threads step others.
    stepping: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def before(
        optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> StepArguments | None:
        if any(_stepped(optimizer) <= _stepped(outer) for outer in stepping):
            return None
        stepping.add(optimizer)
        closures = [x for x in (*args[1:], kwargs.get("closure")) if callable(x)]
        if not closures:
            act(optimizer)
            return None
        [closure] = closures

        def evaluate() -> object:
            result = closure()
            act(optimizer)
            return result

        others = {key: x for key, x in kwargs.items() if key != "closure"}
        return (args[0], evaluate), others

    def after(optimizer: Optimizer, *_: object) -> None:
        stepping.discard(optimizer)

    return [
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]


def is_received(model: nn.Module, received: ArrayRecord) -> bool:
    """Whether a trained parameter, if there is any, is as it was received."""
    own = trainable(model)
    return not own or any(
        torch.equal(own[name].detach().cpu(), x.to(own[name].dtype))
        for name, sent in _names_in(received, model).items()
        if (x := torch.from_numpy(received[sent].numpy())).shape == own[name].shape
    )


def _names_in(received: ArrayRecord, model: nn.Module) -> dict[str, str]:
    """Return the name under which each trained parameter was received, if it was."""
    return {ways[0]: x for ways in spellings(model) for x in ways if x in received}


def before_steps(
    model: nn.Module,
    change: Callable[[Mapping[str, nn.Parameter], Optimizer], None],
    received: ArrayRecord | None = None,
) -> None:
    """Call a function before every step of an optimizer on a model, whoever takes it.

    The gradients are those that the step is taken with: accumulated, unscaled and,
    under Opacus, clipped and noisy. A step that a ``GradScaler`` skips does not count.

    Parameters
    ----------
    model : torch.nn.Module
        What is trained. A later call for the same model replaces this one.
    change : callable
        Takes the trained parameters that the optimizer steps, by their names, and the
        optimizer, and may change their gradients. It must not keep the model.
    received : ArrayRecord, optional
        What the model begins with. Its names may be those of the model inside
        ``torch.compile``, ``DataParallel`` or Opacus' module, or peft's.

    Raises
    ------
    ValueError
        If no trained parameter is as it was received.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)
    >>> before_steps(model, lambda parameters, _: print(list(parameters)))
    >>> model.weight.grad = torch.ones(1, 1)
    >>> torch.optim.SGD(model.parameters(), lr=0.1).step()
    ['weight']
    """
    names: dict[str, str] = {}
    if received is not None:
        names = _names_in(received, model)
        if not is_received(model, received):
            refuse(
                "model",
                f"with parameters {list(trainable(model))[:5]}",
                f"as received, with arrays {sorted(received)[:5]}",
                "this comes between load_state_dict and the training",
            )
    # The hook is on all optimizers of the process, and stays when a loop fails: it must
    # not keep the model in memory.
    watched = weakref.ref(model)

    def act(optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if (found := watched()) is None or (found_inf is not None and float(found_inf)):
            return
        stepped = _stepped(optimizer)
        own = {
            names.get(n, n): p for n, p in trainable(found).items() if id(p) in stepped
        }
        if not own:
            return
        # A fused optimizer is handed scaled gradients.
        scale = getattr(optimizer, "grad_scale", None)
        _multiply(own, 1.0 if scale is None else 1 / float(scale))
        change(own, optimizer)
        _multiply(own, 1.0 if scale is None else float(scale))

    for handle in _WATCHED.pop(model, []):
        handle.remove()
    _WATCHED[model] = on_steps(act)
    for handle in _WATCHED[model]:
        weakref.finalize(model, handle.remove)


def _stepped(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _multiply(parameters: Mapping[str, nn.Parameter], factor: float) -> None:
    for p in parameters.values():
        if factor != 1 and p.grad is not None:
            p.grad *= factor
