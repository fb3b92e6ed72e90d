"""Objects between processes: what arrives, where it is, and when it ends."""

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from flower_ext.simulation.memory import Channel, Memory, dumps, loads

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="needs memory without a name"
)


@pytest.fixture
def ends():
    """Return both ends of a channel."""
    pair = [Channel(end) for end in socket.socketpair()]
    yield pair
    for end in pair:
        end.close()


def descriptors():
    """Return how many descriptors of memory this process has."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the folder itself, which is closed by then
            count += "memfd:flower-ext" in str(path.readlink())
    return count


THINGS = {
    "nothing": None,
    "small": {"a": [1, "two", 3.0], "b": np.arange(5)},
    "large": {"x": np.arange(100_000.0), "y": np.ones((3, 5), order="F")},
    "many": [np.full(i % 7, i) for i in range(1_500)],
    "strided": np.arange(40_000).reshape(200, 200)[::2, ::3],
    "empty": [np.zeros(0), np.zeros((3, 0, 2)), np.float32(1), b"", b"x" * 70_000],
}


def same(found, sent):
    if isinstance(sent, dict):
        assert found.keys() == sent.keys()
        for key in sent:
            same(found[key], sent[key])
    elif isinstance(sent, list):
        assert len(found) == len(sent)
        for one, other in zip(found, sent, strict=True):
            same(one, other)
    elif isinstance(sent, np.ndarray):
        assert (found.dtype, found.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(found, sent)
    else:
        assert found == sent


@pytest.mark.parametrize("name", THINGS)
def test_what_is_sent_arrives(ends, name):
    ours, its = ends
    before = descriptors()
    for _ in range(2):
        ours.send(dumps(THINGS[name]))
        found, descriptor = its.receive()
        assert descriptor == -1
        same(found, THINGS[name])
        del found
    memory = Memory.of(dumps(THINGS[name]))
    assert descriptors() == before + 1
    same(memory.read(), THINGS[name])
    del memory
    assert descriptors() == before


def test_arrays_are_read_where_they_are_and_cannot_be_spoilt():
    sent = [np.arange(3, dtype=np.int8), np.arange(50_000.0)]
    memory = Memory.of(dumps(sent))
    for array in [*memory.read(), *loads(memoryview(b"".join(dumps(sent))))]:
        assert not array.flags.writeable and not array.flags.owndata
        assert array.flags.aligned
    assert memory.read()[1].ctypes.data % 64 == 0
    one, other = memory.read(), memory.read()
    del memory  # what was read stays
    same(one, sent)
    same(other, sent)


def test_a_descriptor_comes_along_with_small_and_large(ends):
    ours, its = ends
    shared = Memory.of(dumps("shared"))
    for thing in ("small", np.zeros(100_000)):
        ours.send(dumps(thing), shared.descriptor)
        found, descriptor = its.receive()
        same(found, thing)
        assert Memory(descriptor).read() == "shared"


def test_what_is_larger_than_a_sockets_buffer_does_not_wait_for_its_reader(ends):
    ours, its = ends
    for i in range(3):
        ours.send(dumps([i, bytes(10_000_000)]))
    assert [its.receive()[0][0] for _ in range(3)] == [0, 1, 2]


def test_the_end_is_an_end_of_file(ends):
    ours, its = ends
    ours.close()
    with pytest.raises(EOFError):
        its.receive()
    with pytest.raises(OSError):
        its.send(dumps(1))


def test_what_has_no_name_is_sent_by_value():
    def inner(x):
        return x + 1

    [found] = loads(memoryview(b"".join(dumps([inner]))))
    assert found is not inner and found(1) == 2
    with pytest.raises(TypeError, match="lock"):
        dumps(threading.Lock())
