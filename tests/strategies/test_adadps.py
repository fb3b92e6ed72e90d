"""AdaDPS: what is divided, what is not, and of what the divisors are made."""

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from private_runs import CLIENTS, KINDS, private, run
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.core.arrays import from_record
from flower_ext.privacy import Mechanism
from flower_ext.strategies import AdaDPS
from flower_ext.strategies.adadps import PublicGradients, PublicMoments
from flower_ext.wire import NF4, Chain, TopK

ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def known(tau=0.0, **moments):
    """Return what makes the strategy with these moments."""
    fixed = {"public_statistics": PublicMoments(moments), "tau": tau}
    return lambda **options: AdaDPS(**fixed, **options)


def ones(model):
    return {name: np.ones(()) for name, x in model.items() if "running" not in name}


@pytest.fixture
def app(task):
    return client_app(task)


@pytest.fixture
def model(initial):
    return from_record(initial)


# Degenerate limits ------------------------------------------------------------------


@EVERY_KIND
def test_with_moments_of_one_it_is_fedavg_bit_for_bit(kind, app, model):
    trained = {n: x for n, x in ones(model).items() if model[n].dtype.kind == "f"}
    found, spent = run(private(known(**trained), kind), app, model)
    expected, its = run(private(AdditiveStrategy, kind), app, model)
    assert spent == its
    for name, x in expected.items():
        assert np.array_equal(found[name], x), name
    other = {name: np.square(0.5) for name in trained}
    found, spent = run(private(known(**other), kind), app, model)
    assert spent == its  # whatever the moments are
    assert any(np.any(found[n] != x) for n, x in expected.items())


@pytest.mark.parametrize("upload", [None, NF4(), Chain(TopK(0.5), NF4())])
def test_what_is_preconditioned_is_the_decoded_change(upload, app, model):
    """A change times two, of a rate of a half, is the change."""
    free = {**ALL, "upload": upload}
    trained = {n: x / 4 for n, x in ones(model).items() if model[n].dtype.kind == "f"}
    twice = known(**trained)(**free)
    once = AdditiveStrategy(**free)
    expected, _ = run(once, app, model, rounds=1)
    found, _ = run(twice, app, model, rounds=1)
    for name in trained:
        change = expected[name] - model[name]
        assert found[name] - model[name] == pytest.approx(2 * change, abs=1e-6)


# The algorithm ----------------------------------------------------------------------


def quadratic_clients(quadratics, curvature, center):
    """Return clients that agree on a minimum of this diagonal curvature."""
    size = len(curvature)
    hessians = np.broadcast_to(np.diag(curvature), (CLIENTS, size, size))
    centers = np.broadcast_to(center, (CLIENTS, size))
    alike = dataclasses.replace(quadratics, centers=centers, hessians=hessians)
    return client_app(alike.task()), alike.start


def test_of_the_hessian_squared_all_coordinates_converge_alike(quadratics):
    curvature, center = np.array([10.0, 1.0, 0.1]), np.array([1.0, -2.0, 3.0])
    app, start = quadratic_clients(quadratics, curvature, center)
    config = {"lr": 0.1, "local-steps": 1}
    found, _ = run(known(w=curvature**2)(**ALL), app, start, 5, config)
    # One step is eta H (a - w), divided by H.
    assert found["w"] - center == pytest.approx(-center * 0.9**5, rel=1e-12)
    plain, _ = run(AdditiveStrategy(**ALL), app, start, 5, config)
    left = (plain["w"] - center) / -center
    assert left == pytest.approx((1 - 0.1 * curvature) ** 5, abs=1e-12)


SENT = {"w": np.array([1.0, 2.0, -1.0]), "counter": np.array([3], np.int64)}
MOMENTS = np.array([4.0, 1.0, 1e-4])


def plan(**options):
    usual = {"num_rounds": 4, "num_sampled_clients": 3, "population_size": 3}
    usual |= {"target_delta": 1e-2, "noise_multiplier": 0.0, "seed": 1}
    return Mechanism(**{**usual, **options})


