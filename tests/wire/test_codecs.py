"""Every codec keeps its promises; a codec of one's own does, or is found out."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from every_codec import EVERY_CODEC

from flower_ext.core.replies import MalformedReply
from flower_ext.testing import ConformanceError, check_codec
from flower_ext.wire import (
    NF4,
    BFloat16,
    Chain,
    Codec,
    Described,
    ErrorFeedback,
    Exact,
    Selection,
    Sending,
    TopK,
    ValueCode,
)
from flower_ext.wire.codec import PAYLOAD, num_values
from flower_ext.wire.registry import (
    CODECS,
    classes,
    decode,
    describe,
    rebuild,
    require_codecs,
)
from flower_ext.wire.wrappers import upload


@dataclass(frozen=True)
class Levels(ValueCode):
    """A quantiser of one's own: random rounding, of a width that depends on values."""

    levels: int = 4

    tag = b"lv"

    @property
    def unbiased(self):
        return True

    @classmethod
    def length(cls, count, dtype):
        return None

    def encode_values(self, values, generator):
        scale = np.float32(np.abs(values.astype(np.float32)).max(initial=0))
        head = np.float32([scale, self.levels]).tobytes()
        if not scale > 0 or not np.isfinite(scale):
            return head
        unit = values.astype(np.float32) / scale * self.levels
        codes = np.floor(unit + generator.random(unit.shape)).astype(np.int8)
        return head + codes.tobytes()

    @classmethod
    def decode_values(cls, data, count, dtype):
        scale, levels = np.frombuffer(data, np.float32, 2)
        if not scale > 0 or not np.isfinite(scale):
            if len(data) != 8:
                raise ValueError("codes of nothing")
            return np.full(count, scale, dtype)
        codes = np.frombuffer(data, np.int8, offset=8)
        if len(codes) != count:
            raise ValueError(f"{len(codes)} codes for {count} values")
        return (codes * (scale / levels)).astype(dtype)


@dataclass(frozen=True)
class Draws(Selection):
    """A selection of one's own, whose coordinates both ends draw from one seed."""

    density: float = 0.5

    tag = b"dr"

    def choose(self, arrays, sending):
        return {}

    def select(self, arrays, sending):
        seed = int(sending.generator.integers(2**32))
        share = int(256 * self.density)
        head = seed.to_bytes(4, "little") + share.to_bytes(2, "little")
        return [head], self._drawn(seed, share, arrays)

    @classmethod
    def read_chosen(cls, reader, like):
        seed = int.from_bytes(reader.take(4), "little")
        share = int.from_bytes(reader.take(2), "little")
        return cls._drawn(seed, share, like)

    @staticmethod
    def _drawn(seed, share, like):
        chosen = {}
        for name in sorted(like):
            x = like[name]
            generator = np.random.default_rng(seed)  # alike for tied arrays
            mask = generator.integers(0, 256, x.size) < share
            chosen[name] = np.flatnonzero(mask) if x.dtype.kind == "f" else None
        return chosen


