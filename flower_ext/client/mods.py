"""Personal models for apps with a training loop of their own: what mods are made of.

A mod stands between the server and an app's functions. It can let them answer with
other arrays in the model's place, such as those that the client has kept, and keep what
they have trained: the functions stay as they are, whatever the framework. It does so
only for the strategy that asks for the client half of its name.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from flower_ext.client.half import require_stable
from flower_ext.client.loops import NO_STEPS, on_steps
from flower_ext.client.personal import PERSONAL, forget_other_runs
from flower_ext.core.errors import at_least
from flower_ext.core.protocol import (
    ARRAYS_KEY,
    CLIENT_HALF_KEY,
    HAS_STATE,
    METRICS_KEY,
    RECEIVED,
    Config,
    Metrics,
    Phase,
)
from flower_ext.core.replies import array_key

Answer = Callable[[Message, Context], Message]


class Asked:
    """A message to an app, as a mod of a personal strategy sees it.

    Parameters
    ----------
    message, context, call_next
        What the mod was called with.
    """

    def __init__(self, message: Message, context: Context, call_next: Answer) -> None:
        self._message, self._context, self._call = message, context, call_next
        forget_other_runs(message.content, context.state)
        kind = message.metadata.message_type.partition(".")[0]
        self.phase = cast(Phase, kind)
        self._key = array_key(message.content, ARRAYS_KEY)

    @property
    def received(self) -> ArrayRecord:
        """The model that came."""
        return self._message.content.array_records[self._key]

    @property
    def kept(self) -> ArrayRecord | None:
        """The client's own model, None before it has one."""
        return self._context.state.array_records.get(PERSONAL + "model")

    def answer(self, arrays: ArrayRecord | None = None) -> Message:
        """Let the app answer, with other arrays in the model's place if they are given.

        An error of the app is raised here.
        """
        message, content = self._message, self._message.content
        if arrays is not None:
            message.content = RecordDict({**content, self._key: arrays})
        try:
            return self._call(message, self._context)
        finally:
            message.content = content

    def model_of(self, reply: Message) -> tuple[str, ArrayRecord]:
        """Return the model in a reply to training, and its key."""
        key = array_key(reply.content, self._key)
        return key, reply.content.array_records[key]

    def keep(self, reply: Message) -> None:
        """Keep the model of a reply as the client's own."""
        self._context.state[PERSONAL + "model"] = self.model_of(reply)[1]

    def evaluated(self, *, compares: bool) -> Message:
        """Let the app evaluate the client's own model.

        Parameters
        ----------
        compares : bool
            Whether it evaluates the received one too, for metrics ``received-...``.
        """
        own = self.kept
        received = self.answer() if compares or own is None else None
        reply = cast(Message, received) if own is None else self.answer(own)
        if not reply.has_content():
            return reply
        if compares and received is not None and received.has_content():
            before = _metrics(received)[1]
            add_metrics(
                reply,
                {RECEIVED + k: x for k, x in before.items() if k != "num-examples"},
            )
        tell_state(reply, own is not None)
        return reply


def tell_state(reply: Message, kept: bool) -> None:
    """Say in a reply to an evaluation whether the client has kept anything."""
    if reply.has_content():
        add_metrics(reply, {HAS_STATE: float(kept)})


def _metrics(reply: Message) -> tuple[str, MetricRecord]:
    found = reply.content.metric_records.items()
    return next(iter(found), (METRICS_KEY, MetricRecord()))


def add_metrics(reply: Message, metrics: Metrics) -> None:
    """Add metrics to a reply of the app."""
    key, record = _metrics(reply)
    reply.content[key] = MetricRecord({**record, **metrics})


def asked(
    half: str, message: Message, context: Context, call_next: Answer
) -> tuple[Asked, Config] | None:
    """Return the message and its settings if its strategy needs this client half."""
    for config in message.content.config_records.values():
        if config.get(CLIENT_HALF_KEY) == half:
            return Asked(message, context, call_next), config
    return None


