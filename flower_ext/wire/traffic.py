"""What messages cost: their bytes, as Flower serialises them, and their numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flower_ext._flower import recorddict_to_proto
from flower_ext.core.held import HeldArray, num_bytes
from flower_ext.wire.codec import num_values


@dataclass(frozen=True)
class Traffic:
    """Messages in one direction, added up.

    Attributes
    ----------
    serialized : int
        Bytes of the records as Flower's protocol buffers hold them: names, headers and
        metrics included; not the envelope of the message (addresses, about 200 bytes).
    encoded : int
        Bytes of the arrays' contents alone: values and, where only some travel, what
        tells their places.
    parameters : int
        Numbers in the arrays, without what tells where they belong: the measure of most
        papers.
    messages : int
        How many.
    """

    serialized: int = 0
    encoded: int = 0
    parameters: int = 0
    messages: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Add up field by field."""
        return Traffic(
            self.serialized + other.serialized,
            self.encoded + other.encoded,
            self.parameters + other.parameters,
            self.messages + other.messages,
        )


class Measured(RecordDict):
    """What is left of a content that was measured before something was taken out."""

    traffic: Traffic


def measure(messages: Iterable[Message]) -> Traffic:
    """Add up the contents of messages; one that is shared is looked at once."""
    known: dict[int, Traffic] = {}
    total = Traffic()
    for message in messages:
        if message.has_content():
            content = message.content
            if id(content) not in known:
                known[id(content)] = measure_content(content)
            total += known[id(content)]
    return total


def measure_content(content: RecordDict) -> Traffic:
    """Measure the content of one message."""
    if isinstance(content, Measured):
        return content.traffic
    serialized, encoded, parameters = _rest_bytes(_layout(content)), 0, 0
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            size = 0
            for name, x in record.items():
                length = num_bytes(x)
                size += _array_bytes(name, x.dtype, tuple(x.shape), x.stype, length)
                encoded += _contents(x)
            serialized += _field(_field(len(key.encode())) + _field(size))
            parameters += num_values(record)
    return _traffic(serialized, encoded, parameters)


@lru_cache(maxsize=256)  # one object for many replies, which are pickled together
def _traffic(serialized: int, encoded: int, parameters: int) -> Traffic:
    return Traffic(serialized, encoded, parameters, 1)


#: Names of :func:`parts` for what is no array, and for a content that was summed up.
REST, SUMMED = "(rest)", "(all)"


def parts(content: RecordDict) -> Mapping[str, int]:
    """Return the serialised bytes of each array, and of all else together.

    They add up to :func:`serialized_bytes`. An array is named by its record and its own
    name, ``"arrays/head.weight"``; :data:`REST` are names of records, metrics and
    configurations. Of a content whose arrays were taken out when they were added up,
    the whole is known only, as :data:`SUMMED`.
    """
    total = serialized_bytes(content)
    if isinstance(content, Measured):
        return {SUMMED: total}
    found = {
        f"{key}/{name}": _array_bytes(
            name, x.dtype, tuple(x.shape), x.stype, num_bytes(x)
        )
        for key, record in content.items()
        if isinstance(record, ArrayRecord)
        for name, x in record.items()
    }
    return found | {REST: total - sum(found.values())}


def serialized_bytes(content: RecordDict) -> int:
    """Return the size of records in Flower's protocol buffers, copying no array."""
    return measure_content(content).serialized


# Numbers and texts as the keys of a cache: 1, 1.0 and True are three different ones.
_Value = tuple[type, object]
_Layout = tuple[tuple[str, type, tuple[tuple[str, _Value], ...]], ...]


def _layout(content: RecordDict) -> _Layout:
    """Return what the size of a content depends on, but for its arrays."""
    return tuple(
        (
            key,
            MetricRecord if isinstance(record, MetricRecord) else ConfigRecord,
            tuple((k, _value(x)) for k, x in record.items()),
        )
        for key, record in content.items()
        if not isinstance(record, ArrayRecord)
    )


def _value(value: object) -> _Value:
    if isinstance(value, list):
        return list, tuple(map(_value, value))
    # Eight bytes, whatever it is.
    return (float, 0.5) if isinstance(value, float) else (type(value), value)


@lru_cache(maxsize=4096)  # clients differ in their losses, and seldom in more
def _rest_bytes(layout: _Layout) -> int:
    """Return the bytes of records without arrays, as Flower makes them."""

    def read(kind: type, value: object) -> object:
        if isinstance(value, tuple):
            return [read(*x) for x in value]
        return value

    rest = {
        key: kind({name: read(*value) for name, value in values})
        for key, kind, values in layout
    }
    try:
        size: int = recorddict_to_proto(RecordDict(rest)).ByteSize()
    except ValueError:  # an integer that cannot travel
        size = 0
    return size


@lru_cache(maxsize=4096)  # every client sends the same names and shapes
def _array_bytes(
    name: str, dtype: str, shape: tuple[int, ...], stype: str, size: int
) -> int:
    fields = [_field(len(dtype)), _field(len(stype))]
    if shape:
        fields.append(_field(sum(map(_varint, shape))))
    if size:
        fields.append(_field(size))
    return _field(_field(len(name.encode())) + _field(sum(fields)))


def _field(length: int) -> int:
    """Return the bytes of a field of that length: its tag, its length, itself."""
    return 1 + _varint(length) + length


def _varint(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def _contents(array: Array) -> int:
    """Return the length without NumPy's header, whose own length is in it."""
    if isinstance(array, HeldArray):
        return array.values.nbytes
    data = array.data
    is_numpy = data[:6] == b"\x93NUMPY" and len(data) >= 10
    header = 10 + int.from_bytes(data[8:10], "little") if is_numpy else 0
    return max(len(data) - header, 0)
