"""Codecs: named arrays as a record of one array of bytes, and back.

All arrays become one array under the key :data:`PAYLOAD`, in a record that stays where
the plain one was (``arrays``). One payload, and not one for each name: sender and
receiver both know names, shapes and dtypes, and Flower spends about 250 bytes on each
named array (its name, and NumPy's header of 128 bytes), which for a LoRA adapter at
density 1/64 is more than all its values. The layout is::

    crc32 of the rest
    number of stages, tag of each        which codecs can read it
    crc32 of names, dtypes and shapes    whose arrays these are
    number of values                     what is counted as transferred
    what the codec wrote

A codec's settings and its randomness are the sender's alone: what reading needs, such
as a number of bits or the seed of a rotation, the codec writes into the record.
"""

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from math import prod
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, layout, to_record, view
from flower_ext.core.held import num_bytes
from flower_ext.core.replies import MalformedReply
from flower_ext.wire.masks import Masks

#: Key of the payload in its record.
PAYLOAD = "<binary>"
#: Serialisation type of a sealed payload, which Flower refuses to read.
SEALED = "encoded-array"
#: Bytes of a tag.
TAG = 2
#: Stages of a chain, at most.
MOST_STAGES = 8
#: What to do where that happened.
CANNOT_READ = (
    "this ClientApp cannot read encoded records: make it with client_app(task, ...), "
    "or give an app with a loop of its own the mod, ClientApp(mods=[encoded()])"
)

_PLAIN = "numpy.ndarray"
_CHECKSUM = struct.Struct("<I")
_BODY = struct.Struct("<IQ")
# No code holds more numbers in a byte than this, or their count is not believed.
_MOST_VALUES_A_BYTE = 1 << 10


@dataclass(frozen=True)
class Sending:
    """What an encoder knows besides the arrays and its settings.

    Attributes
    ----------
    generator : numpy.random.Generator
        Of all that is random in encoding, derived from seed, round and client.
    tied : Mapping[str, str]
        Further names of tensors, each with the first: what is chosen of one is chosen
        of the other.
    silent : collection of str
        Arrays of zeros of which nothing needs to travel.
    received : dict[str, ndarray of bool], optional
        Of a client that did not receive the whole model: what it has of each array.
    began : Mapping[str, ndarray], optional
        Of a change, what it is a change of, which the receiver knows, too.
    """

    generator: np.random.Generator = field(
        default_factory=lambda: np.random.default_rng(0)
    )
    tied: Mapping[str, str] = field(default_factory=dict)
    silent: Collection[str] = ()
    received: Masks | None = None
    began: Mapping[str, NDArray] | None = None


class Written(NamedTuple):
    """What a codec made of arrays: bytes, in parts, and how many values are in them."""

    parts: list[bytes]
    values: int


class Decoded(NamedTuple):
    """What was read of a record.

    Attributes
    ----------
    arrays : dict[str, ndarray]
        As the receiver has them, zero where nothing travelled.
    values : int
        How many numbers travelled.
    masks : dict[str, ndarray of bool] or None
        The coordinates that travelled; None if all did.
    """

    arrays: Arrays
    values: int
    masks: Masks | None = None