@dataclass(frozen=True)
class Uniform(Selection):
    """Half of the coordinates, drawn by both ends, times two: right on average."""

    tag = b"un"
    unbiased = True
    rescaled = True

    def choose(self, arrays, sending):
        return {}

    def select(self, arrays, sending):
        seed = sending.generator.bytes(4)
        whole = [
            x.dtype.kind != "f" or not np.isfinite(x).all()
            for _, x in sorted(arrays.items())
        ]
        return [seed, bytes(whole)], self._drawn(seed, whole, arrays)

    @classmethod
    def read_chosen(cls, reader, like):
        seed = bytes(reader.take(4))
        return cls._drawn(seed, bytes(reader.take(len(like))), like)

    @staticmethod
    def _drawn(seed, whole, like):
        chosen = {}
        for name, all_of_it in zip(sorted(like), whole, strict=True):
            size = like[name].size
            draws = np.random.default_rng([*seed, size])  # alike for tied arrays
            order = draws.permutation(size)[: (size + 1) // 2]
            exact = all_of_it or like[name].dtype.kind != "f"
            chosen[name] = None if exact else np.sort(order)
        return chosen


TABLE = {
    **EVERY_CODEC,
    "own code": Levels,
    "own draws": Uniform,
    "own draws in a chain": lambda: Chain(TopK(0.5), Uniform(), Levels()),
    "own code in a chain": lambda: Chain(TopK(0.4), Levels(7)),
}
# A message cannot name masks; what they are, test_codec.py tries.
UNTOLD = {"masks"}


@pytest.mark.parametrize("name", TABLE)
def test_conformance(name):
    check_codec(TABLE[name], told=name not in UNTOLD)


@pytest.mark.parametrize("name", TABLE)
def test_zeros_stay_zeros_and_one_number_is_one(name):
    codec = TABLE[name]().at(1)
    zeros = {"w": np.zeros((20, 30), np.float32), "b": np.zeros(1), "c": np.float32(0)}
    found = codec.decode(codec.encode(zeros), zeros)
    assert not any(x.any() for x in found.values())
    for one in (np.float32(-3), np.float64([2e-9]), np.float16([[5]]), np.int8([-7])):
        back = codec.decode(codec.encode({"w": one}), {"w": one})["w"]
        assert back.dtype == one.dtype and back.shape == one.shape
        assert np.isfinite(back).all() and np.abs(back) <= 4 * np.abs(one)


def test_every_codec_is_in_the_table():
    found = set().union(*(classes(make()) for make in TABLE.values()))
    assert set(CODECS) <= found


# Codecs that break a promise ----------------------------------------------------------


class Shapeless(Exact):
    @classmethod
    def read(cls, reader, like, then=()):
        found = super().read(reader, like, then)
        return found._replace(
            arrays={n: x.reshape(-1) for n, x in found.arrays.items()}
        )


@dataclass(frozen=True)
class Halves(Exact):
    """Not what it was, though it says so."""

    def encode_values(self, values, generator):
        return super().encode_values(values / 2 if values.size else values, generator)


@dataclass(frozen=True)
class Global(Levels):
    """Draws from another generator."""

    def encode_values(self, values, generator):
        return super().encode_values(values, np.random.default_rng())


@dataclass(frozen=True)
class Down(Levels):
    """Rounds down, which is biased."""

    def encode_values(self, values, generator):
        class Zeros:
            random = staticmethod(np.zeros)

        return super().encode_values(values, Zeros())


@dataclass(frozen=True)
class Finite(BFloat16):
    def encode_values(self, values, generator):
        return super().encode_values(np.nan_to_num(values), generator)


@dataclass(frozen=True)
class Announced(Exact):
    """States more than there is."""

    def write(self, arrays, sending):
        parts, values = super().write(arrays, sending)
        return parts, 2 * values


@dataclass(frozen=True)
class Lenient(Levels):
    """Takes memory for what it reads, before it looks."""

    @classmethod
    def decode_values(cls, data, count, dtype):
        codes = bytes(data)
        return super().decode_values(codes, count, dtype)


@dataclass(frozen=True)
class InPlace(Exact):
    def write(self, arrays, sending):
        for x in arrays.values():
            if x.dtype.kind == "f":
                x *= 0
        return super().write(arrays, sending)


@dataclass(frozen=True)
class Untold(Exact):
    scale: object = np.float32


@dataclass(frozen=True)
class Apart(TopK):
    """Chooses for tied arrays apart."""

    def choose(self, arrays, sending):
        masks = super().choose(arrays, sending)
        return {n: np.roll(m, n == "b") for n, m in masks.items()}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Shapeless, "the codec made other arrays"),
        (Halves, "is not what it was"),
        (Global, "the bytes differ"),
        (Down, "the mean is off"),
        (Finite, "became finite"),
        (Announced, "were announced"),
        (Lenient, "bytes were held"),
        (InPlace, "was changed"),
        (Untold, "a frozen dataclass"),
        (partial(Apart, 0.3), "two names of one tensor differ"),
        # A choice by draws may leave out what is not finite: not for uploads alone.
        (Draws, "became finite"),
    ],
)
def test_a_broken_promise_is_found_out(make, reason):
    with pytest.raises(ConformanceError, match=reason):
        check_codec(make)


# What a record says by itself ---------------------------------------------------------

W = {"w": np.float32([[3, -5, 2], [1, 0.5, 4]])}


