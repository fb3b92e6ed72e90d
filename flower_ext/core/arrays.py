"""The algebra of named arrays, and their way to and from Flower's records."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from math import prod

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from flwr.common import NDArray

from flower_ext.core.held import HeldArray, flower_array
from flower_ext.core.typing import Floats

Arrays = dict[str, NDArray]

# Elements processed at a time: 128 KiB of float64, which stay in a core's cache.
_BLOCK = 1 << 14
# NumPy pads the header of a plain array to 128 bytes. It is parsed as Python, so that
# a long one, which only a hostile client would send, is not looked at.
_LONGEST_HEADER = 4096
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")
# Squared it is still a float32, as the second moments of server optimizers are.
_LARGEST_CHANGE = 1e18


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
    if isinstance(array, HeldArray):
        return array.values
    if array.stype != "numpy.ndarray":
        raise ValueError(f"stype={array.stype!r} must be 'numpy.ndarray'")
    shape, fortran_order, dtype, start = npy_layout(array.data)
    size = prod(shape)
    if size == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(array.data, dtype, size, start)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def npy_layout(
    data: "bytes | NDArray",
) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Return shape, Fortran order, dtype and start of the values of ``.npy`` bytes.

    Raises
    ------
    ValueError
        If the bytes are not those of a plain NumPy array.
    """
    # The length of the header has 2 bytes in version 1 of the format, 4 in later ones.
    if len(data) < 12 or data[6] == 1:
        start = 10 + int.from_bytes(data[8:10], "little")
    else:
        start = 12 + int.from_bytes(data[8:12], "little")
    if start > _LONGEST_HEADER:
        raise ValueError(f"a header of {start} bytes, must be <= {_LONGEST_HEADER}")
    return (*_read_header(bytes(data[:start])), start)


# Every client sends the same headers, and parsing one takes longer than adding up a
# small array.
@lru_cache(maxsize=4096)
def _read_header(
    header: bytes,
) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    stream = BytesIO(header)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read_header(stream)
    except Exception as error:  # NumPy parses it as Python, which fails in many ways
        raise ValueError(f"the header cannot be read: {error!r}") from error
    if dtype.hasobject:
        raise ValueError("an array of Python objects is never read")
    return shape, fortran_order, dtype


def from_record(record: ArrayRecord) -> Arrays:
    """Read all arrays of a record without copying them."""
    return {name: view(array) for name, array in record.items()}


def to_record(arrays: Mapping[str, NDArray]) -> ArrayRecord:
    """Serialise named arrays, keeping order, shapes (0-d too) and dtypes."""
    record = ArrayRecord()  # made of a dictionary it would copy its arrays
    for name, x in arrays.items():
        record[name] = flower_array(np.asarray(x))
    return record


def is_averaged(array: NDArray) -> bool:
    """Whether an array holds real numbers, which are averaged; not counters, flags."""
    return array.dtype.kind == "f"


def is_parameter(name: str, array: NDArray) -> bool:
    """Whether an array is trained: real numbers, but for BatchNorm's statistics.

    Their names tell: ``running_mean`` and ``running_var`` (torch), ``moving_mean`` and
    ``moving_variance`` (Keras).
    """
    return is_averaged(array) and not name.endswith(_STATISTICS)


class Lazy:
    """An elementwise function of arrays, computed block by block when it is needed.

    A client's term may be as large as the model; computed this way while it is added
    to the sum, it is never held as a whole.

    Parameters
    ----------
    function : callable
        Takes flat blocks of the operands and returns a flat block.
    *operands : ndarray or Lazy
        All of one shape.
    within : callable, optional
        See :func:`within`; without it nothing is known of the entries' size.
    """

    def __init__(
        self,
        function: Callable[..., NDArray],
        *operands: "NDArray | Lazy",
        within: Callable[[float], bool] = lambda limit: False,
    ) -> None:
        self.shape: tuple[int, ...] = operands[0].shape
        if any(x.shape != self.shape for x in operands):
            shapes = [x.shape for x in operands]
            raise ValueError(f"operands of shapes {shapes} must have one shape")
        self._function = function
        self.within = within
        self._flat = [x if isinstance(x, Lazy) else x.reshape(-1) for x in operands]

    def block(self, where: slice) -> NDArray:
        """Return a part of the flattened array.

        Raises
        ------
        ValueError
            If the function is not elementwise. NumPy would broadcast its result into
            the sum, which would then hold more than the norm that was clipped.
        """
        parts = [
            x.block(where) if isinstance(x, Lazy) else x[where] for x in self._flat
        ]
        found = self._function(*parts)
        if found.shape != parts[0].shape:
            raise ValueError(
                f"the function made {found.shape} of {parts[0].shape}, it must be "
                "elementwise"
            )
        return found

    def numpy(self) -> NDArray:
        """Return the whole array."""
        return self.block(slice(None)).reshape(self.shape)


