"""Clients that keep a part of the model: the half, and a mod for loops of one's own."""

import re
from collections.abc import Callable, Mapping
from typing import cast

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from torch import nn

from flower_ext.client.encoding import Mod
from flower_ext.client.half import ClientHalf, Local, trainable
from flower_ext.client.mods import tell_state
from flower_ext.client.personal import PERSONAL, forget_other_runs
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import refuse
from flower_ext.core.parts import (
    PERSONAL_NAMES,
    PERSONAL_PLACES,
    PERSONAL_START,
    Filter,
    personal_names,
    require_filter,
)
from flower_ext.core.protocol import ARRAYS_KEY
from flower_ext.core.replies import array_key

PART = "part"  # its name in the personal state


class PartlyPersonalClient(ClientHalf):
    """Trains the whole model, sends the shared arrays and keeps its own.

    The server names the personal arrays. A client's first ones are those of the
    server's initial model; a client that has lost its own begins with those that
    ``Task.model`` makes.
    """

    post_processing = True  # it sends and keeps what is trained
    keeps = True
    sends_kept = True

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Put the client's own arrays beside the shared ones."""
        fresh = local.model.state_dict()
        own = {name: fresh[name] for name in self.personal(local)}
        first = local.received.get(PERSONAL_START, own)
        both = {**arrays, **local.personal.arrays(PART, like=own, first=first)}
        return {**{name: both[name] for name in fresh if name in both}, **both}

    def after_training(self, local: Local) -> None:
        """Keep the client's own arrays."""
        own = {name: local.end[name] for name in self.personal(local)}
        local.personal.save(**{PART: own})

    def model_to_send(self, local: Local) -> Tensors:
        """Send the shared arrays only."""
        own = set(self.personal(local))
        return {name: x for name, x in local.end.items() if name not in own}

    def personal(self, local: Local) -> list[str]:
        """Return the names of the personal arrays, as the server tells them."""
        names = cast("list[str]", local.config.get(PERSONAL_NAMES, []))
        known = local.model.state_dict().keys()
        if not names or not set(names) <= known:
            refuse(
                f"config[{PERSONAL_NAMES!r}]",
                names,
                f"names of the model's arrays {list(known)[:5]}",
                "the strategy must be one whose clients keep a part of the model, and "
                "have the clients' model",
            )
        return names


