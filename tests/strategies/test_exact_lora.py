"""StackedLoRA, FlexLoRA, FedExLoRA: against dense sums, torch, peft, and each other."""

import pickle
from copy import deepcopy
from functools import partial
from operator import attrgetter

import numpy as np
import peft
import pytest
import torch
import transformers
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext.client.adapters import AdapterModel, adapter_task
from flower_ext.client.app import client_app
from flower_ext.client.lora import load_whole
from flower_ext.client.stacked import Stacked
from flower_ext.client.task import Task
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.lora import pairs, split_base
from flower_ext.privacy import Mechanism
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.server.tracking import Tracker, read_metrics
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import (
    FedExLoRA,
    FedExLoRAClient,
    FlexLoRA,
    FlexLoRAClient,
    StackedLoRA,
    StackedLoRAClient,
)
from flower_ext.strategies.flasc import FLASCClient
from flower_ext.wire import NF4, Chain, ErrorFeedback, Exact, TopK

HALVES = (StackedLoRAClient, FlexLoRAClient, FedExLoRAClient, FLASCClient)
RANK, ALPHA = 4, 6
EXACT = [StackedLoRA, FedExLoRA]
ALL = [*EXACT, FlexLoRA]
TIERS = partial(StackedLoRA, ranks=(1, 4))
QUIET = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}
STEPS = {"lr": 0.5, "batch-size": 4, "local-epochs": 3}


def lora(**options):
    settings = {"r": RANK, "lora_alpha": ALPHA, "task_type": "SEQ_CLS"}
    return peft.LoraConfig(
        **{**settings, "target_modules": ["query", "value"], **options}
    )


def mails(context, clients=3):
    """Examples that differ from client to client, and are of other numbers."""
    client = int(context.node_config["partition-id"]) % clients
    generator = torch.Generator().manual_seed(client)
    ids = torch.randint(5, 12, (6 + 2 * client, 5), generator=generator)
    columns = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": (ids[:, client % 5] > 8).long(),
    }
    return columns, columns


@pytest.fixture(scope="module")
def model(tiny_bert):
    return AdapterModel(tiny_bert, lora())


@pytest.fixture(scope="module")
def plain_app(model):
    return client_app(adapter_task(model, mails), *HALVES)


def driven_apart(app, alike=False):
    """Let factors move further than a random network moves them, each its own way."""

    def answer(message, context):
        reply = app(message, context)
        record = reply.content["arrays"]
        client = 0 if alike else int(context.node_config["partition-id"])
        server_round = message.content["config"]["server-round"]
        for i, (name, x) in enumerate(from_record(record).items()):
            if "lora_" in name:
                rng = np.random.default_rng([client, server_round, i])
                moved = x + 0.3 * rng.standard_normal(x.shape)
                record[name] = Array(moved.astype(np.float32))
        return reply

    wrapped = ClientApp()
    wrapped.train()(answer)
    return wrapped


@pytest.fixture(scope="module")
def app(plain_app):
    return driven_apart(plain_app)


class Tapped(LocalGrid):
    """Keeps what travelled, round by round."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if not messages:
            return []
        replies = list(super().send_and_receive(messages, timeout=timeout))
        for name, found in (("sent", messages), ("got", replies)):
            # Copies, since the server lets go of arrays that it has read.
            node = attrgetter(f"metadata.{'dst' if name == 'sent' else 'src'}_node_id")
            contents = {
                node(m): RecordDict({k: r.copy() for k, r in m.content.items()})
                for m in sorted(found, key=node)
                if m.has_content()
            }
            setattr(self, name, [*getattr(self, name, []), contents])
        return replies


class Played:
    """A run of some clients: what the whole model was after every round."""

    def __init__(self, strategy, app, model, rounds=3, clients=3, **start):
        self.strategy, self.model = strategy, model
        self.grid, self.wholes = Tapped(app, clients, STEPS), []

        def look(server_round, arrays):
            whole = getattr(strategy, "whole", lambda x: x)
            self.wholes.append(whole(arrays).to_torch_state_dict())

        self.result = strategy.start(
            self.grid,
            ArrayRecord(model({}).state_dict()),
            rounds,
            evaluate_fn=look,
            **start,
        )

    def weights(self, number=-1):
        """The weights of the whole model after a round, as peft merges them."""
        return merged(self.model, self.wholes[number])

    def replies(self, number):
        """What clients sent in a round, from 1: (examples, arrays)."""
        return [
            (content["metrics"]["num-examples"], from_record(content["arrays"]))
            for content in self.grid.got[number - 1].values()
        ]


def merged(model, arrays):
    """Return the weights in float64, by peft's own merge."""
    whole = deepcopy(model({}))  # to merge writes into the weights
    load_whole(whole, arrays)
    whole = whole.double().merge_and_unload()
    return {name: p.detach().numpy() for name, p in whole.named_parameters()}


