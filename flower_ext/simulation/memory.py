"""Objects between processes of one machine: small ones by a socket, large ones mapped.

A large object is written once, into memory that has no name and that ends with its last
reader. What travels is its descriptor. A reader maps it, and arrays are read where they
are. Linux only.
"""

import mmap
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

import cloudpickle

# Smaller messages are copied faster than they are mapped. Several of them must fit into
# the buffer of a socket whose reader is busy: the sender does not wait for it.
_SMALL = 1 << 15
_ALIGNED = 64  # as NumPy's and torch's fastest loops have it
_COUNT = struct.Struct("<Q")
# Of the message, and whether it is in memory, and whether a descriptor goes along.
_HEAD = struct.Struct("<Q??")
_MOST_PARTS = 512  # that the system writes in one call; Linux takes 1,024
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


def dumps(thing: object, *, by_value: bool = False) -> list[bytes | memoryview]:
    """Pickle an object; its arrays are parts of their own, which are not copied.

    Parameters
    ----------
    thing : object
        What cannot be pickled by name alone is pickled by value.
    by_value : bool
        Whether what a script defines, which the reader cannot import, may be in it.
    """
    buffers: list[pickle.PickleBuffer] = []
    if not by_value:
        try:
            data = pickle.dumps(thing, 5, buffer_callback=buffers.append)
        except Exception:  # such as a function in a function
            by_value = True
    if by_value:
        buffers.clear()
        data = cloudpickle.dumps(thing, 5, buffer_callback=buffers.append)
    return _aligned([data, *(buffer.raw() for buffer in buffers)])


def _aligned(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the number of parts, their sizes, and each with bytes that fill it up."""
    sizes = [memoryview(part).nbytes for part in parts]
    head = struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes)
    found: list[bytes | memoryview] = []
    for part in (head, *parts):
        size = memoryview(part).nbytes
        found += [part, bytes(-size % _ALIGNED)] if size % _ALIGNED else [part]
    return found


def loads(data: memoryview) -> Any:
    """Read an object, whose arrays stay where the data is and cannot be written to."""
    [count] = _COUNT.unpack_from(data)
    sizes = struct.unpack_from(f"<{count}Q", data, _COUNT.size)
    at = _up(_COUNT.size * (count + 1))
    parts = []
    for size in sizes:
        parts.append(data[at : at + size])
        at = _up(at + size)
    return pickle.loads(parts[0], buffers=parts[1:])


def _up(at: int) -> int:
    return at + -at % _ALIGNED


class Memory:
    """Bytes without a name, for all who have the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def of(cls, parts: Sequence[bytes | memoryview]) -> "Memory":
        """Write parts, one after the other."""
        memory = cls(os.memfd_create("flower-ext"))
        for i in range(0, len(parts), _MOST_PARTS):
            memory._write(parts[i : i + _MOST_PARTS])
        return memory

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        left = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        while left:
            written = os.writev(self.descriptor, left)
            while left and written >= left[0].nbytes:
                written -= left.pop(0).nbytes
            if written:  # the system writes two gigabytes at a time
                left[0] = left[0][written:]

    def read(self) -> Any:
        """Return the object that is in it."""
        mapped = mmap.mmap(self.descriptor, 0, flags=_FLAGS, prot=mmap.PROT_READ)
        return loads(memoryview(mapped))

    def __del__(self) -> None:
        os.close(self.descriptor)


class Channel:
    """One end of a socket between two processes.

    Parameters
    ----------
    end : socket.socket
        Of the family of Unix, and a stream.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """Return the descriptor, to wait for."""
        return self._end.fileno()

    def send(self, parts: Sequence[bytes | memoryview], descriptor: int = -1) -> None:
        """Send what :func:`dumps` returned, and a descriptor if it is not -1.

        Raises
        ------
        OSError
            If nobody is there to read it.
        """
        size = sum(memoryview(part).nbytes for part in parts)
        memory = Memory.of(parts) if size > _SMALL else None
        head = _HEAD.pack(size, memory is not None, descriptor >= 0)
        body = b"" if memory else b"".join(parts)
        descriptors = [memory.descriptor] if memory else []
        if descriptor >= 0:
            descriptors.append(descriptor)
        data = head + body
        sent = socket.send_fds(self._end, [data], descriptors) if descriptors else 0
        self._end.sendall(data[sent:])

    def receive(self) -> tuple[Any, int]:
        """Return an object, and the descriptor that came along or -1.

        Raises
        ------
        EOFError
            If the other end is closed.
        """
        try:
            head, descriptors, _, _ = socket.recv_fds(self._end, _HEAD.size, 2)
            head += self._rest(_HEAD.size - len(head))
        except ConnectionResetError as problem:
            raise EOFError from problem
        size, in_memory, along = _HEAD.unpack(head)
        if in_memory:
            thing = Memory(descriptors[0]).read()
        else:
            thing = loads(memoryview(self._rest(size)))
        return thing, descriptors[-1] if along else -1

    def _rest(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._end.recv(size)
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close this end."""
        self._end.close()