class freeze:  # noqa: N801 (as torch.no_grad)
    """Let some parameters of a model get no gradient, and so no step of an optimizer.

    At once, and for good; in a ``with`` statement until its end::

        with freeze(model, "body.*"):
            train(model, loader)  # an optimizer of all parameters

    Parameters
    ----------
    model : Module
        Whose parameters they are.
    frozen : str, sequence of str or callable, optional
        Which ones, see :func:`~flower_ext.core.parts.personal_names`; by default those
        of the last layer.

    Raises
    ------
    ValueError
        If the filter matches no array, or all parameters that are trained.
    """

    def __init__(self, model: nn.Module, frozen: Filter = None) -> None:
        names = list(model.state_dict())
        own = set(personal_names(names, require_filter(frozen, "frozen"), "frozen"))
        found = trainable(model)
        if found.keys() <= own:
            refuse(
                "frozen",
                sorted(own)[:5],
                "arrays that leave parameters to train",
                f"those of this model are {list(found)[:5]}",
            )
        self._frozen = [p for name, p in found.items() if name in own]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def __enter__(self) -> None:
        """Begin what they are frozen for."""

    def __exit__(self, *_: object) -> None:
        """Let them be trained again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)


def normalization_arrays(model: nn.Module) -> list[str]:
    """Return the names of the arrays of a model's normalisation layers.

    These are weights, biases, running statistics and counters of torch's layers, and of
    others whose class has ``Norm`` in its name, such as ``LlamaRMSNorm``.

    Examples
    --------
    >>> normalization_arrays(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    ['1.weight', '1.bias']
    """
    own = set()
    for path, layer in model.named_modules(remove_duplicate=False):
        # A container such as PreNorm has no arrays itself; what begins with _ is a
        # parametrization, which is no layer.
        if re.match(r"[^_].*Norm|Norm", type(layer).__name__):
            arrays = [*layer.named_parameters(recurse=False)]
            arrays += [*layer.named_buffers(recurse=False)]
            own |= {f"{path}.{name}" if path else name for name, _ in arrays}
    return [name for name in model.state_dict() if name in own]


def keep_at_home(personal: Filter = None) -> Mod:
    """Return a Flower mod that keeps a part of the model with the client.

    For any ClientApp, whose functions stay as they are: they receive the whole model,
    with the client's own arrays in it, and reply with all that they trained. The mod
    keeps the personal arrays in ``context.state`` and sends the others. ::

        app = ClientApp(mods=[keep_at_home("head.*")])

    Parameters
    ----------
    personal : str, sequence of str or callable, optional
        Which arrays stay, see :func:`~flower_ext.core.parts.personal_names`. By default
        those that the server names, and the last layer where it names none.

    Returns
    -------
    callable
        For ``ClientApp(mods=[keep_at_home("head.*")])``. It comes after ``packed`` and
        ``encoded()``.

    Raises
    ------
    ValueError
        If the filter matches no array or all, or others than the server's does; if a
        reply lacks one that is to be kept. It becomes the client's error reply.

    Notes
    -----
    A strategy of this package that names the personal arrays, such as
    :class:`~flower_ext.strategies.FedPer`, gets a reply without them. Any other, such
    as Flower's FedAvg, needs all arrays in every reply: there the personal ones are
    sent back as they were received, so that the server's stay what they are, up to the
    rounding of its average. Either way none that was trained leaves the client.

    ``query`` messages pass through.
    """
    require_filter(personal)

    def mod(
        message: Message,
        context: Context,
        call_next: Callable[[Message, Context], Message],
    ) -> Message:
        content = message.content
        kind = message.metadata.message_type.partition(".")[0]
        key = array_key(content, ARRAYS_KEY, [PERSONAL_START])
        record = content.array_records.get(key)
        if record is None or kind not in (MessageType.TRAIN, MessageType.EVALUATE):
            return call_next(message, context)
        came = {**content.array_records.get(PERSONAL_START, {}), **record}
        told = _told(content)
        order = _order(record, told)
        names = _agreed(order, personal, told)
        forget_other_runs(content, context.state)
        kept = context.state.array_records.get(PERSONAL + PART)
        whole = {**came, **_of_these(kept, names)}
        if missing := [name for name in order if name not in whole]:
            cause = "the client has lost what it kept, and the server counts on that"
            refuse("the client's own arrays", None, f"{missing[:5]}", cause)
        groups = {k: x for k, x in content.items() if k != PERSONAL_START}
        groups[key] = ArrayRecord({name: whole[name] for name in order})
        message.content = RecordDict(groups)
        try:
            reply = call_next(message, context)
        finally:
            message.content = content
        if kind == MessageType.EVALUATE and told:
            tell_state(reply, kept is not None)
        if kind != MessageType.TRAIN or not reply.has_content():
            return reply
        key = array_key(reply.content, key)
        trained = reply.content.array_records.get(key)
        if trained is None:
            return reply
        if lacking := set(names) - trained.keys():
            refuse("the reply's arrays", list(trained)[:5], f"with {sorted(lacking)}")
        # With nothing told, the server wants an array under each of its names.
        back = {} if told else {name: came[name] for name in names}
        sent = {n: back.get(n, x) for n, x in trained.items() if n not in names or back}
        context.state[PERSONAL + PART] = ArrayRecord({n: trained[n] for n in names})
        reply.content = RecordDict({**reply.content, key: ArrayRecord(sent)})
        return reply

    return mod


def _told(content: RecordDict) -> ConfigRecord | None:
    """Return the configuration in which the server names personal arrays, if any."""
    found = (x for x in content.config_records.values() if PERSONAL_NAMES in x)
    return next(found, None)


def _order(record: ArrayRecord, told: ConfigRecord | None) -> list[str]:
    """Return the names of all arrays in the model's order."""
    order = list(record)
    if told:
        places = cast("list[int]", told[PERSONAL_PLACES])
        names = cast("list[str]", told[PERSONAL_NAMES])
        for place, name in zip(places, names, strict=True):
            order.insert(place, name)
    return order


def _agreed(order: list[str], personal: Filter, told: ConfigRecord | None) -> list[str]:
    """Return which arrays stay; client and server must mean the same."""
    named = cast("list[str]", told[PERSONAL_NAMES]) if told else None
    if named is not None and personal is None:
        return named
    found = personal_names(order, personal)
    if named is not None and found != named:
        cause = "give both sides the same filter"
        refuse("personal", personal, f"a filter of the server's {named[:5]}", cause)
    return found


def _of_these(kept: ArrayRecord | None, names: list[str]) -> Mapping[str, Array]:
    """Return the arrays that were kept, none at first."""
    if kept is not None and set(kept) != set(names):
        cause = "was it kept for another model?"
        refuse("the client's own arrays", list(kept)[:5], f"{names[:5]}", cause)
    return kept or {}