def frozen(model, arrays):
    """Return the base with its changes, and without the adapter."""
    without = {n: 0 * x if "lora_B" in n else x for n, x in arrays.items()}
    return merged(model, without)


def dense_mean(replies):
    """Return the mean of the scaled products by the weights' names, in float64."""
    total, found = sum(n for n, _ in replies), {}
    for examples, arrays in replies:
        for a, b in pairs(arrays):
            name = a.partition(".lora_A.")[0].removeprefix("base_model.model.")
            scale = ALPHA / len(arrays[a])
            product = arrays[b].astype(np.float64) @ arrays[a].astype(np.float64)
            key = name + ".weight"
            found[key] = found.get(key, 0) + examples / total * scale * product
    return found


# The mean is exact -------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        FedExLoRA,
        StackedLoRA,
        partial(StackedLoRA, ranks=(1, 2, 4)),
        partial(StackedLoRA, ranks=(4, 2), rank_of=lambda client: [2, 4, 2][client]),
    ],
)
def test_the_model_moves_by_the_mean_of_the_products(make, model, app):
    run = Played(make(lora_alpha=ALPHA, **QUIET), app, model)
    for number in (1, 2, 3):
        before = frozen(model, run.wholes[number - 1])
        after, mean = run.weights(number), dense_mean(run.replies(number))
        assert len(mean) == 4
        for name, x in mean.items():
            assert np.linalg.norm(x) > 1e-3
            np.testing.assert_allclose(after[name] - before[name], x, atol=3e-7)
        # The head is averaged.
        replies = run.replies(number)
        head = next(n for n in replies[0][1] if "classifier" in n)
        total = sum(n for n, _ in replies)
        expected = sum(n * arrays[head] for n, arrays in replies) / total
        np.testing.assert_allclose(run.wholes[number][head], expected, atol=1e-6)
    # Dense averaging would not have been it.
    a, b = pairs(replies[0][1])[0]
    if replies[0][1][a].shape == replies[1][1][a].shape:
        means = [sum(n * arrays[k] for n, arrays in replies) / total for k in (a, b)]
        gap = next(iter(mean.values())) - ALPHA / len(means[0]) * means[1] @ means[0]
        assert np.linalg.norm(gap) > 1e-3


@pytest.mark.parametrize("ranks", [(), (1, 2, 4), (4, 3)])
def test_flex_lora_is_the_best_of_every_rank(ranks, model, app):
    strategy = FlexLoRA(lora_alpha=ALPHA, ranks=ranks, **QUIET)
    run = Played(strategy, app, model, rounds=2)
    for number in (1, 2):
        mean = dense_mean(run.replies(number))
        new = {n: x.numpy() for n, x in run.wholes[number].items()}
        lost = whole = 0.0
        for a, b in pairs(new):
            name = a.partition(".lora_A.")[0].removeprefix("base_model.model.")
            u, s, v = torch.linalg.svd(torch.from_numpy(mean[name + ".weight"]))
            best = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
            found = ALPHA / RANK * new[b].astype(float) @ new[a].astype(float)
            np.testing.assert_allclose(found, best, atol=2e-7)
            lost += float((s[RANK:] ** 2).sum())
            whole += float((s**2).sum())
            # All rows can learn, and are as long as the clients' are.
            lengths = np.linalg.norm(new[a], axis=1)
            assert lengths == pytest.approx(np.full(RANK, lengths[0]), rel=1e-5)
            theirs = [arrays[a] for _, arrays in run.replies(number)]
            rms = [np.sqrt((x**2).sum() / len(x)) for x in theirs]
            assert (
                min(rms) <= lengths[0] * (1 + 1e-6) and lengths[0] <= max(rms) * 1.001
            )
        metrics = run.result.train_metrics_clientapp[number]
        share = metrics["discarded-share"]
        assert share == pytest.approx(np.sqrt(lost / whole), rel=1e-4) and share > 1e-3
    # What clients of fewer ranks were sent is the best of theirs, in their scaling.
    server = {n: x.numpy() for n, x in run.wholes[1].items()}
    for place, content in enumerate(run.grid.sent[1].values()):
        own = from_record(content["arrays"])
        rank = ranks[place % len(ranks)] if ranks else RANK
        assert content["config"]["lora-rank"] == rank
        for a, b in pairs(server):
            u, s, v = np.linalg.svd(ALPHA / RANK * server[b] @ server[a])
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            assert own[a].shape == (rank, 16)
            found = ALPHA / rank * own[b] @ own[a]
            np.testing.assert_allclose(found, best, atol=1e-6)


