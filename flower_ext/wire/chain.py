"""Chains: choose coordinates, perhaps in several steps, and code their values.

A selection writes, for each array in the order of the names::

    code of the mask  [count  length  mask]

and hands the values that it chose, flattened, to what comes next. A mask of nothing or
of everything takes one byte; otherwise the shortest of
:data:`~flower_ext.wire.mask_codes.MASK_CODES` is taken for each array.
"""

import struct
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import get_args

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, all_finite, is_averaged
from flower_ext.core.errors import fraction, one_of, refuse
from flower_ext.core.schedules import Scheduled, value_in
from flower_ext.wire.codec import (
    MOST_STAGES,
    Codec,
    Decoded,
    Reader,
    Sending,
    Stage,
    Written,
)
from flower_ext.wire.mask_codes import MASK_CODES, MAX_SIZE, Positions, smallest
from flower_ext.wire.masks import Mask, Masks, Scope, top_k
from flower_ext.wire.value_codes import Exact

# What was chosen of each array; None is all of it.
Chosen = Mapping[str, Positions | None]

_SECTION = struct.Struct("<II")
_NOTHING, _EVERYTHING = 0, 1
_MASK_NAMES = ["nothing", "everything", *MASK_CODES]


class Selection(Stage):
    """A codec that chooses coordinates; alone, it sends their values as they are.

    A subclass says what travels, in :meth:`choose`. One whose choice takes fewer bytes
    than a mask, such as rows or the draws of a seed, overrides :meth:`select` and
    :meth:`read_chosen` and has a ``tag`` of its own. What these need, such as the seed,
    is in their bytes; tied arrays have the same positions, and what is not finite
    travels whole.
    """

    tag = b"mk"
    #: Whether the receiver multiplies the values of an array by its size over their
    #: number: right on average for uniform draws, whose class is ``unbiased`` then.
    rescaled: bool = False
    #: Whether it looks at shapes, which nothing has that another selection has left.
    needs_shapes: bool = False

    @abstractmethod
    def choose(self, arrays: Arrays, sending: Sending) -> Masks:
        """Return what travels of the arrays that it names; the others travel whole."""

    def select(self, arrays: Arrays, sending: Sending) -> tuple[list[bytes], Chosen]:
        """Return the positions that travel, and the bytes that tell them."""
        masks = self.choose(arrays, sending)
        parts: list[bytes] = []
        chosen: dict[str, Positions | None] = {}
        for name in sorted(arrays):
            mask = masks.get(name)
            if mask is None or mask.all():
                chosen[name] = None
            else:
                chosen[name] = np.flatnonzero(mask)
            parts += write_positions(chosen[name], arrays[name].size)
        return parts, chosen

    def values(self, array: NDArray, positions: Positions | None) -> NDArray:
        """Return what is handed on of an array, flat: what is in the positions."""
        return _picked(array, positions)

    @classmethod
    def read_chosen(cls, reader: Reader, like: Arrays) -> Chosen:
        """Return the positions that :meth:`select` told."""
        return {name: read_positions(reader, like[name].size) for name in sorted(like)}

    @property
    def stages(self) -> tuple[type[Stage], ...]:
        """A chain with exact values."""
        return (type(self), Exact)

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Return positions and values."""
        return _write((self, Exact()), arrays, sending)

    @classmethod
    def read(
        cls, reader: Reader, like: Arrays, then: Sequence[type[Stage]] = ()
    ) -> Decoded:
        """Return what was chosen in its places, and zeros in the others."""
        if not then:
            raise ValueError(f"a chain ends with {cls.__name__}, without values")
        chosen = cls.read_chosen(reader, like)
        less = {n: _placeholder(x, chosen[n]) for n, x in like.items()}
        found = then[0].read(reader, less, then[1:])
        arrays, masks = {}, {}
        for name, x in like.items():
            inner = None if found.masks is None else found.masks[name]
            values = found.arrays[name]
            positions = chosen[name]
            if cls.rescaled and positions is not None and is_averaged(x):
                with np.errstate(over="ignore", invalid="ignore"):
                    values = values * x.dtype.type(x.size / max(len(positions), 1))
            arrays[name] = _scatter(values, positions, x)
            masks[name] = _scatter_mask(inner, chosen[name], x)
        return Decoded(arrays, found.values, masks)


@dataclass(frozen=True, eq=False)
class FixedMask(Selection):
    """The coordinates that masks name, once and for all.

    It cannot be told in a message; what it sends can be read by everybody.

    Parameters
    ----------
    masks : Mapping[str, ndarray of bool]
        What travels of the arrays it names; of the others everything does.

    Examples
    --------
    >>> codec = FixedMask({"w": np.array([False, True, False])})
    >>> record = codec.encode({"w": np.float32([1, 5, 2])})
    >>> codec.decode(record, {"w": np.zeros(3, np.float32)})
    {'w': array([0., 5., 0.], dtype=float32)}
    """

    masks: Mapping[str, NDArray]

    def choose(self, arrays: Arrays, sending: Sending) -> Masks:
        """Return the masks."""
        return dict(self.masks)


@dataclass(frozen=True)
class TopK(Selection):
    """The coordinates largest in magnitude; the others are zero to the receiver.

    An array that holds an infinity, as masks of attention do, is no weight: it travels
    whole. So do integers and flags.

    Parameters
    ----------
    density : float or callable
        Share of the coordinates that travels, or ``server_round -> share``; 1 sends
        everything, 0 nothing, and all above at least one coordinate of what ``scope``
        chooses from.
    scope : {"global", "tensor"}
        Whether the largest are chosen over all arrays together, or in each.
    dense : sequence of str
        Arrays with one of these words in their name always travel whole: by default the
        statistics of BatchNorm, and what an adapter saves beside itself.
    within_received : bool (default: False)
        A client chooses only among the coordinates that it received.

    Examples
    --------
    >>> codec = TopK(0.5)
    >>> record = codec.encode({"w": np.float32([3, -5, 2, 1])})
    >>> codec.decode(record, {"w": np.zeros(4, np.float32)})
    {'w': array([ 3., -5.,  0.,  0.], dtype=float32)}
    """

    density: Scheduled
    scope: Scope = "global"
    dense: Sequence[str] = ("running_mean", "running_var", "modules_to_save")
    within_received: bool = False

    def __post_init__(self) -> None:
        density = density_in("density", self.density, 1)
        if not callable(self.density):
            object.__setattr__(self, "density", density)
        one_of("scope", self.scope, get_args(Scope))
        object.__setattr__(self, "dense", words("dense", self.dense))

    @property
    def lossless(self) -> bool:
        """Whether everything travels."""
        return not callable(self.density) and self.density >= 1

    def choose(self, arrays: Arrays, sending: Sending) -> Masks:
        """Return the largest coordinates of what may be masked."""
        within = sending.received if self.within_received else None
        density = density_in("density", self.density, 1)
        if density >= 1:
            return within or {}
        apart = {*sending.tied, *sending.silent}
        own = {n: x for n, x in self.maskable(arrays).items() if n not in apart}
        masks = top_k(own, density, self.scope, within)
        copies = {n: masks[x] for n, x in sending.tied.items() if x in masks}
        silent = {n: np.zeros(arrays[n].shape, np.bool_) for n in sending.silent}
        return masks | copies | silent

    def maskable(self, arrays: Arrays) -> Arrays:
        """Return the arrays of which a part may travel."""
        return {n: x for n, x in arrays.items() if maskable(n, x, self.dense)}


def maskable(name: str, array: NDArray, dense: Sequence[str]) -> bool:
    """Whether a part of an array may travel: of finite weights that are not dense."""
    if not is_averaged(array) or any(word in name for word in dense):
        return False
    return all_finite([array])


def masks_of(chosen: Chosen, arrays: Arrays) -> Masks:
    """Return the masks of positions that were chosen."""
    masks = {}
    for name, positions in chosen.items():
        mask = np.full(arrays[name].size, positions is None)
        mask[positions if positions is not None else []] = True
        masks[name] = mask.reshape(arrays[name].shape)
    return masks


def words(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """Return a setting of several words, checked."""
    if isinstance(value, str):
        refuse(name, value, "a sequence of words", "write ('classifier',)")
    return tuple(value)


def density_in(name: str, schedule: Scheduled, server_round: int) -> float:
    """Return the density of a round, checked."""
    value = value_in(schedule, server_round)
    return fraction(name, value, "a share of the coordinates, 1 is all of them")


@dataclass(frozen=True, init=False)
class Chain(Codec):
    """Selections, and the code of the values that they leave.

    Parameters
    ----------
    *links : Stage
        Selections such as :class:`TopK`, each of which chooses among what the one
        before it left; last, a codec that is none.

    Examples
    --------
    >>> from flower_ext.wire import BFloat16
    >>> codec = Chain(TopK(1 / 4), BFloat16())
    >>> record = codec.encode({"w": np.float32([1, 2, 3, 8])})
    >>> codec.decode(record, {"w": np.zeros(4, np.float32)})
    {'w': array([0., 0., 0., 8.], dtype=float32)}
    """

    links: tuple[Stage, ...]

    def __init__(self, *links: Stage) -> None:
        choosing = [isinstance(link, Selection) for link in links]
        if not links or choosing != [True] * (len(links) - 1) + [False]:
            refuse("links", links, "selections, and last a codec of their values")
        if not all(isinstance(link, Stage) for link in links):
            refuse("links", links, "codecs that are no chain themselves")
        if any(isinstance(x, Selection) and x.needs_shapes for x in links[1:]):
            cause = "behind another selection nothing has a shape"
            refuse("links", links, "with what looks at shapes first", cause)
        if len(links) > MOST_STAGES:
            refuse("links", links, f"at most {MOST_STAGES} codecs")
        object.__setattr__(self, "links", links)

    @property
    def stages(self) -> tuple[type[Stage], ...]:
        """The classes of the links."""
        return tuple(type(link) for link in self.links)

    @property
    def within_received(self) -> bool:  # type: ignore[override]
        """Whether a link is."""
        return any(link.within_received for link in self.links)

    @property
    def lossless(self) -> bool:
        """Whether all links are."""
        return all(link.lossless for link in self.links)

    @property
    def unbiased(self) -> bool:
        """Whether all links are."""
        return all(link.unbiased for link in self.links)

    def at(self, server_round: int) -> "Chain":
        """Return the chain of the links of a round."""
        links = tuple(link.at(server_round) for link in self.links)
        same = all(map(is_, links, self.links))
        return self if same else Chain(*links)

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Return what each selection chose, and the values that are left."""
        return _write(self.links, arrays, sending)


