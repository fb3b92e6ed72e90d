"""Server pruning: degenerate limits, closed forms, torch's pruning, and whole runs."""

import functools
import pickle
from math import nan, prod

import numpy as np
import pytest
import torch
from adding_grid import AddingGrid
from torch.nn.utils import prune

from flower_ext import Stacked, client_app
from flower_ext.core.arrays import from_record
from flower_ext.core.schedules import Cosine
from flower_ext.privacy import Mechanism
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import (
    LAMB,
    SGD,
    Adam,
    Muon,
    OneShotSparsity,
    PeriodicSparsity,
    PolynomialSparsity,
    PruneAfter,
    RefactoredSGD,
    TorchOptimizer,
    Yogi,
)
from flower_ext.server.optimizers.pruning import n_of_m_mask
from flower_ext.server.optimizers.sparsity import erk, uniform
from flower_ext.server.tracking import Tracker, read_metrics
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import (
    FedPer,
    FedPerClient,
    FedProx,
    FedProxClient,
    Scaffold,
    ScaffoldClient,
)
from flower_ext.wire import NF4, Exact, Kept, Nonzero
from flower_ext.wire.codec import num_values
from flower_ext.wire.pruned import nonzero

SHAPES = {
    "conv": (6, 3, 2, 2),
    "w": (20, 30),
    "head": (4, 20),
    "bias": (20,),
    "scale": (),
}
PRUNABLE = ("conv", "w", "head")
INNER = {
    "sgd": SGD,
    "momentum": lambda: SGD(0.5, 0.9),
    "adam": Adam,
    "yogi": Yogi,
    "lamb": lambda: LAMB(0.1),
    "muon": lambda: Muon(otherwise=Adam()),
    "torch": lambda: TorchOptimizer(functools.partial(torch.optim.AdamW, lr=0.1)),
}
CRITERIA = ("magnitude", "saliency", "random", "set", "rigl")


