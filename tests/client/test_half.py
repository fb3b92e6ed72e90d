"""Client halves: three papers' in a few lines, each against formulas in NumPy."""

import doctest
import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn

from flower_ext import AdditiveStrategy, ClientHalf, Task, client_app
from flower_ext.client import half as half_module
from flower_ext.client.half import Beside, Proximal, trainable
from flower_ext.core.arrays import to_record
from flower_ext.simulation import LocalGrid
from flower_ext.wire import Exact
from flower_ext.wire.messages import UPLOAD_KEY
from flower_ext.wire.registry import describe

EXAMPLES, RATE, STEPS = 10, 0.05, 4
FULL = {"lr": RATE, "batch_size": EXAMPLES, "local_epochs": STEPS}
START = {"w": np.array([0.5, -0.5, 0.25])}


class Linear(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return x @ self.drop(self.w)


def data_of(client, slope=(1.0, -2.0, 3.0)):
    x = np.random.default_rng(client).normal(size=(EXAMPLES, 3))
    return {"x": x, "y": x @ np.array(slope)}


def squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]) ** 2


def make_task(model=Linear, **options):
    def data(context):
        own = data_of(context.node_config["partition-id"])
        return own, data_of(99)

    return Task(lambda config: model(), data, squared_error, **options)


def gradient(w, data):
    return 2 * data["x"].T @ (data["x"] @ w - data["y"]) / EXAMPLES


def loss_at(w, data):
    return float(np.mean((data["x"] @ w - data["y"]) ** 2))


class Clients:
    """Two clients of one app, which keep their state from message to message."""

    def __init__(self, *halves, task=None, **options):
        app = client_app(task or make_task(), *halves, **options)
        self.grid = LocalGrid(app, 2)
        self.nodes = list(self.grid.get_node_ids())
        self.name = halves[0].name if halves else "plain"

    def send(self, arrays=None, kind="train", client=0, beside=None, **config):
        config = {"client_half": self.name, **config}
        content = RecordDict(
            {
                "arrays": to_record(START if arrays is None else arrays),
                "config": ConfigRecord(
                    {k.replace("_", "-"): v for k, v in config.items()}
                ),
                **{key: to_record(group) for key, group in (beside or {}).items()},
            }
        )
        message = Message(content, self.nodes[client], kind)
        [reply] = self.grid.send_and_receive([message])
        if reply.has_error():
            raise RuntimeError(reply.error.reason.splitlines()[0])
        return reply.content


def weights(content, key="arrays"):
    return content[key]["w"].numpy()


# Scaffold: personal state, and groups of arrays beside the model ------------------


class ScaffoldClient(ClientHalf):
    name = "scaffold"

    def begin(self, local):
        self.control = local.received["control"]
        self.own = local.personal.arrays("control", like=self.control)

    def after_backward(self, model):
        for name, p in trainable(model).items():
            p.grad += self.control[name] - self.own[name]

    def records(self, local):
        length = local.num_steps * local.settings.learning_rate
        start, end = local.start, local.end
        new = {
            n: self.own[n] - self.control[n] + (start[n] - end[n]) / length
            for n in self.own
        }
        local.personal.save(control=new)
        return {"control-change": {n: new[n] - self.own[n] for n in new}}, {}


def test_scaffold_corrects_by_controls_that_stay_with_the_client():
    clients = Clients(ScaffoldClient)
    own = {client: np.zeros(3) for client in (0, 1)}
    control, w = np.array([0.3, 0.0, -0.1]), START["w"]
    for server_round in (1, 2, 3):
        for client in (0, 1):
            found = clients.send(
                {"w": w},
                client=client,
                beside={"control": {"w": control}},
                server_round=server_round,
                **FULL,
            )
            expected, data = w, data_of(client)
            for _ in range(STEPS):
                corrected = gradient(expected, data) - own[client] + control
                expected = expected - RATE * corrected
            np.testing.assert_allclose(weights(found), expected, rtol=1e-12)
            new = own[client] - control + (w - expected) / (STEPS * RATE)
            change = weights(found, "control-change")
            np.testing.assert_allclose(change, new - own[client], rtol=1e-9)
            own[client] = new
        control, w = control + 0.1, expected
    # Option II of the paper: the control is the mean gradient along the way.
    assert np.abs(own[0] - own[1]).max() > 0.1


# Ditto: a second model, drawn to the first ----------------------------------------