def test_stacking_is_pefts_cat(model, app, tiny_bert):
    ranks = (1, 2, 4)
    strategy = StackedLoRA(lora_alpha=ALPHA, ranks=ranks, **QUIET)
    run = Played(strategy, app, model, rounds=1)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    theirs, shares = None, []
    for k, (examples, arrays) in enumerate(run.replies(1)):
        config = lora(r=ranks[k], modules_to_save=None)
        config.task_type = None
        if theirs is None:
            theirs = peft.get_peft_model(base, config, adapter_name=f"c{k}")
        else:
            theirs.add_adapter(f"c{k}", config)
        named = {
            n.replace(".default.", f".c{k}."): torch.from_numpy(x.copy())
            for n, x in arrays.items()
            if "lora_" in n
        }
        missing = theirs.load_state_dict(named, strict=False)
        assert not missing.unexpected_keys
        shares.append(examples)
    shares = [n / sum(shares) for n in shares]
    names = [f"c{k}" for k in range(3)]
    theirs.add_weighted_adapter(names, shares, "all", combination_type="cat")
    ours, before = run.weights(), merged(model, run.wholes[0])
    count = 0
    for name, layer in theirs.named_modules():
        if hasattr(layer, "get_delta_weight"):
            key = name.removeprefix("base_model.model.") + ".weight"
            delta = layer.get_delta_weight("all").detach().numpy()
            np.testing.assert_allclose(ours[key] - before[key], delta, atol=3e-7)
            count += 1
    assert count == 4


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("make", [StackedLoRA, FlexLoRA])
def test_every_rank_has_its_scaling(make, use_rslora, tiny_bert):
    """Clients of other ranks that end up with one function: the server has it, too."""
    model = AdapterModel(tiny_bert, lora(use_rslora=use_rslora))
    target = np.random.default_rng(0).standard_normal((16, 16))
    u, s, v = np.linalg.svd(target)
    one = s[0] * np.outer(u[:, 0], v[0])

    def answer(message, context):
        # Of every client the same product of rank 1, in its own scaling as peft has it.
        rank = message.content["config"]["lora-rank"]
        own = model({"lora-rank": rank})
        state = {n: x.numpy().copy() for n, x in own.state_dict().items()}
        for a, b in pairs(state):
            layer = own.get_submodule(a.partition(".lora_A.")[0])
            state[a][:], state[b][:] = 0, 0
            state[a][0], state[b][:, 0] = (
                v[0],
                s[0] * u[:, 0] / layer.scaling["default"],
            )
        content = RecordDict({"arrays": to_record(state), "metrics": METRICS})
        return Message(content, reply_to=message)

    clients = ClientApp()
    clients.train()(answer)
    strategy = make(lora_alpha=ALPHA, use_rslora=use_rslora, ranks=(1, 2, 4), **QUIET)
    run = Played(strategy, clients, model, rounds=1)
    after, before = run.weights(), merged(model, run.wholes[0])
    moved = [name for name, x in after.items() if np.abs(x - before[name]).max() > 1e-3]
    assert len([name for name in moved if "attention" in name]) == 4
    for name in moved:
        if "attention" in name:
            np.testing.assert_allclose(after[name] - before[name], one, atol=1e-5)


