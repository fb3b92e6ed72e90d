"""Sparse payloads: time against torch.topk, bytes against the entropy of the mask.

Limit: encoding and decoding a 10-million-parameter update at density 1/16 takes at most
3 times as long as ``torch.topk`` on it. The time with the choice of the coordinates is
shown as well.
"""

import numpy as np
import torch
from _timing import medians, report
from flwr.app import RecordDict

from flower_ext.wire import Chain, Exact, FixedMask
from flower_ext.wire.codec import PAYLOAD
from flower_ext.wire.mask_codes import MASK_CODES, entropy_bytes, smallest
from flower_ext.wire.masks import largest
from flower_ext.wire.traffic import serialized_bytes
from flower_ext.wire.value_codes import VALUE_CODES

SIZE, DENSITY, LIMIT = 10_000_000, 1 / 16, 3.0
DENSITIES = (1 / 2, 1 / 4, 1 / 16, 1 / 64, 1 / 1024)


def update() -> dict[str, np.ndarray]:
    """Return one array of normal numbers."""
    rng = np.random.default_rng(0)
    return {"w": rng.standard_normal(SIZE, np.float32)}


def speed() -> None:
    arrays = update()
    k = int(DENSITY * SIZE)
    codec = FixedMask({"w": largest(arrays["w"], k)})
    tensor = torch.from_numpy(arrays["w"])

    def both() -> None:
        codec.decode(codec.encode(arrays), arrays)

    def all_three() -> None:
        chosen = FixedMask({"w": largest(arrays["w"], k)})
        chosen.decode(chosen.encode(arrays), arrays)

    ours, whole, peer = medians(
        both, all_three, lambda: torch.topk(tensor.abs(), k), repeats=5
    )
    report("encode + decode, 10 M at 1/16, against topk", ours, peer, LIMIT)
    report("choose + encode + decode, against topk", whole, peer, LIMIT)


def size() -> None:
    arrays = update()
    arrays["w"] = arrays["w"][:1_000_000]
    bound = "entropy"
    print(f"\nmask, bytes per non-zero: {'density':>9}", *MASK_CODES, bound, "chosen")
    for density in DENSITIES:
        mask = largest(arrays["w"], int(density * arrays["w"].size))
        positions = np.flatnonzero(mask)
        lengths = [c.length(positions, mask.size) for c in MASK_CODES.values()]
        least = entropy_bytes(len(positions), mask.size)
        chosen = smallest(positions, mask.size)
        cells = " ".join(
            f"{n / len(positions):.3f} ({n / least:.2f}x)" for n in lengths
        )
        each = f"{least / len(positions):.3f} {chosen}"
        print(f"{'':25} 1/{1 / density:<7.0f} {cells} {each}")
    print("\nwhole payload over the dense record, as Flower serialises both:")
    dense = serialized_bytes(RecordDict({"arrays": Exact().encode(arrays)}))
    for density in DENSITIES:
        mask = largest(arrays["w"], int(density * arrays["w"].size))
        for precision, code in VALUE_CODES.items():
            record = Chain(FixedMask({"w": mask}), code).encode(arrays)
            sent = serialized_bytes(RecordDict({"arrays": record}))
            encoded = record[PAYLOAD].shape[0]
            print(
                f"  1/{1 / density:<5.0f} {precision:9} {encoded:>9} bytes encoded, "
                f"{sent:>9} serialised: {dense / sent:.1f} times less"
            )


def main() -> None:
    """Measure time, then bytes."""
    torch.set_num_threads(1)
    speed()
    size()


if __name__ == "__main__":
    main()