@pytest.mark.parametrize("name", TABLE)
def test_every_codec_is_recognised_by_its_records(name):
    codec = TABLE[name]().at(1)
    record = codec.encode(W)
    found = decode(record, W, classes(codec))
    assert np.array_equal(found.arrays["w"], codec.decode(record, W)["w"])
    assert found.values == num_values(record)


def test_a_codec_that_nobody_named_is_refused():
    for codec in (Levels(), Chain(TopK(0.5), Levels())):
        with pytest.raises(MalformedReply, match=r"no codec here has the tag b'lv'"):
            decode(codec.encode(W), W)


def test_a_record_of_another_codec_is_refused():
    for one in (Exact(), NF4(), TopK(0.5), Chain(TopK(0.5), NF4())):
        for other in (BFloat16(), Chain(TopK(0.5), TopK(0.5), NF4())):
            with pytest.raises(MalformedReply, match="was asked for"):
                other.decode(one.encode(W), W)


def test_a_record_begins_with_its_stages():
    payload = bytes(Chain(TopK(0.5), NF4()).encode(W)[PAYLOAD].numpy())
    assert payload[4:9] == b"\x02mkn4"
    assert bytes(NF4().encode(W)[PAYLOAD].numpy())[4:7] == b"\x01n4"


# Chains and masks -------------------------------------------------------------------


def test_each_selection_chooses_among_what_is_left():
    x = np.float32([9, 8, 7, 6, 5, 4, 3, 2])
    found = Chain(TopK(0.5), TopK(0.5), Exact())
    record = found.encode({"w": x})
    unpacked = found.unpack(record, {"w": x})
    assert unpacked.arrays["w"].tolist() == [9, 8, 0, 0, 0, 0, 0, 0]
    assert unpacked.masks["w"].tolist() == [True, True] + 6 * [False]
    assert unpacked.values == num_values(record) == 2


def test_a_client_chooses_among_what_it_received():
    x = {"w": np.float32([9, 8, 7, 6]), "v": np.float32([5, 1])}
    received = {"w": np.array([0, 1, 0, 1], bool), "v": np.ones(2, bool)}
    sending = Sending(received=received)
    for codec, kept in (
        (TopK(0.5, within_received=True), [[0, 8, 0, 6], [5, 0]]),
        (TopK(1.0, within_received=True), [[0, 8, 0, 6], [5, 1]]),
        (TopK(0.5), [[9, 8, 7, 0], [0, 0]]),
        (
            Chain(TopK(0.7), TopK(0.5, within_received=True), Exact()),
            [[0, 8, 0, 6], [0, 0]],
        ),
    ):
        found = codec.decode(codec.encode(x, sending), x)
        assert [found["w"].tolist(), found["v"].tolist()] == kept


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_top_k_keeps_at_least_its_share_of_the_energy(density):
    """The k largest of d squares have no less than k/d of their sum."""
    rng = np.random.default_rng(0)
    for scale in (1, 10):
        x = np.sinh(scale * rng.standard_normal(1000) / 3).astype(np.float32)
        for scope in ("global", "tensor"):
            codec = TopK(density, scope)
            found = codec.decode(codec.encode({"w": x}), {"w": x})["w"]
            kept, all_ = (float((y.astype(np.float64) ** 2).sum()) for y in (found, x))
            assert kept >= density * all_
            assert float(((x - found) ** 2).sum()) == pytest.approx(all_ - kept)


@pytest.mark.parametrize(
    "links",
    [
        (),
        (TopK(0.5),),
        (NF4(), TopK(0.5)),
        (NF4(), NF4()),
        (TopK(0.5), Chain(NF4())),
        (TopK(0.5), ErrorFeedback(NF4())),
        (TopK(0.5), "nf4"),
        (*(TopK(0.5) for _ in range(8)), NF4()),
    ],
)
def test_chains_that_cannot_be_decoded(links):
    with pytest.raises(ValueError, match="links="):
        Chain(*links)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (partial(TopK, 1.5), "density=1.5"),
        (partial(TopK, lambda server_round: -1), "density=-1"),
        (partial(TopK, 0.5, "layer"), "scope='layer'"),
        (partial(TopK, 0.5, dense="head"), "dense='head'"),
        (partial(ErrorFeedback, NF4), "codec="),
        (partial(Described, "nf4"), "codec="),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# Messages ---------------------------------------------------------------------------