class Drawn:
    r"""What has become of a proximal term, see :func:`drawn`.

    Attributes
    ----------
    steps : int
        Optimizer steps that it was added to.
    """

    def __init__(
        self, begun: ArrayRecord, towards: ArrayRecord, strength: float, name: str
    ) -> None:
        self.steps = 0
        self._name = name
        self._begun = begun.to_torch_state_dict()
        self._towards = towards.to_torch_state_dict()
        self._strength = strength
        self._anchors: dict[int, tuple[nn.Parameter, Tensor | None]] = {}
        self._thread = threading.get_ident()

    @torch.no_grad()
    def add(self, optimizer: Optimizer) -> None:
        """Add the term's gradient to those that an optimizer is about to step with."""
        if threading.get_ident() != self._thread:  # it trains another model
            return
        for group in optimizer.param_groups if type(optimizer) is SGD else ():
            if not group["dampening"]:
                rate, momentum = float(group["lr"]), group["momentum"]
                require_stable(self._name, self._strength, rate, momentum)
        # A fused optimizer is handed scaled gradients.
        scale = getattr(optimizer, "grad_scale", None)
        factor = self._strength * (1.0 if scale is None else float(scale))
        for group in optimizer.param_groups:
            for p in group["params"]:
                anchor = self._anchor(p) if p.requires_grad else None
                if anchor is not None:
                    pull = factor * (p - anchor)
                    p.grad = pull if p.grad is None else p.grad + pull
        self.steps += 1

    def require_steps(self, begun: ArrayRecord, trained: ArrayRecord) -> None:
        """Refuse a model that was trained without the term."""
        if self._strength and not self.steps and trained != begun:
            raise ValueError(NO_STEPS)

    def _anchor(self, p: nn.Parameter) -> Tensor | None:
        """Return what a parameter is drawn to; None if it is none of the arrays."""
        if id(p) not in self._anchors:
            # Before its first step it is what the app has loaded: that tells its name.
            alike = [n for n, x in self._begun.items() if x.shape == p.shape]
            here = p.detach().cpu()
            name = next(
                (n for n in alike if torch.equal(self._begun[n].to(here.dtype), here)),
                None,
            )
            if alike and name is None:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} was trained and is none of "
                    f"the arrays {alike[:3]} that the app was given: the proximal term "
                    "needs a loop that loads them and trains, and changes nothing in "
                    "between"
                )
            anchor = None
            if name is not None:
                anchor = self._towards[name].to(p)
                del self._begun[name]  # each is one parameter
            self._anchors[id(p)] = p, anchor
        return self._anchors[id(p)][1]


@contextmanager
def drawn(
    begun: ArrayRecord, towards: ArrayRecord, strength: float, name: str = "strength"
) -> Iterator[Drawn]:
    r"""Add :math:`\frac{\mu}{2} \|w - w_0\|^2` to what torch optimizers minimise here.

    For training loops that cannot be told of it. Its gradient is added to those of
    every step, after a loop has clipped them. Which parameter is which array is told by
    what each holds before its first step.

    Parameters
    ----------
    begun : ArrayRecord
        The arrays that the model begins with.
    towards : ArrayRecord
        :math:`w_0`, under the same names.
    strength : float
        :math:`\mu \ge 0`.
    name : str (default: "strength")
        What it is called where it is refused.

    Examples
    --------
    >>> zero, one = (ArrayRecord({"w": torch.tensor(x)}) for x in (0.0, 1.0))
    >>> w = nn.Parameter(torch.tensor(0.0))
    >>> optimizer = torch.optim.SGD([w], lr=0.25)
    >>> with drawn(begun=zero, towards=one, strength=2.0) as pull:
    ...     for _ in range(2):
    ...         optimizer.zero_grad()
    ...         optimizer.step()  # by 2.0 * 0.25 of the way to 1
    >>> w.item(), pull.steps
    (0.75, 2)
    """
    strength = at_least(name, strength, 0)
    pull = Drawn(begun, towards, strength, name)
    if not strength:
        yield pull
        return
    handles = on_steps(pull.add)
    try:
        yield pull
    finally:
        for handle in handles:
            handle.remove()
