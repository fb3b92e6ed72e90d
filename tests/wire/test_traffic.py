"""What messages cost, of any record: plain, encoded, or no array at all."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import array_record_to_proto
from hypothesis import given
from hypothesis import strategies as st

from flower_ext._flower import ensure_task_identity, recorddict_to_proto
from flower_ext.core.arrays import to_record
from flower_ext.wire import FixedMask
from flower_ext.wire.codec import PAYLOAD
from flower_ext.wire.traffic import (
    REST,
    SUMMED,
    Measured,
    Traffic,
    measure,
    measure_content,
    parts,
)

ensure_task_identity()


def message(content):
    return Message(content, dst_node_id=1, message_type="train")


def test_plain_and_encoded_records():
    w = np.zeros((40, 5), np.float32)
    mask = np.zeros(w.shape, bool)
    mask[:2] = True
    dense = RecordDict({"arrays": to_record({"w": w}), "m": MetricRecord({"a": 1})})
    encoded_ = RecordDict({"arrays": FixedMask({"w": mask}).encode({"w": w})})
    size = encoded_["arrays"][PAYLOAD].shape[0]
    expected = [(800, 200, dense), (size, 10, encoded_)]
    for encoded, parameters, content in expected:
        serialized = recorddict_to_proto(content).ByteSize()
        found = measure([message(content)])
        assert found == Traffic(serialized, encoded, parameters, 1)
    both = measure([message(dense), message(encoded_), message(dense)])
    assert (both.parameters, both.messages) == (410, 3)
    assert both.serialized == sum(
        recorddict_to_proto(x).ByteSize() for x in (dense, encoded_, dense)
    )


def test_parts_are_the_fields_of_flowers_protocol_buffer():
    content = RecordDict(
        {
            "arrays": to_record({"w": np.zeros((40, 5)), "head.b": np.zeros(3)}),
            "other": to_record({"w": np.zeros(2, np.float32)}),
            "m": MetricRecord({"a": 1}),
            "c": ConfigRecord({"b": "word"}),
        }
    )
    found = parts(content)
    for key, record in content.array_records.items():
        for name, array in record.items():
            alone = ArrayRecord({name: array})
            # The arrays of a record are fields of it, one after the other.
            size = array_record_to_proto(alone).ByteSize()
            assert found[f"{key}/{name}"] == size
    assert sum(found.values()) == recorddict_to_proto(content).ByteSize()
    assert list(found) == ["arrays/w", "arrays/head.b", "other/w", REST]
    summed = Measured(content)
    summed.traffic = Traffic(77, 0, 0, 1)
    assert parts(summed) == {SUMMED: 77}
    assert parts(RecordDict()) == {REST: 0}


def test_hostile_records_are_measured_all_the_same():
    for data in (b"", b"no array", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\xff\xff"):
        for name in ("w", PAYLOAD):
            record = ArrayRecord({name: Array("nonsense", (3, 2), "other", data)})
            content = RecordDict({"arrays": record})
            found = measure([message(content)])
            assert found.serialized == recorddict_to_proto(content).ByteSize()
            assert found.encoded <= len(data)


_SCALARS = [0, 1, -1, 127, 128, 2**62, 0.0, 1.0, -1.5, float("nan")]
_OTHERS = [True, False, "", "é", "text", b"", b"bytes"]


@given(
    metrics=st.dictionaries(
        st.text(max_size=3),
        st.one_of(
            st.sampled_from(_SCALARS),
            st.lists(st.integers(-5, 2**40), max_size=3),
            st.lists(st.floats(width=32), max_size=3),
        ),
        max_size=3,
    ),
    config=st.dictionaries(
        st.text(max_size=3),
        st.one_of(
            st.sampled_from([*_SCALARS, *_OTHERS]),
            st.lists(st.booleans(), max_size=3),
            st.lists(st.text(max_size=3), max_size=2),
        ),
        max_size=3,
    ),
)
def test_metrics_and_settings_cost_their_bytes(metrics, config):
    content = RecordDict({"m": MetricRecord(metrics), "c": ConfigRecord(config)})
    expected = recorddict_to_proto(content).ByteSize()
    assert measure_content(content).serialized == expected
    assert measure_content(content).serialized == expected  # of the same kind as before


def test_nothing_costs_nothing():
    assert measure([]) == Traffic() == Traffic() + Traffic()