Term = NDArray | Lazy


def numpy_of(term: Term) -> NDArray:
    """Return a term as an array."""
    return term.numpy() if isinstance(term, Lazy) else term


def lazy(term: Term) -> Lazy:
    """Return an array as a lazy one, which is not copied."""
    return term if isinstance(term, Lazy) else Lazy(np.asarray, term)


def subtract(new: NDArray, old: NDArray, *, largest: float = math.inf) -> Lazy:
    """Return ``new - old``: floats in float32 or wider, integers exactly in int64.

    An entry that is unchanged gives 0, also where it is an infinity or a NaN. Where it
    is known that no entry of ``old`` is larger in size than ``largest``, no block is
    searched for these, and the size of the difference is seen from ``new`` alone.
    """
    if not is_averaged(new):
        return Lazy(_subtract_integers, new, old)
    wide = np.result_type(new, old, np.float32)
    if largest == math.inf:
        return Lazy(partial(_subtract_floats, wide), new, old)
    return Lazy(
        partial(np.subtract, dtype=wide),
        new,
        old,
        within=lambda limit: within(new, limit - largest),
    )


def largest(array: NDArray) -> float:
    """Return the size of the largest number of a float array; inf beside a NaN, too."""
    if not array.size:
        return 0.0
    found = max(abs(float(array.min())), abs(float(array.max())))
    return found if math.isfinite(found) else math.inf


def within(term: Term, limit: float) -> bool:
    """Whether it is known that no entry is larger in size; a NaN is not known."""
    if isinstance(term, Lazy):
        return term.within(limit)
    if term.dtype.kind != "f":
        return False
    return all(
        -limit <= float(np.minimum.reduce(block))
        and float(np.maximum.reduce(block)) <= limit
        for block in _blocks(term)
    )


def _subtract_floats(wide: npt.DTypeLike, new: NDArray, old: NDArray) -> NDArray:
    with np.errstate(invalid="ignore", over="ignore"):
        change = np.subtract(new, old, dtype=wide)
    # An attention mask holds infinities: inf - inf is NaN, which would spoil the reply.
    if not _is_finite(change):
        change[_unchanged(new, old)] = 0
    return change


def _unchanged(new: NDArray, old: NDArray) -> NDArray:
    same: NDArray = (new == old) | (np.isnan(new) & np.isnan(old))
    return same


def _subtract_integers(new: NDArray, old: NDArray) -> NDArray:
    return np.subtract(new.astype(np.int64), old.astype(np.int64))


def zeros_like(arrays: Mapping[str, NDArray]) -> Arrays:
    """Return zeros of the same names, shapes and dtypes that take no memory."""
    # Broadcast, every entry is the same single zero; the arrays are read-only.
    return {
        name: np.broadcast_to(np.zeros((), x.dtype), x.shape)
        for name, x in arrays.items()
    }


def multiply(left: Term, right: Term) -> Lazy:
    """Return the elementwise product in float64; in float32 it might underflow."""
    return Lazy(partial(np.multiply, dtype=np.float64), left, right)


def scale(term: Term, factor: float) -> Term:
    """Return the array times a number, in float64; for 1 the array itself."""
    if factor == 1:
        return term
    return Lazy(partial(np.multiply, factor, dtype=np.float64), term)


