"""Named arrays of which only some coordinates travel, as an ordinary ArrayRecord.

All arrays become one array of bytes under the key :data:`PAYLOAD`, in a record that
stays where the dense one was (``arrays``). One payload, and not one for each name:
sender and receiver both know names, shapes and dtypes, and Flower spends about 250
bytes on each named array (its name, and NumPy's header of 128 bytes), which for a LoRA
adapter at density 1/64 is more than all its values. The layout is::

    "FXS1"  crc32 of the rest  crc32 of names, dtypes and shapes
    precision  number of values
    for each array, in the order of the names:
        code of the mask  [count  length  mask]  values

A mask of nothing or of everything takes one byte; otherwise the shortest of
:data:`~flower_ext.wire.mask_codes.MASK_CODES` is taken for each array. Integers and
flags are always exact.

Whoever receives such a record says so once, ``accept_sparse(model)``, and then loads it
as any other: ``model.load_state_dict(record.to_torch_state_dict())``.
"""

import struct
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any, get_args

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.common import NDArray
from torch import nn

from flower_ext.core.arrays import Arrays, is_averaged, layout, to_record, view
from flower_ext.core.errors import one_of
from flower_ext.core.replies import MalformedReply
from flower_ext.wire.mask_codes import MASK_CODES, MAX_SIZE, Positions, smallest
from flower_ext.wire.masks import Mask, Masks
from flower_ext.wire.value_codes import VALUE_CODES, Precision

#: Key of the payload in its record.
PAYLOAD = "<sparse>"
#: Serialisation type of a sealed payload, which Flower refuses to read.
SEALED = "sparse-record"
#: What to do where that happened.
CANNOT_READ = (
    "this ClientApp cannot read sparse records: give client_app(task, ...) the client "
    "half of the strategy, or an app with a loop of its own the mod of FLASC, "
    "ClientApp(mods=[flasc()])"
)

_NO_DRAWS = np.random.default_rng(0)
_PLAIN = "numpy.ndarray"
_MAGIC = b"FXS1"
_HEADER = struct.Struct("<4sI")
_BODY = struct.Struct("<IBQ")
_SECTION = struct.Struct("<II")
_NOTHING, _EVERYTHING = 0, 1
_MOST_VALUES_A_BYTE = 2  # NF4
_MASK_NAMES = ["nothing", "everything", *MASK_CODES]
_MASKS_ATTRIBUTE = "flower_ext_received_masks"


def encode(
    arrays: Mapping[str, NDArray],
    masks: Mapping[str, Mask] | None = None,
    precision: Precision = "exact",
) -> ArrayRecord:
    """Return the coordinates in the masks as a record of one array of bytes.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        Any shapes; of floats, integers or flags.
    masks : Mapping[str, ndarray of bool], optional
        What travels of the arrays it names; of the others everything does.
    precision : {"exact", "bfloat16", "nf4"}
        How floats travel: as they are, in 16 bits, in 4.5 bits.

    Examples
    --------
    >>> record = encode({"w": np.float32([0, 5, 0])}, {"w": np.array([0, 1, 0], bool)})
    >>> decode(record, {"w": np.zeros(3, np.float32)})[0]
    {'w': array([0., 5., 0.], dtype=float32)}
    """
    one_of("precision", precision, get_args(Precision))
    parts, values = [], 0
    for name in sorted(arrays):
        mask = None if masks is None else masks.get(name)
        section, count = _encode_array(np.asarray(arrays[name]), mask, precision)
        parts += section
        values += count
    code = list(VALUE_CODES).index(precision)
    body = b"".join([_BODY.pack(_layout_checksum(arrays), code, values), *parts])
    payload = _HEADER.pack(_MAGIC, zlib.crc32(body)) + body
    return to_record({PAYLOAD: np.frombuffer(payload, np.uint8)})


