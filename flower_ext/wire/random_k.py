"""Random coordinates, which both ends draw from a seed that travels.

Konečný, McMahan, Yu, Richtárik, Suresh and Bacon 2016, "Federated learning: strategies
for improving communication efficiency", section 2 (random masks); Stich, Cordonnier and
Jaggi 2018, "Sparsified SGD with memory", definition 2.1 (rand-k).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import probability, yes_or_no
from flower_ext.core.schedules import Scheduled, value_in
from flower_ext.wire.chain import Chosen, Selection, maskable, masks_of, words
from flower_ext.wire.codec import Decoded, Reader, Sending, Stage
from flower_ext.wire.mask_codes import Positions
from flower_ext.wire.masks import Masks

# Whether values are multiplied, the seed, and the density.
_RESCALED = struct.Struct("<?")
_HEAD = struct.Struct("<Qd")
_INDEX = struct.Struct("<I")
# What travels of an array: nothing, all, what is drawn for it, or for another one.
_NOTHING, _ALL, _OWN, _TIED = range(4)


@dataclass(frozen=True)
class RandomK(Selection):
    r"""Coordinates of each array drawn at random; the others are zero to the receiver.

    Of d coordinates :math:`k = \max(\lfloor \text{density} \cdot d \rfloor, 1)` travel,
    all choices of k alike. No places do: 17 bytes, and one for each array. Tied arrays
    have the same coordinates.

    Integers and flags travel whole, and an array that holds a NaN or an infinity does.

    Parameters
    ----------
    density : float or callable
        Share of the coordinates that travels, above 0; 1 sends everything; or
        ``server_round -> share``.
    rescaled : bool (default: False)
        Whether the receiver multiplies values by d/k, which makes them right on
        average, with the variance :math:`(d/k - 1) x_i^2`. Without, the expected
        squared error is :math:`(1 - k/d) \|x\|_2^2`, which is what
        :class:`~flower_ext.wire.ErrorFeedback` needs: with it, what is left out would
        grow for densities below a half.
    dense : sequence of str
        Arrays with one of these words in their name always travel whole: by default the
        statistics of BatchNorm, and what an adapter saves beside itself.

    Notes
    -----
    The coordinates are those with the k smallest of d random words of PCG64, whose
    stream NumPy keeps the same in all its versions.

    Deviation from the papers: coordinates are drawn for each array, of which none is
    without any.

    Examples
    --------
    >>> x = {"w": np.ones(8, np.float32)}
    >>> codec = RandomK(0.25, rescaled=True)
    >>> float(codec.decode(codec.encode(x), x)["w"].sum())
    8.0
    """

    density: Scheduled
    rescaled: bool = False
    dense: Sequence[str] = ("running_mean", "running_var", "modules_to_save")

    tag = b"rk"

    def __post_init__(self) -> None:
        density = share_in(self.density, 1)
        if not callable(self.density):
            object.__setattr__(self, "density", density)
        yes_or_no("rescaled", self.rescaled)
        object.__setattr__(self, "dense", words("dense", self.dense))

    @property
    def lossless(self) -> bool:
        """Whether everything travels."""
        return not callable(self.density) and self.density >= 1

    @property
    def unbiased(self) -> bool:
        """Whether what travels makes up for the rest."""
        return self.rescaled or self.lossless

    def choose(self, arrays: Arrays, sending: Sending) -> Masks:
        """Return what :meth:`select` draws."""
        return masks_of(self.select(arrays, sending)[1], arrays)

    def select(self, arrays: Arrays, sending: Sending) -> tuple[list[bytes], Chosen]:
        """Return the positions that travel; a seed and a density tell them."""
        seed = int(sending.generator.integers(1 << 64, dtype=np.uint64))
        density = share_in(self.density, 1)
        names = sorted(arrays)
        kinds = []
        for name in names:
            first = sending.tied.get(name, name)
            if name in sending.silent:
                kinds.append(bytes([_NOTHING]))
            elif density >= 1 or not maskable(first, arrays[name], self.dense):
                kinds.append(bytes([_ALL]))
            elif first == name:
                kinds.append(bytes([_OWN]))
            else:
                kinds.append(bytes([_TIED]) + _INDEX.pack(names.index(first)))
        told = _HEAD.pack(seed, density) + b"".join(kinds)
        chosen = self.read_chosen(Reader(memoryview(told)), arrays)
        return [_RESCALED.pack(self.rescaled), told], chosen

    @classmethod
    def read_chosen(cls, reader: Reader, like: Arrays) -> Chosen:
        """Return the positions of a seed."""
        seed, density = reader.unpack(_HEAD)
        if not 0 < density <= 1:
            raise ValueError(f"density={density}, must be in (0, 1]")
        chosen: dict[str, Positions | None] = {}
        for own, name in enumerate(sorted(like)):
            kind = reader.take(1)[0]
            size = like[name].size
            if kind == _NOTHING:
                chosen[name] = np.empty(0, np.int64)
            elif kind == _ALL or not size:
                chosen[name] = None
            elif kind == _OWN:
                chosen[name] = draw(seed, own, share(density, size), size)
            elif kind == _TIED:
                (first,) = reader.unpack(_INDEX)
                chosen[name] = draw(seed, first, share(density, size), size)
            else:
                raise ValueError(f"{kind} is no kind of choice")
        return chosen

    @classmethod
    def read(
        cls, reader: Reader, like: Arrays, then: Sequence[type[Stage]] = ()
    ) -> Decoded:
        """Return what was drawn in its places, perhaps multiplied."""
        (rescaled,) = reader.unpack(_RESCALED)
        kind = _Rescaled if rescaled else RandomK
        return super(RandomK, kind).read(reader, like, then)


class _Rescaled(RandomK):
    """What reads values that are to be multiplied."""

    rescaled = True


def share_in(schedule: Scheduled, server_round: int) -> float:
    """Return the density of a round, of which something always travels, checked."""
    value = value_in(schedule, server_round)
    return probability("density", value, "a share of the coordinates, 1 is all")


def share(density: float, size: int) -> int:
    """Return how many of some places travel: at least one."""
    return max(int(density * size), 1)


def draw(seed: int, stream: int, count: int, size: int) -> Positions:
    """Return the increasing positions of the smallest of ``size`` random words."""
    drawn = np.random.PCG64([seed, stream]).random_raw(size)
    return np.flatnonzero(drawn <= np.partition(drawn, count - 1)[count - 1])[:count]
