"""An optimizer's state as named arrays and numbers, which a client keeps over rounds.

The optimizers of a round are new, and torch's begin with no momentum and no moments.
Where clients are to go on as if there were no rounds, as in DiLoCo, an
:class:`OptimizerState` hands an optimizer what that of the round before has left.
"""

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from flower_ext.client.personal import (
    Personal,
    forget_other_runs,
    forget_other_states,
)
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import told

#: The name under which it is kept by default.
OPTIMIZER = "optimizer"

# Beside the arrays: what they are of, and what of the state are plain numbers.
_FORM, _NUMBERS = "-form", "-numbers"
_KIND = "kind"


class OptimizerState:
    """The state of an optimizer, which goes on where that of an earlier round ended.

    Kept are the tensors and numbers that ``optimizer.state`` has of each parameter, bit
    for bit. Learning rate and other options are those with which the optimizer was made
    in this round.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        A new one. Where something was kept, it is handed over at once.
    parameters : dict[str, Parameter]
        The model's, by names, which must have all that the optimizer has.
    personal : Personal
        The client's, as of ``Personal(context.state)``.
    name : str (default: "optimizer")
        What it is kept under.

    Raises
    ------
    ValueError
        If another optimizer has kept it, or one of other parameters, shapes or groups;
        from :meth:`keep`, if the state has anything else than tensors and numbers, or
        if steps have changed the optimizer's options, which would be lost.

    Examples
    --------
    >>> from flwr.app import RecordDict
    >>> personal, model = Personal(RecordDict()), nn.Linear(1, 1, bias=False)
    >>> for _ in range(2):  # two rounds
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    ...     state = OptimizerState(optimizer, dict(model.named_parameters()), personal)
    ...     model.weight.grad = torch.ones(1, 1)
    ...     optimizer.step()
    ...     state.keep()
    >>> float(optimizer.state[model.weight]["momentum_buffer"])
    1.5
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        personal: Personal,
        name: str = OPTIMIZER,
    ) -> None:
        self._optimizer, self._personal, self._name = optimizer, personal, name
        names = {id(p): key for key, p in parameters.items()}
        self._places: dict[str, tuple[int, nn.Parameter]] = {}
        for place, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if id(p) not in names:
                    refuse(
                        "optimizer",
                        f"one of a tensor of shape {tuple(p.shape)}",
                        "of the model's parameters only",
                        "others have no name under which their state could be kept",
                    )
                self._places[names[id(p)]] = place, p
        if name + _FORM in personal:
            self._require_same_form()
            self._hand_over()
        self._options = self._current_options()

    @classmethod
    def of(
        cls,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        message: Message,
        context: Context,
    ) -> "OptimizerState":
        """Return that of a client with a training loop of its own.

        One line after the optimizer is made, and ``state.keep()`` after the training.
        """
        forget_other_runs(message.content, context.state)
        personal = Personal(context.state)
        forget_other_states(personal, told(message.content), *groups())
        return cls(optimizer, dict(model.named_parameters()), personal)

    def is_finite(self) -> bool:
        """Whether the optimizer's state is, as it is now."""
        return all(
            bool(torch.isfinite(torch.as_tensor(x)).all())
            for _, p in self._places.values()
            for x in self._optimizer.state.get(p, {}).values()
            if isinstance(x, Tensor | float)
        )

    def keep(self) -> None:
        """Keep the optimizer's state, as it is now."""
        arrays: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for name, (_, p) in self._places.items():
            for slot, x in self._optimizer.state.get(p, {}).items():
                key = f"{slot}/{name}"
                if isinstance(x, Tensor):
                    arrays[key] = x.detach()
                elif type(x) in (int, float):
                    numbers[key] = x
                elif x is not None:
                    bound = "a tensor or a number, which a client can keep"
                    cause = (
                        f"it is of {self._kind}, and such an optimizer has no rounds"
                    )
                    refuse(f"state {slot!r} of {name!r}", x, bound, cause)
        if (now := self._current_options()) != self._options:
            cause = "a schedule belongs into train_config, where it knows the round"
            refuse("options after the last step", now, f"still {self._options}", cause)
        self._personal.save(**{self._name: arrays})
        self._personal.save(**{self._name + _NUMBERS: numbers})
        self._personal.save(**{self._name + _FORM: self._form()})

    @property
    def _kind(self) -> str:
        kind = type(self._optimizer)
        return f"{kind.__module__}.{kind.__qualname__}"

    def _form(self) -> dict[str, Tensor]:
        """Return what the state is of: the class in bytes, group and shape of each."""
        kind = torch.tensor([*self._kind.encode()], dtype=torch.uint8)
        return {_KIND: kind} | {
            f"{name}.": torch.tensor([place, *p.shape])  # no parameter's own name
            for name, (place, p) in self._places.items()
        }

    def _require_same_form(self) -> None:
        kept, now = self._personal.group(self._name + _FORM), self._form()
        was = bytes(kept.pop(_KIND).tolist()).decode()
        if was != self._kind:
            bound = f"{was}, whose state the client has kept"
            cause = (
                "the optimizer was changed between rounds; a new strategy begins anew"
            )
            refuse("optimizer", self._kind, bound, cause)
        del now[_KIND]
        for name in {**kept, **now}:
            found, expected = (
                None if x is None else (int(x[0]), tuple(x[1:].tolist()))
                for x in (now.get(name), kept.get(name))
            )
            if found != expected:
                refuse(
                    f"group and shape of parameter {name.removesuffix('.')!r}",
                    found,
                    f"{expected}, as the client has kept the optimizer's state",
                    "the model, or what of it is trained, was changed between rounds",
                )

    def _hand_over(self) -> None:
        kept: dict[str, Any] = dict(self._personal.group(self._name))
        kept |= self._personal.numbers(self._name + _NUMBERS)
        # By their places among all, as torch has it in a state_dict, of which it moves
        # moments to their parameters' device, and leaves counters on the CPU.
        places = {name: i for i, name in enumerate(self._places)}
        state: dict[int, dict[str, Any]] = {}
        for key, x in kept.items():
            slot, _, name = key.partition("/")
            state.setdefault(places[name], {})[slot] = x
        if state:
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _current_options(self) -> list[dict[str, object]]:
        return [
            {
                key: x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
                for key, x in group.items()
                if key != "params"
            }
            for group in self._optimizer.param_groups
        ]


def groups(name: str = OPTIMIZER) -> tuple[str, ...]:
    """Return the names in a client's personal state of all that is kept.

    The first is that which also tells of which strategy it is, see
    :func:`~flower_ext.client.personal.forget_other_states`.
    """
    return name, name + _NUMBERS, name + _FORM
