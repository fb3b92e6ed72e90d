"""What clients ask for, and what machines have."""

import re

import pytest

from flower_ext.simulation.machines import (
    Machine,
    Resources,
    ray_machines,
    require_room,
)


def test_a_missing_key_is_one_cpu_and_no_gpu():
    assert Resources.of({}) == Resources(0.0, 1.0)
    assert Resources.of({"num_gpus": 0.5, "num_cpus": 2}) == Resources(0.5, 2.0)


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"num_gpu": 1}, "resources=['num_gpu'] must be of 'num_cpus' and 'num_gpus'"),
        ({"num_gpus": -1}, "num_gpus=-1 must be a finite number >= 0"),
        ({"num_gpus": 1.5}, "num_gpus=1.5 must be a fraction of one GPU or a whole"),
        ({"num_cpus": 0}, "num_cpus=0 must be a finite number > 0"),
        ({"num_cpus": "2"}, "num_cpus='2' must be a finite number > 0"),
    ],
)
def test_bad_resources_are_refused(resources, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Resources.of(resources)


def fill(machine, *needs):
    """Place and take needs one after the other; return the GPUs of each."""
    taken = []
    for resources in needs:
        gpus = machine.place(resources)
        if gpus is not None:
            machine.take(resources, gpus)
        taken.append(gpus)
    return taken


def test_cpus_limit():
    machine = Machine("m", 3.0)
    assert fill(machine, *[Resources(0, 2)] * 2) == [{}, None]


def test_thirds_of_a_gpu_are_three():
    machine = Machine("m", 8.0, [1.0])
    assert fill(machine, *[Resources(1 / 3)] * 4)[2:] == [{0: 1 / 3}, None]


def test_a_fraction_is_never_spread_over_gpus():
    machine = Machine("m", 8.0, [1.0, 1.0])
    assert fill(machine, *[Resources(0.6)] * 3) == [{0: 0.6}, {1: 0.6}, None]


def test_fractions_share_a_gpu_so_that_whole_ones_stay_free():
    machine = Machine("m", 8.0, [1.0, 1.0])
    assert fill(machine, Resources(0.5), Resources(0.5), Resources(1)) == [
        {0: 0.5},
        {0: 0.5},
        {1: 1},
    ]


def test_whole_gpus_are_whole():
    machine = Machine("m", 8.0, [1.0, 1.0, 1.0])
    assert fill(machine, Resources(0.1), Resources(2), Resources(1)) == [
        {0: 0.1},
        {1: 1.0, 2: 1.0},
        None,
    ]


def test_what_is_given_back_can_be_taken_again():
    machine = Machine("m", 2.0, [1.0])
    for _ in range(100):
        resources = Resources(0.1, 0.7)
        gpus = machine.place(resources)
        machine.take(resources, gpus)
        machine.give_back(resources, gpus)
    assert fill(machine, Resources(1, 2)) == [{0: 1.0}]


def test_an_empty_machine_has_everything():
    machine = Machine("m", 2.0, [1.0])
    fill(machine, Resources(1, 2))
    assert machine.empty() == Machine("m", 2.0, [1.0])


def test_dead_nodes_are_no_machines():
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
        {"NodeID": "b", "Alive": False, "Resources": {"CPU": 2.0}},
        {"NodeID": "c", "Alive": True, "Resources": {}},
    ]
    assert list(ray_machines(nodes)) == [Machine("a", 2.0, [1.0]), Machine("c", 0.0)]


def test_what_no_machine_has_is_refused_with_what_there_is():
    machines = [Machine("a", 4.0, [1.0]), Machine("b", 8.0)]
    require_room(machines, {Resources(1, 4): 0, Resources(0, 8): 1})
    with pytest.raises(
        ValueError,
        match=re.escape(
            "client 7 needs 1 CPUs and 2 GPUs, more than any machine has: "
            "4 CPUs and 1 GPUs; 8 CPUs and 0 GPUs"
        ),
    ):
        require_room(machines, {Resources(2, 1): 7})


def test_what_others_use_is_room_all_the_same():
    machine = Machine("a", 1.0)
    fill(machine, Resources())
    require_room([machine], {Resources(): 0})
