"""What messages say of codecs: which one uploads need, and the form of the arrays."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecordValues
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, lazy, subtract
from flower_ext.core.protocol import Change
from flower_ext.wire.codec import Codec, Stage, unpack

# Keys of a message's configuration.
UPLOAD_KEY = "upload-codec"
DESCRIPTION_KEY = "array-description"

# Of names, shapes and dtypes: enough for 100,000 arrays.
_LONGEST_DESCRIPTION = 1 << 24


def describe_arrays(arrays: Mapping[str, NDArray]) -> bytes:
    """Write names, dtypes and shapes in few bytes."""
    text = json.dumps([[k, x.dtype.str, x.shape] for k, x in arrays.items()])
    return zlib.compress(text.encode(), 9)


def described_arrays(config: Mapping[str, ConfigRecordValues]) -> Arrays | None:
    """Return arrays as a message describes them, which take no memory.

    None if it does not.
    """
    data = config.get(DESCRIPTION_KEY)
    if not isinstance(data, bytes):
        return None
    reader = zlib.decompressobj()
    text = reader.decompress(data, _LONGEST_DESCRIPTION)
    if not reader.eof:
        raise ValueError(f"a description must be <= {_LONGEST_DESCRIPTION} bytes")
    return {
        name: np.broadcast_to(np.zeros((), np.dtype(dtype)), shape)
        for name, dtype, shape in json.loads(text)
    }


def change(new: NDArray, old: NDArray) -> NDArray:
    """Return ``new - old``: floats in float32 or wider, all else in int64."""
    return subtract(new, old).numpy()


def change_like(sent: Mapping[str, NDArray]) -> Arrays:
    """Return arrays with the shapes and dtypes of changes, which take no memory."""
    zeros = {name: np.zeros((), x.dtype) for name, x in sent.items()}
    return {
        name: np.broadcast_to(change(zeros[name], zeros[name]), x.shape)
        for name, x in sent.items()
    }


@dataclass(frozen=True)
class Uploads:
    """Reads the changes that clients encode as they were told.

    Parameters
    ----------
    stages : frozenset of tuple of type of Stage
        Of the codecs that were told: a record of another one is refused.
    """

    stages: frozenset[tuple[type[Stage], ...]]

    @classmethod
    def of(cls, codecs: Iterable[Codec]) -> "Uploads":
        """Return what reads the records of codecs, whatever their settings."""
        return cls(frozenset().union(*(codec.accepted for codec in codecs)))

    def decode(self, record: ArrayRecord, start: Arrays) -> Change:
        """Return the change of a client that started from these arrays.

        Raises
        ------
        MalformedReply
            If the record is not what the client was told to send.
        """
        found = unpack(record, change_like(start), self._find, start)
        arrays = {name: lazy(x) for name, x in found.arrays.items()}
        return Change(arrays, found.masks)

    def _find(self, tags: Sequence[bytes]) -> Sequence[type[Stage]]:
        known = {tuple(stage.tag for stage in stages): stages for stages in self.stages}
        if tuple(tags) not in known:
            raise ValueError(
                f"it is coded as {list(tags)}, one of {[list(x) for x in known]} was "
                "asked for"
            )
        return known[tuple(tags)]