class DittoClient(ClientHalf):
    name = "ditto"
    num_trainings = 2
    post_processing = True

    def own(self, local):
        return local.personal.arrays("model", like=local.start, first=local.start)

    def after_training(self, local):
        personal = local.with_model(self.own(local))
        personal.fit(Proximal(towards=local.start, strength=0.7))
        local.personal.save(model=personal.end)

    def model_to_evaluate(self, local):
        return self.own(local)


def test_ditto_trains_a_model_of_its_own_near_the_received_one():
    clients = Clients(DittoClient)
    data, personal = data_of(0), None
    test = data_of(99)
    for w in (START["w"], START["w"] + 1.0):
        found = clients.send({"w": w}, **FULL)
        expected, own = w, w if personal is None else personal
        for _ in range(STEPS):
            expected = expected - RATE * gradient(expected, data)
            own = own - RATE * (gradient(own, data) + 0.7 * (own - w))
        personal = own
        np.testing.assert_allclose(weights(found), expected, rtol=1e-12)
        measured = clients.send({"w": w}, "evaluate", **FULL)["metrics"]["loss"]
        assert measured == pytest.approx(loss_at(personal, test), rel=1e-12)
    # A client that has not trained has the received model.
    measured = clients.send(kind="evaluate", client=1)["metrics"]["loss"]
    assert measured == pytest.approx(loss_at(START["w"], test), rel=1e-12)


RANDOM = {"lr": 0.02, "batch_size": 3, "local_epochs": 3}


def dropping():
    return Linear(0.5)


def test_a_second_model_does_not_change_the_first_and_has_its_own_random_choices():
    """Batches and dropout of both are random; the first is that of plain training."""

    class Second(ClientHalf):
        name = "second"

        def others(self, local):
            self.found = {}
            for name in ("model", "again"):
                other = local.with_model(local.start)
                other.fit()
                self.found[name] = other.end

        def records(self, local):
            return self.found, {}

    class Before(Second):
        begin = Second.others

    class After(Second):
        after_training = Second.others

    plain = Clients(task=make_task(dropping)).send(**RANDOM)
    for half in (Before, After):
        found = Clients(half, task=make_task(dropping)).send(**RANDOM)
        np.testing.assert_array_equal(weights(found), weights(plain))
        models = [weights(found, key) for key in ("arrays", "model", "again")]
        assert not np.allclose(models[0], models[1])
        assert not np.allclose(models[1], models[2])
        again = Clients(half, task=make_task(dropping)).send(**RANDOM)
        np.testing.assert_array_equal(weights(again, "model"), models[1])


# HypCluster: several models, one of which the client takes ------------------------


def unstack(arrays):
    return [{"w": w} for w in arrays["w"]]


class HypClusterClient(ClientHalf):
    name = "hyp-cluster"

    def receive(self, local, arrays):
        self.losses = [local.loss_of(model) for model in unstack(arrays)]
        self.choice = int(np.argmin(self.losses))
        return unstack(arrays)[self.choice]

    def records(self, local):
        return {}, {"cluster": self.choice, "losses": self.losses}


def test_hyp_cluster_takes_the_model_that_loses_least_on_its_training_data():
    stacked = {"w": np.array([[0.0, 0.0, 0.0], [1.0, -1.0, 2.0], [-5.0, 0.0, 1.0]])}
    clients, data = Clients(HypClusterClient), data_of(0)
    found = clients.send(stacked, **FULL)
    losses = [loss_at(w, data) for w in stacked["w"]]
    assert found["metrics"]["cluster"] == int(np.argmin(losses)) == 1
    assert found["metrics"]["losses"] == pytest.approx(losses, rel=1e-12)
    expected = stacked["w"][1]
    for _ in range(STEPS):
        expected = expected - RATE * gradient(expected, data)
    np.testing.assert_allclose(weights(found), expected, rtol=1e-12)
    measured = clients.send(stacked, "evaluate")["metrics"]["loss"]
    assert measured == pytest.approx(loss_at(stacked["w"][1], data_of(99)), rel=1e-12)


# One hook at a time ---------------------------------------------------------------


class FedProxClient(ClientHalf):
    name = "fedprox"

    def begin(self, local):
        self.term = Proximal(towards=local.start, strength=0.7)

    def regularizer(self, model):
        return self.term(model)


def test_a_regularizer_is_added_to_the_objective_and_to_its_gradient():
    found = Clients(FedProxClient).send(**FULL)
    w, data, seen = START["w"], data_of(0), []
    for _ in range(STEPS):
        away = w - START["w"]
        seen.append(loss_at(w, data) + 0.35 * away @ away)
        w = w - RATE * (gradient(w, data) + 0.7 * away)
    np.testing.assert_allclose(weights(found), w, rtol=1e-12)
    assert found["metrics"]["train-loss"] == pytest.approx(np.mean(seen), rel=1e-12)


