r"""Rows of matrices: the same of all clients of a round, drawn by each, or the largest.

Of a matrix of m rows, r travel. In the words of Muhamed, Li, Woodruff, Diab and Smith
2024, "Grass: Compute efficient low-memory LLM training with structured sparse
gradients" (arXiv:2406.17660), the receiver has :math:`P P^T X` of X with
:math:`P^T = \rho B`: B picks rows, and the diagonal :math:`\rho` multiplies them by
:math:`1 / \sqrt{r q_j}`, where :math:`r q_j` is how often row j is drawn. Then
:math:`E[P P^T] = I`.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import one_of, refuse, whole, yes_or_no
from flower_ext.core.schedules import Scheduled
from flower_ext.core.typing import Floats
from flower_ext.wire.chain import (
    Chain,
    Chosen,
    Selection,
    maskable,
    masks_of,
    read_positions,
    words,
    write_positions,
)
from flower_ext.wire.codec import Codec, Reader, Sending
from flower_ext.wire.mask_codes import Positions
from flower_ext.wire.masks import Masks, largest
from flower_ext.wire.random_k import draw, share, share_in
from flower_ext.wire.vote import Voted
from flower_ext.wire.wrappers import AnyOf, Described, ErrorFeedback

Choice = Literal["round", "client", "norm", "largest"]

_HEAD = struct.Struct("<Qd")  # the seed and the density
_INDEX = struct.Struct("<I")
# What travels of an array: nothing, all, rows drawn for it or for another one, or rows
# that are told.
_NOTHING, _ALL, _OWN, _TIED, _TOLD = range(5)


class Picked(NamedTuple):
    """Rows of a matrix, increasing, and with which probability each was drawn."""

    rows: Positions
    probabilities: Floats


def has_rows(shape: Sequence[int]) -> bool:
    """Whether an array is a matrix, or has more axes, of which the first is its rows.

    Examples
    --------
    >>> has_rows((3, 4)), has_rows((8, 3, 5, 5)), has_rows((3,)), has_rows((3, 0))
    (True, True, False, False)
    """
    return len(shape) > 1 and 0 not in shape


def row_norms(array: NDArray) -> Floats:
    """Return the l2 norms of the rows of an array that has some, in float64."""
    rows = array.reshape(len(array), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        return np.asarray(np.sqrt(squares), np.float64)


def inclusion(norms: Floats, count: int) -> Floats:
    r"""Return the probabilities with which rows are drawn, as far as they can by norm.

    They are :math:`\min(1, c \|x_j\|_2)`, with c such that their sum is ``count``. Rows
    of zeros are not drawn, and where norms are not finite their rows come first.

    Parameters
    ----------
    norms : ndarray
        ``(rows,)``, at least 0.
    count : int
        Rows to draw.

    Examples
    --------
    >>> inclusion(np.array([6.0, 1.0, 1.0, 0.0]), 2)
    array([1. , 0.5, 0.5, 0. ])
    """
    weights = norms if np.isfinite(norms).all() else 1.0 - np.isfinite(norms)
    # The smallest numbers have no inverse, and the largest no sum.
    weights = weights / max(weights.max(initial=0.0), np.finfo(np.float64).tiny)
    sure = np.zeros(len(weights), np.bool_)
    while True:
        free = np.where(sure, 0.0, weights)
        left, total = count - np.count_nonzero(sure), free.sum()
        found = free * (left / total if total > 0 else 0.0)
        if not (found >= 1).any():
            return np.asarray(found + sure)
        sure |= found >= 1


def draw_rows(probabilities: Floats, start: float) -> Positions:
    """Draw different rows, each with its own probability, by systematic sampling.

    Laid end to end, the probabilities are intervals on a line; the rows are those in
    which one of the points ``start + 0, 1, 2, ...`` lies.

    Parameters
    ----------
    probabilities : ndarray
        ``(rows,)``, between 0 and 1; their sum is the number of rows drawn.
    start : float
        Uniform in [0, 1).

    Examples
    --------
    >>> draw_rows(np.array([1.0, 0.5, 0.5, 0.0]), 0.6)
    array([0, 2])
    """
    sure = probabilities >= 1
    ends = np.cumsum(np.where(sure, 0.0, probabilities))
    points = np.ceil(ends - start)
    return np.flatnonzero(sure | (np.diff(points, prepend=0.0) > 0))


@dataclass(frozen=True)
class Rows(Selection):
    r"""Rows of each matrix; the others are zero to the receiver.

    Of m rows, :math:`r = \max(\lfloor \text{density} \cdot m \rfloor, 1)` travel: a
    matrix is any array of at least two axes, whose first is its rows, such as the
    output units of a layer or the words of an embedding. What cannot be split by rows
    travels whole: vectors and single numbers, such as biases; integers and flags; and
    an array that holds a NaN or an infinity. Tied arrays have the same rows.

    ===========  ====================================================  ==============
    choice       rows                                                  told by
    ===========  ====================================================  ==============
    ``round``    drawn of ``seed`` and round: the same of all clients  a seed
    ``client``   drawn by each client, all alike                       a seed
    ``norm``     drawn by each client, in proportion to their norms    a mask of rows
    ``largest``  of each client those with the largest norms           a mask of rows
    ===========  ====================================================  ==============

    Seed and density take 16 bytes, each array one, and one that is tied to another
    five; a mask of rows takes little more than its entropy.

    Parameters
    ----------
    density : float or callable
        Share of the rows that travels, above 0; 1 sends everything; or ``server_round
        -> share``.
    choice : {"round", "client", "norm", "largest"}
        See above. Of ``round`` a client knows the rows before it trains, so that it may
        train no others: :class:`~flower_ext.client.Grass` does.
    rescaled : bool (default: False)
        Whether rows are divided by the probability with which they are drawn. Then what
        arrives is right on average: over the draws of a client, and with ``round`` over
        the rounds. Without, what is left out shrinks, which is what
        :class:`~flower_ext.wire.ErrorFeedback` needs. The largest are not drawn.
    seed : int (default: 0)
        Of the rows of ``round``. A download and an upload with the same seed and
        density have the same rows.
    dense : sequence of str
        Arrays with one of these words in their name always travel whole: by default
        what an adapter saves beside itself.
    server_round : int (default: 0)
        Of ``round``: whose rows they are. The server says it.

    Notes
    -----
    In a chain it comes first, since what a selection leaves has no rows. Rows are drawn
    by random words of PCG64, whose stream NumPy keeps the same in all its versions, of
    the seed and the array's name.

    Deviation from the paper: rows are drawn without replacement. Those with
    :math:`r \|x_j\| > \sum_i \|x_i\|` are sure, and drawn once instead of several
    times; all others have the paper's :math:`r q_j`, among what the sure ones leave.

    Examples
    --------
    >>> x = {"w": np.arange(8, dtype=np.float32).reshape(4, 2), "b": np.ones(3)}
    >>> codec = Rows(0.5, "largest")
    >>> codec.decode(codec.encode(x), x)["w"].tolist()
    [[0.0, 0.0], [0.0, 0.0], [4.0, 5.0], [6.0, 7.0]]
    """

    density: Scheduled
    choice: Choice = "round"
    rescaled: bool = False
    seed: int = 0
    dense: Sequence[str] = ("modules_to_save",)
    server_round: int = 0

    tag = b"rw"
    needs_shapes = True

    def __post_init__(self) -> None:
        density = share_in(self.density, 1)
        if not callable(self.density):
            object.__setattr__(self, "density", density)
        one_of("choice", self.choice, get_args(Choice))
        if yes_or_no("rescaled", self.rescaled) and self.choice == "largest":
            cause = "the largest rows are not drawn, and cannot be right on average"
            refuse("rescaled", True, "False with choice='largest'", cause)
        whole("seed", self.seed, 0)
        whole("server_round", self.server_round, 0)
        object.__setattr__(self, "dense", words("dense", self.dense))

    @property
    def lossless(self) -> bool:
        """Whether everything travels."""
        return not callable(self.density) and self.density >= 1

    @property
    def unbiased(self) -> bool:
        """Whether what a client draws makes up for the rest."""
        return self.lossless or (self.rescaled and self.choice != "round")

    def at(self, server_round: int) -> Self:
        """Return the codec of a round, whose rows it then knows."""
        now = super().at(server_round)
        if self.choice != "round" or self.server_round:
            return now
        return replace(now, server_round=server_round)

    @property
    def round_seed(self) -> int:
        """What the rows of the round are drawn of, the same of all clients."""
        sequence = np.random.SeedSequence([self.seed, self.server_round])
        return int(sequence.generate_state(1, np.uint64)[0])

    def pick(
        self, name: str, shape: Sequence[int], norms: Callable[[], Floats], seed: int
    ) -> Picked | None:
        """Return the rows of an array; None is all of it.

        Parameters
        ----------
        name : str
            Its name, the first of a tied one.
        shape : sequence of int
            Its shape.
        norms : callable
            Returns the norms of its rows, ``(rows,)``; called where they matter.
        seed : int
            Of this draw; :attr:`round_seed` of one of the round.
        """
        if not has_rows(shape) or any(word in name for word in self.dense):
            return None
        rows, count = shape[0], share(share_in(self.density, 1), shape[0])
        if count >= rows:
            return None
        if self.choice == "largest":
            return Picked(np.flatnonzero(largest(norms(), count)), np.ones(count))
        if self.choice == "norm":
            found = inclusion(norms(), count)
            generator = np.random.Generator(np.random.PCG64([seed, _stream(name)]))
            drawn = draw_rows(found, generator.random())
            return Picked(drawn, found[drawn])
        drawn = draw(seed, _stream(name), count, rows)
        return Picked(drawn, np.full(count, count / rows))

    def choose(self, arrays: Arrays, sending: Sending) -> Masks:
        """Return what :meth:`select` chooses."""
        return masks_of(self.select(arrays, sending)[1], arrays)

    def select(self, arrays: Arrays, sending: Sending) -> tuple[list[bytes], Chosen]:
        """Return the positions that travel, and what tells them."""
        seed = int(sending.generator.integers(1 << 64, dtype=np.uint64))
        if self.choice == "round":
            seed = self.round_seed
        names = sorted(arrays)
        told = [_HEAD.pack(seed, share_in(self.density, 1))]
        for name in names:
            if name in sending.silent:
                told.append(bytes([_NOTHING]))
                continue
            first = sending.tied.get(name, name)
            x = arrays[first]
            picked = None
            if maskable(first, x, self.dense):
                picked = self.pick(first, x.shape, partial(row_norms, x), seed)
            if picked is None:
                told.append(bytes([_ALL]))
            elif self.choice in ("norm", "largest"):
                told += [bytes([_TOLD]), *write_positions(picked.rows, len(x))]
            elif first == name:
                told.append(bytes([_OWN]))
            else:
                told.append(bytes([_TIED]) + _INDEX.pack(names.index(first)))
        data = memoryview(b"".join(told))
        return [bytes(data)], self.read_chosen(Reader(data), arrays)

    def values(self, array: NDArray, positions: Positions | None) -> NDArray:
        """Return the rows that travel, perhaps divided by their probabilities."""
        found = super().values(array, positions)
        if not self.rescaled or positions is None or not len(positions):
            return found
        rows = found.reshape(-1, array.size // len(array))
        probabilities = np.full(len(rows), len(rows) / len(array))
        if self.choice == "norm":
            count = share(share_in(self.density, 1), len(array))
            which = positions[:: rows.shape[1]] // rows.shape[1]
            probabilities = inclusion(row_norms(array), count)[which]
        with np.errstate(over="ignore"):
            scaled = rows / probabilities[:, None]
            return np.asarray(scaled, array.dtype).reshape(-1)

    @classmethod
    def read_chosen(cls, reader: Reader, like: Arrays) -> Chosen:
        """Return the positions of the rows that a seed or masks tell."""
        seed, density = reader.unpack(_HEAD)
        if not 0 < density <= 1:
            raise ValueError(f"density={density}, must be in (0, 1]")
        names = sorted(like)
        chosen: dict[str, Positions | None] = {}
        for name in names:
            (kind,), shape = reader.take(1), like[name].shape
            if kind == _NOTHING:
                chosen[name] = np.empty(0, np.int64)
            elif kind == _ALL:
                chosen[name] = None
            elif not has_rows(shape):
                raise ValueError(f"an array of shape {shape} has no rows")
            elif kind == _TOLD:
                chosen[name] = _positions(read_positions(reader, shape[0]), shape)
            elif kind in (_OWN, _TIED):
                first = name
                if kind == _TIED:
                    (place,) = reader.unpack(_INDEX)
                    first = names[place]
                count = share(density, shape[0])
                rows = draw(seed, _stream(first), count, shape[0])
                chosen[name] = _positions(rows, shape)
            else:
                raise ValueError(f"{kind} is no kind of choice")
        return chosen


def shared_rows(codec: Codec | None) -> Rows | None:
    """Return what chooses the rows of an upload, if they are those of the round.

    Parameters
    ----------
    codec : Codec or None
        As a client was told: of its round.

    Examples
    --------
    >>> from flower_ext.wire import NF4
    >>> codec = ErrorFeedback(Chain(Rows(0.25), NF4())).at(7)
    >>> shared_rows(codec) == Rows(0.25).at(7)
    True
    >>> shared_rows(Rows(0.25, "largest")) is None
    True
    """
    while isinstance(codec, ErrorFeedback | Described):
        codec = codec.codec
    if isinstance(codec, Voted | AnyOf):
        codec = codec.now if isinstance(codec, Voted) else codec.options[0]
    if isinstance(codec, Chain):
        codec = codec.links[0]
    return codec if isinstance(codec, Rows) and codec.choice == "round" else None


def _stream(name: str) -> int:
    """Return which of a seed's streams is an array's: both ends know its name."""
    return zlib.crc32(name.encode())


def _positions(rows: Positions | None, shape: Sequence[int]) -> Positions | None:
    """Return the positions of rows in an array that is laid out flat."""
    if rows is None:
        return None
    length = prod(shape[1:])
    return (rows[:, None] * length + np.arange(length)).reshape(-1)