def decode(record: ArrayRecord, like: Mapping[str, NDArray]) -> tuple[Arrays, Masks]:
    """Return the arrays, zero where nothing travelled, and what did travel.

    Parameters
    ----------
    record : ArrayRecord
        As :func:`encode` makes it.
    like : Mapping[str, ndarray]
        Arrays of the names, shapes and dtypes that are expected.

    Raises
    ------
    MalformedReply
        Whatever is wrong with it: nothing is written before it is found to be right,
        and what is allocated depends on ``like``, not on the length of the payload.
    """
    try:
        payload = _payload(record)
        magic, checksum = _HEADER.unpack_from(payload)
        body = payload[_HEADER.size :]
        if magic != _MAGIC:
            raise ValueError(f"it begins with {magic!r} and not with {_MAGIC!r}")
        if checksum != zlib.crc32(body):
            raise ValueError("its checksum is wrong: cut off or altered")
        expected, code, total = _BODY.unpack_from(body)
        if expected != _layout_checksum(like):
            raise ValueError(
                f"its arrays are not the {len(like)} expected, such as "
                f"{dict(list(layout(like).items())[:2])}"
            )
        return _Reader(body, _BODY.size).arrays(like, _precision(code), total)
    except (ValueError, TypeError, EOFError, struct.error) as error:
        raise MalformedReply(f"a sparse payload cannot be read: {error}") from error


def seal(record: ArrayRecord) -> ArrayRecord:
    """Return a sparse record that cannot be taken for an ordinary one.

    Some receivers pass over arrays whose names they do not know, as ``load_state_dict``
    does with ``strict=False``, and would train something else. A sealed record fails
    when it is read, with :data:`SEALED` in the message. :func:`decode` and the like
    read it as it is.
    """
    return _with_stype(record, SEALED)


def unseal(record: ArrayRecord) -> ArrayRecord:
    """Return what was sealed, and any other record as it is."""
    return _with_stype(record, _PLAIN) if is_sparse(record) else record


def _with_stype(record: ArrayRecord, stype: str) -> ArrayRecord:
    array = record[PAYLOAD]
    shape = tuple(array.shape)
    return ArrayRecord({PAYLOAD: Array(array.dtype, shape, stype, array.data)})


def is_sparse(record: ArrayRecord) -> bool:
    """Whether a record is one that :func:`encode` made."""
    return PAYLOAD in record


def num_values(record: ArrayRecord) -> int:
    """Return how many numbers a record transfers, sparse or not.

    This is the count of parameters that papers report; the masks are not in it. More
    numbers than its bytes can hold are none.
    """
    if is_sparse(record):
        try:
            payload = _payload(record)
            stated = int(_BODY.unpack_from(payload, _HEADER.size)[2])
        except (MalformedReply, ValueError, struct.error):
            return 0
        return stated if stated <= _MOST_VALUES_A_BYTE * len(payload) else 0
    return sum(
        size
        for array in record.values()
        if 0 <= (size := prod(array.shape)) <= len(array.data)
    )


def mask_codes(record: ArrayRecord, like: Mapping[str, NDArray]) -> dict[str, str]:
    """Return the code that was chosen for each array's mask."""
    body = _payload(record)[_HEADER.size :]
    _, code, _ = _BODY.unpack_from(body)
    reader = _Reader(body, _BODY.size)
    return {
        name: reader.section(np.asarray(like[name]), _precision(code))[0]
        for name in sorted(like)
    }


def accept_sparse(model: nn.Module) -> nn.Module:
    """Let a model's ``load_state_dict`` take sparse records, beside dense ones.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, once, by a pre-hook of its ``load_state_dict``, and returned.
        The coordinates that do not travel become zero.
    """
    if not hasattr(model, _MASKS_ATTRIBUTE):
        setattr(model, _MASKS_ATTRIBUTE, None)
        model.register_load_state_dict_pre_hook(_load_sparse)  # type: ignore[no-untyped-call]
    return model


