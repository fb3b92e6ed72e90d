"""Models of which much is zero: the rest travels, and of its change only the values.

Zeros are bits that are all 0. A weight that is zero and not pruned can be told from a
pruned one as the negative zero, which calculates alike; that is how
:class:`~flower_ext.server.optimizers.PruneAfter` writes it.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, is_averaged
from flower_ext.core.errors import yes_or_no
from flower_ext.wire.chain import Chosen, Selection, maskable, masks_of
from flower_ext.wire.codec import Reader, Sending
from flower_ext.wire.mask_codes import Positions
from flower_ext.wire.masks import Mask, Masks

_CHECKSUM = struct.Struct("<I")
# What travels of an array: nothing, all, or what is not zero in what was received.
_NOTHING, _ALL, _KNOWN = range(3)


def nonzero(array: NDArray) -> Mask:
    """Return which numbers are not zero; the negative zero is one that is not.

    Examples
    --------
    >>> nonzero(np.array([0.0, -0.0, 2.0]))
    array([False,  True,  True])
    """
    mask: Mask = array != 0
    return mask | np.signbit(array) if is_averaged(array) else mask


@dataclass(frozen=True)
class Nonzero(Selection):
    """What is not zero, as it is: for downloads of models that are pruned.

    Lossless: a bit for each number at most, and the numbers that are not zero. Arrays
    of which too little is zero to pay for that travel whole.

    Examples
    --------
    >>> x = {"w": np.where(np.arange(8000) % 5, 0, 1).astype(np.float32)}
    >>> codec = Nonzero()
    >>> x["w"].nbytes, codec.encode(x).count_bytes() < 0.25 * x["w"].nbytes
    (32000, True)
    >>> bool(np.all(codec.decode(codec.encode(x), x)["w"] == x["w"]))
    True
    """

    @property
    def lossless(self) -> bool:
        """True."""
        return True

    def choose(self, arrays: Arrays, sending: Sending) -> Masks:
        """Return what is not zero, of arrays where that saves bytes."""
        found = {name: nonzero(x) for name, x in arrays.items()}
        return {name: mask for name, mask in found.items() if _pays(mask, arrays[name])}


def _pays(mask: Mask, array: NDArray) -> bool:
    saved = (mask.size - np.count_nonzero(mask)) * array.itemsize
    return bool(saved > mask.size // 8 + 16)  # of a bitmap, the longest of the codes


@dataclass(frozen=True)
class Kept(Selection):
    """The change where the model is not zero: for uploads to a server that prunes.

    Client and server both know the model that the client began with, so that no places
    travel: values only, a byte for each array and a checksum of the places. The rest of
    the change is zero to the server. Vectors, scalars and integers travel whole, and so
    do arrays that were all zero, which are new and not pruned.

    Parameters
    ----------
    everything : bool or callable (default: False)
        Whether all of the change travels, or ``server_round -> bool``, for rounds in
        which the server looks at what is pruned. It is set in the ``upload`` of
        :class:`~flower_ext.server.optimizers.PruneAfter`.

    Notes
    -----
    The download must be lossless, or what is zero is not the same to both; a strategy
    refuses any other. Alone, without a model that is known, everything travels.

    Examples
    --------
    >>> began = {"w": np.float32([[0, 2], [3, 0]])}
    >>> change = {"w": np.float32([[5, 6], [7, 8]])}
    >>> record = Kept().encode(change, Sending(began=began))
    >>> Kept().decode(record, change, began)
    {'w': array([[0., 6.],
           [7., 0.]], dtype=float32)}
    """

    everything: bool | Callable[[int], bool] = False

    tag = b"kp"
    needs_shapes = True
    needs_began = True

    def __post_init__(self) -> None:
        if not callable(self.everything):
            yes_or_no("everything", self.everything)

    def choose(self, arrays: Arrays, sending: Sending) -> Masks:
        """Return what :meth:`select` takes."""
        return masks_of(self.select(arrays, sending)[1], arrays)

    def select(self, arrays: Arrays, sending: Sending) -> tuple[list[bytes], Chosen]:
        """Return the positions that travel, and a byte for each array."""
        began = {} if self.everything else sending.began or {}
        kinds: dict[str, int] = {}
        for name, x in arrays.items():
            if name in sending.silent:
                kinds[name] = _NOTHING
            elif name in began and maskable(name, x, ()) and is_pruned(began[name]):
                kinds[name] = _KNOWN
            else:
                kinds[name] = _ALL
        known = {name: kinds[name] for name in sorted(arrays)}
        chosen, checksum = _positions(known, arrays, began)
        return [bytes(known.values()), _CHECKSUM.pack(checksum)], chosen

    @classmethod
    def read_chosen(cls, reader: Reader, like: Arrays) -> Chosen:
        """Return the positions, which the model tells that the client began with."""
        kinds = dict(zip(sorted(like), reader.take(len(like)), strict=True))
        (checksum,) = reader.unpack(_CHECKSUM)
        began = reader.began or {}
        for name, kind in kinds.items():
            if kind > _KNOWN:
                raise ValueError(f"{kind} is no kind of choice")
            if kind == _KNOWN and name not in began:
                raise ValueError(f"what {name!r} began with is not known here")
        chosen, own = _positions(kinds, like, began)
        if own != checksum:
            raise ValueError(
                "the client began with zeros in other places than the server: the "
                "download must be lossless, such as Nonzero()"
            )
        return chosen


def is_pruned(array: NDArray) -> bool:
    """Whether some numbers of a matrix, or a kernel, are zero, and not all."""
    if not is_averaged(array) or array.ndim < 2:
        return False
    count = np.count_nonzero(nonzero(array))
    return bool(0 < count < array.size)


def _positions(
    kinds: Mapping[str, int], like: Mapping[str, NDArray], began: Mapping[str, NDArray]
) -> tuple[dict[str, Positions | None], int]:
    """Return what travels of each array, and a checksum of what is known of it."""
    chosen: dict[str, Positions | None] = {}
    checksum = 0
    for name, kind in kinds.items():
        if kind == _KNOWN:
            mask = nonzero(began[name])
            if mask.shape != like[name].shape:
                raise ValueError(f"{name!r} began in another shape")
            chosen[name] = np.flatnonzero(mask)
            checksum = zlib.crc32(np.packbits(mask).tobytes(), checksum)
        else:
            chosen[name] = None if kind == _ALL else np.empty(0, np.int64)
    return chosen, checksum
