"""Reading replies: what is usable, what is left out, and with which words."""

import logging
from collections import Counter

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from flower_ext.core.arrays import to_record
from flower_ext.core.replies import (
    MalformedReply,
    aggregate_metrics,
    log_dropped,
    read_arrays,
    read_scalar,
    read_vector,
    sort_replies,
)

LIKE = {"w": np.zeros((2, 3), np.float32), "n": np.array(5)}


def with_metrics(**records):
    """A reply with metric records of these names and contents."""
    return RecordDict({name: MetricRecord(values) for name, values in records.items()})


def with_arrays(**arrays):
    return RecordDict({"arrays": to_record(arrays)})


# Arrays ---------------------------------------------------------------------------


def test_arrays_are_read_by_name_whatever_their_order():
    reply = with_arrays(n=np.array(7), w=np.ones((2, 3), np.float32))
    assert read_arrays(reply, "arrays", LIKE)["n"] == 7


@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_floats_of_another_width_are_accepted(dtype):
    reply = with_arrays(n=np.array(7), w=np.ones((2, 3), dtype))
    assert read_arrays(reply, "arrays", LIKE)["w"].dtype == dtype


def test_missing_record_is_told_with_those_there_are():
    reply = RecordDict({"weights": to_record(LIKE)})
    with pytest.raises(MalformedReply, match=r"'arrays' in the reply.*\['weights'\]"):
        read_arrays(reply, "arrays", LIKE)


def test_missing_and_unknown_arrays_are_named():
    with pytest.raises(MalformedReply, match=r"missing \['n'\], unknown \['x'\]"):
        read_arrays(with_arrays(w=LIKE["w"], x=np.ones(1)), "arrays", LIKE)


@pytest.mark.parametrize(
    ("w", "found"),
    [
        (np.ones((3, 2), np.float32), r"float32\[3, 2\]"),
        (np.ones(3, np.float32), r"float32\[3\]"),
        (np.ones((2, 3), np.int32), r"int32\[2, 3\]"),
        (np.ones((2, 3), bool), r"bool\[2, 3\]"),
        (np.ones((2, 3), np.complex64), r"complex64\[2, 3\]"),
        (np.full((2, 3), "x"), r"<U1\[2, 3\]"),
    ],
)
def test_another_shape_or_kind_is_told_with_the_expected_one(w, found):
    with pytest.raises(
        MalformedReply, match=rf"'w' of 'arrays' is {found}, expected float32\[2, 3\]"
    ):
        read_arrays(with_arrays(w=w, n=np.array(1)), "arrays", LIKE)


@pytest.mark.parametrize("data", [b"", b"no array", Array(np.ones(3)).data[:-1]])
def test_unreadable_bytes_are_malformed(data):
    reply = RecordDict(
        {"arrays": ArrayRecord({"w": Array("float64", (3,), "numpy.ndarray", data)})}
    )
    with pytest.raises(MalformedReply, match="'arrays' cannot be read"):
        read_arrays(reply, "arrays", {"w": np.ones(3)})


# Metrics --------------------------------------------------------------------------


def test_a_scalar_is_found_in_any_metric_record():
    assert read_scalar(with_metrics(a={"x": 1}, b={"n": 3}), "n") == 3.0


@pytest.mark.parametrize(
    "bad", [-1, -1e-9, float("nan"), float("inf"), float("-inf"), [], [1.0], [1, 2]]
)
def test_a_weight_must_be_one_finite_number_from_0(bad):
    with pytest.raises(MalformedReply, match=r"metric 'n'=.* must be .*>= 0"):
        read_scalar(with_metrics(m={"n": bad}), "n")


def test_a_scalar_may_be_as_low_as_its_bound():
    assert read_scalar(with_metrics(m={"n": -2.0}), "n", low=-2.0) == -2


def test_a_missing_metric_is_named():
    with pytest.raises(MalformedReply, match="no metric 'n'"):
        read_scalar(with_metrics(m={"x": 1}), "n")


def test_a_vector_is_read_with_its_size():
    assert read_vector(with_metrics(m={"n": [1, 2, 3]}), "n", 3) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [[1, 2], [1, 2, -3], [1.0, 2.0, float("nan")], 3])
def test_a_vector_of_another_size_or_with_a_bad_number_is_malformed(bad):
    with pytest.raises(MalformedReply, match=r"must be 3 finite number\(s\) >= 0"):
        read_vector(with_metrics(m={"n": bad}), "n", 3)


# Sorting --------------------------------------------------------------------------


@pytest.fixture
def from_nodes(scripted):
    """Make replies of these nodes; a negative number is an error of that node."""
    scripted([None])  # lets messages be made outside a run

    def make(*nodes):
        replies = []
        for node in nodes:
            asked = Message(RecordDict(), abs(node), "train")
            replies.append(
                Message(RecordDict(), reply_to=asked)
                if node > 0
                else Message(Error(2, f"trouble in {-node}"), reply_to=asked)
            )
        return replies

    return make


def nodes_of(replies):
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_are_put_in_the_order_of_the_cohort(from_nodes):
    found = sort_replies(from_nodes(7, 9, 8), {9: 0, 8: 4, 7: 5})
    assert nodes_of(found.usable) == [9, 8, 7]


def test_errors_are_counted_and_their_reason_is_logged(from_nodes, caplog):
    caplog.set_level(logging.INFO, "flwr")
    found = sort_replies(from_nodes(-7, 8, -9), {7: 0, 8: 1, 9: 2})
    assert nodes_of(found.usable) == [8]
    assert found.errors == ["trouble in 7", "trouble in 9"]
    assert "node 7: trouble in 7" in caplog.text


