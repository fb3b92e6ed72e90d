"""What a newcomer does wrong: named before anything runs, or read as it was meant."""

import functools
import inspect
import re

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from flower_ext.client.app import client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import LocalSettings
from flower_ext.client.task import Task
from flower_ext.client.trainer import Plain
from flower_ext.core.arrays import to_record
from flower_ext.core.sampling import MinSeparationSampler
from flower_ext.privacy.silo_budget import SiloPrivacy
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD
from flower_ext.server.rounds import EveryClientFailed, run_rounds
from flower_ext.simulation.local import LocalGrid, run_local
from flower_ext.strategies import (
    DPFTRL,
    FLASC,
    BoundedGroupLoss,
    FedFish,
    FedMGDA,
    MaxFL,
)

INITIAL = ArrayRecord([np.zeros(4, np.float32)])
GROUPS = {"groups": ["a", "b"], "upper_bound": 0.5}
OURS = {
    AdditiveStrategy: {},
    FedFish: {},
    MaxFL: {},
    FLASC: {},
    BoundedGroupLoss: GROUPS,
}


def growing(**records):
    """A ClientApp that adds 1 to the model, and replies with these records."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = message.content["arrays"].to_numpy_ndarrays()
        grown = ArrayRecord([x + 1 for x in arrays])
        content = {"arrays": grown, "metrics": MetricRecord({"num-examples": 1})}
        content |= {k: grown if r is None else r for k, r in records.items()}
        content = {k: r for k, r in content.items() if r != "none"}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def start(strategy=None, app=None, clients=3, **options):
    options = {"initial_arrays": INITIAL, "num_rounds": 2, **options}
    grid = options.pop("grid", None) or LocalGrid(app or growing(), clients)
    return (strategy or AdditiveStrategy()).start(grid, **options)


# Options --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("fraction_trian", "fraction_train"),
        ("min_replys", "min_replies"),
        ("server_optimiser", "server_optimizer"),
        ("fraction_fit", "fraction_train"),
        ("min_fit_clients", "min_train_nodes"),
        ("min_available_clients", "min_available_nodes"),
        ("num_rounds", r"start\(num_rounds=...\)"),
        ("checkpoint", r"start\(checkpoint=...\)"),
        ("initial_parameters", r"start\(initial_arrays=...\)"),
    ],
)
def test_a_misspelt_option_is_ours_and_named_with_the_nearest(cls, name, nearest):
    text = f"^{cls.__name__} has no option '{name}': did you mean {nearest}"
    with pytest.raises(TypeError, match=text):
        cls(**OURS[cls], **{name: 1})


def test_an_option_of_a_strategys_own_is_suggested():
    with pytest.raises(TypeError, match="FedFish has no .*'dampng': did you .*damping"):
        FedFish(dampng=0.5)
    with pytest.raises(TypeError, match=r"FedFish has no option 'xyz': it has \['arr"):
        FedFish(xyz=1)


@pytest.mark.parametrize("cls", OURS)
def test_options_by_position_are_flowers(cls):
    values = {}
    for i, name in enumerate(inspect.signature(FedAvg).parameters):
        values[name] = (0.5, 0.25, 3, 4, 5, "n", "a", "c", max, min)[i]
    ours, flowers = cls(*values.values(), **OURS[cls]), FedAvg(*values.values())
    for name in values:
        assert getattr(ours, name) == getattr(flowers, name)


def test_options_by_position_are_not_given_twice_or_too_many():
    with pytest.raises(TypeError, match="'fraction_train' is given by position and by"):
        AdditiveStrategy(0.5, fraction_train=0.5)
    with pytest.raises(TypeError, match="11 positional options, there are 10"):
        AdditiveStrategy(*[None] * 11)


def test_what_stands_for_a_mechanism_or_an_optimizer_is_said():
    with pytest.raises(TypeError, match="FedMGDA has no option 'mechanism': .* no sum"):
        FedMGDA(mechanism=1)
    with pytest.raises(ValueError, match=r"'adam' must be .*: an instance, such as Ad"):
        AdditiveStrategy(server_optimizer="adam")


# Arguments of start -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"initial_arrays": [np.zeros(4)]}, "initial_arrays=<class 'list'> must be an"),
        ({"initial_arrays": [1.0, 2.0]}, "initial_arrays=<class 'list'> must be an"),
        ({"initial_arrays": None}, "initial_arrays=<class 'NoneType'> must be an"),
        ({"initial_arrays": nn.Linear(2, 2).state_dict()}, "ArrayRecord.model.state_d"),
        ({"initial_arrays": nn.Linear(2, 2)}, "ArrayRecord.model.state_dict"),
        ({"initial_arrays": ArrayRecord()}, "initial_arrays={} must be a model"),
        ({"grid": LocalGrid}, "grid=.* must be a Grid"),
        ({"grid": "local"}, "grid='local' must be a Grid"),
        ({"num_rounds": "3"}, "num_rounds='3' must be an integer"),
        ({"train_config": [1]}, r"train_config=\[1\] must be a ConfigRecord"),
        ({"evaluate_config": "lr=1"}, "evaluate_config='lr=1' must be a ConfigRecord"),
        ({"evaluate_fn": MetricRecord()}, "evaluate_fn={} must be a function"),
        ({"evaluate_fn": lambda r, a: 0.5}, "result=0.5 must be a MetricRecord"),
        (
            {"evaluate_fn": lambda r, a: {"loss": torch.tensor(1.0)}},
            r"result=.*tensor.* must be a MetricRecord .*needs .item\(\)",
        ),
        ({"tracker": "results"}, "tracker='results' must be a Tracker"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_what_is_taken_for_an_argument_of_start_is_named(options, text):
    app = ClientApp()
    app.train()(pytest.fail)
    if options.get("grid") is LocalGrid:
        options = {"grid": type("Class", (), {})}
    with pytest.raises(ValueError, match=text):
        start(app=app, **options)


def test_a_strategys_class_is_no_strategy():
    with pytest.raises(ValueError, match="an instance, not the class"):
        run_rounds(AdditiveStrategy, LocalGrid(growing(), 2), INITIAL)


def test_a_dict_serves_as_a_configuration_and_as_a_result():
    result = start(train_config={"lr": 0.1}, evaluate_fn=lambda r, a: {"round": r})
    assert result.evaluate_metrics_serverapp[2] == MetricRecord({"round": 2})
    assert start(evaluate_fn=lambda r, a: None).evaluate_metrics_serverapp == {}


def test_no_rounds_are_told(caplog):
    assert start(num_rounds=0).arrays == INITIAL
    assert "num_rounds=0 trains nothing" in caplog.text


def test_halves_of_an_app_in_the_wrong_order_are_named():
    with pytest.raises(
        ValueError, match="must be a ServerApp: the ClientApp comes sec"
    ):
        run_local(growing(), ServerApp())
    with pytest.raises(ValueError, match="client_app=.* must be a ClientApp"):
        run_local(ServerApp(), ServerApp())


# Replies --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FedAvg, AdditiveStrategy])
def test_the_only_arrays_of_a_reply_are_the_model_whatever_their_key(cls):
    app = growing(arrays="none", model=None)
    result = start(cls(), app)
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], np.full(4, 2.0))


def test_of_several_arrays_the_model_needs_its_key():
    with pytest.raises(Exception, match="no ArrayRecord 'arrays' in the reply, only"):
        start(app=growing(arrays="none", model=None, gradients=None))


def test_what_a_strategy_reads_beside_the_model_is_no_model():
    """FedFish finds the model beside the Fisher, which it does not take for it."""
    one = ArrayRecord([np.ones(4, np.float32)])
    result = start(FedFish(damping=1.0), growing(arrays="none", model=None, fisher=one))
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], np.full(4, 2.0))
    with pytest.raises(Exception, match="no ArrayRecord 'arrays' in the reply"):
        start(FedFish(), growing(arrays="none", fisher=one))


def test_the_models_own_key_comes_first():
    wrong = ArrayRecord([np.full(4, 99, np.float32)])
    result = start(app=growing(more=wrong))
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], np.full(4, 2.0))


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"num_examples": 1}, "no metric 'num-examples' .*though there is 'num_exampl"),
        ({"loss": 1.0}, r"no metric 'num-examples' in the reply, only \['loss'\]"),
        ({}, r"no metric 'num-examples' in the reply, only \[\]"),
    ],
)
def test_a_missing_weight_is_named_with_what_is_there(metrics, text):
    with pytest.raises(Exception, match=text):
        start(app=growing(metrics=MetricRecord(metrics)))


# Rounds of a subclass's own -----------------------------------------------------------


def own_train(self, server_round, arrays, config, grid):
    """Ask the first two nodes, as a Flower user writes it."""
    content = RecordDict({"arrays": arrays, "config": config})
    nodes = sorted(grid.get_node_ids())[:2]
    return [Message(content, node, MessageType.TRAIN) for node in nodes]


def own_evaluate(self, server_round, arrays, config, grid):
    content = RecordDict({"arrays": arrays, "config": config})
    nodes = sorted(grid.get_node_ids())[-2:]
    return (Message(content, node, MessageType.EVALUATE) for node in nodes)


def others_too(self, server_round, arrays, config, grid):
    """Ask one node of the cohort, and all that are not in it."""
    cls = next(c for c in type(self).__mro__ if vars(c).get("others"))
    drawn = list(super(cls, self).configure_train(server_round, arrays, config, grid))
    asked = {message.metadata.dst_node_id for message in drawn}
    others = [node for node in grid.get_node_ids() if node not in asked]
    content = drawn[0].content
    return drawn[:1] + [Message(content, n, MessageType.TRAIN) for n in others]


@pytest.mark.parametrize("base", [FedAvg, AdditiveStrategy])
def test_a_subclass_may_write_all_messages_itself(base):
    own = {"configure_train": own_train, "configure_evaluate": own_evaluate}
    result = start(type("Own", (base,), own)(), clients=5)
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], np.full(4, 2.0))
    assert result.evaluate_metrics_clientapp[2]["loss"] == 0.5
    if base is AdditiveStrategy:
        assert result.train_metrics_clientapp[2]["num-replies"] == 2


def test_a_subclass_may_write_the_messages_of_some_rounds_itself():
    class Own(AdditiveStrategy):
        def configure_train(self, server_round, arrays, config, grid):
            if server_round % 2:
                return super().configure_train(server_round, arrays, config, grid)
            return own_train(self, server_round, arrays, config, grid)

    # With a momentum the model that was sent does not cancel out.
    result = start(Own(server_optimizer=SGD(0.5, momentum=0.5)), num_rounds=4)
    plain = AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.5))
    assert result.arrays == start(plain, num_rounds=4).arrays
    replies = [m["num-replies"] for m in result.train_metrics_clientapp.values()]
    assert replies == [3, 2, 3, 2]


def test_a_subclass_may_ask_others_than_were_drawn():
    own = {"configure_train": others_too, "others": True}
    strategy = type("Own", (AdditiveStrategy,), own)(fraction_train=0.5)
    result = start(strategy, clients=6)
    assert result.train_metrics_clientapp[2]["num-replies"] == 4


PRIVATE = {
    "num_rounds": 2,
    "num_sampled_clients": 3,
    "population_size": 6,
    "noise_multiplier": 1.0,
}


@pytest.mark.parametrize(
    ("cls", "given", "configure", "text"),
    [
        (FedFish, {}, own_train, "the clients must be told the strategy's settings"),
        (MaxFL, {}, own_train, "the clients must be told the strategy's settings"),
        (FLASC, {}, own_train, "the clients must be told the strategy's settings"),
        (BoundedGroupLoss, GROUPS, own_train, "clients must be told the strategy's"),
        (DPFTRL, PRIVATE, own_train, "what the mechanism accounts for; choose a sam"),
        (DPFTRL, PRIVATE, others_too, "what the mechanism accounts for; choose a sam"),
    ],
)
def test_messages_that_a_strategy_depends_on_are_its_own(cls, given, configure, text):
    own = {"configure_train": configure, "others": True}
    app = ClientApp()
    app.train()(pytest.fail)
    with pytest.raises(ValueError, match=f"configure_train=.*Own's own.*{text}"):
        start(type("Own", (cls,), own)(**given), app, clients=6)


# Tasks and their settings ---------------------------------------------------------


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def columns(context):
    return {"x": torch.ones(9, 4), "y": torch.zeros(9, dtype=torch.int64)}


def learn(config=None, run_config=None, **parts):
    model = nn.Linear(4, 3)
    whole = {
        "model": lambda run_config: nn.Linear(4, 3),
        "data": lambda context: (columns(context), columns(context)),
        "loss": loss,
        **parts,
    }
    grid = LocalGrid(client_app(Task(**whole)), 2, run_config)
    return AdditiveStrategy().start(
        grid,
        to_record({k: v.numpy() for k, v in model.state_dict().items()}),
        num_rounds=1,
        train_config=ConfigRecord(config or {}),
    )


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"data": columns}, "the task's data='dict' must be .train, test."),
        ({"data": lambda c: ((1, 2), (3, 4))}, "the task's data='tuple' must be"),
        ({"data": lambda c: [[1, 2]] * 2}, "the task's data='list' must be"),
        ({"data": lambda c: ({"x": [1.0]},) * 2}, "column 'x'='list' must be a tensor"),
        ({"loss": lambda m, b: loss(m, b).mean()}, r"'loss' has shape \(\), must be"),
        ({"loss": lambda m, b: 0.5}, r"'loss' has shape .*, must be \(9,\)"),
    ],
)
def test_a_task_that_is_not_made_as_it_should_is_named(parts, text):
    with pytest.raises(EveryClientFailed, match=text):
        learn(**parts)


def test_a_model_in_place_of_its_function_and_a_function_of_a_task_are_named():
    with pytest.raises(ValueError, match="Task.model='Linear' must be a function"):
        learn(model=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="task=.* must be a Task"):
        client_app(lambda run_config: nn.Linear(4, 3))


def test_columns_may_be_numpys():
    plain = learn()
    arrays = {"x": np.ones((9, 4), np.float32), "y": np.zeros(9, int)}
    assert len(learn(data=lambda context: (arrays, arrays)).arrays) == len(plain.arrays)


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("learning_rate", "learning-rate"),
        ("LearningRate", "learning-rate"),
        ("LR", "lr"),
        ("local_epochs", "local-epochs"),
        ("batch_size", "batch-size"),
        ("max_gradient_norm", "max-gradient-norm"),
        ("Seed", "seed"),
    ],
)
@pytest.mark.parametrize("where", ["config", "run_config"])
def test_a_setting_in_another_spelling_is_said(key, right, where):
    text = f"configuration '{key}'=1 must be spelt '{right}'"
    with pytest.raises(EveryClientFailed, match=text):
        learn(**{where: {key: 1}})


def test_a_setting_that_is_nearly_right_is_warned_of_once(caplog):
    for _ in range(2):
        LocalSettings.read({"local-epoch": 3, "num-server-rounds": 4, "note": "x"})
    assert caplog.text.count("'local-epoch', the setting is called 'local-epochs'") == 1
    assert caplog.text.count("setting is called") == 1


def test_a_setting_in_both_spellings_is_read():
    settings = LocalSettings.read({"learning_rate": 9.0, "learning-rate": 0.5})
    assert settings.learning_rate == 0.5


@pytest.mark.parametrize("base", [AdditiveStrategy, FedAvg])
@pytest.mark.parametrize(
    ("hook", "returned", "text"),
    [
        ("configure_train", None, "configure_train's result=None must be an iterable"),
        ("configure_train", ["node"], "configure_train's messages='node' must be Mes"),
        ("configure_evaluate", None, "configure_evaluate's result=None must be an"),
        ("aggregate_train", None, "aggregate_train's result='NoneType' must be a pair"),
        ("aggregate_train", INITIAL, "'ArrayRecord' must be a pair of ArrayRecord and"),
        (
            "aggregate_train",
            ({}, None),
            "aggregate_train's result='dict' must be a pair",
        ),
        ("aggregate_train", (None, 0.5), "aggregate_train's result=0.5 must be a Met"),
        ("aggregate_evaluate", 0.5, "aggregate_evaluate's result=0.5 must be a Metric"),
    ],
)
def test_what_a_hook_of_ones_own_returns_is_named(base, hook, returned, text):
    kind = type("Mine", (base,), {hook: lambda self, *given: returned})
    with pytest.raises(ValueError, match=text):
        run_rounds(kind(), LocalGrid(growing(), 2), INITIAL, num_rounds=1)


def test_a_dict_of_metrics_of_a_hook_is_a_record():
    class Mine(FedAvg):
        def aggregate_evaluate(self, server_round, replies):
            return {"loss": 0.25}

    result = run_rounds(Mine(), LocalGrid(growing(), 2), INITIAL, num_rounds=1)
    assert result.evaluate_metrics_clientapp[1] == MetricRecord({"loss": 0.25})


# Tasks and their runs -----------------------------------------------------------------


def make(run_config):
    return nn.Linear(3, 2)


def data(context):
    batch = {"x": torch.ones(4, 3), "y": torch.zeros(4, dtype=torch.long)}
    return batch, batch


def losses(model, batch):
    x, y = batch["x"], batch["y"]
    return nn.functional.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"model": nn.Linear}, r"Task.model='Linear' must be a .* of \(run_config\)"),
        (
            {"model": lambda: make({})},
            r"Task.model='<lambda>' .*lambda run_config:",
        ),
        (
            {"data": lambda: data(None)},
            r"Task.data=.* must be a .* of \(context\)",
        ),
        ({"loss": lambda batch: 0}, r"Task.loss=.* must be .* of \(model, batch\)"),
        ({"metrics": lambda x: {}}, r"Task.metrics=.* must be .* of \(model, batch\)"),
    ],
)
def test_functions_of_a_task_are_looked_at_before_a_client_runs(changed, text):
    task = Task(**{"model": make, "data": data, "loss": losses, **changed})
    with pytest.raises(ValueError, match=text):
        client_app(task)


def test_functions_of_a_task_may_be_objects_with_further_defaults():
    class Make:
        def __call__(self, run_config, width=1.0):
            return make(run_config)

    task = Task(Make(), data, functools.partial(losses), lambda *both: {})
    assert isinstance(client_app(task), ClientApp)


def test_metrics_that_are_no_dict_are_named(caplog):
    task = Task(make, data, losses, lambda model, batch: batch["y"])
    start(app=client_app(task), initial_arrays=ArrayRecord(make({}).state_dict()))
    assert "Task.metrics(...)='Tensor' must be a dict: one value" in caplog.text


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(2, 2), r"it makes: 'weight' \(2, 2\), not \(2, 3\)$"),
        (
            nn.Sequential(nn.Linear(3, 2)),
            r"missing \['bias', .*unknown \['0.bias',",
        ),
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_arrays_of_another_model_are_told_from_those_of_the_task(model, says, private):
    """By a silo that trains privately, too, and in no words but the package's own."""
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-2, clipping_norm=1.0)
    trainer = DPSGD(privacy) if private else Plain()
    app = client_app(Task(make, data, losses), trainer=trainer)
    initial = ArrayRecord(model.state_dict())
    with pytest.raises(EveryClientFailed, match="not those of Task.model; ") as caught:
        start(app=app, initial_arrays=initial, num_rounds=1)
    reason = str(caught.value).partition("\n")[0]
    assert re.search(says, reason)
    assert "loading state_dict" not in str(caught.value)


def test_a_run_config_that_is_no_dict_is_refused():
    server = ServerApp()
    server.main()(pytest.fail)
    app = client_app(Task(make, data, losses))
    for run in (
        lambda: run_local(server, app, run_config="."),
        lambda: LocalGrid(app, 2, ["lr"]),
    ):
        with pytest.raises(ValueError, match=r"run_config=.* must be a dict: app_"):
            run()


def test_rounds_without_clients_are_explained_once(caplog):
    strategy = AdditiveStrategy(sampler=MinSeparationSampler(3, seed=0))
    start(strategy, num_rounds=6)
    told = [r for r in caplog.records if "asks nobody" in r.getMessage()]
    assert len(told) == 1
    assert "Round 2 asks nobody" in told[0].getMessage()
    assert "3 connected clients has taken part less than" in told[0].getMessage()
    caplog.clear()
    # A round with some, if fewer than it should have, is none of these.
    strategy = AdditiveStrategy(0.7, sampler=MinSeparationSampler(2, seed=0))
    start(strategy, num_rounds=6)
    assert "asks nobody" not in caplog.text