def test_the_gradient_of_a_regularizer_is_scaled_down_with_the_rest():
    class Far(FedProxClient):
        def begin(self, local):
            self.term = Proximal({"w": local.start["w"] + 100.0}, strength=0.7)

    found = Clients(Far).send(**FULL | {"local_epochs": 1}, max_gradient_norm=0.5)
    direction = gradient(START["w"], data_of(0)) - 70.0
    expected = START["w"] - RATE * 0.5 * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(weights(found), expected, rtol=1e-5)


def test_what_examples_add_to_the_objective_is_averaged():
    class Tilted(ClientHalf):
        name = "tilted"

        def objective(self, losses, batch):
            return (1 + batch["y"].abs()) * losses

    found = Clients(Tilted).send(**FULL | {"local_epochs": 1})
    data = data_of(0)
    error = data["x"] @ START["w"] - data["y"]
    weighted = (1 + np.abs(data["y"])) * error
    expected = START["w"] - RATE * 2 * data["x"].T @ weighted / EXAMPLES
    np.testing.assert_allclose(weights(found), expected, rtol=1e-12)


def test_an_objective_that_is_already_a_mean_is_refused():
    class Mean(ClientHalf):
        name = "mean"

        def objective(self, losses, batch):
            return losses.mean()

    with pytest.raises(RuntimeError, match=r"'objective' has shape \(\), must be \(10"):
        Clients(Mean).send(**FULL)


def test_after_step_may_project_the_model():
    seen = []

    class Projected(ClientHalf):
        name = "projected"

        def objective(self, losses, batch):
            return losses

        def after_step(self, local):
            with torch.no_grad():
                local.model.w /= max(1.0, float(local.model.w.norm()) / 0.9)
            seen.append(local.model.w.tolist())

    found = Clients(Projected).send(**FULL)
    w, data = START["w"], data_of(0)
    for step in range(STEPS):
        w = w - RATE * gradient(w, data)
        w = w / max(1.0, np.linalg.norm(w) / 0.9)
        np.testing.assert_allclose(seen[step], w, rtol=1e-12)
    np.testing.assert_allclose(weights(found), w, rtol=1e-12)
    assert np.linalg.norm(w) == pytest.approx(0.9)


def test_the_hooks_are_called_in_the_order_that_the_table_says():
    calls = []

    class Notes(ClientHalf):
        name = "notes"

    def noting(hook):
        def call(self, *arguments):
            calls.append(hook)
            return getattr(ClientHalf, hook)(self, *arguments)

        return call

    hooks = [name for name, x in vars(ClientHalf).items() if callable(x)]
    for hook in hooks:
        setattr(Notes, hook, noting(hook))
    clients = Clients(Notes)
    clients.send(**FULL | {"local_epochs": 1})
    step = ["objective", "regularizer", "after_backward", "after_step"]
    before = ["make_model", "receive", "begin", "optimizer", "batches"]
    after = ["after_training", "records", "model_to_send", "release"]
    assert calls == [*before, *step, *after]
    calls.clear()
    clients.send(kind="evaluate")
    rest = ["model_to_evaluate", "evaluate"]
    assert calls == ["make_model", "receive", *rest, "release"]
    # Only a trainer that charges steps asks for their number.
    assert {*before, *step, *after, *rest, "planned_steps"} == set(hooks)
    named = [hook for hook in hooks if hook in ClientHalf.__doc__]
    assert named == [hook for hook in hooks if hook != "planned_steps"]


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Parameter(torch.tensor([0.5, -0.5, 0.25], dtype=torch.float64))
        self.head = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.head * (x @ self.body)


class HomeHead(ClientHalf):
    """The head stays at home, and the server knows nothing of it."""

    name = "home-head"

    def receive(self, local, arrays):
        own = {"head": local.end["head"]}
        return {**arrays, **local.personal.arrays("head", like=own, first=own)}

    def after_training(self, local):
        local.personal.save(head={"head": local.end["head"]})

    def model_to_send(self, local):
        return {"body": local.end["body"]}


