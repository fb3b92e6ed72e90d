"""Streams of correlated noise, one model-sized array per round."""

import os
from collections.abc import Mapping
from math import prod

import numpy as np

from flower_ext.core.errors import at_least, one_of, whole
from flower_ext.core.typing import AnyFloats, Floats
from flower_ext.privacy.factorizations.factorization import Factorization

State = dict[str, str | int | float | bool | AnyFloats]

_SCHEMA = 1


class NoiseStream:
    """Row t of C^-1 Z, in O(buffers x model) memory.

    Parameters
    ----------
    factorization : Factorization
        The mechanism; its ``rounds`` are the most that the stream gives.
    shapes : Mapping[str, tuple[int, ...]]
        Shape of every named array, in the order of the model. Renaming an array
        changes nothing; another order gives other noise.
    seed : int, optional
        Secret seed >= 0 of a reproducible stream; required unless ``secure``.
    secure : bool
        Draw from the operating system's cryptographic generator instead, for models
        that are released. Such a run cannot be repeated from a seed; its state can
        still be saved, and a resumed stream stays correctly correlated with what was
        released, but its fresh noise is new.
    dtype : str
        ``"float32"`` or ``"float64"`` for the output and for the buffers. Gaussians
        and all arithmetic are float64 in both cases; float32 rounds the result and
        what is stored, a relative error near 1e-7 that does not grow with the rounds
        (measured over 2,000 rounds: below 1e-6 of the noise's standard deviation).
    chunk : int
        Parameters handled at a time. It bounds the working memory, and never changes
        the noise.

    Notes
    -----
    Round t draws from a generator keyed by (seed, t), so that a stream resumed from
    `state_dict` continues bit for bit on the same NumPy version. Whoever knows the
    seed or the state can remove the noise: both are as secret as the raw updates.

    Not protected: the seeded generator (NumPy's SFC64) is not cryptographic, and
    floating-point noise has gaps that a strong adversary may read (Mironov 2012).

    Examples
    --------
    >>> from flower_ext.privacy import Identity
    >>> stream = NoiseStream(Identity(3), {"w": (2, 2)}, seed=1)
    >>> stream.next(standard_deviation=0.5)["w"].shape
    (2, 2)
    """

    def __init__(
        self,
        factorization: Factorization,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        seed: int | None = None,
        secure: bool = False,
        dtype: str = "float32",
        chunk: int = 16_384,
    ) -> None:
        if secure == (seed is not None):
            raise ValueError(
                f"seed={'given' if seed is not None else None} with secure={secure}: "
                "give a seed for reproducible noise, or secure=True for noise from "
                "the operating system, not both and not neither"
            )
        if seed is not None:
            whole("seed", seed, 0)
        if not shapes:
            raise ValueError("shapes={} must name at least one array")
        self._factorization = factorization
        self._recurrence = factorization.recurrence()
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._sizes = [prod(shape) for shape in self._shapes.values()]
        self._size = sum(self._sizes)
        self._seed = seed
        self._secure = secure
        self._dtype = np.dtype(one_of("dtype", dtype, ("float32", "float64")))
        self._chunk = whole("chunk", chunk, 1)
        self._round = 0
        self._standard_deviation = 0.0
        self._buffers: AnyFloats = np.zeros(
            (self._recurrence.buffers, self._size), self._dtype
        )

    def next(self, standard_deviation: float = 1.0) -> dict[str, AnyFloats]:
        """Return the noise of the next round.

        Parameters
        ----------
        standard_deviation : float
            Scale of Z: noise multiplier x clipping norm x sensitivity. 0 gives exact
            zeros. It may change only where the mechanism restarts, because noise of
            earlier rounds is used again.

        Raises
        ------
        ValueError
            After the planned rounds, and when the scale changes within a restart.
        """
        scale = at_least("standard_deviation", standard_deviation, 0)
        if self._round >= self._factorization.rounds:
            raise ValueError(
                f"rounds={self._factorization.rounds} of {self._factorization.name} "
                "must be >= the rounds of the run: plan the mechanism for all of them"
            )
        # Between restarts the buffers hold noise of one scale only.
        if self._factorization.restarts_at(self._round):
            self._standard_deviation = scale
        elif scale != self._standard_deviation:
            raise ValueError(
                f"standard_deviation={scale} must be {self._standard_deviation}, as "
                f"in the rounds before: {self._factorization.name} uses their noise "
                "again, so a clipping norm may change only at a restart"
            )
        flat = self._draw(scale)
        self._round += 1
        noise: dict[str, AnyFloats] = {}
        low = 0
        for (name, shape), size in zip(self._shapes.items(), self._sizes, strict=True):
            noise[name] = flat[low : low + size].reshape(shape)
            low += size
        return noise

    def _draw(self, scale: float) -> AnyFloats:
        """Run the recurrence over the model, chunk by chunk."""
        recurrence, step = self._recurrence, self._round
        sources = [self._source(step, i) for i in range(recurrence.draws(step))]
        flat: AnyFloats = np.empty(self._size, self._dtype)
        if scale == 0:  # nothing to remember either: it stays 0 until a restart
            flat.fill(0)
            return flat
        # A recurrence works on each parameter alone, and a source goes on where the
        # last chunk ended: how the model is cut changes nothing.
        fresh = np.empty((len(sources), min(self._chunk, self._size)))
        for low in range(0, self._size, self._chunk):
            high = min(low + self._chunk, self._size)
            part = fresh[:, : high - low]
            for row, source in zip(part, sources, strict=True):
                source.fill(row)
            noise = recurrence.advance(step, part, self._buffers[:, low:high])
            np.multiply(noise, scale, out=flat[low:high], casting="same_kind")
        return flat

    def _source(self, step: int, index: int) -> "_Seeded | _Secure":
        """Return the generator of one fresh vector."""
        if self._seed is None:
            return _Secure()
        return _Seeded(self._seed, step, index)

    def state_dict(self) -> State:
        """Return what a resumed run needs: JSON scalars and one array.

        It holds the seed and past noise: store it like the raw updates.
        """
        return {
            "schema": _SCHEMA,
            "round": self._round,
            "seed": "" if self._seed is None else str(self._seed),
            "secure": self._secure,
            "standard_deviation": self._standard_deviation,
            "factorization": self._factorization.fingerprint(),
            "sizes": ",".join(map(str, self._sizes)),
            "buffers": self._buffers.copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`; whatever does not fit is refused."""
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(
                f"state has keys {sorted(state)}, must be {sorted(expected)}: noise "
                "state missing or from another version"
            )
        for key in ("schema", "seed", "secure", "factorization", "sizes"):
            if state[key] != expected[key]:
                shown = f"={state[key]!r}, must be {expected[key]!r}"
                if key == "seed":
                    shown = ""  # it is secret in an error message, too
                raise ValueError(
                    f"state[{key!r}]{shown}: the checkpoint belongs to another "
                    "mechanism, seed or model"
                )
        done, scale = state["round"], state["standard_deviation"]
        buffers = state["buffers"]
        if whole("state['round']", done, 0) > self._factorization.rounds:
            raise ValueError(f"state['round']={done} is after the planned rounds")
        if (
            not isinstance(buffers, np.ndarray)
            or buffers.shape != self._buffers.shape
            or buffers.dtype != self._dtype
            or not np.all(np.isfinite(buffers))
        ):
            raise ValueError(
                f"state['buffers'] must be finite {self._dtype} of shape "
                f"{self._buffers.shape}: without it the noise cannot be continued"
            )
        self._standard_deviation = at_least("state['standard_deviation']", scale, 0)
        self._round = int(str(done))
        self._buffers = buffers.copy()


# The index of a generator that no recurrence asks for.
_ALONE = 2**32 - 1


def noise_of_step(size: int, seed: int | None, step: int) -> Floats:
    """Return standard normals beside a stream's, for one release that needs few.

    Parameters
    ----------
    size : int
        How many.
    seed : int or None
        As of :class:`NoiseStream`: no stream with it has these. None draws from the
        operating system.
    step : int
        Number of the release; of one seed each is used once.
    """
    noise = np.empty(size)
    source = _Secure() if seed is None else _Seeded(seed, step, _ALONE)
    source.fill(noise)
    return noise


class _Seeded:
    """Standard normals of one round, in order."""

    def __init__(self, seed: int, step: int, index: int) -> None:
        # Keyed by round and vector: a resumed stream needs no generator's state.
        key = np.random.SeedSequence(seed, spawn_key=(step, index))
        self._generator = np.random.Generator(np.random.SFC64(key))

    def fill(self, out: Floats) -> None:
        self._generator.standard_normal(out=out)


class _Secure:
    """Standard normals from operating-system entropy (Box and Muller 1958)."""

    def fill(self, out: Floats) -> None:
        half = -(-len(out) // 2)
        words = np.frombuffer(os.urandom(16 * half), dtype=np.uint64)
        # 53 random bits each, in (0, 1]: the logarithm is finite, |z| <= 8.6.
        uniform = ((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
        radius = np.sqrt(-2 * np.log(uniform[:half]))
        angle = 2 * np.pi * uniform[half:]
        # Radius and angle of one point give two independent normals.
        out[:half] = radius * np.cos(angle)
        out[half:] = (radius * np.sin(angle))[: len(out) - half]