def _write(links: Sequence[Stage], arrays: Arrays, sending: Sending) -> Written:
    """Let each selection choose among what is left, and the last link code it."""
    *selections, last = links
    told: list[bytes] = []
    for selection in selections:
        assert isinstance(selection, Selection)
        parts, chosen = selection.select(arrays, sending)
        told += parts
        received = sending.received
        if received is not None:
            received = {n: _picked(received[n], chosen[n]) for n in arrays}
            sending = replace(sending, received=received)
        arrays = {n: selection.values(x, chosen[n]) for n, x in arrays.items()}
    parts, values = last.write(arrays, sending)
    return Written(told + parts, values)


def _picked(x: NDArray, positions: Positions | None) -> NDArray:
    flat = x.reshape(-1)
    return flat if positions is None else flat[positions]


def _placeholder(like: NDArray, positions: Positions | None) -> NDArray:
    """Return zeros in the form of the values that were chosen, in no memory."""
    count = like.size if positions is None else len(positions)
    return np.broadcast_to(np.zeros((), like.dtype), (count,))


def _scatter(values: NDArray, positions: Positions | None, like: NDArray) -> NDArray:
    if positions is None:
        return values.reshape(like.shape)
    flat = np.zeros(like.size, like.dtype)
    flat[positions] = values
    return flat.reshape(like.shape)