def test_a_part_of_the_model_may_stay_at_home():
    """Three rounds of a shared body with a head of each client's own, in NumPy."""
    bodies, heads = np.array([0.5, -0.5, 0.25]), np.ones(2)
    expected = []
    for _ in range(3):
        trained = []
        for client in (0, 1):
            body, data = bodies, data_of(client)
            for _ in range(STEPS):
                error = heads[client] * (data["x"] @ body) - data["y"]
                slope = 2 * error @ (data["x"] @ body) / EXAMPLES
                body = body - RATE * 2 * heads[client] * data["x"].T @ error / EXAMPLES
                heads[client] -= RATE * slope
            trained.append(body)
        bodies = np.mean(trained, axis=0)
        expected.append(bodies)
    for upload in (None, Exact()):
        app = client_app(make_task(TwoLayers), HomeHead)
        strategy = AdditiveStrategy(upload=upload, fraction_evaluate=0.0)
        strategy.client_half = HomeHead
        config = {k.replace("_", "-"): v for k, v in FULL.items()}
        result = strategy.start(
            LocalGrid(app, 2),
            to_record({"body": START["w"]}),
            3,
            train_config=ConfigRecord(config),
        )
        np.testing.assert_allclose(
            result.arrays["body"].numpy(), expected[-1], rtol=1e-9
        )


def test_a_model_that_began_elsewhere_changes_what_was_sent():
    """With a codec and without one, the server learns of the same change."""

    class Own(ClientHalf):
        name = "own"

        def receive(self, local, arrays):
            return {"w": arrays["w"] + 10.0}

    class OwnChange(Own):
        def model_to_send(self, local):
            moved = local.end["w"] - local.start["w"]
            return {"w": local.model_received["w"] + moved}

    for half, away in ((Own, 10.0), (OwnChange, 0.0)):
        found = []
        for upload in (None, Exact()):
            strategy = AdditiveStrategy(upload=upload, fraction_evaluate=0.0)
            strategy.client_half = half
            grid = LocalGrid(client_app(make_task(), half), 2)
            config = ConfigRecord({"lr": 0.0})
            result = strategy.start(grid, to_record(START), 1, train_config=config)
            found.append(result.arrays["w"].numpy())
        np.testing.assert_allclose(found, [START["w"] + away] * 2, rtol=1e-12)


class TiedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.head = self.body

    def forward(self, x):
        return x @ self.head


def test_of_a_tied_tensor_no_name_stays_at_home_alone():
    """What was kept would be loaded over what was sent."""
    clients = Clients(HomeHead, task=make_task(TiedLayers))
    with pytest.raises(RuntimeError, match=r"\['body', 'head'\] must be equal arrays"):
        clients.send({"body": START["w"]})
    # Equal ones are no matter.
    clients.send({"body": np.zeros(3)})


def test_what_a_model_began_with_does_not_change_while_it_trains():
    """Also where a half lets it begin with arrays that the model has already."""
    seen = []

    class Fresh(ClientHalf):
        name = "fresh"

        def receive(self, local, arrays):
            return local.end

        def begin(self, local):
            self.second = local.with_model(local.end)

        def records(self, local):
            seen.extend([local.start["w"], local.end["w"], self.second.start["w"]])
            return {}, {}

    Clients(Fresh).send(**FULL)
    start, end, second = seen
    assert start.tolist() == second.tolist() == [0, 0, 0]
    assert end.tolist() != [0, 0, 0]


def test_arrays_of_no_model_cannot_be_encoded():
    class Stranger(ClientHalf):
        name = "stranger"

        def model_to_send(self, local):
            return {"v": torch.ones(3)}

    with pytest.raises(RuntimeError, match=r"model_to_send.*\['v'\] must be arrays of"):
        Clients(Stranger).send(**{UPLOAD_KEY: describe(Exact())})


def test_the_half_is_chosen_before_the_model_is_made():
    made = []

    def model():
        made.append(1)
        return Linear()

    clients = Clients(task=make_task(model))
    with pytest.raises(RuntimeError, match="client half 'other'"):
        clients.send({"something": np.ones(2)}, client_half="other")
    assert not made


def test_a_group_that_the_server_did_not_send_is_named():
    beside = Beside({"other": {}})
    with pytest.raises(
        ValueError, match=r"received=\['other'\] must be with 'control'"
    ):
        beside["control"]
    assert beside.get("control") is None