def accumulate(total: Floats, terms: Sequence[tuple[Term, float]]) -> None:
    """Add ``sum(weight * term)`` to ``total`` in place, in float64, in order.

    All terms are added to one block of the total before the next: it stays in the
    processor's cache, and no temporary array is as large as the model.

    Parameters
    ----------
    total : ndarray of float64
        Contiguous.
    terms : sequence of (ndarray or Lazy, float)
        Each of the shape of ``total``, and its weight.
    """
    into = total.reshape(-1)
    flat = [(x if isinstance(x, Lazy) else x.reshape(-1), w) for x, w in terms]
    product = np.empty(min(_BLOCK, into.size))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, into.size, _BLOCK):
            where = slice(start, start + _BLOCK)
            block = into[where]
            wide = product[: block.size]
            for x, weight in flat:
                wide[...] = x.block(where) if isinstance(x, Lazy) else x[where]
                wide *= weight
                block += wide


def all_finite(terms: Iterable[Term]) -> bool:
    """Whether no array holds a NaN or an infinity."""
    with np.errstate(invalid="ignore", over="ignore"):
        return all(_is_finite(block) for x in terms for block in _blocks(x))


def _is_finite(block: NDArray) -> bool:
    # A NaN or an infinity spoils the sum, which is faster to compute than a test of
    # every entry. The sum of finite entries may overflow: only then are they tested.
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(block.sum()) or np.isfinite(block).all())


def none_below_zero(terms: Iterable[Term]) -> bool:
    """Whether no array holds a negative number."""
    return all(bool(block.min() >= 0) for x in terms for block in _blocks(x))


def finite_or_unchanged(new: Mapping[str, NDArray], old: Mapping[str, NDArray]) -> bool:
    """Whether no array has a NaN or an infinity that it did not have before."""
    return all(
        not is_averaged(x)
        or _is_finite(x)
        or bool(np.all(np.isfinite(x) | _unchanged(x, old[name])))
        for name, x in new.items()
    )


def can_move(
    sent: Mapping[str, NDArray], changes: Mapping[str, Term], factor: float = 1.0
) -> bool:
    """Whether a model can be moved by changes times a factor, in its own precision.

    No change may exceed 1e18 in size: the second moments of server optimizers hold its
    square, often as a float32.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return all(
            _can_move(old, change, factor)
            for name, x in changes.items()
            if name in sent and is_averaged(sent[name])
            for old, change in _side_by_side(sent[name], x)
        )


def _side_by_side(old: NDArray, change: Term) -> Iterator[tuple[NDArray, NDArray]]:
    """Yield blocks of an array with those of its change.

    A change of another shape, that of a smaller model, is held against the number that
    it could make largest.
    """
    if old.shape == change.shape:
        yield from zip(_blocks(old), _blocks(change), strict=True)
    else:
        for block in _blocks(change):
            yield np.copysign(largest(old), block).astype(old.dtype), block


def _can_move(old: NDArray, change: NDArray, factor: float) -> bool:
    most = _LARGEST_CHANGE / factor if factor else math.inf
    if not -most <= change.min() <= change.max() <= most:  # false for a NaN, too
        return False
    # Beside the largest float32 such a change is less than its last digit: only half
    # precision can overflow.
    if np.finfo(old.dtype).max > 1e30:
        return True
    moved = np.add(old, change * factor, dtype=np.float64).astype(old.dtype)
    return _is_finite(moved) or bool(np.all(np.isfinite(moved) | ~np.isfinite(old)))


def norm(terms: Iterable[Term]) -> float:
    """Return the l2 norm of all arrays taken as one vector."""
    with np.errstate(over="ignore"):  # a warning would tell whose contribution it was
        squares = (
            float(np.sum(np.square(block, dtype=np.float64)))
            for x in terms
            for block in _blocks(x)
        )
        return math.sqrt(sum(squares))


def _blocks(term: Term) -> Iterator[NDArray]:
    flat = term if isinstance(term, Lazy) else term.reshape(-1)
    for start in range(0, prod(term.shape), _BLOCK):
        where = slice(start, start + _BLOCK)
        yield flat.block(where) if isinstance(flat, Lazy) else flat[where]


def layout(arrays: Mapping[str, NDArray]) -> dict[str, str]:
    """Describe names, dtypes and shapes, for error messages and checkpoints."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}