METRICS = MetricRecord({"num-examples": 5.0})


# Limits --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alike(model):
    """Clients of the same examples, which end up at the same adapter."""
    task = adapter_task(model, partial(mails, clients=1))
    return driven_apart(client_app(task, *HALVES), alike=True)


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("make", [FedExLoRA, FlexLoRA])
def test_clients_that_are_alike_are_averaged(make, clients, model, alike):
    run = Played(make(lora_alpha=ALPHA, **QUIET), alike, model, 2, clients)
    plain = Played(AdditiveStrategy(**QUIET), alike, model, 1, clients)
    for name, x in plain.weights(1).items():
        np.testing.assert_allclose(run.weights(1)[name], x, atol=2e-7)
    if make is FedExLoRA:
        # Nothing is left for the base: that of a client is what it was.
        assert not split_base(run.wholes[-1])[1]
        again = Played(AdditiveStrategy(**QUIET), alike, model, 2, clients)
        for name, x in again.wholes[-1].items():
            np.testing.assert_allclose(run.wholes[-1][name], x, atol=1e-6)


def test_flex_lora_of_one_client_keeps_its_product(model, alike):
    run = Played(FlexLoRA(lora_alpha=ALPHA, **QUIET), alike, model, 1, 1)
    [(_, arrays)] = run.replies(1)
    arrays = {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}
    for name, x in merged(model, arrays).items():
        np.testing.assert_allclose(run.weights()[name], x, atol=2e-7)


def test_who_trains_nothing_changes_nothing(model, plain_app, monkeypatch):
    monkeypatch.setitem(STEPS, "lr", 0.0)
    for make in ALL:
        run = Played(make(lora_alpha=ALPHA, **QUIET), plain_app, model, 1)
        for name, x in merged(model, run.wholes[0]).items():
            np.testing.assert_allclose(run.weights()[name], x, atol=1e-7)


# The base -----------------------------------------------------------------------


class Watching:
    """Halves that note the frozen weights that they train on."""

    def __init__(self, half):
        self.seen = seen = {}

        class Half(half):
            def begin(self, local):
                layers = dict(local.model.named_parameters())
                seen[local.server_round, local.client] = {
                    name.replace(".base_layer", "").removeprefix("base_model.model."): (
                        p.detach().numpy().copy()
                    )
                    for name, p in layers.items()
                    if not p.requires_grad
                }

        self.half = Half


@pytest.mark.parametrize("make", EXACT)
def test_who_was_not_asked_has_the_servers_base(make, model):
    watched = Watching(make.client_half)
    clients = driven_apart(client_app(adapter_task(model, mails), watched.half))
    strategy = make(lora_alpha=ALPHA, fraction_train=0.5, **QUIET)
    run = Played(strategy, clients, model, rounds=4, clients=4)
    asked = {client for _, client in watched.seen}
    assert len(asked) == 4 and len(watched.seen) == 8
    for (server_round, _), weights in watched.seen.items():
        expected = frozen(model, run.wholes[server_round - 1])
        for name in expected.keys() & weights.keys():
            np.testing.assert_allclose(weights[name], expected[name], atol=2e-7)
    first, last = (frozen(model, run.wholes[i]) for i in (0, 3))
    assert any(np.abs(x - first[name]).max() > 0.1 for name, x in last.items())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("make", EXACT)
