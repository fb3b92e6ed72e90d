"""Records on their way to and from virtual clients: shared, never mixed up, cheap.

An array is sent as the bytes that Flower made of it. Reading those bytes costs more
than training a tiny client for a step, so their header is read once for all clients.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.common import NDArray

from flower_ext._flower import unchecked
from flower_ext.core.arrays import npy_layout
from flower_ext.core.held import HeldArray, fields_of, flower_array

Record = ArrayRecord | MetricRecord | ConfigRecord

# Smaller ones are copied faster than they are shared.
_SHARED_BYTES = 1 << 16


class _Source:
    """Where an array's bytes are: made once for all of its copies, if at all."""

    def __init__(self, data: "bytes | NDArray") -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def bytes(self) -> bytes:
        """Return them as Flower has them."""
        if isinstance(self._data, np.ndarray):
            self._data = self._data.tobytes()
        return self._data


class SentArray(HeldArray):
    """A Flower array that is quick to read; in everything else it is a plain one."""

    _source: _Source

    def __init__(self, values: NDArray) -> None:
        super().__init__(values)
        vars(self)["_source"] = _Source(flower_array(self.values).data)

    @property
    def data(self) -> bytes:
        """The bytes that it was sent as."""
        return self._source.bytes()

    @data.setter
    def data(self, data: bytes) -> None:
        self.__class__ = Array  # type: ignore[assignment]
        self.data = data

    @property
    def size(self) -> int:
        """Length of the bytes."""
        return len(self._source)

    def numpy(self) -> NDArray:
        """Return the array as a NumPy array of the caller's own."""
        return self.values.copy(order="K")


def sent_array(
    dtype: str, shape: tuple[int, ...], stype: str, data: "bytes | NDArray"
) -> Array:
    """Make an array from fields that were checked when the original was made.

    Parameters
    ----------
    dtype, shape, stype
        As of Flower's.
    data : bytes or ndarray of uint8
        Flower's bytes; if they are in an array, they are read there.
    """
    fields = {"dtype": dtype, "shape": shape, "stype": stype}
    # Past what Flower does when an attribute is set, which takes longer than a copy.
    values = _values(data) if stype == "numpy.ndarray" else None
    if values is None:  # Flower or NumPy will say what is wrong
        array = Array.__new__(Array)
        data = data if isinstance(data, bytes) else data.tobytes()
        vars(array).update(fields, data=data)
        return array
    array = SentArray.__new__(SentArray)
    vars(array).update(fields, values=values, _source=_Source(data))
    return array


def _values(data: "bytes | NDArray") -> NDArray | None:
    """Return the values of a plain NumPy array, read-only; None if it is another."""
    try:
        shape, fortran_order, dtype, start = npy_layout(data)
    except (ValueError, EOFError):
        return None
    size = prod(shape)
    if not size or len(data) != start + size * dtype.itemsize:
        return None
    flat = np.frombuffer(data, dtype, offset=start)
    flat.flags.writeable = False
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def own_copy(record: Record) -> Record:
    """Copy a record and its values, but not the bytes of arrays."""
    if isinstance(record, ArrayRecord):
        return unchecked(record, {name: _own(x) for name, x in record.items()})
    values = {k: list(x) if isinstance(x, list) else x for k, x in record.items()}
    return unchecked(record, values)


def _own(array: Array) -> Array:
    if not isinstance(array, SentArray):
        return sent_array(*fields_of(array))
    own = SentArray.__new__(SentArray)
    vars(own).update(vars(array))
    return own


def own_copies(content: RecordDict) -> RecordDict:
    """Copy the records of a message, so that its receiver may spoil them."""
    return record_dict({key: own_copy(record) for key, record in content.items()})


def record_dict(records: dict[str, Record]) -> RecordDict:
    """Make a RecordDict of records; Flower's own looks at each for microseconds."""
    return unchecked(_NO_RECORDS, records)


_NO_RECORDS = RecordDict()
_NO_ARRAYS, _NO_METRICS, _NO_CONFIG = ArrayRecord(), MetricRecord(), ConfigRecord()

# Between processes of Ray ------------------------------------------------------------

# Ray shares NumPy arrays between processes without copying them, and bytes not.
Carried = tuple[str, str, tuple[int, ...], str, "bytes | NDArray"]
# Pickling a record of metrics takes longer than its dictionary, and what it is.
Values = tuple[bool, dict[str, MetricRecordValues | ConfigRecordValues]]
Wire = Values | list[Carried]


def to_wire(record: Record) -> Wire:
    """Turn a record into what Ray sends best."""
    if not isinstance(record, ArrayRecord):
        return isinstance(record, MetricRecord), dict(record.items())
    return [
        (name, dtype, shape, stype, _carrier(data))
        for name, array in record.items()
        for dtype, shape, stype, data in [fields_of(array)]
    ]


def _carrier(data: bytes) -> "bytes | NDArray":
    return np.frombuffer(data, np.uint8) if len(data) >= _SHARED_BYTES else data


def from_wire(wire: Wire) -> Record:
    """Turn it back into a record, whose arrays are read where they were put."""
    if isinstance(wire, list):
        arrays = {
            name: sent_array(dtype, shape, stype, data)
            for name, dtype, shape, stype, data in wire
        }
        return unchecked(_NO_ARRAYS, arrays)
    metrics, values = wire
    if metrics:
        return unchecked(_NO_METRICS, values)
    return unchecked(_NO_CONFIG, values)


def to_wires(content: Mapping[str, Record]) -> dict[str, Wire]:
    """Turn the records of a message into what Ray sends best."""
    return {key: to_wire(record) for key, record in content.items()}


def from_wires(wires: Mapping[str, Wire]) -> RecordDict:
    """Turn them back into records."""
    return record_dict({key: from_wire(wire) for key, wire in wires.items()})
