"""A plan for virtual clients that share GPUs.

From a shell, on the machine with the GPUs, and for machines elsewhere::

    GPUS="python -m flower_ext.simulation.gpus"
    $GPUS --memory 3000
    $GPUS --memory 3000 --gpu-memory 80000 --gpus 8 --cpus 64
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from logging import ERROR

from flower_ext.core.errors import positive, refuse, whole
from flower_ext.simulation.machines import (
    Machine,
    Resources,
    ray_machines,
    require_room,
)

#: MiB that CUDA takes in every process, beside what a model takes: its context and the
#: workspaces of cuBLAS and cuDNN. On an H100 (torch 2.11, CUDA 13.0) it was 750 to 765.
CUDA_MIB = 800.0

_STEPS = 10_000  # Ray counts GPUs in ten thousandths


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
    machines: Sequence[Machine],
    memory: float | None,
    gpu_memory: float | None,
    num_cpus: int = 1,
) -> Plan:
    """Share GPUs between clients by memory and CPUs.

    Parameters
    ----------
    machines : sequence of Machine
        What Ray reports, see :func:`ray_machines`.
    memory : float or None
        MiB of GPU memory that a client's training takes, without CUDA's own. None
        shares by CPUs alone.
    gpu_memory : float or None
        MiB of the smallest GPU; None only if ``memory`` is.
    num_cpus : int (default: 1)
        CPUs of a client.

    Returns
    -------
    Plan
        The share of a GPU that each client gets. Those on one GPU fit into its memory,
        no GPU of a machine gets two clients more than another, and of such shares it
        is the one that lets most clients run at once. All machines get the same share,
        so one with few CPUs for its GPUs holds the others back: plan without it, too,
        and leave it out if that is better.

    Raises
    ------
    ValueError
        If nothing fits, with the reason.

    Notes
    -----
    Ray fills one GPU after the other. With a small share and few CPUs, all clients
    would be on the first GPUs, and the last ones would idle.

    Examples
    --------
    >>> print(plan([Machine("a", 16, [1.0, 1.0])], 3000, 16000).options)
    client-resources-num-cpus=1 client-resources-num-gpus=0.25
    >>> print(plan([Machine("a", 4, [1.0, 1.0])], 3000, 16000).options)
    client-resources-num-cpus=1 client-resources-num-gpus=0.5
    """
    whole("num_cpus", num_cpus, 1)
    gpus = sum(len(machine.gpus) for machine in machines)
    if not gpus:
        raise ValueError("Ray reports no GPU: leave client-resources-num-gpus at 0")
    # How many clients fit into a GPU, by its memory; each has a CUDA of its own.
    most, fit = _STEPS, "memory was not asked about"
    if memory is not None:
        each = positive("memory", memory) + CUDA_MIB
        gpu_memory = positive("gpu_memory", gpu_memory)
        most = int(gpu_memory // each)
        fit = f"{most} clients of {each:g} MiB fit into a GPU of {gpu_memory:g} MiB"
    if most < 1:
        raise ValueError(
            f"a client takes {memory:g} MiB and {CUDA_MIB:g} MiB for CUDA, a GPU has "
            f"{gpu_memory:g} MiB: nothing fits; try smaller batches or half precision"
        )
    # Of each machine with GPUs: the clients that its CPUs allow, and its GPUs.
    room = [
        (int(machine.cpus // num_cpus), len(machine.gpus))
        for machine in machines
        if machine.gpus
    ]
    if not any(clients for clients, _ in room):
        # Raises, and says what there is.
        require_room(machines, {Resources(1.0, float(num_cpus)): 0})
    most = min(most, _STEPS)
    # One client a GPU is always even. Of equal numbers at once, the larger share.
    at_once, share = max(
        (sum(min(clients, share * count) for clients, count in room), -share)
        for share in range(1, min(most, max(clients for clients, _ in room)) + 1)
        if all(_is_even(clients, count, share) for clients, count in room)
    )
    share = -share
    by_cpus = " (the CPUs allow no more)" if share < most else ""
    return Plan(
        num_cpus,
        _STEPS // share / _STEPS,
        at_once,
        f"{fit}; {at_once} run at once on {gpus} GPUs, {share} on each{by_cpus}",
    )


def _is_even(clients: int, gpus: int, share: int) -> bool:
    """Whether Ray puts clients evenly on a machine's GPUs, ``share`` on each at most.

    It fills one after the other. A share that it, or Flower, cannot count is not even:
    in ten thousandths, more than ``share`` of them might fit.
    """
    # For example 1/150 is 0.0066, of which 151 fit.
    step = _STEPS // share
    if _STEPS // step != share or gpus * _STEPS // step != gpus * share:
        return False
    full, rest = divmod(min(clients, gpus * share), share)
    on_each = ([share] * full + [rest] + [0] * gpus)[:gpus]
    return max(on_each) - min(on_each) <= 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan for the Ray of this machine, of ``RAY_ADDRESS``, or elsewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m flower_ext.simulation.gpus",
        description="Plan how virtual clients share the GPUs.",
    )
    parser.add_argument(
        "--memory",
        type=float,
        help="MiB of GPU memory of a client; without it, CPUs alone decide",
    )
    parser.add_argument(
        "--gpu-memory", type=float, help="MiB of a GPU; by default asked of CUDA"
    )
    parser.add_argument("--num-cpus", type=int, default=1, help="CPUs of a client")
    elsewhere = parser.add_argument_group("machines that are not at hand")
    elsewhere.add_argument("--gpus", type=int, help="GPUs of a machine")
    elsewhere.add_argument("--cpus", type=int, help="CPUs of a machine")
    elsewhere.add_argument("--machines", type=int, default=1, help="how many (1)")
    args = parser.parse_args(argv)
    try:
        if args.gpus is None and args.cpus is None:
            machines = _machines_of_ray()
        else:
            machines = _machines_elsewhere(args)
        gpu_memory = args.gpu_memory
        if args.memory is not None and gpu_memory is None:
            gpu_memory = smallest_gpu()
        print(plan(machines, args.memory, gpu_memory, args.num_cpus))
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def _machines_of_ray() -> list[Machine]:
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, logging_level=ERROR)
    try:
        return list(ray_machines(ray.nodes()))  # type: ignore[no-untyped-call]
    finally:
        if mine:
            ray.shutdown()


def _machines_elsewhere(args: argparse.Namespace) -> list[Machine]:
    for name in ("gpus", "cpus", "machines"):
        whole(f"--{name}", getattr(args, name), 1, "--gpus and --cpus go together")
    if args.memory is not None and args.gpu_memory is None:
        refuse("--gpu-memory", None, "given", "the machines are not at hand")
    machine = Machine("elsewhere", float(args.cpus), [1.0] * args.gpus)
    return [machine.empty() for _ in range(args.machines)]


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
