"""The client's end of codecs, of an app with a loop of its own: the mod encoded()."""

import re
import zlib

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from rounded import Rounded

from flower_ext.client.encoding import encoded, upload
from flower_ext.client.seeds import random_seed
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.schedules import Decay
from flower_ext.simulation import LocalGrid
from flower_ext.wire import (
    NF4,
    AnyOf,
    BFloat16,
    Chain,
    ErrorFeedback,
    Exact,
    Kept,
    Nonzero,
    TopK,
)
from flower_ext.wire.codec import is_encoded, seal
from flower_ext.wire.messages import (
    DESCRIPTION_KEY,
    UPLOAD_KEY,
    change_like,
    describe_arrays,
    described_arrays,
)
from flower_ext.wire.registry import describe

START = {
    "a": np.float32([[0.5, -4.0, 0.25], [2.0, -1.0, 3.0]]),
    "b": np.float32([0.125, -0.25, 6.0, 0.0]),
    "n": np.array(3),
}
STEPS = {"a": np.float32([[1, -2, 3], [4, -5, 6]]), "b": np.float32([7, -8, 9, 10])}


def app(*mods, key="arrays", seen=None, spoil=()):
    """Return an app that adds known steps, times the client's number plus one."""
    made = ClientApp(mods=list(mods))

    def answer(message, context):
        record = message.content["arrays"]
        arrays = {k: x.copy() for k, x in from_record(record).items()}
        if seen is not None:
            seen.append(arrays)
        factor = np.float32(context.node_config["partition-id"] + 1)
        new = {k: x + factor * STEPS.get(k, 1) for k, x in arrays.items()}
        new["n"] = new["n"].astype(np.int64)
        new["b"][: len(spoil)] = np.nan
        content = {"metrics": MetricRecord({"num-examples": 1})}
        if message.metadata.message_type == "train":
            content[key] = to_record(new)
        return Message(RecordDict(content), reply_to=message)

    made.train()(answer)
    made.evaluate()(answer)
    return made


def ask(made, arrays=START, download=None, upload=None, rounds=(1,), kind="train"):
    """Return the first client's replies, and the grid."""
    grid = LocalGrid(made, 2) if isinstance(made, ClientApp) else made
    replies = []
    for server_round in rounds:
        config = ConfigRecord({"server-round": server_round})
        if upload is not None:
            config[UPLOAD_KEY] = describe(upload)
        record = to_record(arrays)
        if download is not None:
            record = seal(download.encode(arrays))
            config[DESCRIPTION_KEY] = describe_arrays(arrays)
        content = RecordDict({"arrays": record, "config": config})
        node = next(iter(grid.get_node_ids()))
        message = Message(content, node, kind)
        before = dict(message.content)
        replies += grid.send_and_receive([message])
        assert dict(message.content) == before
    return replies


def sent(reply, codec, arrays=START, key="arrays"):
    return codec.decode(reply.content.array_records[key], change_like(arrays))