def test_no_client_leaves_its_base_to_others(make, shared, model, monkeypatch):
    """Also where a task hands out one and the same model, and where a client fails."""
    task = adapter_task(model, mails)
    if shared:
        one = model({})
        task = Task(lambda config: one, task.data, task.loss)
    first = task.model({})
    before = {name: p.detach().clone() for name, p in first.named_parameters()}

    class Failing(make.client_half):
        def after_training(self, local):
            if (local.server_round, local.client) == (2, 1):
                raise RuntimeError("on purpose")

    clients = driven_apart_if_good(client_app(task, Failing))
    run = Played(make(lora_alpha=ALPHA, **QUIET), clients, model)
    assert run.result.train_metrics_clientapp[2]["num-errors"] == 1
    assert split_base(run.wholes[-1])[1]
    for other in (first, task.model({})):
        for name, p in other.named_parameters():
            if not p.requires_grad:
                assert torch.equal(p, before[name]), name
    # And FedAvg after it is the FedAvg that it would have been.
    plain = client_app(task, Failing)
    after = Played(AdditiveStrategy(**QUIET), plain, model, 1)
    fresh = client_app(adapter_task(model, mails))
    expected = Played(AdditiveStrategy(**QUIET), fresh, model, 1)
    for name, x in expected.wholes[-1].items():
        assert torch.equal(after.wholes[-1][name], x)


def driven_apart_if_good(app):
    def answer(message, context):
        reply = app(message, context)
        return far(message, context) if reply.has_content() else reply

    far = driven_apart(app).__call__
    wrapped = ClientApp()
    wrapped.train()(answer)
    return wrapped


@pytest.mark.parametrize("make", EXACT)
def test_the_base_travels_as_whatever_is_less(make, model, app, tmp_path):
    """Factors while they are few numbers, then the weight; what is counted is sent."""
    options = {"ranks": (1,)} if make is StackedLoRA else {}
    strategy = make(lora_alpha=ALPHA, **options, **QUIET)
    tracker = Tracker(tmp_path, tensorboard=False)
    run = Played(strategy, app, model, 5, 2, tracker=tracker)
    ranks = []
    for number, whole in enumerate(run.wholes[:-1], 1):
        sizes = [x.numel() for n, x in whole.items() if "query.base_" in n]
        for content in run.grid.sent[number - 1].values():
            own = from_record(content["arrays"])
            base = split_base(own)[1]
            assert base.keys() == split_base(whole)[1].keys()
            for name, x in base.items():
                assert np.array_equal(x, whole[name]) and x.dtype == np.float32
            # A new adapter is drawn from a seed.
            assert any("lora_" in n for n in own) == (make is FedExLoRA)
        ranks.append(sum(sizes) / 2 / (16 + 16))
        row = read_metrics(tmp_path)[number - 1]
        one = [
            sum(len(x.data) for x in c["arrays"].values())
            for c in run.grid.sent[number - 1].values()
        ]
        assert 0 <= row["bytes/down"] - sum(one) < 4000 * len(one)
    # Two clients of rank 1: two more ranks a round, and 16 x 16 from rank 8 on. Of
    # rank 4, eight ranks at most, of which FedEx-LoRA leaves the mean's to the adapter.
    expected = {StackedLoRA: [0, 2, 4, 6, 8], FedExLoRA: [0, 4, 8, 8, 8]}
    assert ranks == expected[make]
    assert any(n.endswith("query.base_left") for n in run.wholes[1])
    assert any(n.endswith("query.base_change") for n in run.wholes[4])


# What is saved ----------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_saved_result_loads_in_plain_peft_and_transformers(
    make, model, app, tiny_bert, tmp_path
):
    strategy = make(lora_alpha=ALPHA, **QUIET)
    run = Played(strategy, app, model)
    model.save(strategy.whole(run.result.arrays), tmp_path)
    base = tmp_path / "base" if make in EXACT else tiny_bert
    assert (tmp_path / "base").exists() == (make in EXACT)
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(base), tmp_path
    )
    whole = model({})
    load_whole(whole, run.wholes[-1])
    ids = torch.randint(5, 12, (4, 6), generator=torch.Generator().manual_seed(1))

    def logits(net):
        with torch.no_grad():
            return net.eval()(input_ids=ids).logits

    expected = logits(whole)
    assert torch.allclose(logits(loaded), expected, atol=1e-6)
    assert torch.allclose(logits(loaded.merge_and_unload()), expected, atol=1e-5)
    assert not torch.allclose(logits(model({})), expected, atol=1e-3)


def test_a_changed_base_under_an_adapter_that_changes_it_is_not_saved(
    tiny_bert, tmp_path
):
    olora = AdapterModel(tiny_bert, lora(init_lora_weights="olora"))
    arrays = olora({}).state_dict()
    layer = next(iter(arrays)).partition(".lora_")[0]
    arrays[layer + ".base_change"] = torch.ones(16, 16)
    with pytest.raises(ValueError, match="init_lora_weights='olora' must be True"):
        olora.save(ArrayRecord(arrays), tmp_path)


