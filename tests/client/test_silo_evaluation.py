"""Silos that answer evaluations with noise, within the epsilon that they promise."""

import math

import numpy as np
import pytest
import torch
from dp_accounting import dp_event, privacy_accountant
from dp_accounting.pld import pld_privacy_accountant
from one_silo import EXAMPLES, Dense, Silo, columns, first_arrays, make_task

from flower_ext import AdditiveStrategy
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import ClientHalf
from flower_ext.client.user_level import ULS
from flower_ext.core.arrays import to_record
from flower_ext.privacy import (
    PrivateEvaluation,
    SiloPrivacy,
    StepLedger,
    gaussian_mu,
    private_evaluation,
)
from flower_ext.privacy.silo_account import SiloAccount

ROUNDS, EVERY, DELTA, EPSILON, SHARE = 6, 2, 1e-3, 4.0, 0.3
BOUNDS = {"loss": 0.7, "score": (-1.0, 3.0)}
DATA = columns(EXAMPLES)


_FOLDERS = []


@pytest.fixture(autouse=True)
def ledgers(tmp_path):
    """A silo that evaluates before it trains knows what it has spent by its ledger."""
    _FOLDERS.append(tmp_path)
    yield
    _FOLDERS.clear()


def new_ledger():
    return _FOLDERS[0] / f"{len(list(_FOLDERS[0].iterdir()))}.json"


def scores(model, batch):
    return {"score": 10 * batch["x"][:, 0], "other": batch["x"][:, 1]}


def promise(own=None, **changes):
    usual = {
        "epsilon": EPSILON,
        "num_rounds": ROUNDS,
        "clipping_norm": 0.5,
        "delta": DELTA,
        "ledger": new_ledger(),
        "evaluation": PrivateEvaluation(
            **{"bounds": BOUNDS, "every": EVERY, "share": SHARE, **(own or {})}
        ),
    }
    return SiloPrivacy(**{**usual, **changes})


def silo_of(*halves, kind=DPSGD, data=None, trainer=None, own=None, **changes):
    task = make_task(data=DATA if data is None else data, metrics=scores)
    trainer = trainer or kind(promise(own, **changes))
    return Silo(task, None, *halves, trainer=trainer)


def evaluated(silo, number=EVERY, arrays=None):
    arrays = first_arrays() if arrays is None else arrays
    reply = silo.send(arrays, "evaluate", server_round=number)
    if reply.has_error():
        raise RuntimeError(reply.error.reason.splitlines()[0])
    return dict(reply.content["metrics"])


def by_hand(arrays, data):
    """Return the means of clipped metrics, with no noise."""
    model = Dense()
    model.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    with torch.no_grad():
        out = model(data["x"]).log_softmax(-1)
    losses = -out[torch.arange(len(out)), data["y"]].double()
    score = 10 * data["x"][:, 0].double()
    return {
        "loss": float(losses.clamp(0.0, 0.7).mean()),
        "score": float(score.clamp(-1.0, 3.0).mean()),
    }


@pytest.fixture
def drawn(monkeypatch):
    """Noise of 0, or of one standard deviation where ``drawn[0]`` says so."""
    value = [0.0]
    monkeypatch.setattr(
        private_evaluation, "noise_of_step", lambda size, *of: np.full(size, value[0])
    )
    return value