def test_a_description_is_short_and_makes_the_codec_again():
    for codec, text in (
        (NF4(), '["NF4"]'),
        (TopK(0.25, "tensor"), '["TopK",{"density":0.25,"scope":"tensor"}]'),
        (
            ErrorFeedback(Chain(TopK(1.0, dense=()), Levels(7))),
            '["ErrorFeedback",["Chain",["TopK",{"density":1.0,"dense":[]}],'
            '["Levels",{"levels":7}]]]',
        ),
    ):
        assert describe(codec) == text
        assert rebuild(text, [Levels]) == codec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "describes no codec"),
        ("[]", "describes no codec"),
        ("{}", "describes no codec"),
        ('"NF4"', "describes no codec"),
        ("[" * 100_000, "describes no codec"),
        ('["TopK"]', "describes no codec"),
        ('["TopK",{"share":0.5}]', "describes no codec"),
        ('["TopK",{"density":2}]', "density=2"),
        ('["Levels"]', r"client_app\(task, ..., codecs=\[Levels\]\)"),
        ('["__import__"]', "does not know the codec"),
    ],
)
def test_what_describes_no_codec(text, reason):
    with pytest.raises(ValueError, match=reason):
        rebuild(text)


def test_a_codec_of_the_round_must_be_known_before_it_is_told():
    codec = TopK(lambda server_round: 1 / server_round)
    with pytest.raises(ValueError, match="what is known of its round"):
        describe(codec)
    assert describe(codec.at(4)) == '["TopK",{"density":0.25}]'


class NoCodec:
    pass


class TopKAgain(TopK):
    """Another selection, whose records are read as those of TopK."""


class Taken(ValueCode):
    tag = b"n4"


class Long(Levels):
    tag = b"long"


Impostor = type("NF4", (Levels,), {"tag": b"im"})


@pytest.mark.parametrize("own", [NoCodec, NF4(), Taken, Long, Impostor, "NF4"])
def test_codecs_of_ones_own_that_cannot_be_told_from_others(own):
    with pytest.raises(ValueError, match="must be"):
        require_codecs([own])


def test_codecs_of_ones_own():
    assert require_codecs([Levels, TopKAgain, Draws]) == (Levels, TopKAgain, Draws)
    with pytest.raises(ValueError, match="codecs="):
        require_codecs(Levels)


# Error feedback ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec", [TopK(0.2), Chain(TopK(0.2, "tensor"), BFloat16()), NF4(), Levels(3)]
)
def test_what_was_sent_and_what_is_left_is_what_changed(codec):
    """In float64, of changes that are small integers, so that all sums are exact."""
    rng = np.random.default_rng(0)
    codec = ErrorFeedback(codec)
    exact = isinstance(codec.codec, TopK)
    kept, sent, total = None, np.zeros(40), np.zeros(40)
    for _ in range(6):
        change = {"w": rng.integers(-50, 50, 40).astype(np.float64)}
        record, kept, _ = upload(codec, change, kept, Sending(rng))
        sent += codec.decode(record, change)["w"]
        total += change["w"]
        if exact:
            assert np.array_equal(sent + kept["w"], total)
        assert sent + kept["w"] == pytest.approx(total, abs=1e-9)
    assert kept["w"].any()


def test_a_residual_that_is_not_finite_is_thrown_away():
    change = {"w": np.float32([1, np.inf, 2])}
    for codec in (NF4(), TopK(0.3)):
        assert upload(ErrorFeedback(codec), change, None, Sending()).residual is None


def test_without_feedback_nothing_is_kept():
    assert upload(TopK(0.5), W, None, Sending()).residual is None
    assert not Codec.feedback and ErrorFeedback(NF4()).feedback
    assert Described(ErrorFeedback(NF4())).feedback
    assert ErrorFeedback(Described(NF4())).described


def test_counters_have_no_residual():
    change = {"n": np.array([3]), "w": np.float32([1, 2, 3])}
    kept = upload(ErrorFeedback(TopK(0.4)), change, None, Sending()).residual
    assert set(kept) == {"w"}
