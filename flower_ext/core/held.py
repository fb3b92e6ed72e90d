"""Arrays of a reply that is read in the process that made it.

Flower's arrays are bytes. To make them, and to read them again, takes longer than the
training of a small client; where the reply is added up at once, nobody needs them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from io import BytesIO
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common import NDArray

from flower_ext._flower import unchecked

Fields = tuple[str, tuple[int, ...], str, bytes]

_HOLDING = ContextVar("holding", default=False)
_NO_ARRAYS = ArrayRecord()
_flowers = Array.from_numpy_ndarray


class LikeFlowers(Array):
    """Equals Flower's array of the same fields, and is pickled as that."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return fields_of(self) == fields_of(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Array], Fields]:
        return Array, fields_of(self)


class HeldArray(LikeFlowers):
    """A Flower array that holds its values; its bytes are made when they are asked for.

    Parameters
    ----------
    values : ndarray
        Not copied: they are read before whoever made them changes them.
    """

    def __init__(self, values: NDArray) -> None:
        self.values = np.asarray(values).view()
        self.values.flags.writeable = False
        self.dtype, self.shape = _name_of(values.dtype), values.shape
        self.stype = "numpy.ndarray"

    @property
    def data(self) -> bytes:
        """The bytes that Flower makes of the values."""
        if "_bytes" not in self.__dict__:
            self.__dict__["_bytes"] = flower_array(self.values).data
        return cast(bytes, self.__dict__["_bytes"])

    @data.setter
    def data(self, data: bytes) -> None:
        self.__class__ = Array  # type: ignore[assignment]
        self.data = data

    @property
    def size(self) -> int:
        """Length of the bytes, which are not made for it."""
        return len(_header(self.values)) + self.values.nbytes

    def numpy(self) -> NDArray:
        """Return the array as a NumPy array of the caller's own."""
        return self.values.copy(order="K")


def flower_array(values: NDArray) -> Array:
    """Return ``Array(values)``: the same bytes, copied once and not three times."""
    plain = type(values) is np.ndarray and values.dtype.kind in "fciub"
    if not plain or not values.size:
        return _flowers(values)
    flat = values.T if _in_fortran_order(values) else np.ascontiguousarray(values)
    array = Array.__new__(Array)
    vars(array).update(
        dtype=_name_of(values.dtype),
        shape=values.shape,
        stype="numpy.ndarray",
        data=b"".join((_header(values), flat.data)),
    )
    return array


def _header(values: NDArray) -> bytes:
    return _header_of(values.dtype, values.shape, _in_fortran_order(values))


def _in_fortran_order(values: NDArray) -> bool:
    # NumPy writes an array in C order unless it is contiguous in Fortran's only.
    return values.flags.f_contiguous and not values.flags.c_contiguous


@lru_cache(maxsize=4096)  # every client sends the same
def _header_of(
    dtype: np.dtype[np.generic], shape: tuple[int, ...], fortran_order: bool
) -> bytes:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": fortran_order, "shape": shape}
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


@lru_cache(maxsize=256)
def _name_of(dtype: np.dtype[np.generic]) -> str:
    return str(dtype)


def fields_of(array: Array) -> Fields:
    """Return what an array is made of."""
    return array.dtype, tuple(array.shape), array.stype, array.data


def num_bytes(array: Array) -> int:
    """Return the length of an array's bytes."""
    return array.size if isinstance(array, HeldArray) else len(array.data)


@contextmanager
def holding_replies() -> Iterator[None]:
    """Let replies hold their arrays: each is read before its client's model changes."""
    token = _HOLDING.set(True)
    try:
        yield
    finally:
        _HOLDING.reset(token)


def reply_record(arrays: Mapping[str, NDArray]) -> ArrayRecord:
    """Make the record of arrays that a client sends: held, or as Flower's bytes."""
    make: Callable[[NDArray], Array] = HeldArray if _HOLDING.get() else flower_array
    return unchecked(_NO_ARRAYS, {name: make(x) for name, x in arrays.items()})
