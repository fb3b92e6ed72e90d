"""Workers as processes of this machine, forked with their large modules loaded.

::

    this process --+-- asks --> zygote: torch is loaded once
                   |              | forks
                   +-- packs -->  worker, worker, ...

Nothing else is started: the first round begins when one process has loaded what this
one has, and a message takes a tenth of a millisecond. That process stays for the next
grid, whose workers are there at once. See :mod:`flower_ext.simulation.zygote`.
"""

import atexit
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from signal import Signals
from typing import Any

from flower_ext.core.errors import refuse
from flower_ext.simulation.machines import Machine, Resources
from flower_ext.simulation.memory import Channel, dumps
from flower_ext.simulation.policy import HELD_SECONDS
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.worker import Broadcast, PackAnswer, Shared
from flower_ext.simulation.workplace import (
    Hired,
    WorkerDied,
    WorkerFailed,
    Workplace,
    threads_of,
)
from flower_ext.simulation.zygote import ANSWER, END, LOADED, START, Mapped

# What is loaded before workers are forked, with all of their parts that this process
# has loaded: they take seconds, and start no threads.
_LARGE = {"flower_ext", "flwr", "opacus", "peft", "sklearn", "torch", "transformers"}
# What a client needs, whether or not this process does. The first optimizer imports
# torch's compiler.
_ALWAYS = ("flower_ext.simulation.worker", "torch", "torch._dynamo")
_HERE = "this machine"
# Where NVIDIA's and AMD's drivers are.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")


def is_possible() -> bool:
    """Whether processes can be forked and share memory that has no name."""
    return hasattr(os, "memfd_create")  # not on macOS, whose libraries forbid it


class _Zygote:
    """The process that forks workers which compute with some number of threads."""

    def __init__(self, threads: int) -> None:
        ours, its = socket.socketpair()
        here = [name for name in sys.modules if name.partition(".")[0] in _LARGE]
        code = (
            f"import sys; sys.path[:] = {_paths()!r}\n"
            "from flower_ext.simulation.zygote import serve\n"
            f"serve({its.fileno()})"
        )
        # Libraries read this when they are loaded. In a session of its own it is not
        # interrupted from the keyboard: the server stops workers as it ends.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        its.close()
        self._channel = Channel(ours)
        self._channel.send(dumps([*_ALWAYS, *here]))
        self._threads = threads
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._ended = False

    @classmethod
    def of(cls, threads: int) -> "_Zygote":
        """Return the one of this process, which is started if there is none."""
        key = os.getpid(), threads  # a fork of this process has none
        found = _zygotes.get(key)
        if found is None or found._has_ended():
            found = _zygotes[key] = cls(threads)
        return found

    def _has_ended(self) -> bool:
        return self._ended or self._process.poll() is not None

    def _give_up(self) -> None:
        """Note that it does not answer, which is known before the system says so."""
        self._ended = True
        self._process.kill()
        self._process.wait()

    def start(self, gpus: str) -> tuple[int, Channel]:
        """Fork a worker that sees some GPUs; return its number and the channel to it.

        It finds the environment, folder and paths that this process has now.
        """
        ours, its = socket.socketpair()
        number, folder = next(self._numbers), str(Path.cwd())
        settings = self._threads, gpus, dict(os.environ), folder, _paths()
        with its, self._lock:
            try:
                self._channel.send(dumps((START, number, *settings)), its.fileno())
            except OSError:  # there is no such worker, which is found out later
                self._give_up()
        return number, Channel(ours)

    def end(self, number: int) -> str:
        """End a worker, or find that it has ended; say how."""
        try:
            with self._lock:
                self._channel.send(dumps((END, number)))
                status, _ = self._channel.receive()
        except (EOFError, OSError):
            self._give_up()
            return "the process that starts workers has ended"
        if status >= 0:
            return f"it ended with status {status}"
        return f"it was ended by {Signals(-status).name}"

    def close(self) -> None:
        """End it, and the workers that there are."""
        self._channel.close()
        self._process.wait()


# By process and number of threads. They stay for the grids to come, and end with this
# process, however it ends: the system closes its end of the channel.
_zygotes: dict[tuple[int, int], _Zygote] = {}


@atexit.register
def _close() -> None:
    for (pid, _), zygote in _zygotes.items():
        if pid == os.getpid():
            zygote.close()