def test_groups_beside_the_model_come_under_their_own_keys():
    seen = {}

    class Curious(ClientHalf):
        name = "curious"

        def receive(self, local, arrays):
            seen.update(local.received)
            return arrays

    beside = {"a": {"x": np.arange(3)}, "b": {"x": np.ones(()), "y": np.zeros((0, 2))}}
    clients = Clients(Curious)
    for kind in ("train", "evaluate"):
        seen.clear()
        clients.send(kind=kind, beside=beside)
        found = {k: {n: x.tolist() for n, x in g.items()} for k, g in seen.items()}
        assert found == {"a": {"x": [0, 1, 2]}, "b": {"x": 1.0, "y": []}}
    seen.clear()
    clients.send()
    assert seen == {}


def test_start_and_end_are_the_model_before_and_after_training():
    seen = []

    class Watching(ClientHalf):
        name = "watching"

        def begin(self, local):
            seen.append(local.end["w"].tolist())

        def records(self, local):
            seen.append(local.start["w"].tolist())
            seen.append(local.end["w"].tolist())
            assert not local.end["w"].requires_grad
            return {}, {}

    found = Clients(Watching).send(**FULL)
    assert seen == [START["w"].tolist()] * 2 + [weights(found).tolist()]


def test_losses_and_measures_of_other_models_leave_the_model_as_it_was():
    class Measuring(ClientHalf):
        name = "measuring"

        def begin(self, local):
            other = {"w": torch.tensor([1.0, 2.0, 3.0])}
            self.found = {
                "train": local.loss_of(other),
                "test": local.loss_of(other, local.test),
                "measured": local.measure(other)["loss"],
            }

        def records(self, local):
            return {}, self.found

    found = Clients(Measuring).send(**FULL)
    w = np.array([1.0, 2.0, 3.0])
    metrics = found["metrics"]
    assert metrics["train"] == pytest.approx(loss_at(w, data_of(0)), rel=1e-12)
    assert metrics["test"] == pytest.approx(loss_at(w, data_of(99)), rel=1e-12)
    assert metrics["measured"] == metrics["test"]
    np.testing.assert_array_equal(weights(found), weights(Clients().send(**FULL)))


def test_a_copy_shares_what_is_frozen_and_not_sent():
    class Based(Linear):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(3, 3).requires_grad_(False)
            self.kept = nn.Parameter(torch.ones(2), requires_grad=False)

            def only_sent(module, state, prefix, metadata):
                del state[f"{prefix}base.weight"], state[f"{prefix}base.bias"]

            def expect(module, keys):
                keys.missing_keys.clear()

            self.register_state_dict_post_hook(only_sent)
            self.register_load_state_dict_post_hook(expect)

    seen = []

    class Copying(ClientHalf):
        name = "copying"

        def after_training(self, local):
            other = local.with_model({**local.end, "kept": torch.zeros(2)})
            seen.extend([local.model, other.model])

    Clients(Copying, task=make_task(Based)).send({**START, "kept": np.ones(2)})
    mine, other = seen
    assert other.base.weight is mine.base.weight
    assert mine.kept.tolist() == [1, 1] and other.kept.tolist() == [0, 0]
    assert other.w is not mine.w


# The proximal term ----------------------------------------------------------------


def test_a_proximal_term_is_half_its_strength_times_the_squared_distance():
    model = nn.Linear(2, 2)
    towards = {name: p.detach() + 1 for name, p in model.named_parameters()}
    term = Proximal(towards, 0.5)(model)
    assert float(term) == pytest.approx(0.25 * 6)
    term.backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad, -0.5 * torch.ones_like(p))
    # A part of the model may be left free, and nothing costs nothing.
    assert float(Proximal({"bias": towards["bias"]}, 0.5)(model)) == pytest.approx(0.5)
    assert Proximal(towards, 0.0)(model) is None


def test_a_proximal_term_towards_nothing_of_the_model_is_refused():
    with pytest.raises(ValueError, match=r"towards=\['v'\] must be with names of tra"):
        Proximal({"v": torch.ones(3)}, 1.0)(Linear())
    with pytest.raises(ValueError, match="strength=-1.0 must be"):
        Proximal({}, -1.0)
    with pytest.raises(ValueError, match="strength=nan must be"):
        Proximal({}, math.nan)


def test_groups_of_a_reply_may_be_records_or_tensors():
    class Both(ClientHalf):
        name = "both"

        def records(self, local):
            record = ArrayRecord({"x": torch.ones(2)})
            return {"one": record, "two": {"x": torch.ones(2)}}, {}

    found = Clients(Both).send()
    assert found["one"]["x"].numpy().tolist() == found["two"]["x"].numpy().tolist()


def test_doctests_pass():
    found = doctest.testmod(half_module)
    assert found.attempted and not found.failed
