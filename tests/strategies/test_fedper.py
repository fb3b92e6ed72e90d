"""FedPer: its two limits, a closed form, who sends what, and what one model cannot."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import DPSGD, AdditiveStrategy, Mechanism, Task, client_app
from flower_ext.client.parts import PART
from flower_ext.client.personal import PERSONAL
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.parts import PERSONAL_START
from flower_ext.core.sampling import UniformSampler
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.optimizers import Adam, TorchOptimizer
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FedPer, FedPerClient, LocalOnly, LocalOnlyClient
from flower_ext.wire import NF4, BFloat16, Chain, ErrorFeedback, TopK

CONFIG = {"batch-size": 4, "lr": 0.1, "momentum": 0.9}
COUNTER = "norm.num_batches_tracked"


def run(strategy, app, initial, clients=3, rounds=3, config=CONFIG):
    return strategy.start(LocalGrid(app, clients, config), initial, num_rounds=rounds)


def kept(calls, client, group=PART):
    """Return what a client kept after its last call."""
    last = [call for call in calls if call.client == client][-1]
    return from_record(last.state[PERSONAL + group])


# The limits -------------------------------------------------------------------------


def test_with_nothing_personal_that_matters_it_is_fedavg_bit_for_bit(task, initial):
    """BatchNorm's counter is of no consequence to a layer with a momentum."""
    app = client_app(task, FedPerClient)
    ours = run(FedPer(personal=COUNTER), app, initial)
    theirs = run(AdditiveStrategy(), app, initial)
    for name, array in theirs.arrays.items():
        assert (ours.arrays[name].data == array.data) == (name != COUNTER)
    for number, metrics in theirs.evaluate_metrics_clientapp.items():
        assert ours.evaluate_metrics_clientapp[number]["loss"] == metrics["loss"]
    assert ours.arrays[COUNTER].data == initial[COUNTER].data


def test_with_nothing_shared_that_matters_it_is_local_training(task, spied):
    def with_spare(config):
        model = task.model(config)
        model.spare = nn.Parameter(torch.zeros(1))
        return model

    spare = dataclasses.replace(task, model=with_spare)
    torch.manual_seed(0)
    initial = to_record({n: x.numpy() for n, x in with_spare({}).state_dict().items()})
    app, calls = spied(client_app(spare, FedPerClient, LocalOnlyClient))
    ours = run(FedPer(personal=lambda name: name != "spare"), app, initial)
    models = [kept(calls, i) for i in range(3)]
    theirs = run(LocalOnly(), app, initial)
    for i, model in enumerate(models):
        alone = kept(calls, i, "model")
        assert alone.pop("spare") == 0
        assert model.keys() == alone.keys()
        for name, x in alone.items():
            assert np.array_equal(model[name], x)
    for number, metrics in theirs.evaluate_metrics_clientapp.items():
        assert ours.evaluate_metrics_clientapp[number]["loss"] == metrics["loss"]


def test_two_rounds_by_hand(linear_task, spied):
    """Full-batch steps on ``(y - x w - b)^2 / 2``, in NumPy; b stays with clients."""
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.standard_normal((n, 2)), "y": rng.standard_normal(n) + n}
        for n in (4, 6)
    ]
    app, calls = spied(client_app(linear_task(data, 2, bias=True), FedPerClient))
    w, start = np.array([[0.5, -1.0]]), np.array([0.25])
    initial = to_record({"weight": np.float32(w), "bias": np.float32(start)})
    config = {"lr": 0.1, "batch-size": 10, "local-epochs": 3}
    result = run(FedPer(personal="bias"), app, initial, 2, 2, config)
    own = [start.copy(), start.copy()]
    for _ in range(2):
        bodies = []
        for i, columns in enumerate(data):
            body = w.copy()
            for _ in range(3):
                gap = columns["x"] @ body[0] + own[i] - columns["y"]
                gradient = gap @ columns["x"] / len(gap)
                own[i] = own[i] - 0.1 * gap.mean()
                body = body - 0.1 * gradient
            bodies.append(body)
        w = (4 * bodies[0] + 6 * bodies[1]) / 10
    np.testing.assert_allclose(result.arrays["weight"].numpy(), w, rtol=1e-5)
    assert result.arrays["bias"].numpy() == 0.25
    for i in range(2):
        np.testing.assert_allclose(kept(calls, i)["bias"], own[i], rtol=1e-5)