def model(seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return {n: np.asarray(random.normal(size=s), dtype) for n, s in SHAPES.items()}


def moves(count, seed=1):
    random = np.random.default_rng(seed)
    return [
        {n: 0.3 * np.asarray(random.normal(size=s)) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


def run(optimizer, directions, sent=None):
    """Return the models after every step."""
    found, sent = [], sent or model()
    for move in directions:
        sent = optimizer.step(sent, dict(move))
        found.append(sent)
    return found


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.tobytes() == right[name].tobytes(), name


def zeros(model):
    return {name: int(np.count_nonzero(model[name] == 0)) for name in PRUNABLE}


# Degenerate limits ----------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_sparsity_zero_is_the_inner_optimizer(inner, criterion):
    plain, ours = INNER[inner](), INNER[inner]()
    wrapped = PruneAfter(ours, PeriodicSparsity(0.0, every=2), criterion)
    directions = moves(4)
    pairs = zip(run(plain, directions), run(wrapped, directions), strict=True)
    for left, right in pairs:
        assert_same(left, right)
    expected = plain.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for slot, arrays in expected.items():
        assert_same(arrays, ours.state_dict()[slot])


@pytest.mark.parametrize("inner", INNER)
def test_one_shot_is_the_inner_optimizer_until_then(inner):
    directions = moves(4)
    wrapped = PruneAfter(INNER[inner](), OneShotSparsity(0.5, at=3))
    expected, found = run(INNER[inner](), directions), run(wrapped, directions)
    for i in (0, 1):
        assert_same(found[i], expected[i])
    for name in PRUNABLE:  # the same step, and then half of it 0
        kept = found[2][name] != 0
        assert kept.sum() == kept.size - kept.size // 2
        assert np.array_equal(found[2][name][kept], expected[2][name][kept])
        assert np.array_equal(found[3][name] != 0, kept)
    for name in ("bias", "scale"):
        assert found[2][name].tobytes() == expected[2][name].tobytes()


def test_a_drop_fraction_of_zero_keeps_the_first_mask():
    for criterion in ("set", "rigl"):
        schedule = PeriodicSparsity(0.6, every=1)
        optimizer = PruneAfter(SGD(), schedule, criterion, drop_fraction=0)
        first, *others = run(optimizer, moves(5))
        for other in others:
            for name in PRUNABLE:
                assert np.array_equal(nonzero(other[name]), nonzero(first[name]))


# How sparse -----------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.95, 0.999])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_floor_of_the_share_is_pruned(sparsity, criterion):
    schedule = PeriodicSparsity(sparsity, every=1)
    optimizer = PruneAfter(SGD(), schedule, criterion)
    for found in run(optimizer, moves(3)):
        for name in PRUNABLE:
            size = prod(SHAPES[name])
            gone = size - np.count_nonzero(nonzero(found[name]))
            assert gone == int(sparsity * size)
        assert all(np.all(found[name] != 0) for name in ("bias", "scale"))
    sizes = [prod(SHAPES[name]) for name in PRUNABLE]
    share = sum(int(sparsity * n) for n in sizes) / sum(sizes)
    assert optimizer.sparsity == pytest.approx(share)


def erk_by_bisection(shapes, sparsity):
    """Find the factor with which min(1, factor * sum / prod) keeps as much."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    goal = (1 - sparsity) * sum(sizes.values())

    def densities(factor):
        return {n: min(1.0, factor * sum(s) / sizes[n]) for n, s in shapes.items()}

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(d * sizes[n] for n, d in densities(middle).items())
        low, high = (middle, high) if kept < goal else (low, middle)
    return {name: 1 - d for name, d in densities(low).items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.95, 0.999])
def test_erk_is_as_sparse_in_total_and_no_array_denser_than_one(sparsity):
    shapes = {
        "first": (32, 1, 5, 5),
        "second": (64, 32, 5, 5),
        "wide": (512, 1600),
        "head": (10, 512),
        "tiny": (2, 3),
    }
    found = erk(shapes, sparsity)
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(found[n] * sizes[n] for n in shapes)
    assert total == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)
    assert all(0 <= x <= 1 for x in found.values())
    assert found == pytest.approx(erk_by_bisection(shapes, sparsity), abs=1e-9)
    assert uniform(shapes, sparsity) == dict.fromkeys(shapes, sparsity)
    if 0.1 < sparsity < 0.99:  # quotients 5/6, 0.1, 0.0026 and 0.0021
        assert found["tiny"] == 0.0 <= found["head"] < found["wide"] < found["second"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_erk_prunes_as_much_as_uniform_but_elsewhere(criterion):
    total = {}
    for distribution in ("uniform", "erk"):
        optimizer = PruneAfter(
            SGD(), OneShotSparsity(0.8), criterion, distribution=distribution
        )
        [found] = run(optimizer, moves(1))
        total[distribution] = zeros(found)
    assert total["erk"]["head"] < total["uniform"]["head"]
    assert total["erk"]["w"] > total["uniform"]["w"]
    sums = [sum(found.values()) for found in total.values()]
    assert abs(sums[0] - sums[1]) <= len(PRUNABLE)


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (3, 5)])
@pytest.mark.parametrize("criterion", ["magnitude", "saliency", "random"])
def test_exactly_n_of_m_are_kept_in_every_row(pattern, criterion):
    n, m = pattern
    schedule = OneShotSparsity(1 - n / m)
    optimizer = PruneAfter(SGD(), schedule, criterion, n_of_m=pattern)
    for found in run(optimizer, moves(2)):
        for name in PRUNABLE:
            rows = nonzero(found[name]).reshape(SHAPES[name][0], -1)
            whole = rows.shape[1] // m * m
            groups = rows[:, :whole].reshape(len(rows), -1, m).sum(axis=-1)
            assert np.all(groups == n)
            assert np.all(rows[:, whole:])


def test_n_of_m_keeps_the_largest_of_each_group():
    worth = np.random.default_rng(0).random((7, 12))
    found = n_of_m_mask(worth, 2, 4, np.ones((7, 12), bool))
    for row, mask in zip(worth, found, strict=True):
        for start in range(0, 12, 4):
            group, kept = row[start : start + 4], mask[start : start + 4]
            assert set(np.flatnonzero(kept)) == set(np.argsort(group)[-2:])


def test_polynomial_steps_by_hand():
    schedule = PolynomialSparsity(0.8, start=3, end=6)
    expected = [None, None, *(0.8 * (1 - (1 - k / 4) ** 3) for k in (1, 2, 3)), 0.8]
    found = [schedule(step) for step in range(1, 7)]
    assert found[:2] == [None, None]
    assert found[2:] == pytest.approx(expected[2:])
    straight = PolynomialSparsity(0.8, 1, 4, power=1)
    assert [straight(t) for t in range(1, 5)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_polynomial_reaches_its_sparsity_whatever_the_interval(every):
    schedule = PolynomialSparsity(0.9, start=2, end=9, every=every)
    optimizer = PruneAfter(SGD(), schedule)
    sparsities = [zeros(found)["w"] / 600 for found in run(optimizer, moves(11))]
    assert sparsities == sorted(sparsities)
    assert sparsities[0] == 0 and sparsities[-1] == sparsities[8] == 0.9
    assert sparsities[1] > 0


# Which weights --------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_magnitude_prunes_what_torch_prunes(sparsity):
    directions = moves(1)
    [dense] = run(SGD(), directions)
    optimizer = PruneAfter(SGD(), OneShotSparsity(sparsity))
    [found] = run(optimizer, directions)
    for name in PRUNABLE:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.tensor(dense[name]))
        amount = int(sparsity * dense[name].size)
        prune.l1_unstructured(module, "weight", amount=amount)
        assert np.array_equal(found[name], module.weight.detach().numpy())
        assert np.array_equal(optimizer.masks[name], module.weight_mask.numpy() == 1)


def test_saliency_is_the_weight_times_the_direction():
    [move] = moves(1)
    [dense] = run(SGD(0.1), [move])
    [found] = run(PruneAfter(SGD(0.1), OneShotSparsity(0.7), "saliency"), [move])
    for name in PRUNABLE:
        worth = np.abs(dense[name].astype(np.float64) * move[name])
        kept = found[name] != 0
        assert worth[kept].min() > worth[~kept].max()


@pytest.mark.parametrize("criterion", ["magnitude", "saliency", "random"])
def test_what_is_pruned_stays_pruned(criterion):
    schedule = PolynomialSparsity(0.9, 1, 6)
    before = None
    for found in run(PruneAfter(SGD(), schedule, criterion), moves(7)):
        kept = nonzero(found["w"])
        assert before is None or not np.any(kept & ~before)
        before = kept


def test_random_masks_are_of_the_seed():
    def masks(seed, criterion="random"):
        optimizer = PruneAfter(SGD(), OneShotSparsity(0.5), criterion, seed=seed)
        run(optimizer, moves(1))
        return optimizer.masks

    for criterion in ("random", "set", "rigl"):
        assert np.array_equal(masks(1, criterion)["w"], masks(1, criterion)["w"])
        assert not np.array_equal(masks(1, criterion)["w"], masks(2, criterion)["w"])
    # Two arrays of one shape have masks of their own.
    optimizer = PruneAfter(SGD(), OneShotSparsity(0.5), "random")
    twins = {"a": np.ones((9, 9)), "b": np.ones((9, 9))}
    optimizer.step(twins, {n: np.zeros((9, 9)) for n in twins})
    assert not np.array_equal(optimizer.masks["a"], optimizer.masks["b"])


def regrowth(criterion, inner, drop=0.3):
    """Return masks before and after an update, the weights, and the direction."""
    schedule = PeriodicSparsity(0.6, every=3)
    optimizer = PruneAfter(inner, schedule, criterion, drop_fraction=drop)
    directions = moves(4)
    third = run(optimizer, directions[:3])[-1]
    old = optimizer.masks
    masked = {n: np.where(old.get(n, True), x, 0.0) for n, x in directions[3].items()}
    stepped = pickle.loads(pickle.dumps(optimizer)).inner.step(third, dict(masked))
    new = optimizer.step(third, dict(directions[3]))
    return optimizer, old, stepped, new, directions[3]


@pytest.mark.parametrize("criterion", ["set", "rigl"])
@pytest.mark.parametrize("drop", [0.3, 0.5, Cosine(0.3, 10)])
def test_the_smallest_are_dropped_and_as_many_grow_from_zero(criterion, drop):
    optimizer, old, stepped, new, move = regrowth(criterion, SGD(0.1), drop)
    for name in PRUNABLE:
        before, after = old[name], optimizer.masks[name]
        count = int(before.sum())
        assert after.sum() == count
        share = drop if isinstance(drop, float) else drop(4)
        leaves = int(share * count)
        size = np.abs(stepped[name])
        order = np.argsort(np.where(before, size, np.inf).reshape(-1))
        smallest = order[:leaves]
        stays = before.copy()
        stays.reshape(-1)[smallest] = False
        assert np.all(after[stays])
        grown = after & ~before
        assert grown.any()
        assert not new[name][grown].any()
        assert np.all(np.signbit(new[name][grown]))
        assert np.array_equal(new[name][stays], stepped[name][stays])
        if criterion == "rigl":
            worth = np.abs(move[name])
            assert worth[after & ~stays].min() > worth[~after].max()


@pytest.mark.parametrize("criterion", ["set", "rigl"])
@pytest.mark.parametrize("inner", ["momentum", "adam", "lamb", "muon", "torch"])
def test_what_has_grown_starts_with_moments_of_zero(criterion, inner):
    optimizer, old, _, _, _ = regrowth(criterion, INNER[inner]())
    looked = 0
    for arrays in optimizer.inner.state_dict().values():
        for name in PRUNABLE:
            if name in arrays and arrays[name].shape == SHAPES[name]:
                mask = optimizer.masks[name]
                assert not arrays[name][~mask | ~old[name]].any()
                assert np.count_nonzero(arrays[name][mask & old[name]])
                looked += 1
    assert looked >= 3


def test_dense_words_and_what_is_not_finite_are_left_whole():
    sent = {**model(), "attention.mask": np.full((3, 3), -np.inf, np.float32)}
    [move] = moves(1)
    optimizer = PruneAfter(SGD(), OneShotSparsity(0.5), dense=("head", "conv"))
    new = optimizer.step(sent, {**move, "attention.mask": np.zeros((3, 3))})
    assert optimizer.masks.keys() == {"w"}
    assert np.all(np.isinf(new["attention.mask"]))
    assert np.all(new["head"] != 0)


def test_arrays_that_rest_keep_their_masks():
    optimizer = PruneAfter(SGD(), PeriodicSparsity(0.5, every=1), "set")
    [sent] = run(optimizer, moves(1))
    before = optimizer.masks
    [move] = moves(1)
    optimizer.step({"w": sent["w"]}, {"w": move["w"]})
    assert np.array_equal(optimizer.masks["head"], before["head"])
    assert not np.array_equal(optimizer.masks["w"], before["w"])


# State ----------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("inner", ["momentum", "adam", "muon", "torch"])
def test_a_saved_state_continues_bit_for_bit(criterion, inner):
    def make():
        schedule = PolynomialSparsity(0.8, 2, 7, every=2)
        return PruneAfter(INNER[inner](), schedule, criterion)

    directions = moves(8)
    whole = run(make(), directions)
    first, second = make(), make()
    half = run(first, directions[:4])[-1]
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    rest = run(second, directions[4:], half)
    for left, right in zip(rest, whole[4:], strict=True):
        assert_same(left, right)
    assert second.kind == first.kind != make().inner.kind


# Runs -----------------------------------------------------------------------------

CONFIG = {"batch-size": 4, "lr": 0.1}
HALVES = (FedProxClient, ScaffoldClient, FedPerClient)
STRATEGIES = {
    "FedAvg": AdditiveStrategy,
    "FedProx": FedProx,
    "Scaffold": Scaffold,
    "FedPer": lambda **options: FedPer(personal="out.*", **options),
}


@pytest.fixture(scope="module")
def app(task):
    return client_app(task, *HALVES)


def train(app, initial, criterion, name="FedAvg", inner="momentum", **options):
    """Run a strategy, whose uploads and downloads are sparse if that is asked for."""
    kind = options.pop("kind", LocalGrid)
    start = options.pop("start", {})
    schedule = PeriodicSparsity(0.5, every=3, start=2)
    optimizer = PruneAfter(INNER[inner](), schedule, criterion)
    if options.pop("sparse", False):
        options |= {"download": Nonzero(), "upload": optimizer.upload}
    strategy = STRATEGIES[name](
        server_optimizer=optimizer, fraction_evaluate=0.0, **options
    )
    grid = kind(app, 4, CONFIG)
    rounds = start.pop("num_rounds", 6)
    result = strategy.start(grid, initial, num_rounds=rounds, **start)
    metrics = result.train_metrics_clientapp[rounds]
    assert metrics["num-errors"] == metrics["num-dropped"] == 0
    return from_record(result.arrays), optimizer


@pytest.mark.parametrize(
    ("criterion", "inner"),
    [
        ("magnitude", "momentum"),
        ("saliency", "sgd"),
        ("random", "adam"),
        ("set", "muon"),
        ("rigl", "lamb"),
    ],
)
def test_sparse_messages_lose_nothing(app, initial, criterion, inner):
    dense, _ = train(app, initial, criterion, inner=inner)
    found, optimizer = train(app, initial, criterion, inner=inner, sparse=True)
    assert_same(found, dense)
    for name, mask in optimizer.masks.items():
        assert mask.sum() == mask.size - mask.size // 2
        assert np.array_equal(nonzero(found[name]), mask)


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_composes_with_strategies_and_partial_sums(app, initial, name):
    kind = AddingGrid
    dense, _ = train(app, initial, "rigl", name, kind=kind, upload=Exact())
    found, optimizer = train(app, initial, "rigl", name, kind=kind, sparse=True)
    assert_same(found, dense)
    assert optimizer.sparsity == 0.5
    assert np.count_nonzero(found["hidden.weight"] == 0) >= 6


def test_stacked_clients_know_the_mask_as_others_do(task, initial):
    stacked = client_app(task, trainer=Stacked(at_once=2))
    dense, _ = train(stacked, initial, "rigl", upload=Exact())
    found, _ = train(stacked, initial, "rigl", sparse=True)
    assert_same(found, dense)


@pytest.mark.parametrize("criterion", ["magnitude", "rigl"])
def test_what_travels_is_what_is_kept(app, initial, criterion, tmp_path):
    """Of 20 prunable and 19 other trained numbers, statistics and a counter."""
    tracker = Tracker(tmp_path, tensorboard=False)
    train(app, initial, criterion, sparse=True, start={"tracker": tracker})
    rows = read_metrics(tmp_path)
    size = sum(x.size for x in from_record(initial).values())
    sent = [size, size, *[size - 6] * 4]  # a mask of 8 does not pay
    assert [row["parameters/down"] for row in rows] == [4 * n for n in sent]
    # The masks are made in the second step, and again in the fifth.
    looks = [1, 2, 5] if criterion == "rigl" else [1, 2]
    up = [size if i in looks else size - 10 for i in range(1, 7)]
    assert [row["parameters/up"] for row in rows] == [4 * n for n in up]


@pytest.mark.parametrize("criterion", ["magnitude", "rigl"])
def test_a_resumed_run_is_the_same(app, initial, criterion, tmp_path):
    expected, _ = train(app, initial, criterion, sparse=True)
    start = {"num_rounds": 4, "checkpoint": tmp_path}
    train(app, initial, criterion, sparse=True, start=start)
    start = {"num_rounds": 6, "checkpoint": tmp_path}
    found, _ = train(app, initial, criterion, sparse=True, start=start)
    assert_same(found, expected)


def test_a_round_that_is_no_step_does_not_count(aggregate, reply):
    """RigL's dense round is the one in which it grows, whatever rounds have failed."""
    optimizer = PruneAfter(SGD(), PeriodicSparsity(0.5, every=2), "rigl")
    strategy = AdditiveStrategy(
        server_optimizer=optimizer, upload=optimizer.upload, min_replies=1
    )
    assert strategy.upload_codec(None, _Number(1)) == Kept(everything=True)
    sent = {"w": np.ones((4, 4), np.float32)}
    change = {"w": np.float32(np.random.default_rng(0).random((4, 4)))}
    answer = reply(None)
    answer["arrays"] = Kept(everything=True).encode(change)
    sent, _ = aggregate(strategy, sent, [answer, answer], server_round=1)
    assert strategy.upload_codec(None, _Number(2)) == Kept(everything=False)
    none, _ = aggregate(strategy, sent, [RuntimeError()] * 2, server_round=2)
    assert none is None
    assert strategy.upload_codec(None, _Number(3)) == Kept(everything=False)
    assert optimizer.step(sent, {"w": np.zeros((4, 4))})
    assert strategy.upload_codec(None, _Number(4)) == Kept(everything=True)


class _Number:
    """As much of a round as a codec asks for."""

    def __init__(self, number):
        self.number = number


def test_a_download_that_loses_something_is_refused_with_such_an_upload(app, initial):
    optimizer = PruneAfter(SGD(), OneShotSparsity(0.5))
    strategy = AdditiveStrategy(
        server_optimizer=optimizer, download=NF4(), upload=optimizer.upload
    )
    with pytest.raises(ValueError, match=r"^download=NF4\(\) must be lossless, such"):
        strategy.start(LocalGrid(app, 4, CONFIG), initial, num_rounds=1)


def test_a_payload_is_as_small_as_its_values(app):
    optimizer = PruneAfter(SGD(), OneShotSparsity(0.9))
    [found] = run(optimizer, moves(1))
    kept = sum(int(mask.sum()) for mask in optimizer.masks.values())
    assert num_values(Nonzero().encode(found)) == kept + 21


def test_under_a_mechanism_masks_are_made_of_what_is_noised(app, initial):
    seen = []

    class Spy(SGD):
        def step(self, sent, direction):
            before = {n: x.copy() for n, x in direction.items()}
            seen.append((before, super().step(sent, direction)))
            return dict(seen[-1][1])

    plan = Mechanism(
        num_rounds=2,
        num_sampled_clients=4,
        population_size=4,
        noise_multiplier=1.0,
        clipping=0.1,
    )
    optimizer = PruneAfter(Spy(), OneShotSparsity(0.5, at=1))
    strategy = AdditiveStrategy(
        server_optimizer=optimizer,
        mechanism=plan,
        download=Nonzero(),
        upload=optimizer.upload,
    )
    result = strategy.start(LocalGrid(app, 4, CONFIG), initial, num_rounds=2)
    (direction, stepped), _ = seen
    noise = np.linalg.norm(direction["hidden.weight"])
    assert noise > 0.05  # a mean of four changes of at most 0.1 is no larger than 0.1
    for name, mask in optimizer.masks.items():
        size = np.abs(stepped[name])
        assert size[mask].min() >= size[~mask].max()
        assert np.array_equal(nonzero(result.arrays[name].numpy()), mask)


# Bad input ------------------------------------------------------------------------

ONE = OneShotSparsity(0.5)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((SGD, ONE), {}, r"^optimizer=.* must be a ServerOptimizer: an instance"),
        ((RefactoredSGD(), ONE), {}, r"^optimizer=.* must be one whose coordinates"),
        ((SGD(), 0.5), {}, r"^schedule=0.5 must be a function of the step: OneShot"),
        ((SGD(), ONE, "largest"), {}, r"^criterion='largest' must be one of"),
        ((SGD(), ONE), {"distribution": "er"}, r"^distribution='er' must be one of"),
        ((SGD(), ONE), {"drop_fraction": 1.5}, r"^drop_fraction=1.5 must be between"),
        ((SGD(), ONE), {"dense": "head"}, r"^dense='head' must be a sequence of words"),
        ((SGD(), ONE), {"seed": -1}, r"^seed=-1 must be an integer >= 0"),
        ((SGD(), ONE), {"n_of_m": 2}, r"^n_of_m=2 must be two integers"),
        ((SGD(), ONE), {"n_of_m": (0, 4)}, r"^n_of_m\[0\]=0 must be an integer >= 1"),
        ((SGD(), ONE), {"n_of_m": (4, 4)}, r"^n_of_m=\(4, 4\) must be fewer of more"),
        ((SGD(), ONE), {"n_of_m": (1, 4)}, r"^schedule=.* must be at once 0.75"),
        ((SGD(), ONE, "set"), {"n_of_m": (2, 4)}, r"^criterion='set' must be none tha"),
        (
            (SGD(), ONE),
            {"n_of_m": (2, 4), "distribution": "erk"},
            r"^distribution='erk' must be 'uniform' with n_of_m",
        ),
        (
            (SGD(), PolynomialSparsity(0.5, 1, 9)),
            {"n_of_m": (2, 4)},
            r"^schedule=.* must be at once 0.5, which is n_of_m=\(2, 4\)",
        ),
    ],
)
def test_bad_arguments(arguments, options, error):
    with pytest.raises(ValueError, match=error):
        PruneAfter(*arguments, **options)


@pytest.mark.parametrize("bad", [1, 1.0, -0.1, nan, "0.5", True])
def test_a_bad_sparsity_is_refused(bad):
    for make in (
        OneShotSparsity,
        lambda sparsity: PeriodicSparsity(sparsity, 1),
        lambda sparsity: PolynomialSparsity(sparsity, 1, 2),
    ):
        with pytest.raises(ValueError, match=r"^sparsity=.* must be in the open inter"):
            make(bad)
    with pytest.raises(ValueError, match=r"^schedule\(1\)=.* must be"):
        run(PruneAfter(SGD(), lambda step: bad), moves(1))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: OneShotSparsity(0.5, at=0), "^at=0 must be an integer >= 1"),
        (lambda: PeriodicSparsity(0.5, 0), "^every=0 must be an integer >= 1"),
        (lambda: PeriodicSparsity(0.5, 1, 0), "^start=0 must be an integer >= 1"),
        (lambda: PeriodicSparsity(0.5, 1, 5, 4), "^end=4 must be an integer >= 5: it"),
        (lambda: PolynomialSparsity(0.5, 5, 4), "^end=4 must be an integer >= 5: it"),
        (lambda: PolynomialSparsity(0.5, 1, 4, 0), "^every=0 must be an integer >= 1"),
        (lambda: PolynomialSparsity(0.5, 1, 4, power=0), "^power=0 must be a finite"),
    ],
)
def test_a_bad_schedule_is_refused(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_repr_names_everything():
    optimizer = PruneAfter(Adam(), ONE, "random", dense=("head",))
    assert repr(optimizer) == (
        f"PruneAfter({Adam()!r}, OneShotSparsity(sparsity=0.5, at=1), 'random', "
        "distribution='uniform', n_of_m=None, drop_fraction=0.3, dense=('head',), "
        "seed=0)"
    )