def test_changes_are_divided_then_clipped(aggregate, reply):
    changes = np.array([[0.2, 0.1, 0.0], [0.0, 0.0, 0.5], [-3.0, 4.0, 1.0]])
    moved = [{**SENT, "w": SENT["w"] + change} for change in changes]
    strategy = known(tau=0.1, w=MOMENTS)(mechanism=plan(clipping=2.0))
    new, _ = aggregate(strategy, SENT, [reply(x) for x in moved])
    divided = changes / (np.sqrt(MOMENTS) + 0.1)
    lengths = np.linalg.norm(divided, axis=1)
    assert lengths[0] < 2.0 < lengths[1]
    clipped = divided * np.minimum(1, 2.0 / lengths)[:, None]
    assert new["w"] - SENT["w"] == pytest.approx(clipped.mean(0), rel=1e-9)
    assert new["counter"] == 3


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e12])
def test_one_client_moves_the_sum_by_the_norm_at_most(size, aggregate, reply):
    """Whatever it sends, also where the factors are largest."""
    steep = known(w=np.array([1e12, 1.0, 1e-12]))
    moved = [{**SENT, "w": SENT["w"] + size * x} for x in np.eye(3)]
    for hostile in moved:
        with_it, without = (
            aggregate(steep(mechanism=plan(clipping=0.5)), SENT, contents)[0]["w"]
            for contents in (
                [reply(SENT), reply(moved[1]), reply(hostile)],
                [reply(SENT), reply(moved[1]), reply(SENT)],
            )
        )
        # The mean is over the planned three.
        assert 3 * np.linalg.norm(with_it - without) <= 0.5 * (1 + 1e-9)


def test_the_noise_is_not_divided(aggregate, reply):
    """Clients that changed nothing leave the noise alone: of one size everywhere."""
    still = [reply(SENT)] * 3
    noisy = {"noise_multiplier": 1.0, "factorization": "identity", "clipping": 2.0}
    found, metrics = aggregate(known(w=MOMENTS)(mechanism=plan(**noisy)), SENT, still)
    plain, _ = aggregate(AdditiveStrategy(mechanism=plan(**noisy)), SENT, still)
    assert np.array_equal(found["w"], plain["w"])
    many = {"w": np.zeros(30_000)}
    third = np.repeat(MOMENTS, 10_000)
    found, metrics = aggregate(
        known(w=third)(mechanism=plan(**noisy)), many, [reply(many)] * 3
    )
    for part in np.split(found["w"], 3):
        assert part.std() == pytest.approx(metrics["noise-std"], rel=0.03)


# Statistics of public data ----------------------------------------------------------


def public_line(rng, examples=10):
    x = rng.standard_normal((examples, 3)) * [10.0, 1.0, 0.1]
    return {"x": x, "y": rng.standard_normal(examples)}


def tensors(data):
    return {name: torch.tensor(x, dtype=torch.float32) for name, x in data.items()}


def by_hand(data, weight, batch_size):
    """Return the mean square of the batches' gradients of 0.5 (y - x w)^2."""
    x, y = data["x"], data["y"]
    cuts = range(0, len(y), batch_size)
    pieces = [(x[i : i + batch_size], y[i : i + batch_size]) for i in cuts]
    return np.mean(
        [np.mean((u @ weight - v)[:, None] * u, 0) ** 2 for u, v in pieces], 0
    )


@pytest.mark.parametrize(("batch_size", "decay"), [(10, 0.9), (4, 0.5), (1, 0.0)])
def test_moments_of_public_gradients_are_those_by_hand(linear_task, batch_size, decay):
    rng = np.random.default_rng(4)
    data, clients = public_line(rng), [public_line(rng) for _ in range(CLIENTS)]
    task = linear_task(clients, 3)
    public = PublicGradients(task, tensors(data), decay=decay, batch_size=batch_size)
    strategy = AdaDPS(public_statistics=public, tau=0.01, **ALL)
    models = [np.zeros((1, 3), np.float32)]

    def look(number, record):
        if number:
            models.append(from_record(record)["weight"].copy())

    start, config = {"weight": models[0]}, {"lr": 0.02, "local-steps": 1}
    run(strategy, client_app(task), start, 3, config, evaluate_fn=look)
    expected = by_hand(data, models[0][0], batch_size)
    for weight in models[1:3]:
        now = by_hand(data, weight[0], batch_size)
        assert np.abs(now / expected - 1).max() > 0.01
        expected = decay * expected + (1 - decay) * now
    found = strategy.state_dict()["second-moments"]["weight"]
    assert found[0] == pytest.approx(expected, rel=1e-4)
    root = 1 / (np.sqrt(found) + 0.01)
    assert strategy.preconditioner["weight"] == pytest.approx(root)


def test_a_run_with_public_gradients_is_resumed_bit_for_bit(task, model, tmp_path):
    train, _ = task.data(type("Context", (), {"node_config": {"partition-id": 9}}))

    def make(**options):
        public = PublicGradients(task, train, batch_size=16)
        return AdaDPS(public_statistics=public, tau=0.1, **options)

    app = client_app(task)
    whole, _ = run(private(make, "blt"), app, model)
    for rounds in (2, 4):
        strategy = private(make, "blt")
        found, _ = run(strategy, app, model, rounds, checkpoint=tmp_path)
    for name, x in whole.items():
        assert np.array_equal(found[name], x), name