# Codecs, resumed runs, clients trained together ------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_codecs_that_lose_nothing_change_nothing(make, model, plain_app):
    options = {"lora_alpha": ALPHA, **QUIET}
    plain = Played(make(**options), plain_app, model, 2)
    coded = Played(
        make(download=Exact(), upload=Exact(), **options), plain_app, model, 2
    )
    assert plain.wholes[-1].keys() == coded.wholes[-1].keys()
    for name, x in plain.wholes[-1].items():
        assert torch.allclose(coded.wholes[-1][name], x, atol=1e-6)


@pytest.mark.parametrize("ranks", [{}, {"ranks": (1, 4)}])
@pytest.mark.parametrize("make", ALL)
def test_nf4_both_ways(make, ranks, model, plain_app, tmp_path):
    if make is FedExLoRA and ranks:
        return
    options = {"lora_alpha": ALPHA, **ranks, **QUIET}
    found, traffic = [], []
    for codecs in ({}, {"download": NF4(), "upload": NF4()}):
        folder = tmp_path / str(len(found))
        run = Played(
            make(**options, **codecs),
            plain_app,
            model,
            3,
            tracker=Tracker(folder, tensorboard=False),
        )
        found.append(run.weights())
        rows = read_metrics(folder)
        assert all(row["train/num-errors"] == 0 for row in rows)
        traffic.append([rows[-1][f"encoded-bytes/{way}"] for way in ("down", "up")])
    assert all(coded < exact / 4 for exact, coded in zip(*traffic, strict=True))
    start = merged(model, run.wholes[0])
    moved = sum(np.sum((x - start[n]) ** 2) for n, x in found[0].items())
    apart = sum(np.sum((x - found[1][n]) ** 2) for n, x in found[0].items())
    assert 0 < apart < 0.1 * moved


@pytest.mark.parametrize("make", ALL)
def test_residuals_need_coordinates_that_stay(make, model, plain_app):
    strategy = make(
        lora_alpha=ALPHA, upload=ErrorFeedback(Chain(TopK(0.5), NF4())), **QUIET
    )
    if make is FedExLoRA:
        Played(strategy, plain_app, model, 2)
        return
    with pytest.raises(
        ValueError, match="residuals would be added to other coordinates"
    ):
        Played(strategy, plain_app, model, 1)


@pytest.mark.parametrize("make", [FedExLoRA, FlexLoRA, TIERS])
def test_a_resumed_run_is_the_same_bit_for_bit(make, model, app, tmp_path):
    make = partial(make, lora_alpha=ALPHA, fraction_train=0.5, **QUIET)
    expected = Played(make(), app, model, 4, 4)
    for rounds in (1, 2, 4):
        found = Played(make(), app, model, rounds, 4, checkpoint=tmp_path)
    assert found.wholes[-1].keys() == expected.wholes[-1].keys()
    for name, x in expected.wholes[-1].items():
        assert torch.equal(found.wholes[-1][name], x)
    strategy = pickle.loads(pickle.dumps(found.strategy))
    again = strategy.whole(found.result.arrays).to_torch_state_dict()
    assert all(torch.equal(again[name], x) for name, x in expected.wholes[-1].items())


@pytest.mark.parametrize("make", [FedExLoRA, TIERS])
def test_clients_that_are_stacked_give_the_same(make, model, plain_app):
    task = adapter_task(model, mails)
    stacked = client_app(task, *HALVES, trainer=Stacked(at_once=4))
    found = [
        Played(make(lora_alpha=ALPHA, **QUIET), app, model, 2, 4)
        for app in (plain_app, stacked)
    ]
    for name, x in found[0].weights().items():
        np.testing.assert_allclose(found[1].weights()[name], x, atol=1e-6)


