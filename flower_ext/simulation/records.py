"""Records on their way to and from virtual clients: shared, never mixed up, cheap.

An array is sent as the bytes that Flower made of it. Reading those bytes costs more
than training a tiny client for a step, so their header is read once for all clients.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common import NDArray

from flower_ext.core.arrays import npy_layout
from flower_ext.core.held import LikeFlowers, fields_of

Record = ArrayRecord | MetricRecord | ConfigRecord

# Smaller ones are copied faster than they are shared.
_SHARED_BYTES = 1 << 16


class SentArray(LikeFlowers):
    """A Flower array that is quick to read; in everything else it is a plain one."""

    def numpy(self) -> NDArray:
        """Return the array as a NumPy array of the caller's own."""
        plain = _plain_layout(self)
        if plain is None:
            return super().numpy()
        dtype, shape, fortran_order, start = plain
        flat = np.frombuffer(self.data, dtype, offset=start)
        if fortran_order:
            return flat.reshape(shape[::-1]).T.copy(order="F")
        return flat.reshape(shape).copy()


def sent_array(
    dtype: str, shape: tuple[int, ...], stype: str, data: bytes
) -> SentArray:
    """Make an array from fields that were checked when the original was made."""
    array = SentArray.__new__(SentArray)
    array.dtype, array.shape, array.stype, array.data = dtype, shape, stype, data
    return array


def _plain_layout(
    array: Array,
) -> tuple[np.dtype[np.generic], tuple[int, ...], bool, int] | None:
    """Return dtype, shape, order and start of the values of a plain NumPy array."""
    if array.stype != "numpy.ndarray":
        return None
    try:
        shape, fortran_order, dtype, start = npy_layout(array.data)
    except (ValueError, EOFError):
        return None  # NumPy will say what is wrong
    size = prod(shape)
    if not size or len(array.data) != start + size * dtype.itemsize:
        return None
    return dtype, shape, fortran_order, start


def own_copy(record: Record) -> Record:
    """Copy a record and its values, but not the bytes of arrays."""
    if not isinstance(record, ArrayRecord):
        values = {k: list(x) if isinstance(x, list) else x for k, x in record.items()}
        return type(record)(values)  # type: ignore[arg-type]
    own = ArrayRecord()
    for name, array in record.items():
        own[name] = sent_array(*fields_of(array))
    return own


def own_copies(content: RecordDict) -> RecordDict:
    """Copy the records of a message, so that its receiver may spoil them."""
    return RecordDict({key: own_copy(record) for key, record in content.items()})


# Between processes of Ray ------------------------------------------------------------

# Ray shares NumPy arrays between processes without copying them, and bytes not.
Carried = tuple[str, str, tuple[int, ...], str, "bytes | NDArray"]
Wire = MetricRecord | ConfigRecord | list[Carried]


def to_wire(record: Record) -> Wire:
    """Turn a record into what Ray sends best."""
    if not isinstance(record, ArrayRecord):
        return record
    return [
        (name, dtype, shape, stype, _carrier(data))
        for name, array in record.items()
        for dtype, shape, stype, data in [fields_of(array)]
    ]


def _carrier(data: bytes) -> "bytes | NDArray":
    return np.frombuffer(data, np.uint8) if len(data) >= _SHARED_BYTES else data


def from_wire(wire: Wire) -> Record:
    """Turn it back into a record, which holds bytes of its own."""
    if not isinstance(wire, list):
        return wire
    record = ArrayRecord()
    for name, dtype, shape, stype, data in wire:
        record[name] = sent_array(
            dtype, shape, stype, data if isinstance(data, bytes) else data.tobytes()
        )
    return record


def to_wires(content: RecordDict) -> dict[str, Wire]:
    """Turn the records of a message into what Ray sends best."""
    return {key: to_wire(record) for key, record in content.items()}


def from_wires(wires: Mapping[str, Wire]) -> RecordDict:
    """Turn them back into records."""
    return RecordDict({key: from_wire(wire) for key, wire in wires.items()})
