"""What is made of Flower's without its checks is what Flower itself makes."""

import subprocess
import sys

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from flower_ext._flower import (
    ensure_task_identity,
    quick_message,
    quick_reply,
    unchecked,
)

ensure_task_identity()


def parts(message, *unlike):
    """Return all that a message has, but for what depends on the time."""
    assert vars(message).keys() == {"_metadata", "_content", "_error"}
    about = vars(message.metadata)
    return {k: x for k, x in about.items() if k not in unlike}, message.has_error()


@pytest.mark.parametrize("group", ["", "7"])
def test_a_quick_message_is_flowers(group):
    content = RecordDict()
    quick = quick_message(content, 3, "train.special", group)
    slow = Message(content, 3, "train.special", group_id=group)
    assert parts(quick, "_created_at") == parts(slow, "_created_at")
    assert quick.content is content
    assert abs(quick.metadata.created_at - slow.metadata.created_at) < 5
    other = quick_message(content, 4, "train.special", group, "id")
    assert (other.metadata.dst_node_id, other.metadata.message_id) == (4, "id")
    assert (quick.metadata.dst_node_id, quick.metadata.message_id) == (3, "")


@pytest.mark.parametrize("error", [None, Error(3, "reason")])
def test_a_quick_reply_is_flowers(error):
    asked = Message(RecordDict(), 3, "evaluate", ttl=50, group_id="2", dst_task_id=9)
    vars(asked.metadata)["_message_id"] = "id"
    content = None if error else RecordDict()
    quick = quick_reply(content, error, asked)
    slow = Message(error or content, reply_to=asked)
    assert parts(quick, "_created_at", "_ttl") == parts(slow, "_created_at", "_ttl")
    assert abs(quick.metadata.ttl - slow.metadata.ttl) < 5
    assert quick.metadata.ttl <= 50
    assert (quick.error if error else quick.content) is (error or content)


def test_an_unchecked_record_is_checked_from_then_on():
    like = ConfigRecord({"a": 1})
    made = unchecked(like, {"b": 2})
    assert (like, made) == ({"a": 1}, {"b": 2})
    with pytest.raises(TypeError):
        made["c"] = object()


_MAKE = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flower_ext._flower import make_arrays_by
from flower_ext.core.held import flower_array

before = [Array(np.arange(3.0)), *ArrayRecord([np.ones((2, 2))]).values()]
make_arrays_by(flower_array)
after = [Array(np.arange(3.0)), *ArrayRecord([np.ones((2, 2))]).values()]
assert before == after and {type(x) for x in after} == {Array}
"""


def test_a_process_whose_arrays_are_made_by_a_function_has_the_same_arrays():
    subprocess.run([sys.executable, "-c", _MAKE], check=True)


_KEEP = """
import resource
import numpy as np
from flower_ext.simulation.worker import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"".join([bytes(50_000_000)])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cold = faults()
keep_freed_memory()
faults()
print(cold, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_memory_that_a_client_freed_is_there_for_the_next():
    command = [sys.executable, "-c", _KEEP]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cold, warm = map(int, said.split())
    assert warm < cold / 10