def _scatter_mask(
    inner: Mask | None, positions: Positions | None, like: NDArray
) -> Mask:
    """Return the mask of an array, of which ``inner`` is what its values came with."""
    if positions is None:
        whole = np.ones(like.size, np.bool_) if inner is None else inner
        return whole.reshape(like.shape)
    mask = np.zeros(like.size, np.bool_)
    mask[positions] = True if inner is None else inner
    return mask.reshape(like.shape)


def write_positions(positions: Positions | None, size: int) -> list[bytes]:
    """Return the bytes of a mask: a code, and perhaps a count, a length and the mask.

    Parameters
    ----------
    positions : ndarray of int64 or None
        Increasing; None is everything.
    size : int
        Places.
    """
    if positions is None:
        return [bytes([_EVERYTHING])]
    if not len(positions):
        return [bytes([_NOTHING])]
    name = smallest(positions, size)
    coded = MASK_CODES[name].encode(positions, size)
    return [
        bytes([_MASK_NAMES.index(name)]),
        _SECTION.pack(len(positions), len(coded)),
        coded,
    ]


def read_positions(reader: Reader, size: int) -> Positions | None:
    """Return what :func:`write_positions` wrote."""
    which = reader.take(1)[0]
    if which >= len(_MASK_NAMES):
        raise ValueError(f"mask code {which} is unknown")
    if which == _EVERYTHING:
        return None
    if which == _NOTHING:
        return np.empty(0, np.int64)
    count, length = reader.unpack(_SECTION)
    if not count <= size <= MAX_SIZE:
        raise ValueError(f"{count} values for an array of {size}")
    return MASK_CODES[_MASK_NAMES[which]].decode(reader.take(length), count, size)