def test_an_app_that_knows_nothing_sends_its_change_encoded():
    seen = []
    codec = Chain(TopK(0.3), BFloat16())
    [reply] = ask(app(encoded(), seen=seen), upload=codec)
    assert all(np.array_equal(seen[0][k], x) for k, x in START.items())
    found = sent(reply, codec)
    assert found["a"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert found["b"].tolist() == [0, -8, 9, 10]
    assert found["n"] == 1
    assert reply.content["metrics"]["num-examples"] == 1


def test_it_receives_arrays_whatever_was_sent():
    seen, download, upload = [], TopK(0.2), TopK(1.0)
    [reply] = ask(app(encoded(), seen=seen), download=download, upload=upload)
    assert seen[0]["a"].tolist() == [[0, -4, 0], [0, 0, 0]]
    assert seen[0]["b"].tolist() == [0, 0, 6, 0]
    found = sent(reply, upload)
    assert all(np.array_equal(found[k], x) for k, x in STEPS.items())


def test_of_a_pruned_model_the_change_of_what_is_kept_is_sent():
    pruned = {**START, "a": np.float32([[0.5, 0, -0.0], [0, -1.0, 0]])}
    seen, codec = [], Kept()
    [reply] = ask(
        app(encoded(), seen=seen), upload=codec, download=Nonzero(), arrays=pruned
    )
    assert seen[0]["a"].tobytes() == pruned["a"].tobytes()
    record = reply.content.array_records["arrays"]
    found = codec.decode(record, change_like(pruned), pruned)
    assert found["a"].tolist() == [[1, 0, 3], [0, -5, 0]]
    assert found["b"].tolist() == STEPS["b"].tolist()


def test_mods_outside_see_the_message_as_it_came():
    def outside(message, context, call_next):
        content = message.content
        before = dict(content)
        reply = call_next(message, context)
        assert message.content is content and dict(content) == before
        return reply

    [reply] = ask(app(outside, encoded()), download=NF4(), upload=NF4())
    assert not reply.has_error()


def test_an_evaluation_is_decoded_too():
    seen = []
    [reply] = ask(app(encoded(), seen=seen), download=NF4(), kind="evaluate")
    assert NF4().decode(NF4().encode(START), START)["a"].tolist() == (
        seen[0]["a"].tolist()
    )
    assert set(reply.content) == {"metrics"}


def test_other_messages_pass():
    for kind in ("train", "evaluate"):
        runs = [ask(app(*mods), kind=kind)[0].content for mods in ([], [encoded()])]
        assert [set(x) for x in runs] == 2 * [set(runs[0])]
        for record in runs[1].array_records.values():
            assert not is_encoded(record)


def test_its_reply_stays_under_its_own_key():
    [reply] = ask(app(encoded(), key="mine"), upload=NF4())
    assert set(reply.content) == {"mine", "metrics"}
    assert is_encoded(reply.content["mine"])


@pytest.mark.parametrize("codec", [TopK(0.2), Chain(TopK(0.4), NF4()), NF4()])
def test_feedback_loses_nothing(codec):
    states = []

    def keep(message, context, call_next):
        states.append(context.state)
        return call_next(message, context)

    codec = ErrorFeedback(codec)
    grid = LocalGrid(app(keep, encoded()), 2)
    total = {k: np.zeros(x.shape) for k, x in STEPS.items()}
    for times in range(1, 6):
        [reply] = ask(grid, upload=codec, rounds=(times,))
        found = sent(reply, codec)
        left = from_record(states[-1].array_records["personal/upload-residual"])
        assert set(left) == set(STEPS)
        for name, x in STEPS.items():
            total[name] += found[name]
            assert total[name] + left[name] == pytest.approx(times * x, abs=1e-4)


def test_a_client_that_diverged_starts_anew():
    states, spoil = [], []

    def keep(message, context, call_next):
        states.append(context.state)
        return call_next(message, context)

    grid = LocalGrid(app(keep, encoded(), spoil=spoil), 2)
    for number, (diverged, kept) in enumerate([([], True), ([1], False), ([], True)]):
        spoil[:] = diverged
        ask(grid, upload=ErrorFeedback(NF4()), rounds=(number + 1,))
        assert ("personal/upload-residual" in states[-1]) == kept


@pytest.mark.parametrize(("rounds", "forgets"), [((1, 2), False), ((2, 2), True)])
def test_what_another_run_left_out_is_not_added(rounds, forgets):
    codec = ErrorFeedback(TopK(0.2))
    grid = LocalGrid(app(encoded()), 1)
    first, second = ask(grid, upload=codec, rounds=rounds)
    found = [sent(reply, codec) for reply in (first, second)]
    again = all(np.array_equal(x, found[1][name]) for name, x in found[0].items())
    assert again == forgets


def test_a_codec_of_ones_own_must_be_named():
    [reply] = ask(app(encoded()), upload=Rounded(5.0))
    assert re.search(r"codecs=\[Rounded\]", reply.error.reason)
    [reply] = ask(app(encoded(Rounded)), upload=Rounded(5.0))
    assert sent(reply, Rounded())["a"] == pytest.approx(STEPS["a"], abs=5)
    with pytest.raises(ValueError, match="codecs="):
        encoded(Rounded())


def test_draws_depend_on_seed_round_and_client():
    def payloads(made, **config):
        replies = []
        for server_round in (1, 2):
            replies += ask(made, upload=Rounded(5.0), rounds=(server_round,))
        return [bytes(r.content["arrays"]["<binary>"].data) for r in replies]

    one, two = payloads(app(encoded(Rounded))), payloads(app(encoded(Rounded)))
    assert one == two and one[0] != one[1]
    assert random_seed(0, 1, 0, 2) != random_seed(0, 1, 0, 1)


def test_what_it_cannot_do_is_refused_before_the_app_trains():
    seen = []
    made = app(encoded(), seen=seen)
    [reply] = ask(made, upload=TopK(0.5, within_received=True))
    assert "needs the client half" in reply.error.reason
    content = RecordDict({"arrays": seal(NF4().encode(START)), "c": ConfigRecord()})
    grid = LocalGrid(made, 1)
    message = Message(content, next(iter(grid.get_node_ids())), "train")
    [reply] = grid.send_and_receive([message])
    assert "download=Described(codec)" in reply.error.reason
    assert seen == []


def test_it_says_which_arrays_a_reply_lacks():
    made = ClientApp(mods=[encoded()])

    @made.train()
    def train(message, context):
        records = {"arrays": to_record({"a": START["a"]}), "metrics": MetricRecord()}
        return Message(RecordDict(records), reply_to=message)

    [reply] = ask(made, upload=NF4())
    assert "missing ['b', 'n']" in reply.error.reason


def test_without_the_mod_an_encoded_model_cannot_be_read():
    made = ClientApp()

    @made.train()
    def train(message, context):
        message.content["arrays"].to_torch_state_dict()

    [reply] = ask(made, download=NF4())
    assert "encoded-array" in reply.error.reason


def test_arrays_that_come_back_equal_are_one():
    made = ClientApp(mods=[encoded()])
    arrays = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}

    @made.train()
    def train(message, context):
        new = {k: x + np.float32([1, 5, 2]) for k, x in arrays.items()}
        records = {"arrays": to_record(new), "metrics": MetricRecord()}
        return Message(RecordDict(records), reply_to=message)

    [reply] = ask(made, arrays=arrays, upload=TopK(0.4))
    assert dict(reply.content["tied"]) == {"b": "a"}
    found = sent(reply, TopK(0.4), arrays)
    assert found["a"].tolist() == [0, 5, 0] and found["b"].tolist() == [0, 0, 0]