# What one model cannot --------------------------------------------------------------


def two_populations():
    """Return a task whose clients agree on features, and not on which label is 1."""

    def data(context):
        client = context.node_config["partition-id"]
        generator = torch.Generator().manual_seed(client)
        x = torch.randn(60, 2, generator=generator)
        y = (x[:, 0] > x[:, 1]).long()
        columns = {"x": x, "y": 1 - y if client % 2 else y}
        return [
            {n: c[part] for n, c in columns.items()}
            for part in (slice(40), slice(40, 60))
        ]

    def model(config):
        net = nn.Sequential()
        net.add_module("body", nn.Sequential(nn.Linear(2, 12), nn.Tanh()))
        net.add_module("head", nn.Linear(12, 2))
        return net

    def loss(model, batch):
        return nn.functional.cross_entropy(
            model(batch["x"]), batch["y"], reduction="none"
        )

    def metrics(model, batch):
        return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}

    torch.manual_seed(1)
    start = {name: x.numpy() for name, x in model({}).state_dict().items()}
    return Task(model, data, loss, metrics), to_record(start)


def test_a_shared_body_with_own_heads_does_what_one_model_cannot():
    task, initial = two_populations()
    app = client_app(task, FedPerClient)
    config = {"lr": 0.5, "batch-size": 20, "local-epochs": 2}
    found = {
        name: run(strategy, app, initial, 4, 6, config).evaluate_metrics_clientapp[6]
        for name, strategy in (
            ("own heads", FedPer(personal="head.*")),
            ("one model", AdditiveStrategy()),
        )
    }
    assert found["own heads"]["accuracy"] > 0.95
    assert found["own heads"]["accuracy-seen-p10"] > 0.9
    assert found["one model"]["accuracy"] < 0.65  # half of the clients want the other


# Who sends what ---------------------------------------------------------------------