def received_masks(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return what travelled of each array of the state that a model loaded last.

    None if that was a dense one.
    """
    masks: dict[str, torch.Tensor] | None = getattr(model, _MASKS_ATTRIBUTE, None)
    return masks


def _load_sparse(
    model: nn.Module, state: dict[str, Any], prefix: str, *_: object
) -> None:
    setattr(model, _MASKS_ATTRIBUTE, None)
    payload = state.pop(prefix + PAYLOAD, None)
    if payload is None:
        return
    like = {name: x.detach().cpu().numpy() for name, x in model.state_dict().items()}
    arrays, masks = decode(to_record({PAYLOAD: payload.cpu().numpy()}), like)
    for name, array in arrays.items():
        state[prefix + name] = torch.from_numpy(array)
    kept = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    setattr(model, _MASKS_ATTRIBUTE, kept)


def _payload(record: ArrayRecord) -> memoryview:
    if set(record) != {PAYLOAD}:
        raise MalformedReply(f"a sparse record has one array, not {sorted(record)[:5]}")
    payload = view(unseal(record)[PAYLOAD])
    if payload.dtype != np.uint8 or payload.ndim != 1:
        raise ValueError(f"it must be bytes, not {payload.dtype}{list(payload.shape)}")
    return payload.data


def _layout_checksum(arrays: Mapping[str, NDArray]) -> int:
    text = repr(sorted(layout(arrays).items()))
    return zlib.crc32(text.encode())


def _precision(code: int) -> str:
    names = list(VALUE_CODES)
    if code >= len(names):
        raise ValueError(f"precision {code} is unknown")
    return names[code]


def _encode_array(
    x: NDArray, mask: Mask | None, precision: str
) -> tuple[list[bytes], int]:
    """Return the section of one array, and how many values are in it."""
    flat = x.reshape(-1)
    code = VALUE_CODES[precision if is_averaged(x) else "exact"]
    if mask is None or mask.all():
        return [bytes([_EVERYTHING]), code.encode_values(flat, _NO_DRAWS)], flat.size
    positions = np.flatnonzero(mask)
    if not len(positions):
        return [bytes([_NOTHING])], 0
    name = smallest(positions, flat.size)
    coded = MASK_CODES[name].encode(positions, flat.size)
    head = bytes([_MASK_NAMES.index(name)]) + _SECTION.pack(len(positions), len(coded))
    return [head, coded, code.encode_values(flat[positions], _NO_DRAWS)], len(positions)


class _Reader:
    """Reads a payload from front to back, never past its end."""

    def __init__(self, body: memoryview, start: int) -> None:
        self._body = body
        self._at = start

    def arrays(
        self, like: Mapping[str, NDArray], precision: str, total: int
    ) -> tuple[Arrays, Masks]:
        """Return all arrays and masks; the payload must end behind them."""
        found: dict[str, tuple[NDArray, Mask]] = {}
        values = 0
        for name in sorted(like):
            found[name] = _scatter(like[name], *self.section(like[name], precision)[1:])
            values += int(np.count_nonzero(found[name][1]))
        if self._at != len(self._body):
            raise ValueError(f"{len(self._body) - self._at} bytes too many")
        if values != total:
            raise ValueError(f"it has {values} values, {total} were announced")
        return (
            {name: found[name][0] for name in like},
            {name: found[name][1] for name in like},
        )

    def section(
        self, like: NDArray, precision: str
    ) -> tuple[str, Positions | None, NDArray]:
        """Return an array's mask code, positions (None: all of them) and values."""
        size = like.size
        which = self._take(1)[0]
        if which >= len(_MASK_NAMES):
            raise ValueError(f"mask code {which} is unknown")
        name = _MASK_NAMES[which]
        positions: Positions | None = None
        count = size
        if which == _NOTHING:
            positions, count = np.empty(0, np.int64), 0
        elif which != _EVERYTHING:
            count, length = _SECTION.unpack(self._take(_SECTION.size))
            if not count <= size <= MAX_SIZE:
                raise ValueError(f"{count} values for an array of {size}")
            positions = MASK_CODES[name].decode(self._take(length), count, size)
        code = VALUE_CODES[precision if is_averaged(like) else "exact"]
        data = self._take(code.length(count, like.dtype) or 0)
        return name, positions, code.decode_values(data, count, like.dtype)

    def _take(self, length: int) -> memoryview:
        part = self._body[self._at : self._at + length]
        if len(part) != length:
            raise ValueError("it is cut off")
        self._at += length
        return part


def _scatter(
    like: NDArray, positions: Positions | None, values: NDArray
) -> tuple[NDArray, Mask]:
    if positions is None:
        return np.array(values).reshape(like.shape), np.ones(like.shape, np.bool_)
    flat = np.zeros(like.size, like.dtype)
    mask = np.zeros(like.size, np.bool_)
    flat[positions] = values
    mask[positions] = True
    return flat.reshape(like.shape), mask.reshape(like.shape)
