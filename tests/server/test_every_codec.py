"""Rounds with every codec: over messages as without, exact where nothing is lost."""

from functools import partial

import numpy as np
import pytest
from every_codec import EVERY_CODEC
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Proto
from flwr.serverapp.exception import InconsistentMessageReplies

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import from_record
from flower_ext.simulation import LocalGrid, PackedGrid, packed
from flower_ext.wire import (
    DRIVE,
    EDEN,
    NF4,
    QSGD,
    AnyOf,
    BFloat16,
    Chain,
    Described,
    ErrorFeedback,
    Exact,
    FixedMask,
    Kept,
    Nonzero,
    OneBit,
    Permutation,
    RandomK,
    Rows,
    TernGrad,
    ThreeLC,
    TopK,
    UniversalCode,
    Voted,
)
from flower_ext.wire.registry import CODECS, classes
from flower_ext.wire.value_codes import nf4_levels

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
CONFIG = {"batch-size": 4, "lr": 0.1}


def as_bytes(message, context, call_next):
    """Let a node see of a message what its bytes say, and the server of the reply."""

    def through(message):
        sent = message_to_proto(message).SerializeToString()
        return message_from_proto(Proto.FromString(sent))

    return through(call_next(through(message), context))


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_messages_change_nothing(task, initial, name):
    codec = EVERY_CODEC[name]()
    codecs = {"download": codec}
    if not isinstance(codec, FixedMask):  # which no message can name
        codecs["upload"] = codec
    if any(part.needs_began for part in classes(codec)):
        codecs["download"] = Nonzero()
    nodes = LocalGrid(client_app(task, mods=[as_bytes, packed]), 2, CONFIG)
    results = []
    for grid in (
        LocalGrid(client_app(task), 4, CONFIG),
        PackedGrid(nodes, num_clients=4, transport="messages"),
    ):
        result = AdditiveStrategy(**codecs, **ANY).start(grid, initial, num_rounds=2)
        for metrics in result.train_metrics_clientapp.values():
            assert (metrics["num-replies"], metrics["num-errors"]) == (4, 0)
        results.append(result)
    direct, over_messages = results
    for key, array in direct.arrays.items():
        assert over_messages.arrays[key].data == array.data, key
    # As text: of a model that was cut to a bit a loss is NaN, which equals none.
    of_evaluations = [str(x.evaluate_metrics_clientapp) for x in results]
    assert of_evaluations[0] == of_evaluations[1]
    moved = any(direct.arrays[n].data != x.data for n, x in initial.items())
    assert moved or name == "top-k of nothing"


# Where nothing is lost ----------------------------------------------------------------


def anything(rng):
    return rng.standard_normal((3, 64)).astype(np.float32)


def multiples(rng):
    return np.float32(0.25) * rng.integers(-40, 40, (3, 64)).astype(np.float32)


def three_values(rng):
    return np.float32(0.7) * rng.integers(-1, 2, (3, 64)).astype(np.float32)


def on_two_sides(rng):
    return np.where(rng.random((3, 64)) < 0.5, np.float32(0.3), np.float32(-0.7))


def of_bfloat16(rng):
    codec = BFloat16()
    x = {"w": anything(rng)}
    return codec.decode(codec.encode(x), x)["w"]


def of_nf4(rng):
    """Return levels times the scale of their block, of which each has the largest."""
    levels = rng.integers(0, 16, (3, 64))
    levels[:, 5] = 15
    return nf4_levels()[levels] * rng.random((3, 1), np.float32)


def an_order(rng):
    return rng.permutation(3 * 64).reshape(3, 64).astype(np.float32)


universal = partial(UniversalCode, 0.25, "none")
# Each codec where it loses nothing, and changes of which that is so.
LOSSLESS = {
    "exact": (Exact(), anything),
    "bfloat16": (BFloat16(), of_bfloat16),
    "nf4": (NF4(), of_nf4),
    "top-k": (TopK(1), anything),
    "top-k of each": (TopK(1.0, "tensor"), anything),
    "random-k": (RandomK(1), anything),
    "random-k, rescaled": (RandomK(1, rescaled=True), anything),
    "rows": (Rows(1), anything),
    "rows, rescaled": (Rows(1, "norm", rescaled=True), anything),
    "permutation": (Permutation(), an_order),
    "permutation of none": (Permutation(), anything),
    "nonzero": (Nonzero(), three_values),
    "kept": (Kept(), anything),
    "universal": (universal(), multiples),
    "universal at random": (universal("stochastic"), multiples),
    "universal of all": (universal(scope="global"), multiples),
    "universal by entropy": (universal(coding="entropy"), multiples),
    "universal, fine": (UniversalCode(1e-300), anything),
    "qsgd of one value": (QSGD(2, bucket=1), three_values),
    "terngrad": (TernGrad(), three_values),
    "3lc": (ThreeLC(), three_values),
    "one bit": (OneBit(), on_two_sides),
    "chain": (Chain(TopK(1), RandomK(1), Exact()), anything),
    "chain of steps": (Chain(TopK(1), universal()), multiples),
    "feedback": (ErrorFeedback(Chain(TopK(1), BFloat16())), of_bfloat16),
    "voted": (Voted(NF4(), TopK(1), tradeoff=0.1, chosen=1), anything),
    "any of two": (AnyOf(Exact(), NF4()), anything),
    "described": (Described(Exact()), anything),
}
# What is turned at random comes back rounded; the other is no codec of uploads.
NEVER = {EDEN, DRIVE, FixedMask}


