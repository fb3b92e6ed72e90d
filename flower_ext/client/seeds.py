"""Seeds of a client's random choices, and the global generators they go into."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_seed(
    seed: int, server_round: int, client: int, stream: int = 0, *branch: int
) -> int:
    """Return the seed of one client in one round, the same wherever it runs.

    A ``stream`` is one use of the client's; a ``branch`` one of its further models.
    """
    sequence = np.random.SeedSequence([seed, server_round, client, stream, *branch])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python.

    A client's own code draws from all three: Hugging Face's ``train_test_split`` from
    NumPy's, an augmentation from Python's.
    """
    seed_torch(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's own generators, as ``torch.manual_seed`` does but in microseconds.

    That one visits every kind of device, a millisecond even where there is none.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def same_generators() -> Iterator[None]:
    """Leave the global generators of torch, NumPy and Python as they were."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    python_state = random.getstate()
    try:
        # A GPU that nobody has used has no state to keep.
        begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        used = torch.cuda.device_count() if begun else 0
        with torch.random.fork_rng(devices=range(used)):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