def test_an_array_that_the_loss_does_not_know_has_no_gradient():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Parameter(torch.ones(1))
            self.unused = nn.Parameter(torch.ones(1))

    task = Task(
        lambda config: Two(), None, lambda model, batch: model.used * batch["x"]
    )
    public = PublicGradients(task, {"x": torch.full((3,), 2.0)})
    sent = {name: np.float32([1.0]) for name in ("used", "unused")}
    found = public.second_moments(sent, {})
    assert found == {"used": [4.0], "unused": [0.0]}


def test_gradients_that_are_not_finite_leave_the_old_ones(caplog):
    task = Task(
        lambda config: nn.Linear(1, 1, bias=False),
        None,
        lambda model, batch: model(batch["x"])[:, 0] ** 2,
    )
    public = PublicGradients(task, {"x": torch.ones(2, 1)})
    far, before = {"weight": np.float32([[3e38]])}, {"weight": np.ones((1, 1))}
    assert public.second_moments(far, before) is before
    assert "gradients on public data are not finite" in caplog.text
    with pytest.raises(
        ValueError, match=r"public=.* must be other data: the gradients"
    ):
        public.second_moments(far, {})


def test_frequencies_are_ratios_to_the_most_frequent_up_to_a_bound(aggregate, reply):
    """Equation of the multipliers: min(most, max f / f)."""
    words = {"w": np.array([40.0, 4.0, 0.0])}
    strategy = AdaDPS(
        public_statistics=PublicMoments.of_frequencies(words, most=25), tau=0, **ALL
    )
    moved = {**SENT, "w": SENT["w"] + 1}
    new, _ = aggregate(strategy, SENT, [reply(moved)] * 2)
    assert new["w"] - SENT["w"] == pytest.approx(np.array([1.0, 10.0, 25.0]))


# Bad input --------------------------------------------------------------------------


def test_statistics_that_nobody_calls_public_are_refused():
    for wrong in ({"w": MOMENTS}, MOMENTS, None, PublicMoments):
        with pytest.raises(ValueError, match=r"public_statistics=.* say that they are"):
            AdaDPS(public_statistics=wrong)


@pytest.mark.parametrize(
    "wrong", [[1.0, -1.0], [np.nan], [np.inf], np.zeros(0)], ids=str
)
def test_moments_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"second_moments\['w'\]=.* finite and >= 0"):
        PublicMoments({"w": np.array(wrong)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (known(v=MOMENTS), r"public_statistics=\['v'\] must be of trained arrays"),
        (known(counter=1.0), r"public_statistics=\['counter'\] must be of trained"),
        (known(w=np.ones(2)), r"public_statistics\['w'\]=\(2,\) must be as \(3,\)"),
        (known(w=np.ones((2, 3))), r"\(2, 3\) must be as \(3,\)"),
        (known(w=MOMENTS * 0), r"tau=0.0 must be so large .* second moments of 0"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_a_round(
    make, words, reply, exchange
):
    with pytest.raises(ValueError, match=words):
        exchange(make(), SENT, [reply(SENT)] * 2)


def test_other_options_are_refused(task, model, app):
    with pytest.raises(ValueError, match="tau=-1 must be a finite number >= 0"):
        AdaDPS(public_statistics=PublicMoments({}), tau=-1)
    train, _ = task.data(type("Context", (), {"node_config": {"partition-id": 0}}))
    with pytest.raises(ValueError, match="tau=0 must be > 0 but with PublicMoments"):
        AdaDPS(public_statistics=PublicGradients(task, train), tau=0)
    with pytest.raises(ValueError, match="most=0.5 must be a finite number >= 1"):
        PublicMoments.of_frequencies({"w": MOMENTS}, most=0.5)
    with pytest.raises(ValueError, match=r"frequencies\['w'\]=.* > 0 for some input"):
        PublicMoments.of_frequencies({"w": np.zeros(2)})
    with pytest.raises(ValueError, match="task=None must be a Task"):
        PublicGradients(None, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="public=.* at least one example"):
        PublicGradients(task, {"x": torch.ones(0, 3)})
    with pytest.raises(ValueError, match="decay=2 must be between 0 and 1"):
        PublicGradients(task, {"x": torch.ones(1, 3)}, decay=2)
    with pytest.raises(ValueError, match="batch_size=0 must be an integer >= 1"):
        PublicGradients(task, {"x": torch.ones(1, 3)}, batch_size=0)
    strategy = AdaDPS(public_statistics=PublicGradients(task, train), **ALL)
    other = ArrayRecord({"v": torch.ones(1)})
    with pytest.raises(ValueError, match="a model of the names of initial_arrays"):
        run(strategy, app, from_record(other))
