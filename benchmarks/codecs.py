"""Codecs: time and bytes of 10 million values, each codec against torch.topk.

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
    arrays, tensor = {"w": x}, torch.from_numpy(x)

    def peer() -> None:
        torch.topk(tensor.abs().reshape(-1), int(DENSITY * SIZE))

    found = codecs(x)
    *ours, whole = medians(
        *(partial(both, codec, arrays) for codec in found), peer, repeats=REPEATS
    )
    for codec, seconds in zip(found, ours, strict=True):
        left = (both(codec, arrays)["w"] - x).astype(np.float64)
        error = np.sum(left**2) / np.sum(x.astype(np.float64) ** 2)
        name = type(codec).__name__ if isinstance(codec, FixedMask) else codec
        bits = 8 * codec.encode(arrays)[PAYLOAD].shape[0] / SIZE
        what = f"{name}: {bits:.3f} bits a value, error {error:.4f}; encode + decode"
        report(what, seconds, whole, LIMIT)


if __name__ == "__main__":
    main()