class Watched(LocalGrid):
    """Keeps all messages, both ways."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        for sent, log in ((messages, "down"), (replies, "up")):
            for message in sent:
                node = message.metadata.src_node_id
                node = message.metadata.dst_node_id if log == "down" else node
                kind = message.metadata.message_type
                self.__dict__.setdefault(log, []).append((node, kind, message.content))
        return replies


@pytest.mark.parametrize("codecs", [False, True])
def test_what_is_personal_never_travels_up_and_once_down(task, initial, spied, codecs):
    options = {}
    if codecs:
        options = {
            "download": BFloat16(),
            "upload": ErrorFeedback(Chain(TopK(0.5), NF4())),
        }
    app, calls = spied(client_app(task, FedPerClient))
    grid = Watched(app, 3, CONFIG)
    strategy = FedPer(personal=["out.*", "norm.*"], **options)
    result = strategy.start(grid, initial, num_rounds=3)
    assert result.train_metrics_clientapp[3]["num-replies"] == 3
    own = {name for name in initial if name.startswith(("out.", "norm."))}
    for node, _, content in grid.up:
        assert set(content.array_records) <= {"arrays"}
        for record in content.array_records.values():
            assert not own & record.keys()
            octets = b"".join(array.data for array in record.values())
            for call in calls:
                if call.client == node - 1000:
                    for x in from_record(call.state[PERSONAL + PART]).values():
                        assert x.size < 3 or x.tobytes() not in octets
    first = [content for _, kind, content in grid.down if kind == "train"]
    for i, content in enumerate(first):
        assert not own & content["arrays"].keys()
        assert (PERSONAL_START in content) == (i < 3)
    for content in first[:3]:  # whatever the codec does to what is shared
        for name, array in content[PERSONAL_START].items():
            assert array.data == initial[name].data
    for name in own:
        assert result.arrays[name].data == initial[name].data
    heads = [kept(calls, i)["out.weight"] for i in range(3)]
    assert not np.allclose(heads[0], heads[1], atol=1e-3)


def test_what_is_sent_is_without_the_personal_arrays(task, initial):
    """Fewer bytes by exactly those of the personal arrays, once clients have theirs."""
    app = client_app(task, FedPerClient)
    grids = [Watched(app, 2, CONFIG) for _ in range(2)]
    FedPer(personal="out.*").start(grids[0], initial, num_rounds=2)
    AdditiveStrategy().start(grids[1], initial, num_rounds=2)
    size = sum(len(initial[name].data) for name in ("out.weight", "out.bias"))

    def octets(entry):
        return sum(
            len(a.data) for r in entry[2].array_records.values() for a in r.values()
        )

    for log, expected in (("up", [size, size]), ("down", [0, size])):
        ours, plain = (
            [octets(e) for e in getattr(grid, log) if e[1] == "train"][::2]
            for grid in grids
        )
        assert [b - a for a, b in zip(ours, plain, strict=True)] == expected


def test_clients_evaluate_their_own_and_new_ones_the_first(task, initial):
    strategy = FedPer(
        personal="out.*", fraction_train=0.5, sampler=UniformSampler(seed=1)
    )
    seen = []

    def look(replies, round):
        seen.append(
            {r.client: (r.number("loss"), r.client in round.trained) for r in replies}
        )
        return {}

    strategy.report_evaluate = look
    app = client_app(task, FedPerClient)
    result = run(strategy, app, initial, 4, 1)
    # Whoever was not asked measures the new body under the head of the initial model.
    server = AdditiveStrategy(fraction_train=0.0)
    plain = []
    server.report_evaluate = lambda replies, round: (
        plain.append({r.client: r.number("loss") for r in replies}) or {}
    )
    run(server, app, result.arrays, 4, 1)
    for client, (loss, asked) in seen[0].items():
        assert (loss == plain[0][client]) != asked


def test_a_client_that_failed_or_lost_its_state_goes_on(task, initial):
    """A client that has not answered is sent the first arrays again."""
    inner = client_app(task, FedPerClient)
    begun = []

    def answer(message, context):
        number = message.content["config"]["server-round"]
        client = context.node_config["partition-id"]
        if message.metadata.message_type == "train":
            begun.append((number, client, PERSONAL_START in message.content))
            if (number, client) == (1, 0):
                raise OSError("at the first time")
            if (number, client) == (3, 1):
                context.state.clear()
        return inner(message, context)

    app = ClientApp()
    app.train()(answer)
    app.evaluate()(answer)
    result = run(FedPer(personal="out.*"), app, initial, 2, 3)
    assert [x for x in begun if x[2]] == [(1, 0, True), (1, 1, True), (2, 0, True)]
    errors = [m["num-errors"] for m in result.train_metrics_clientapp.values()]
    assert errors == [1, 0, 0]


def test_the_servers_optimizer_leaves_personal_arrays_alone(task, initial):
    """Also one that lets all weights decay."""
    app = client_app(task, FedPerClient)

    def decaying(parameters):
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)

    for optimizer in (TorchOptimizer(decaying), Adam(0.1)):
        strategy = FedPer(personal="out.*", server_optimizer=optimizer)
        result = run(strategy, app, initial, 2, 2)
        for name, array in initial.items():
            same = result.arrays[name].data == array.data
            assert same == name.startswith("out.")


def test_a_mechanism_noises_what_is_shared_only(task, initial):
    mechanism = Mechanism(
        num_rounds=2,
        num_sampled_clients=3,
        population_size=3,
        noise_multiplier=1.0,
        target_delta=1e-2,
        seed=1,
    )
    strategy = FedPer(personal=["out.*", "norm.*"], mechanism=mechanism)
    sent = from_record(initial)
    assert strategy.zero(sent).arrays["delta"].keys() == {
        "hidden.weight",
        "hidden.bias",
        "scale",
    }
    result = run(strategy, client_app(task, FedPerClient), initial, rounds=2)
    assert result.train_metrics_clientapp[2]["num-errors"] == 0
    for name, array in initial.items():
        own = name.startswith(("out.", "norm."))
        assert (result.arrays[name].data == array.data) == own


def test_silos_train_both_parts_by_dp_sgd(linear_task, spied):
    data = [{"x": np.ones((20, 1)) * i, "y": np.ones(20)} for i in range(2)]
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-3, clipping_norm=1.0, seed=3)
    task = linear_task(data, 1, bias=True)
    app, calls = spied(client_app(task, FedPerClient, trainer=DPSGD(privacy)))
    initial = to_record(
        {"weight": np.ones((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    )
    config = {"lr": 0.1, "batch-size": 10, "local-epochs": 1}
    result = run(FedPer(personal="bias"), app, initial, 2, 2, config)
    spent = result.train_metrics_clientapp
    assert spent[2]["num-errors"] == 0
    assert 0 < spent[1]["example-epsilon"] < spent[2]["example-epsilon"]
    assert kept(calls, 0)["bias"] != kept(calls, 1)["bias"] != 0


def test_adapters_split_by_their_names(tiny_bert, spied):
    import peft

    from flower_ext.client.adapters import AdapterModel

    config = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False
    )
    make = AdapterModel(tiny_bert, config, num_labels=2)

    def data(context):
        generator = torch.Generator().manual_seed(context.node_config["partition-id"])
        ids = torch.randint(5, 12, (8, 4), generator=generator)
        columns = {"input_ids": ids, "labels": (ids[:, 0] > 8).long()}
        return columns, columns

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    torch.manual_seed(0)
    initial = to_record({n: x.numpy() for n, x in make({}).state_dict().items()})
    app, calls = spied(client_app(Task(make, data, loss), FedPerClient))
    result = run(FedPer(personal="*lora_B*"), app, initial, 2, 2)
    assert result.train_metrics_clientapp[2]["num-errors"] == 0
    for call in calls:
        if call.kind == "train":
            assert not any("lora_B" in name for name in call.reply["arrays"])
            assert any("lora_A" in name for name in call.reply["arrays"])
    own = [kept(calls, i) for i in range(2)]
    assert own[0] and all("lora_B" in name for name in own[0])
    assert any(not np.array_equal(own[0][name], own[1][name]) for name in own[0])


# What is refused --------------------------------------------------------------------


class Silent(LocalGrid):
    """No message may reach it."""

    def push_messages(self, messages):
        assert not list(messages)
        return []


@pytest.mark.parametrize(
    ("personal", "words"),
    [
        ("head.*", "personal='head.*' must be a filter that matches arrays"),
        (["out.*", "nrom.*"], "personal='nrom.*' must be a filter that matches"),
        ("*", "personal='*' must be a filter that leaves others"),
        # What is left is a counter, which says nothing.
        (lambda name: name != COUNTER, "it leaves none that is trained"),
    ],
)
def test_a_filter_of_nothing_or_all_is_refused_before_anything_runs(
    task, initial, personal, words
):
    grid = Silent(client_app(task, FedPerClient), 2)
    for fraction in (1.0, 0.0):
        strategy = FedPer(personal=personal, fraction_train=fraction)
        with pytest.raises(ValueError, match=re.escape(words)):
            strategy.start(grid, initial, num_rounds=1)


def test_a_tie_between_a_shared_and_a_personal_array_is_refused(task):
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    initial = to_record({"embed.weight": table, "mid": table + 1, "head.weight": table})
    grid = Silent(client_app(task, FedPerClient), 2)
    words = "matches both 'embed.weight' and 'head.weight', or none: they are equal"
    with pytest.raises(ValueError, match=words):
        FedPer(personal="head.*").start(grid, initial, num_rounds=1)
    names = FedPer(personal=["head.*", "embed.*"]).personal_names(from_record(initial))
    assert names == ["embed.weight", "head.weight"]


def test_a_half_whose_server_names_nothing_says_so(task, initial):
    class Unnamed(AdditiveStrategy):
        client_half = FedPerClient

    grid = LocalGrid(client_app(task, FedPerClient), 2, CONFIG)
    strategy = Unnamed()
    messages = list(strategy.configure_train(1, initial, ConfigRecord(), grid))
    errors = [reply.error.reason for reply in grid.send_and_receive(messages)]
    assert all("config['personal-arrays']=[] must be names" in text for text in errors)
