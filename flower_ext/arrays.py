"""The algebra of named arrays, and their way to and from Flower's records."""

from collections.abc import Iterable, Mapping
from io import BytesIO
from math import prod

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from flwr.common import NDArray

Arrays = dict[str, NDArray]

# Elements added at a time: a block of float64 that stays in the cache.
_BLOCK = 1 << 15


def view(array: Array) -> NDArray:
    """Read a Flower array without copying it.

    Parameters
    ----------
    array : Array
        A NumPy array as Flower serialises it.

    Returns
    -------
    ndarray
        A read-only view of the array's own bytes.

    Raises
    ------
    ValueError
        If the bytes are not those of a plain NumPy array of the stated size.
    """
    if array.stype != "numpy.ndarray":
        raise ValueError(f"stype={array.stype!r} must be 'numpy.ndarray'")
    stream = BytesIO(array.data)
    version = np.lib.format.read_magic(stream)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects is never read")
    size = prod(shape)
    if size == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(array.data, dtype, size, stream.tell())
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def from_record(record: ArrayRecord) -> Arrays:
    """Read all arrays of a record without copying them."""
    return {name: view(array) for name, array in record.items()}


def to_record(arrays: Mapping[str, NDArray]) -> ArrayRecord:
    """Serialise named arrays, keeping order, shapes (0-d too) and dtypes."""
    return ArrayRecord({name: Array(np.asarray(x)) for name, x in arrays.items()})


def is_averaged(array: NDArray) -> bool:
    """Whether an array holds real numbers; counters and flags do not."""
    return array.dtype.kind == "f"


def subtract(new: NDArray, old: NDArray) -> NDArray:
    """Return ``new - old``: floats in float32 or wider, integers exactly in int64."""
    if is_averaged(new):
        wide = np.result_type(new, old, np.float32)
        return np.asarray(np.subtract(new, old, dtype=wide))
    return np.asarray(new.astype(np.int64) - old.astype(np.int64))


def accumulate(total: npt.NDArray[np.float64], term: NDArray, weight: float) -> None:
    """Add ``weight * term`` to ``total`` in place, in float64, block by block.

    The blocks keep the product in the processor's cache: no temporary array of the
    size of the model.
    """
    into, values = total.reshape(-1), term.reshape(-1)
    for start in range(0, into.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        into[block] += np.multiply(values[block], weight, dtype=np.float64)


def zeros_like(arrays: Mapping[str, NDArray]) -> dict[str, npt.NDArray[np.float64]]:
    """Return float64 zeros of the same names and shapes."""
    return {name: np.zeros(x.shape) for name, x in arrays.items()}


def all_finite(arrays: Iterable[NDArray]) -> bool:
    """Whether no array holds a NaN or an infinity (one pass, no temporary)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return all(np.isfinite(np.sum(x, dtype=np.float64)) for x in arrays)


def norm(arrays: Iterable[NDArray]) -> float:
    """Return the l2 norm of all arrays taken as one vector."""
    return float(np.sqrt(sum(_squares(x) for x in arrays)))


def _squares(array: NDArray) -> float:
    flat = array.reshape(-1)
    return sum(
        float(np.sum(np.square(flat[start : start + _BLOCK], dtype=np.float64)))
        for start in range(0, flat.size, _BLOCK)
    )


def layout(arrays: Mapping[str, NDArray]) -> dict[str, str]:
    """Describe names, dtypes and shapes, for error messages and checkpoints."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}
