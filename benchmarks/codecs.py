"""Codecs: time and bytes of 10 million values, each codec against torch.topk.

The values are normal, for ``Permutation`` even steps in a random order.

Limit: encoding and decoding takes at most 4 times as long as ``torch.topk`` of one
value in 64, on one thread. The squared error, over the squared norm, is shown as well.
"""

from functools import partial

import numpy as np
import torch
from _timing import medians, report

from flower_ext.wire import (
    EDEN,
    Codec,
    FixedMask,
    Permutation,
    RandomK,
    Rows,
    Sending,
    Stage,
    TopK,
    UniversalCode,
)
from flower_ext.wire.codec import PAYLOAD
from flower_ext.wire.masks import largest
from flower_ext.wire.registry import CODECS

ROWS, COLUMNS, DENSITY, LIMIT, REPEATS = 10_000, 1_000, 1 / 64, 4.0, 5
SIZE = ROWS * COLUMNS


def codecs(x: np.ndarray) -> list[Codec]:
    """Return every codec that is no wrapper, some of them with several settings."""
    settings = {
        EDEN: [EDEN(bits) for bits in (0.5, 1, 2, 4)],
        FixedMask: [FixedMask({"w": largest(x, int(DENSITY * x.size))})],
        TopK: [TopK(DENSITY)],
        RandomK: [RandomK(DENSITY)],
        Rows: [Rows(DENSITY), Rows(DENSITY, "norm"), Rows(DENSITY, "largest")],
        UniversalCode: [UniversalCode(1.0), UniversalCode(1.0, coding="entropy")],
    }
    stages = [cls for cls in CODECS if issubclass(cls, Stage)]
    return [codec for cls in stages for codec in settings.get(cls) or [cls()]]


def both(codec: Codec, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encode and decode."""
    return codec.decode(codec.encode(arrays, Sending()), arrays)


def main() -> None:
    """Measure each codec in turn with ``torch.topk``."""
    torch.set_num_threads(1)
    x = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
    tensor = torch.from_numpy(x)
    order = np.random.default_rng(0).permutation(SIZE).reshape(x.shape).astype("f4")

    def peer() -> None:
        torch.topk(tensor.abs().reshape(-1), int(DENSITY * SIZE))

    found = codecs(x)
    inputs = [{"w": order if isinstance(c, Permutation) else x} for c in found]
    *ours, whole = medians(
        *map(partial(partial, both), found, inputs), peer, repeats=REPEATS
    )
    for codec, arrays, seconds in zip(found, inputs, ours, strict=True):
        values = arrays["w"].astype(np.float64)
        left = both(codec, arrays)["w"] - values
        error = np.sum(left**2) / np.sum(values**2)
        name = type(codec).__name__ if isinstance(codec, FixedMask) else codec
        bits = 8 * codec.encode(arrays)[PAYLOAD].shape[0] / SIZE
        what = f"{name}: {bits:.3f} bits a value, error {error:.4f}; encode + decode"
        report(what, seconds, whole, LIMIT)


if __name__ == "__main__":
    main()