class Reader:
    """Reads what a codec wrote from front to back, never past its end.

    Parameters
    ----------
    data : memoryview
        What was written.
    began : Mapping[str, ndarray], optional
        Of a change, what it is a change of.
    """

    def __init__(
        self, data: memoryview, began: Mapping[str, NDArray] | None = None
    ) -> None:
        self.began = began
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that are not read yet."""
        return len(self._data) - self._at

    def take(self, length: int) -> memoryview:
        """Return the next bytes, without copying them."""
        if not 0 <= length <= self.left:
            raise ValueError("it is cut off")
        part = self._data[self._at : self._at + length]
        self._at += length
        return part

    def unpack(self, code: struct.Struct) -> tuple[Any, ...]:
        """Return the next numbers."""
        return code.unpack(self.take(code.size))


class Codec(ABC):
    """Makes bytes of named arrays, and arrays of the bytes.

    A codec is a frozen dataclass: its settings are numbers, words, tuples of them, or
    codecs, and by them the server tells clients which one to use. A setting that
    depends on the round may be a function of it, see :meth:`at`.

    To write one, derive from :class:`~flower_ext.wire.value_codes.ValueCode` if it
    codes the values of each array, from :class:`~flower_ext.wire.chain.Selection` if it
    chooses coordinates, or from :class:`Stage`. In its own tests,
    :func:`flower_ext.testing.check_codec` holds it to its promises.

    Notes
    -----
    Integers and flags are counters, not weights: they travel exactly. What is not
    finite must not become so, or a client that diverged would not be noticed.
    """

    #: Whether a client adds what its upload left out to its next one.
    feedback: bool = False
    #: Whether a client chooses among the coordinates that it received, and no others.
    within_received: bool = False
    #: Whether a change can be read only where it is known what it is a change of.
    needs_began: ClassVar[bool] = False
    #: Whether messages say names and shapes, for apps with a loop of their own.
    described: bool = False

    @property
    @abstractmethod
    def stages(self) -> "tuple[type[Stage], ...]":
        """What reads its records, in turn."""

    @property
    def accepted(self) -> "frozenset[tuple[type[Stage], ...]]":
        """What reads the records of all who were told to use it: these, and no others.

        A record says which of them it needs; settings are the sender's.
        """
        return frozenset({self.stages})

    @property
    def lossless(self) -> bool:
        """Whether arrays come back bit for bit."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether the mean over the generator's draws is what was encoded."""
        return self.lossless

    @abstractmethod
    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Return the bytes of arrays; their names, dtypes and shapes need not be in."""

    def votes(self, arrays: Arrays, sending: Sending) -> dict[str, float]:
        """Return metrics that a client adds to its reply with this upload."""
        return {}

    def at(self, server_round: int) -> Self:
        """Return the codec of a round: functions of it are replaced by their values."""
        found = {x.name: getattr(self, x.name) for x in _fields(self)}
        new = {name: _at(value, server_round) for name, value in found.items()}
        changed = {name: x for name, x in new.items() if x is not found[name]}
        return replace(self, **changed) if changed else self  # type: ignore[type-var]

    def encode(
        self, arrays: Mapping[str, NDArray], sending: Sending | None = None
    ) -> ArrayRecord:
        """Return the record of one array of bytes that travels.

        Parameters
        ----------
        arrays : Mapping[str, ndarray]
            Any shapes; of floats, integers or flags.
        sending : Sending, optional
            By default the first draws of a generator, and nothing that is known.
        """
        known = {name: np.asarray(x) for name, x in arrays.items()}
        parts, values = self.write(known, sending or Sending())
        tags = [stage.tag for stage in self.stages]
        head = bytes([len(tags)]) + b"".join(tags)
        parts = [head + _BODY.pack(_layout_checksum(known), values), *parts]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        payload = b"".join([_CHECKSUM.pack(checksum), *parts])
        return to_record({PAYLOAD: np.frombuffer(payload, np.uint8)})

    def decode(
        self,
        record: ArrayRecord,
        like: Mapping[str, NDArray],
        began: Mapping[str, NDArray] | None = None,
    ) -> Arrays:
        """Return the arrays of a record of this codec, zero where nothing travelled.

        Parameters
        ----------
        record : ArrayRecord
            As :meth:`encode` makes it, whatever the settings; sealed or not.
        like : Mapping[str, ndarray]
            Arrays of the names, dtypes and shapes that are expected.
        began : Mapping[str, ndarray], optional
            Of a change, what it is a change of, as in :class:`Sending`.

        Raises
        ------
        MalformedReply
            Whatever is wrong with it. The memory that is allocated depends on ``like``,
            not on the length of the payload.
        """
        return self.unpack(record, like, began).arrays

    def unpack(
        self,
        record: ArrayRecord,
        like: Mapping[str, NDArray],
        began: Mapping[str, NDArray] | None = None,
    ) -> Decoded:
        """Return all that :meth:`decode` reads: what travelled and how much, too."""
        return unpack(record, like, self._own, began)

    def _own(self, tags: Sequence[bytes]) -> "Sequence[type[Stage]]":
        own = [stage.tag for stage in self.stages]
        if own != list(tags):
            raise ValueError(f"it is coded as {list(tags)}, {own} was asked for")
        return self.stages


class Stage(Codec):
    """A codec that reads what it wrote itself, or the stages behind it in a chain."""

    #: Two bytes that say in a record what it is read with.
    tag: ClassVar[bytes]

    @property
    def stages(self) -> "tuple[type[Stage], ...]":
        """Itself alone."""
        return (type(self),)

    @classmethod
    @abstractmethod
    def read(
        cls, reader: Reader, like: Arrays, then: "Sequence[type[Stage]]" = ()
    ) -> Decoded:
        """Return the arrays of what :meth:`write` wrote; depends on nothing else.

        Parameters
        ----------
        reader : Reader
            What is wrong with its bytes is a ``ValueError``, found before memory is
            allocated that ``like`` does not account for.
        like : dict[str, ndarray]
            Arrays of the names, dtypes and shapes to return.
        then : sequence of type of Stage
            The further stages of a chain, for those that have any.
        """


def _fields(codec: Codec) -> "tuple[Field[Any], ...]":
    return fields(codec) if is_dataclass(codec) else ()


def _at(value: object, server_round: int) -> object:
    if isinstance(value, Codec):
        return value.at(server_round)
    if isinstance(value, tuple):
        new = tuple(_at(x, server_round) for x in value)
        same = all(x is y for x, y in zip(new, value, strict=True))
        return value if same else new
    return value(server_round) if callable(value) else value


def unpack(
    record: ArrayRecord,
    like: Mapping[str, NDArray],
    find: Callable[[Sequence[bytes]], Sequence[type[Stage]]],
    began: Mapping[str, NDArray] | None = None,
) -> Decoded:
    """Read a record with the codecs that are found for its tags.

    Raises
    ------
    MalformedReply
        Whatever is wrong with the record.
    """
    arrays = {name: np.asarray(x) for name, x in like.items()}
    try:
        payload = _payload(record)
        (checksum,) = _CHECKSUM.unpack_from(payload)
        if checksum != zlib.crc32(payload[_CHECKSUM.size :]):
            raise ValueError("its checksum is wrong: cut off or altered")
        frame = _open(payload)
        if frame.layout != _layout_checksum(arrays):
            raise ValueError(
                f"its arrays are not the {len(like)} expected, such as "
                f"{dict(list(layout(arrays).items())[:2])}"
            )
        first, *then = find(frame.tags)
        reader = Reader(frame.data, began)
        found = first.read(reader, arrays, then)
        _check(found, arrays, frame.values, reader.left)
    except Exception as error:  # no reply ends a run
        raise MalformedReply(f"an encoded record cannot be read: {error}") from error
    # What is a view of the payload can neither be written to nor outlive it.
    own = {n: x if x.flags.writeable else x.copy() for n, x in found.arrays.items()}
    return found._replace(arrays={name: own[name] for name in arrays})


def _check(found: Decoded, like: Arrays, values: int, left: int) -> None:
    """Hold a codec to what was announced, and its arrays to what is expected."""
    if left:
        raise ValueError(f"{left} bytes too many")
    if found.values != values:
        raise ValueError(f"it has {found.values} values, {values} were announced")
    if layout(found.arrays).items() != layout(like).items():
        raise ValueError("the codec made other arrays than are expected")


class _Frame(NamedTuple):
    tags: list[bytes]
    layout: int
    values: int
    data: memoryview


def _payload(record: ArrayRecord) -> memoryview:
    if not is_encoded(record):
        raise ValueError(
            "it is not encoded: an app with a loop of its own needs the mod "
            "ClientApp(mods=[encoded()])"
        )
    if set(record) != {PAYLOAD}:
        raise ValueError(f"it has one array {PAYLOAD!r}, not {sorted(record)[:5]}")
    payload = view(unseal(record)[PAYLOAD])
    if payload.dtype != np.uint8 or payload.ndim != 1:
        raise ValueError(f"it must be bytes, not {payload.dtype}{list(payload.shape)}")
    return payload.data


def _open(payload: memoryview) -> _Frame:
    reader = Reader(payload)
    reader.take(_CHECKSUM.size)
    stages = reader.take(1)[0]
    if not 1 <= stages <= MOST_STAGES:
        raise ValueError(f"{stages} stages, must be 1 to {MOST_STAGES}")
    tags = [bytes(reader.take(TAG)) for _ in range(stages)]
    names, values = reader.unpack(_BODY)
    return _Frame(tags, names, values, reader.take(reader.left))


def _layout_checksum(arrays: Mapping[str, NDArray]) -> int:
    return zlib.crc32(repr(sorted(layout(arrays).items())).encode())


def seal(record: ArrayRecord) -> ArrayRecord:
    """Return an encoded record that cannot be taken for an ordinary one.

    Some receivers pass over arrays whose names they do not know, as ``load_state_dict``
    does with ``strict=False``, and would train something else. A sealed record fails
    when it is read, with :data:`SEALED` in the message. Codecs read it as it is.
    """
    return _with_stype(record, SEALED)


def unseal(record: ArrayRecord) -> ArrayRecord:
    """Return what was sealed, and any other record as it is."""
    return _with_stype(record, _PLAIN) if is_encoded(record) else record


def _with_stype(record: ArrayRecord, stype: str) -> ArrayRecord:
    array = record[PAYLOAD]
    shape = tuple(array.shape)
    return ArrayRecord({PAYLOAD: Array(array.dtype, shape, stype, array.data)})


def is_encoded(record: ArrayRecord) -> bool:
    """Whether a record is one that a codec made."""
    return PAYLOAD in record


def num_values(record: ArrayRecord) -> int:
    """Return how many numbers a record transfers, encoded or not.

    This is the count of parameters that papers report; what tells where they belong is
    not in it. More numbers than its bytes can hold are none.
    """
    if is_encoded(record):
        try:
            payload = _payload(record)
            values = _open(payload).values
        except Exception:  # no reply ends a run
            return 0
        return values if values <= _MOST_VALUES_A_BYTE * len(payload) else 0
    return sum(
        size
        for array in record.values()
        if 0 <= (size := prod(array.shape)) <= num_bytes(array)
    )