def test_every_round_has_a_new_adapter_as_peft_draws_it(model, app):
    strategy = StackedLoRA(lora_alpha=ALPHA, ranks=(4, 2), seed=3, **QUIET)
    start = from_record(ArrayRecord(model({}).state_dict()))
    from flower_ext.core.protocol import Round

    begun = {n: strategy.begin(4, Round(n, start)) for n in (1, 2)}
    for a, b in pairs(start):
        one, two = begun[1][a], begun[2][a]
        assert not np.array_equal(one, two) and not begun[1][b].any()
        # U(-1/4, 1/4) of 16 inputs: kaiming_uniform_ with a = sqrt(5).
        for x in (one, two, start[a]):
            assert np.abs(x).max() <= 0.25 and x.std() == pytest.approx(0.144, rel=0.25)
    run = Played(strategy, app, model, 1)
    assert np.array_equal(strategy.begin(2, Round(1, start))[a].shape, (2, 16))
    assert all("lora_" not in n for c in run.grid.sent[0].values() for n in c["arrays"])


# Bad input ---------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_settings_are_refused(make, model, plain_app):
    def refused(words, **options):
        with pytest.raises(ValueError, match=words):
            make(**{"lora_alpha": ALPHA, **options})

    refused("lora_alpha=0 must be a finite number > 0", lora_alpha=0)
    refused("use_rslora=1 must be True or False", use_rslora=1)
    refused("server_optimizer=.* must be left out", server_optimizer=SGD(0.5))
    plan = {"num_rounds": 1, "num_sampled_clients": 1, "population_size": 1}
    private = Mechanism(**plan, noise_multiplier=1.0, target_delta=0.1)
    refused("mechanism=.* must be left out: the .* dense matrices", mechanism=private)
    with pytest.raises(ValueError, match="is no sum over clients"):
        from flower_ext.simulation import Asynchronous

        start = ArrayRecord(model({}).state_dict())
        strategy = make(lora_alpha=ALPHA)
        strategy.start(LocalGrid(plain_app, 3), start, asynchronous=Asynchronous(1, 2))
    if make is FedExLoRA:
        refused(r"ranks=\(1, 2\) must be left out: the mean of factors", ranks=(1, 2))
        return
    refused("ranks=0 must be an integer >= 1", ranks=(4, 0))
    refused("rank_of=.* must be left out without ranks", rank_of=lambda client: 1)
    with pytest.raises(ValueError, match=r"ranks=\(2, 5\) must be <= 4, as of initial"):
        Played(make(lora_alpha=ALPHA, ranks=(2, 5)), plain_app, model)
    with pytest.raises(ValueError, match=r"rank_of\(0\)=3 must be one of"):
        wrong = make(lora_alpha=ALPHA, ranks=(2, 4), rank_of=lambda client: 3)
        Played(wrong, plain_app, model)


A, B = (f"layer.lora_{x}.default.weight" for x in "AB")
WHOLE = {A: np.ones((2, 3), np.float32), B: np.zeros((4, 2), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"head": np.ones(2)}, "is it an AdapterModel with LoRA"),
        ({B: WHOLE[B]}, "must be whole pairs"),
        ({**WHOLE, B.replace("layer", "other"): WHOLE[B]}, "a frozen factor"),
        ({**WHOLE, "layer.lora_magnitude_vector.default.weight": np.ones(4)}, "DoRA"),
        ({**WHOLE, "layer.lora_B.default.bias": np.ones(4)}, "a bias of LoRA"),
        (
            {
                **WHOLE,
                "conv.lora_A.default.weight": np.ones((2, 3, 3, 3)),
                "conv.lora_B.default.weight": np.ones((4, 2, 1, 1)),
            },
            "convolutions",
        ),
        (
            {
                **WHOLE,
                "e.lora_embedding_A.default": np.ones((2, 3)),
                "e.lora_embedding_B.default": np.ones((4, 2)),
            },
            "embeddings",
        ),
        (
            {**WHOLE, "layer.base_layer.weight": np.ones((4, 3))},
            "frozen weights must not",
        ),
        (
            {
                **WHOLE,
                A.replace("layer", "other"): np.ones((1, 3)),
                B.replace("layer", "other"): np.zeros((4, 1)),
            },
            r"ranks of the layers=\[1, 2\] must be one",
        ),
    ],
)
@pytest.mark.parametrize("make", ALL)
def test_models_are_refused_before_anything_runs(make, arrays, words):
    asked = []
    clients = ClientApp()
    clients.train()(lambda message, context: asked.append(message))
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    strategy = make(lora_alpha=ALPHA)
    with pytest.raises(ValueError, match=words):
        strategy.start(LocalGrid(clients, 3), to_record(arrays))
    assert not asked