# A client's own choice ----------------------------------------------------------------


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize(
    ("own", "told"),
    [
        (NF4(), AnyOf(Exact(), NF4())),
        (TopK(0.2), AnyOf(Exact(), TopK(0.5), NF4())),
        (Chain(TopK(0.3), NF4()), AnyOf(Chain(TopK(0.5), NF4()))),
        (TopK(0.2), TopK(0.6)),
        (Rounded(5.0), AnyOf(Exact(), Rounded())),
    ],
)
def test_a_client_chooses_among_what_the_server_reads(own, told, feedback):
    states = []

    def keep(message, context, call_next):
        states.append(context.state)
        return call_next(message, context)

    told = ErrorFeedback(told) if feedback else told
    [reply] = ask(app(keep, upload(own)), upload=told)
    # What another client sends that the server told to take this codec.
    as_told = ErrorFeedback(own) if feedback else own
    [expected] = ask(app(encoded(Rounded)), upload=as_told)
    assert bytes(reply.content["arrays"]["<binary>"].data) == bytes(
        expected.content["arrays"]["<binary>"].data
    )
    # Whether anything is kept is the server's to say.
    assert ("personal/upload-residual" in states[0]) == feedback


def test_a_choice_has_a_schedule_and_an_evaluation_needs_none():
    made = app(upload(TopK(Decay(0.8, 0.5))))
    replies = ask(made, upload=AnyOf(NF4(), TopK(1)), rounds=(1, 2, 3))
    sizes = [np.count_nonzero(sent(r, TopK(1))["b"]) for r in replies]
    sizes = [
        n + np.count_nonzero(sent(r, TopK(1))["a"])
        for n, r in zip(sizes, replies, strict=True)
    ]
    assert sizes == [8, 4, 2]
    [reply] = ask(made, download=NF4(), kind="evaluate")
    assert set(reply.content) == {"metrics"}


@pytest.mark.parametrize(
    ("own", "told", "reason"),
    [
        (NF4(), AnyOf(Exact(), TopK(0.5)), r"\['Exact', 'TopK of Exact'\]: its strat"),
        (NF4(), ErrorFeedback(BFloat16()), r"what the server reads, \['BFloat16'\]"),
        (TopK(0.5), Chain(TopK(0.5), NF4()), r"\['TopK of NF4'\]"),
        (NF4(), None, "plain arrays only: its strategy needs upload=AnyOf"),
        (TopK(0.5), TopK(0.5, within_received=True), "needs the client half"),
        (TopK(Decay(0.5, 0.5)), AnyOf(Rounded(), TopK(1)), r"codecs=\[Rounded\]"),
    ],
)
def test_a_choice_that_the_server_cannot_read_is_refused(own, told, reason):
    seen = []
    [reply] = ask(app(upload(own), seen=seen), upload=told)
    assert re.search(reason, reply.error.reason) and seen == []


@pytest.mark.parametrize(
    "bad", [ErrorFeedback(NF4()), NF4, TopK(0.5, within_received=True), AnyOf(NF4())]
)
def test_what_is_no_choice(bad):
    with pytest.raises(ValueError, match="error feedback is for the server to ask"):
        upload(bad)


def test_description_takes_few_bytes_and_bounded_memory():
    names = [
        f"base_model.model.layers.{i}.lora_{x}.weight" for i in range(12) for x in "AB"
    ]
    arrays = {name: np.zeros((8, 384), np.float32) for name in names}
    described = describe_arrays(arrays)
    assert len(described) < 400
    read = described_arrays({DESCRIPTION_KEY: described})
    assert {n: (x.shape, x.dtype) for n, x in read.items()} == {
        n: (x.shape, x.dtype) for n, x in arrays.items()
    }
    assert described_arrays({}) is None
    with pytest.raises(ValueError, match="a description must be"):
        described_arrays({DESCRIPTION_KEY: zlib.compress(bytes(1 << 25))})


def test_an_empty_record_is_no_model():
    made = app(encoded())
    grid = LocalGrid(made, 1)
    content = RecordDict({"note": ConfigRecord({UPLOAD_KEY: describe(NF4())})})
    message = Message(content, next(iter(grid.get_node_ids())), "train")
    [reply] = grid.send_and_receive([message])
    assert reply.has_error() and "arrays" in reply.error.reason
