"""GPUs for virtual clients: a mod for those that differ, a plan for those alike.

From a shell, on the machine with the GPUs::

    python -m flower_ext.simulation.gpus --memory 3000
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import ERROR
from typing import cast

from flwr.app import Context, Message, RecordDict

from flower_ext.errors import positive
from flower_ext.simulation.clients import Call
from flower_ext.simulation.needs import (
    Machine,
    Need,
    ResourcesFunction,
    ray_machines,
    require_room,
)

#: MiB that CUDA takes in every process, beside what a model takes.
CUDA_MIB = 500.0

Mod = Callable[[Message, Context, Call], Message]

_STEPS = 10_000  # Ray counts GPUs in ten thousandths


def resources(need: Mapping[str, float] | ResourcesFunction) -> Mod:
    """Make a client mod: each client's work gets GPUs of its own, as a Ray task.

    Flower gives all its workers the same GPUs. With this mod they have none
    (``client-resources-num-gpus=0``), and the work of a client is handed to a task that
    has what the client needs. Tasks wait until that is free. Outside Ray, and for a
    client that needs no GPU, the work is done where the message arrives.

    Parameters
    ----------
    need : Mapping or callable
        ``{"num_gpus": 0.25}``, or a function ``(partition_id, run_config)`` that
        returns it. CPUs are those of Flower's worker, which waits meanwhile.

    Returns
    -------
    Mod
        Behind ``packed``, if both are used.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> def need(partition_id, run_config):
    ...     return {"num_gpus": 1 if partition_id < 10 else 0.25}
    >>> app = ClientApp(mods=[resources(need)])
    """
    if not callable(need):
        Need.of(need)

    def mod(message: Message, context: Context, call_next: Call) -> Message:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return call_next(message, context)
        client = int(context.node_config["partition-id"])
        found = Need.of(need(client, context.run_config) if callable(need) else need)
        if not found.num_gpus:
            return call_next(message, context)
        machines = [
            Machine(m.name, math.inf, m.gpus) for m in ray_machines(ray.nodes())
        ]
        require_room(machines, {found: client})
        task = ray.remote(_work).options(
            num_cpus=0, num_gpus=found.num_gpus, max_retries=0
        )
        reply, context.state = ray.get(task.remote(call_next, message, context))
        return cast(Message, reply)

    return mod


def _work(
    call_next: Call, message: Message, context: Context
) -> tuple[Message, RecordDict]:
    return call_next(message, context), context.state


@dataclass(frozen=True)
class Plan:
    """How clients that are alike share the GPUs.

    Attributes
    ----------
    num_cpus, num_gpus : float
        Of a client.
    at_once : int
        Clients that run at the same time.
    why : str
        The arithmetic, in words.
    """

    num_cpus: float
    num_gpus: float
    at_once: int
    why: str

    @property
    def options(self) -> str:
        """What to hand to ``flwr run --federation-config``."""
        return (
            f"client-resources-num-cpus={self.num_cpus:g} "
            f"client-resources-num-gpus={self.num_gpus:g}"
        )

    def __str__(self) -> str:
        return (
            f"{self.why}\nPlain Flower:  flwr run . --federation-config "
            f"'{self.options}'\nPackedGrid:    --federation-config "
            f"'client-resources-num-gpus=0' and\n               "
            f"PackedGrid(..., resources={{'num_cpus': {self.num_cpus:g}, "
            f"'num_gpus': {self.num_gpus:g}}})"
        )


def plan(
    machines: Sequence[Machine], memory: float, gpu_memory: float, num_cpus: int = 1
) -> Plan:
    """Share GPUs between clients by memory.

    Parameters
    ----------
    machines : sequence of Machine
        What Ray reports, see :func:`ray_machines`.
    memory : float
        MiB of GPU memory that a client's training takes, without CUDA's own.
    gpu_memory : float
        MiB of the smallest GPU.
    num_cpus : int (default: 1)
        CPUs of a client.

    Returns
    -------
    Plan
        A share of a GPU for each client, so that those on a GPU fit into its memory.

    Raises
    ------
    ValueError
        If nothing fits, with the reason.

    Examples
    --------
    >>> print(plan([Machine("a", 16, [1.0, 1.0])], 3000, 16000).options)
    client-resources-num-cpus=1 client-resources-num-gpus=0.25
    """
    positive("memory", memory)
    positive("gpu_memory", gpu_memory)
    gpus = sum(len(machine.gpus) for machine in machines)
    if not gpus:
        raise ValueError("Ray reports no GPU: leave client-resources-num-gpus at 0")
    each = memory + CUDA_MIB
    share = int(gpu_memory // each)
    if share < 1:
        raise ValueError(
            f"a client takes {memory:g} MiB and {CUDA_MIB:g} MiB for CUDA, a GPU has "
            f"{gpu_memory:g} MiB: nothing fits; try smaller batches or half precision"
        )
    num_gpus = math.floor(_STEPS / share) / _STEPS
    need = Need(num_gpus, float(num_cpus))
    at_once = 0
    for machine in (machine.empty() for machine in machines):
        while (place := machine.place(need)) is not None:
            machine.take(need, place)
            at_once += 1
    if not at_once:
        require_room(machines, {need: 0})
    by_cpus = " (the CPUs allow no more)" if at_once < share * gpus else ""
    return Plan(
        num_cpus,
        num_gpus,
        at_once,
        f"{share} clients of {each:g} MiB fit into a GPU of {gpu_memory:g} MiB; "
        f"{at_once} run at once on {gpus} GPUs{by_cpus}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan for the Ray of this machine, or of ``RAY_ADDRESS``."""
    parser = argparse.ArgumentParser(
        prog="python -m flower_ext.simulation.gpus",
        description="Plan how virtual clients share the GPUs.",
    )
    parser.add_argument(
        "--memory", type=float, required=True, help="MiB of GPU memory of a client"
    )
    parser.add_argument(
        "--gpu-memory", type=float, help="MiB of a GPU; by default asked of CUDA"
    )
    parser.add_argument("--num-cpus", type=int, default=1, help="CPUs of a client")
    args = parser.parse_args(argv)
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, logging_level=ERROR)
    try:
        machines = list(ray_machines(ray.nodes()))  # type: ignore[no-untyped-call]
        memory = args.gpu_memory or smallest_gpu()
        print(plan(machines, args.memory, memory, args.num_cpus))
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    finally:
        if mine:
            ray.shutdown()
    return 0


def smallest_gpu() -> float:
    """Return the MiB of this machine's smallest GPU."""
    import torch

    sizes = [
        torch.cuda.get_device_properties(i).total_memory / 2**20
        for i in range(torch.cuda.device_count())
    ]
    if not sizes:
        raise ValueError("CUDA sees no GPU here: say --gpu-memory")
    return min(sizes)


if __name__ == "__main__":
    sys.exit(main())