def unit_noise(groups=1):
    """Return the noise multiplier of each of the planned evaluations."""
    mu = math.sqrt(SHARE) * gaussian_mu(EPSILON, DELTA)
    return groups * math.sqrt(ROUNDS // EVERY) / mu


# What is released -----------------------------------------------------------------


def test_it_is_the_mean_of_clipped_metrics_and_noise_by_hand(drawn):
    found = evaluated(silo_of())
    exact = by_hand(first_arrays(), DATA)
    assert set(found) == {"num-examples", *BOUNDS, "loss-noise-std", "score-noise-std"}
    assert {k: found[k] for k in BOUNDS} == pytest.approx(exact, rel=1e-6)
    drawn[0] = 1.0
    moved = evaluated(silo_of())
    for name, half in (("loss", 0.35), ("score", 2.0)):
        std = half * math.sqrt(2) * unit_noise() / EXAMPLES
        assert found[f"{name}-noise-std"] == pytest.approx(std)
        assert moved[name] - found[name] == pytest.approx(std)


def test_noise_is_new_every_time_and_with_a_seed_the_same_in_the_same_reply():
    values = [evaluated(silo_of())["score"] for _ in range(2)]
    assert values[0] != values[1]
    changes = {"seed": 3, "ledger": None, "own": {"every": 1}}
    seeded = [evaluated(silo_of(**changes), 1)["score"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    silo = silo_of(**changes)
    first, second = (evaluated(silo, number)["score"] for number in (1, 2))
    assert first == seeded[0] != second
    other = {k: a + np.float32(1e-6) for k, a in first_arrays().items()}
    found = evaluated(silo_of(**changes), 1, other)
    assert abs(found["score"] - first) > 1e-3 * found["score-noise-std"]


def test_noise_of_a_seed_comes_not_again_on_other_data():
    """Where the server has told the same: the difference would be without noise."""
    changes = {"seed": 3, "ledger": None, "own": {"every": 1}}
    near = {**DATA, "x": DATA["x"].clone()}
    near["x"][0] += 1e-6
    one, other = (evaluated(silo_of(data=x, **changes), 1) for x in (DATA, near))
    gap = abs(one["score"] - other["score"])
    assert gap > 1e-3 * one["score-noise-std"]


def test_evaluations_of_other_rounds_are_withheld():
    silo = silo_of()
    assert evaluated(silo, 1) == {"num-examples": EXAMPLES}
    assert silo.state().config_records == {}
    assert "loss" in evaluated(silo, 2)
    assert evaluated(silo_of(evaluation=None), 2) == {"num-examples": EXAMPLES}


def test_a_silo_without_test_data_releases_nothing():
    nobody = {name: column[:0] for name, column in DATA.items()}
    assert evaluated(silo_of(data=nobody)) == {"num-examples": 0}


def test_one_example_moves_the_sum_by_what_is_charged(drawn):
    """From zero to the most that any metric can be."""
    drawn[0] = 0.0
    silo = silo_of()
    far = {**DATA, "x": DATA["x"].clone(), "weight": DATA["weight"].clone()}
    far["x"][0], far["weight"][0] = 1e6, 1e6
    nan = {**DATA, "x": DATA["x"].clone(), "weight": DATA["weight"].clone()}
    nan["x"][0], nan["weight"][0] = math.nan, math.nan
    one, other = (evaluated(silo_of(data=data)) for data in (far, nan))
    units = [one[k] - other[k] for k in BOUNDS]
    widths = [0.35 * math.sqrt(2), 2.0 * math.sqrt(2)]
    shift = math.hypot(*(EXAMPLES * u / w for u, w in zip(units, widths, strict=True)))
    assert shift == pytest.approx(1.0)
    assert silo is not None


class Shifted(ClientHalf):
    """Evaluates a model of its own."""

    name = "shifted"
    post_processing = True

    def model_to_evaluate(self, local):
        return {k: x + 0.5 for k, x in local.start.items()}

    def evaluate(self, local):
        return {"mine": 1.0}


def test_the_model_that_is_evaluated_may_be_the_clients_own(drawn):
    silo = silo_of(Shifted)
    reply = silo.send(
        first_arrays(), "evaluate", server_round=EVERY, client_half="shifted"
    )
    metrics = dict(reply.content["metrics"])
    shifted = {
        k: a + np.float32(0.5 * (a.dtype.kind == "f"))
        for k, a in first_arrays().items()
    }
    assert metrics["loss"] == pytest.approx(by_hand(shifted, DATA)["loss"], rel=1e-5)
    assert "mine" not in metrics


class Looking(ClientHalf):
    """Chooses what it evaluates by a loss on training data."""

    name = "looking"
    post_processing = True

    def model_to_evaluate(self, local):
        local.mean_loss(local.train)


def test_what_reads_training_data_is_refused():
    reply = silo_of(Looking).send(
        first_arrays(), "evaluate", server_round=EVERY, client_half="looking"
    )
    assert "must be left out with this client half" in reply.error.reason


# The budget -----------------------------------------------------------------------


CONFIG = {"batch_size": 4, "local_steps": 3, "lr": 0.1}


def ledger_of(silo):
    return StepLedger.read(silo.state().config_records["account/example-level-dp"])


@pytest.mark.parametrize("first", ["train", "evaluate"])
def test_all_rounds_and_evaluations_are_within_epsilon(first):
    silo, spent = silo_of(), []
    for number in range(1, ROUNDS + 1):
        if first == "evaluate":
            evaluated(silo, number)
        _, metrics = silo.train(first_arrays(), server_round=number, **CONFIG)
        if first == "train":
            evaluated(silo, number)
        spent.append(metrics["example-epsilon"])
    found = ledger_of(silo)
    assert EPSILON * 0.97 < found.epsilon(DELTA) <= EPSILON
    assert spent == sorted(spent)
    # By dp-accounting, from what was done.
    (noise,) = {z for (q, z, _) in found.steps if q < 1}
    assert found.steps == {(1 / 3, noise, 1): 18, (1.0, unit_noise(), 1): 3}
    events = [
        (dp_event.PoissonSampledDpEvent(1 / 3, dp_event.GaussianDpEvent(noise)), 18),
        (dp_event.GaussianDpEvent(unit_noise()), 3),
    ]
    relation = privacy_accountant.NeighboringRelation.ADD_OR_REMOVE_ONE
    independent = pld_privacy_accountant.PLDAccountant(relation)
    for event, count in events:
        independent.compose(event, count)
    assert found.epsilon(DELTA) == pytest.approx(
        independent.get_epsilon(DELTA), rel=0.01
    )
    # With nothing for the evaluations there would have been less noise.
    alone = silo_of(evaluation=None)
    alone.train(first_arrays(), **CONFIG)
    ((_, less, _),) = ledger_of(alone).steps
    assert noise > 1.05 * less
    with pytest.raises(
        RuntimeError, match="an evaluation more than the 3 that are pla"
    ):
        evaluated(silo, 8)
    assert ledger_of(silo) == found


def test_the_noise_of_training_is_kept_over_an_evaluation():
    silo = silo_of()
    for number, steps in ((1, 3), (2, 1), (3, 1)):
        config = {**CONFIG, "local_steps": steps, "server_round": number}
        silo.train(first_arrays(), **config)
        evaluated(silo, number)
    assert len({noise for (rate, noise, _) in ledger_of(silo).steps if rate < 1}) == 1


def test_an_evaluation_is_charged_before_it_is_made(monkeypatch):
    silo, written = silo_of(), []
    write = SiloAccount.write
    monkeypatch.setattr(
        SiloAccount, "write", lambda self, x: (written.append(x), write(self, x))[1]
    )

    def fail(*args):
        assert written
        raise RuntimeError("no noise")

    monkeypatch.setattr(private_evaluation, "noise_of_step", fail)
    reply = silo.send(first_arrays(), "evaluate", server_round=EVERY)
    assert reply.has_error()
    assert len(written) == 1


def test_an_evaluation_beyond_max_epsilon_is_refused(tmp_path):
    path = tmp_path / "ledger.json"
    StepLedger().add(1.0, 1.6, 5).save(path)
    assert StepLedger().add(1.0, 1.6, 5).epsilon(DELTA) > EPSILON
    with pytest.raises(RuntimeError, match="round 2 would exceed max_epsilon=4"):
        evaluated(silo_of(ledger=path))


def test_a_choice_and_evaluations_share_what_is_left(monkeypatch):
    choice = {"selection_epsilon": 0.4, "loss_cap": 2.0}

    class Choosing(ClientHalf):
        name = "choosing"
        post_processing = True

        def begin(self, local):
            worse = {k: x + 1.0 for k, x in local.start.items()}
            local.best_of([dict(local.start), worse])

    silo = silo_of(Choosing, **choice)
    for number in range(1, ROUNDS + 1):
        config = {**CONFIG, "client_half": "choosing"}
        silo.train(first_arrays(), server_round=number, **config)
        evaluated(silo, number)
    assert EPSILON * 0.9 < ledger_of(silo).epsilon(DELTA) <= EPSILON


def test_a_choice_without_noise_leaves_nothing_to_share():
    class Choosing(ClientHalf):
        name = "choosing"
        post_processing = True

        def begin(self, local):
            local.best_of([dict(local.start), dict(local.start)])

    silo = silo_of(Choosing, selection_epsilon=math.inf, loss_cap=2.0)
    with pytest.raises(RuntimeError, match="nothing is left for the training"):
        silo.train(first_arrays(), **CONFIG, client_half="choosing")


@pytest.mark.parametrize(("kind", "shift"), [(DPSGD, 2), (ULS, 1)])
def test_of_users_only_so_many_test_examples_count(kind, shift, drawn):
    # Twelve examples of five users, of each of whom two are used.
    silo = silo_of(kind=kind, max_examples_per_user=2)
    found = evaluated(silo)
    rows = [i for i in range(EXAMPLES) if i < 10]
    kept = {name: column[rows] for name, column in DATA.items()}
    exact = by_hand(first_arrays(), kept)
    assert {k: found[k] for k in BOUNDS} == pytest.approx(exact, rel=1e-6)
    std = 2.0 * math.sqrt(2) * unit_noise(groups=2) / len(rows)
    assert found["score-noise-std"] == pytest.approx(std)
    # Epsilon is that of the Gaussian, whatever the unit of the ledger is.
    ledger = ledger_of(silo)
    ((rate, noise, size),) = ledger.steps
    assert (rate, noise, size) == pytest.approx((1.0, shift * unit_noise(), shift))
    alone = StepLedger().add(1.0, unit_noise(), 1)
    assert ledger.epsilon(DELTA) == pytest.approx(alone.epsilon(DELTA))


def test_evaluations_of_all_trainers_of_a_ledger_are_counted():
    path = new_ledger()
    for kind, number in ((DPSGD, 2), (ULS, 4), (ULS, 6)):
        evaluated(silo_of(kind=kind, max_examples_per_user=2, ledger=path), number)
    for kind in (DPSGD, ULS):
        with pytest.raises(RuntimeError, match="more than the 3 that are planned"):
            evaluated(silo_of(kind=kind, max_examples_per_user=2, ledger=path), 8)


def test_a_run_of_silos_averages_what_they_release():
    silo = silo_of()
    strategy = AdditiveStrategy()
    result = strategy.start(silo.grid, to_record(first_arrays()), num_rounds=2)
    assert set(result.evaluate_metrics_clientapp[1]) == set()
    found = result.evaluate_metrics_clientapp[2]
    assert set(found) == {*BOUNDS, "loss-noise-std", "score-noise-std"}


# Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        (
            {},
            {"epsilon": None, "num_rounds": None, "noise_multiplier": 1.0},
            "epsilon=",
        ),
        (
            {"num_sampled_clients": 3},
            {},
            "evaluation.num_sampled_clients=3 must be left",
        ),
        ({"every": 7}, {}, "every=7 must be <= num_rounds=6"),
        ({}, {"evaluation": True}, "evaluation=True must be a PrivateEvaluation"),
    ],
)
def test_bad_plans_are_refused(own, changes, message):
    with pytest.raises(ValueError, match=message):
        promise(own, **changes)


def test_a_metric_that_is_not_measured_costs_nothing():
    silo = silo_of(own={"bounds": {"accuracy": 1.0}})
    with pytest.raises(
        RuntimeError, match="bounds=.'accuracy'. must be of metrics, wh"
    ):
        evaluated(silo)
    assert silo.state().config_records == {}


def test_exact_means_beside_noisy_ones_are_refused():
    trainer = DPSGD(promise(), release_evaluation=True)
    with pytest.raises(
        RuntimeError, match="release_evaluation=True must be False with"
    ):
        evaluated(silo_of(trainer=trainer))


def test_layers_that_mix_test_examples_are_refused():
    class Mixing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3, track_running_stats=False)
            self.out = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.norm(x))

    silo = Silo(make_task(Mixing, data=DATA), None, trainer=DPSGD(promise()))
    with pytest.raises(RuntimeError, match="'norm' must be a layer that does not mix"):
        evaluated(silo, arrays=first_arrays(Mixing))
