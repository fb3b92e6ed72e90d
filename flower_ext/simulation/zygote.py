"""The process that workers are forked from, with their large modules loaded.

It loads modules and does nothing else: no thread runs in it and no data is there, so
that a fork of it is as good as a process that was started anew. Only a worker that has
a GPU is started anew. The zygote ends with the process that started it, and its workers
end with it.
"""

import gc
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from flower_ext.simulation.memory import Channel, Memory, dumps
from flower_ext.simulation.worker import Broadcast, Worker

#: What it is asked, with the number of a worker: to start it, or to end it.
START, END = "start", "end"
#: What workers say: that they have loaded the app or why not, the answer to a pack, or
#: why there is none.
LOADED, ANSWER, FAILED = "loaded", "answer", "failed"


def serve(descriptor: int) -> None:
    """Load modules, then start and end workers until nobody asks any more.

    Parameters
    ----------
    descriptor : int
        Of the socket by which it is asked, first to load modules by their names. What
        cannot be imported is left to the workers.
    """
    asked = Channel(socket.socket(fileno=descriptor))
    modules, _ = asked.receive()
    gc.disable()
    for name in modules:
        with suppress(Exception):
            import_module(name)
    gc.freeze()  # what is never written to stays one copy for all workers
    gc.enable()
    pids: dict[int, int] = {}
    while True:
        try:
            (what, number, *options), end = asked.receive()
        except (EOFError, OSError):
            break
        if what == START:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                asked.close()
                _begin(end, *options)
            os.close(end)
            pids[number] = pid
        else:
            asked.send(dumps(_end(pids.pop(number))))
    for pid in pids.values():
        _end(pid)


def _end(pid: int) -> int:
    """End a worker; return its exit status, below zero for a signal."""
    os.kill(pid, signal.SIGKILL)  # one that has ended keeps its own status
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _begin(
    descriptor: int,
    threads: int,
    gpus: str,
    environ: Mapping[str, str],
    folder: str,
    paths: Sequence[str],
) -> NoReturn:
    """Become a worker, in the folder and the environment of the server."""
    try:
        os.chdir(folder)
        environ = {**environ, "CUDA_VISIBLE_DEVICES": gpus}
        if gpus:
            # CUDA does not outlive a fork, and who knows which module has touched it.
            os.set_inheritable(descriptor, True)
            code = (
                f"import sys; sys.path[:] = {paths!r}\n"
                f"from flower_ext.simulation.zygote import work\n"
                f"work({descriptor}, {threads})"
            )
            environ["OMP_NUM_THREADS"] = str(threads)
            os.execve(sys.executable, [sys.executable, "-c", code], environ)
        for name in os.environ.keys() - environ.keys():
            del os.environ[name]
        os.environ.update(environ)
        sys.path[:] = paths
        _scatter_seeds()
        work(descriptor, threads)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def work(descriptor: int, threads: int) -> NoReturn:
    """Run packs until nobody asks any more; never return."""
    try:
        # Where memory is short, a worker is ended and not the server, which goes on.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
        _run_packs(Channel(socket.socket(fileno=descriptor)), threads)
    except (EOFError, OSError):
        pass  # the server has gone
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _scatter_seeds() -> None:
    """Give this process random numbers of its own, as a new one has."""
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()


def _run_packs(channel: Channel, threads: int) -> None:
    pickled, _ = channel.receive()
    worker = Worker(pickled, threads)
    loaded = True
    try:
        worker.load()
    except Exception:  # to be raised again, and told, when clients are to run
        loaded = False
    channel.send(dumps((LOADED, loaded)))
    while True:
        (number, *pack), descriptor = channel.receive()
        channel.send(_answer(worker, number, Mapped(descriptor), pack))


def _answer(
    worker: Worker, number: int, shared: "Mapped", pack: Sequence[Any]
) -> list[bytes | memoryview]:
    try:
        return dumps((ANSWER, worker.run(number, shared, *pack)))
    except BaseException:
        return dumps((FAILED, traceback.format_exc()))


class Mapped(Memory):
    """What the clients of a round have in common, in memory that all workers map."""

    def read(self) -> Broadcast:
        """Return it."""
        found: Broadcast = super().read()
        return found