def test_a_node_that_was_not_asked_is_left_out(from_nodes):
    found = sort_replies(from_nodes(7, 8), {8: 0})
    assert nodes_of(found.usable) == [8]
    assert found.dropped == Counter({"the client was not asked in this round": 1})


def test_all_replies_of_a_node_that_sent_several_are_left_out(from_nodes):
    found = sort_replies(from_nodes(7, 8, 7), {7: 0, 8: 1})
    assert nodes_of(found.usable) == [8]
    assert found.dropped == Counter({"the client replied more than once": 2})


def test_each_reason_is_warned_about_once_with_its_count(caplog):
    log_dropped(Counter({"too late": 3, "too odd": 1}), 5)
    texts = [record.message for record in caplog.records]
    assert texts == [
        "round 5: 3 reply(s) dropped: too late",
        "round 5: 1 reply(s) dropped: too odd",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


# Averages of metrics --------------------------------------------------------------


def weighing(weight, **metrics):
    return with_metrics(metrics={"n": weight, **metrics})


def average(*contents, consumed=()):
    return dict(
        aggregate_metrics(list(contents), "n", aggregate_metricrecords, consumed)
    )


def test_metrics_are_averaged_by_weight():
    assert average(weighing(1, loss=2.0), weighing(3, loss=6.0)) == {"loss": 5.0}


def test_lists_are_averaged_elementwise():
    found = average(weighing(1, v=[0.0, 4.0]), weighing(1, v=[2.0, 4.0]))
    assert found == {"v": [1.0, 4.0]}


def test_a_metric_that_one_reply_lacks_is_left_out_with_a_warning(caplog):
    found = average(weighing(1, loss=2.0, f1=1.0), weighing(1, loss=4.0))
    assert found == {"loss": 3.0}
    assert "metrics ['f1'] are not in every reply" in caplog.text


@pytest.mark.parametrize("count", [2, 5])
def test_metrics_under_another_key_are_averaged_with_the_others(count):
    odd = with_metrics(**{"my-metrics": {"n": 3, "loss": 6.0}})
    found = average(odd, *[weighing(1, loss=2.0)] * count)
    assert found == {"loss": pytest.approx((18 + 2 * count) / (3 + count))}


def test_metrics_are_where_most_replies_have_them():
    seen = []

    def own(contents, key):
        seen.extend(contents)
        return MetricRecord()

    odd = with_metrics(a={"loss": 9.0}, b={"n": 3, "loss": 6.0}, metrics={"f1": 1.0})
    aggregate_metrics([odd, *[weighing(1, loss=2.0)] * 2], "n", own)
    assert seen[0] == weighing(3, loss=6.0)
    assert seen[1] == weighing(1, loss=2.0)


@pytest.mark.parametrize(
    "own",
    [lambda contents, key: 1 / 0, lambda contents, key: {"a": "b"}, lambda *_: None],
    ids=["raises", "text", "nothing"],
)
def test_a_function_that_makes_no_metrics_leaves_them_out(own, caplog):
    found = aggregate_metrics([weighing(1, loss=2.0)], "n", own)
    assert found == MetricRecord()
    assert "the metrics are left out" in caplog.text


@pytest.mark.parametrize("other", [[1.0], [], 1.0])
def test_a_metric_of_another_length_is_left_out(other):
    assert average(weighing(1, v=[1.0, 2.0]), weighing(1, v=other)) == {}


def test_an_empty_list_is_not_averaged_with_a_number():
    assert average(weighing(1, v=[]), weighing(1, v=2.0)) == {}


def test_consumed_metrics_are_left_out():
    found = average(weighing(1, loss=2.0, q=1.0), consumed=("q",))
    assert found == {"loss": 2.0}


def test_replies_that_all_weigh_nothing_have_no_average():
    assert average(weighing(0, loss=2.0), weighing(0.0, loss=3.0)) == {}


def test_a_reply_that_weighs_nothing_does_not_spoil_the_average_with_nan():
    found = average(weighing(2, loss=3.0), weighing(0, loss=float("nan")))
    assert found == {"loss": 3.0}


def test_a_reply_that_weighs_nothing_may_lack_metrics():
    assert average(weighing(2, loss=3.0), weighing(0)) == {"loss": 3.0}


def test_the_weight_may_be_in_the_second_metric_record():
    replies = [
        with_metrics(a={"loss": loss}, b={"n": weight})
        for loss, weight in [(2.0, 1), (6.0, 3)]
    ]
    assert average(*replies) == {"loss": 5.0}


def test_a_name_in_two_records_is_averaged_once():
    reply = with_metrics(a={"n": 2, "loss": 3.0}, b={"loss": 100.0})
    assert average(reply, reply) == {"loss": 3.0}


def test_own_aggregation_gets_the_whole_replies_and_the_key():
    content = weighing(2, loss=3.0)
    content["arrays"] = to_record(LIKE)
    content["note"] = ConfigRecord({"a": 1})
    seen = []

    def own(contents, key):
        seen.append((contents, key))
        return MetricRecord({"mine": 1.0})

    assert aggregate_metrics([content], "n", own) == {"mine": 1.0}
    [(contents, key)] = seen
    assert key == "n"
    assert contents == [content]


def test_aggregation_leaves_the_replies_as_they_were():
    content = weighing(1, loss=2.0, only_here=1.0)
    average(content, weighing(1, loss=2.0))
    assert content == weighing(1, loss=2.0, only_here=1.0)
