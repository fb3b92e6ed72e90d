"""Seeds of a client's random choices, and the global generators they go into."""

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import get_ident

import numpy as np
import torch
from torch import Tensor

# Of the Mersenne twister: 624 words, and the place of the next.
_STATE_BYTES = 625 * 4


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
    _numpy.seed(seed % 2**32)
    random.seed(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's own generators, as ``torch.manual_seed`` does but in microseconds.

    That one visits every kind of device, a millisecond even where there is none.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


class Globals:
    """The global generators' states, and torch's number of threads: those of now.

    Attributes
    ----------
    torch : Tensor
        State of torch's generator on the CPU.
    cuda : list of Tensor
        Those of the GPUs. One that nobody has used has no state to keep.
    threads : int
        Of torch.
    thread : int
        The thread that has taken them first.
    """

    def __init__(self) -> None:
        self.thread = get_ident()
        self.take()

    def take(self) -> None:
        """Take those of now."""
        self._put_numpy = _numpy.restorer()
        self._python = random.getstate()
        self.torch = torch.default_generator.get_state()
        begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.cuda: list[Tensor] = torch.cuda.get_rng_state_all() if begun else []
        self.threads = torch.get_num_threads()

    def put(self) -> None:
        """Put them back."""
        self._put_numpy()
        random.setstate(self._python)
        torch.default_generator.set_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Put them in the place of others for a time; take what they become."""
        others = Globals()
        self.put()
        try:
            yield
        finally:
            self.take()
            others.put()


_OUTSIDE: ContextVar[Globals | None] = ContextVar("outside", default=None)


@contextmanager
def same_globals() -> Iterator[None]:
    """Leave random states and torch's number of threads as they were.

    Within another it does nothing, since that one puts them back.
    """
    if _OUTSIDE.get() is not None:
        yield
        return
    before = Globals()
    token = _OUTSIDE.set(before)
    try:
        yield
    finally:
        before.put()
        _OUTSIDE.reset(token)


@contextmanager
def stepped_out() -> Iterator[None]:
    """Let other threads run meanwhile: with the globals of outside, which they change.

    What is random outside must go on there, such as the noise of a mod. Where
    :func:`same_globals` is around all threads it does nothing.
    """
    before = _OUTSIDE.get()
    if before is None or before.thread != get_ident():
        yield
        return
    before.put()
    try:
        yield
    finally:
        before.take()


class _NumPysState:
    """The state of NumPy's global generator, saved and restored in a microsecond.

    NumPy itself takes a tenth of a millisecond each way. All that its state has beside
    the generator's memory is a Gaussian that may be waiting: they are drawn in pairs.
    """

    def __init__(self) -> None:
        self._nothing_waits = b""  # the memory after a seed: no Gaussian was drawn

    def seed(self, seed: int) -> None:
        """Seed the generator, which forgets a Gaussian that waits."""
        np.random.seed(seed)  # noqa: NPY002
        self._nothing_waits = _memory()

    def restorer(self) -> Callable[[], None]:
        """Return a function that lets the generator be as it is now."""
        saved = _memory()
        if not saved or saved != self._nothing_waits:
            state = np.random.get_state(legacy=False)  # noqa: NPY002
            if not saved or state["has_gauss"]:
                return partial(np.random.set_state, state)  # noqa: NPY002
        return partial(self._restore, saved)

    def _restore(self, saved: bytes) -> None:
        np.random.seed(0)  # noqa: NPY002  (refuses a generator that the user has put in)
        ctypes.memmove(_address(), saved, len(saved))
        self._nothing_waits = saved


def _memory() -> bytes:
    """Return what NumPy's generator has in memory; nothing of a user's own."""
    address = _address()
    return ctypes.string_at(address, _STATE_BYTES) if address else b""


def _address() -> int:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if not isinstance(generator, np.random.MT19937):
        return 0
    return int(generator.ctypes.state_address)


_numpy = _NumPysState()