def test_every_codec_has_its_lossless_limit():
    found = set().union(*(classes(codec) for codec, _ in LOSSLESS.values()))
    assert set(CODECS) - found == NEVER


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_sum_of_what_is_decoded_is_that_of_what_was_sent(aggregate, reply, name):
    codec, make = LOSSLESS[name]
    rng = np.random.default_rng(0)
    sent = {
        "w": np.zeros((3, 64), np.float32),
        "v": np.zeros(64, np.float32),
        "n": np.array([3, 5]),
    }
    plain, coded = [], []
    for weight in (1.0, 5.0, 2.0):
        change = {"w": make(rng), "v": make(rng)[0], "n": rng.integers(0, 9, 2)}
        moved = {n: (x + change[n]).astype(x.dtype) for n, x in sent.items()}
        plain.append(reply(moved, weight))
        coded.append(reply(None, weight))
        coded[-1]["arrays"] = codec.encode(change)
    expected, metrics = aggregate(AdditiveStrategy(**ANY), sent, plain)
    found, others = aggregate(AdditiveStrategy(upload=codec, **ANY), sent, coded)
    assert metrics["num-replies"] == others["num-replies"] == 3
    for key, x in expected.items():
        assert found[key].tobytes() == x.tobytes(), key
    assert expected["w"].any()


@pytest.mark.parametrize(
    "codec",
    [Exact(), TopK(1), RandomK(1), Chain(TopK(1), Exact()), ErrorFeedback(TopK(1))],
    ids=str,
)
def test_rounds_of_what_loses_nothing_are_those_without_codec(task, initial, codec):
    """With clients that train; the mean of counters is rounded in other places."""
    plain, coded = (
        from_record(
            AdditiveStrategy(**options, **ANY)
            .start(LocalGrid(client_app(task), 4, CONFIG), initial, num_rounds=3)
            .arrays
        )
        for options in ({}, {"upload": codec, "download": codec})
    )
    for key, x in plain.items():
        assert coded[key].tobytes() == x.tobytes(), key


# What nobody wrote --------------------------------------------------------------------


def spoiled(record, rng):
    """Return what may become of a record on its way, by name."""
    [(key, array)] = record.items()
    payload = array.numpy()
    flipped = payload.copy()
    flipped[rng.integers(len(payload))] ^= np.uint8(1 << rng.integers(8))
    return {
        "cut": {key: payload[: len(payload) // 2]},
        "longer": {key: np.append(payload, np.zeros(9, np.uint8))},
        "flipped": {key: flipped},
        "empty": {key: payload[:0]},
        "of other numbers": {key: payload.astype(np.float32)},
        "twice": {key: payload, "more": payload},
    }


@pytest.mark.parametrize("name", [n for n in EVERY_CODEC if n != "masks"])
def test_a_spoiled_reply_is_left_out_with_its_reason(aggregate, reply, name, caplog):
    codec = EVERY_CODEC[name]()
    rng = np.random.default_rng(0)
    sent = {"w": np.zeros((3, 64), np.float32), "n": np.array([3, 5])}
    change = {"w": anything(rng), "n": np.array([1, 1])}
    record = codec.at(1).encode(change)
    own = codec.at(1).stages
    other = next(x for x in (Exact(), NF4(), BFloat16()) if x.stages != own)
    bad = spoiled(record, rng)
    bad["another codec"] = {k: x.numpy() for k, x in other.encode(change).items()}
    bad["another size"] = {
        k: x.numpy()
        for k, x in codec.at(1).encode({"w": change["w"].T, "n": change["n"]}).items()
    }
    contents = [reply(arrays) for arrays in bad.values()]
    good = reply()
    good["arrays"] = record
    caplog.set_level("WARNING", logger="flwr")
    alone, _ = aggregate(AdditiveStrategy(upload=codec, **ANY), sent, [good])
    found, metrics = aggregate(
        AdditiveStrategy(upload=codec, **ANY), sent, [*contents, good]
    )
    assert metrics["num-replies"] == 1 and metrics["num-dropped"] == len(bad)
    for key, x in alone.items():
        assert found[key].tobytes() == x.tobytes()
    assert "cannot be read" in caplog.text
    with pytest.raises(InconsistentMessageReplies, match="cannot be read"):
        aggregate(AdditiveStrategy(upload=codec, **ANY), sent, contents)