def test_an_adapter_that_was_trained_is_not_stacked():
    arrays = {**WHOLE, B: np.ones((4, 2), np.float32)}
    with pytest.raises(ValueError, match="merge a trained adapter into the base"):
        StackedLoRA(lora_alpha=1).start(LocalGrid(ClientApp(), 3), to_record(arrays))


@pytest.mark.parametrize("make", ALL)
def test_clients_of_another_adapter_refuse_in_words(make, model, tiny_bert):
    start = ArrayRecord(model({}).state_dict())

    def play(task_model, words, **options):
        clients = client_app(adapter_task(task_model, mails), *HALVES)
        strategy = make(**{"lora_alpha": ALPHA, **options})
        with pytest.raises(EveryClientFailed, match=words):
            strategy.start(LocalGrid(clients, 3, STEPS), start)

    other = AdapterModel(tiny_bert, lora(lora_alpha=2 * ALPHA))
    play(other, "scaling of .*=3.0 must be 1.5, as the server counts on")
    play(
        AdapterModel(tiny_bert, lora(use_rslora=True)), "scaling of .*=3.0 must be 1.5"
    )
    play(AdapterModel(tiny_bert, lora(use_dora=True)), "DoRA")

    def deaf(config):
        return model({})

    if make is not FedExLoRA:
        task = Task(deaf, mails, adapter_task(model, mails).loss)
        strategy = make(lora_alpha=ALPHA, ranks=(2,))
        words = "rank of the adapter=4 must be 2, as the server tells: Task.model must"
        with pytest.raises(EveryClientFailed, match=words):
            strategy.start(LocalGrid(client_app(task, *HALVES), 3, STEPS), start)


@pytest.mark.parametrize("make", [FedExLoRA, FlexLoRA, TIERS])
def test_malformed_replies_are_dropped_with_the_reason(make, model, app, caplog):
    def spoilt(how):
        def answer(message, context):
            reply = app(message, context)
            if context.node_config["partition-id"] == 1:
                record = reply.content["arrays"]
                for a, b in pairs(from_record(record)):
                    x, y = how(*(record[n].numpy() for n in (a, b)))
                    record[a], record[b] = Array(x), Array(y)
            return reply

        clients = ClientApp()
        clients.train()(answer)
        return clients

    def other_rank(a, b):
        rank = len(a) - 1
        return a[:rank], b[:, :rank]

    def huge(a, b):
        return a * np.float32(1e12), b * np.float32(1e12)

    for how, words in (
        (other_rank, "expected float32"),
        (huge, "is not finite, or beyond"),
    ):
        caplog.clear()
        strategy = make(lora_alpha=ALPHA, **QUIET)
        run = Played(strategy, spoilt(how), model, 2)
        metrics = run.result.train_metrics_clientapp[1]
        assert metrics["num-dropped"] == 1 and metrics["num-replies"] == 2
        assert words in caplog.text
        good = [reply for i, reply in enumerate(run.replies(1)) if i != 1]
        mean = dense_mean(good)
        after, before = run.weights(1), frozen(model, run.wholes[0])
        for name, x in mean.items():
            if isinstance(strategy, FlexLoRA):
                u, s, v = np.linalg.svd(x)
                x = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
            np.testing.assert_allclose(after[name] - before[name], x, atol=4e-7)
    # A round whose clients have no examples keeps the model.
    nothing = driven_apart(without_examples(app))
    run = Played(make(lora_alpha=ALPHA, **QUIET), nothing, model, 1)
    for name, x in run.wholes[0].items():
        assert torch.equal(run.wholes[1][name], x)


def without_examples(app):
    def answer(message, context):
        reply = app(message, context)
        reply.content["metrics"]["num-examples"] = 0
        return reply

    clients = ClientApp()
    clients.train()(answer)
    return clients