def _paths() -> list[str]:
    return [path for path in sys.path if path]


@dataclass(eq=False)
class _Process(Hired):
    """A process."""

    zygote: _Zygote
    number: int
    channel: Channel

    def __post_init__(self) -> None:
        self._loaded: bool | None = None  # not known
        self._answer: tuple[str, Any] | None = None
        self._why = ""  # it has ended

    def has_room(self) -> bool:
        return True

    def ready(self) -> bool:
        if self._loaded is None and wait_for([self.channel.fileno()], 0):
            self.listen()
        return self._loaded is not None

    def has_worked(self) -> bool:
        return bool(self._loaded)

    def ask(self, number: int, shared: Shared, *pack: Any) -> Any:
        assert isinstance(shared, Mapped)
        self._answer = None
        with suppress(OSError):  # it will be found to be dead
            self.channel.send(dumps((number, *pack)), shared.descriptor)
        return self

    def listen(self) -> None:
        """Read what it says."""
        try:
            (what, found), _ = self.channel.receive()
        except EOFError:
            self.stop()
            return
        if what == LOADED:
            self._loaded = found
        else:
            self._answer = what, found

    def is_done(self) -> bool:
        """Whether it has answered, or never will."""
        return bool(self._answer or self._why)

    def answer(self) -> PackAnswer:
        if not self._answer:
            raise WorkerDied(self._why)
        (what, found), self._answer = self._answer, None
        if what != ANSWER:
            raise WorkerFailed(found)
        answer: PackAnswer = found
        return answer

    def stop(self) -> None:
        if not self._why:
            self._why = self.zygote.end(self.number)
            self.channel.close()


class ProcessWorkplace(Workplace):
    """Processes of this machine.

    Parameters
    ----------
    setting : Setting
        Of the clients.
    """

    def __init__(self, setting: Setting) -> None:
        if not is_possible():
            refuse("transport", "processes", "'ray' or 'messages' here", "Linux only")
        self.here = _HERE
        self.held_seconds = HELD_SECONDS
        self._setting = dumps(setting.pickled())
        self._gpus = gpus_here()

    def machines(self) -> Iterable[Machine]:
        """Return this machine."""
        return [Machine(_HERE, cpus_here(), [1.0] * len(self._gpus))]

    def start(
        self, resources: Resources, machine: Machine, gpus: dict[int, float]
    ) -> Hired:
        """Fork a process, once its modules are there."""
        zygote = _Zygote.of(threads_of(resources))
        number, channel = zygote.start(",".join(self._gpus[i] for i in gpus))
        with suppress(OSError):
            channel.send(self._setting)
        return _Process(resources, machine, gpus, zygote, number, channel)

    def share(self, broadcast: Broadcast) -> Shared:
        """Put it into memory that workers map."""
        return Mapped.of(dumps(broadcast, by_value=True))

    def wait(self, calls: Sequence[Any], seconds: float | None) -> Sequence[Any]:
        """Return the processes that have answered or ended."""
        if not any(call.is_done() for call in calls):
            asked = {call.channel.fileno(): call for call in calls}
            for descriptor in wait_for([*asked], seconds):
                asked[descriptor].listen()
        return [call for call in calls if call.is_done()]

    def answer(self, call: Any) -> PackAnswer:
        """Return what a process has answered."""
        found: PackAnswer = call.answer()
        return found

    def require_free(self, asked: Iterable[Resources]) -> None:
        """Nobody is known to hold anything."""

    def free(self) -> str:
        """Say what there is."""
        return f"{cpus_here():g} CPUs and {len(self._gpus)} GPUs are there"

    def close(self) -> None:
        """Keep the process that starts workers, for another grid."""


def cpus_here() -> float:
    """Return how many CPUs this process may use: those of its mask and its quota."""
    count = float(len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # no quota, or not this way
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1.0, float(quota) // float(period)))
    return count


def gpus_here() -> list[str]:
    """Return the names of the GPUs that this process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        return [name.strip() for name in seen.split(",") if name.strip()]
    if not any(map(os.path.exists, _DRIVERS)):  # torch would take seconds to say so
        return []
    from torch import cuda

    return [str(i) for i in range(cuda.device_count())]
