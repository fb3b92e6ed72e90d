"""FLASC: an independent reference, its limits, masks, tiers, and real adapters."""

import pickle
import re
from functools import partial

import numpy as np
import peft
import pytest
import torch
import transformers
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext.client.adapters import AdapterModel, adapter_task, causal_lm_loss
from flower_ext.client.app import client_app
from flower_ext.client.encoding import encoded
from flower_ext.client.task import Task
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.schedules import Decay
from flower_ext.privacy import Mechanism
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.asynchronous import Asynchronous
from flower_ext.server.optimizers import SGD, Adam, RefactoredSGD, TorchOptimizer
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.server.tracking import Tracker, read_metrics
from flower_ext.simulation import LocalGrid, PackedGrid, packed
from flower_ext.strategies.flasc import FLASC, FLASCClient, Tier
from flower_ext.wire import Chain, FixedMask, registry
from flower_ext.wire.codec import PAYLOAD, num_values
from flower_ext.wire.traffic import serialized_bytes
from flower_ext.wire.value_codes import VALUE_CODES


def encode(arrays, masks=None, precision="exact"):
    """Return what a client would send of these changes."""
    return Chain(FixedMask(masks or {}), VALUE_CODES[precision]).encode(arrays)


def decode(record, like):
    """Return the arrays of a record, and what of them travelled."""
    found = registry.decode(record, like)
    return found.arrays, found.masks


ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
PLAIN = {"server_optimizer": SGD(1.0), "fraction_evaluate": 0.0, **ANY}

# A problem to solve by hand: a client wants its own c, ||p - c||^2 / 2 ---------------

SHAPES = {"a": (2, 3), "b": (4,)}
STEP = {"lr": 0.25, "batch-size": 1, "local-epochs": 2}
START = {
    "a": np.float32([[0.5, -4.0, 0.0], [2.0, -1.0, 3.0]]),
    "b": np.float32([0.1, -0.2, 6.0, 0.0]),
}


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def centre(client):
    rng = np.random.default_rng(client)
    return {n: rng.standard_normal(s, np.float32) * 3 for n, s in SHAPES.items()}


def centres(context):
    client = int(context.node_config["partition-id"])
    columns = {n: torch.from_numpy(x)[None] for n, x in centre(client).items()}
    return columns, columns


def distance(model, batch):
    return sum(
        0.5 * ((p - batch[n]) ** 2).flatten(1).sum(1)
        for n, p in model.named_parameters()
    )


TASK = Task(lambda config: Vectors(), centres, distance)
APP = client_app(TASK, FLASCClient)


def sorted_mask(flat, k):
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-np.abs(flat), kind="stable")[:k]] = True
    return mask


def reference(rounds, clients, download, upload, scope, freeze=False, steps=2):
    """The algorithm on flat vectors, as the paper's code has it; SGD(1) on the server.

    Returns the weights after every round.
    """
    blocks = [slice(0, 6), slice(6, 10)] if scope == "tensor" else [slice(0, 10)]

    def top(x, density):
        mask = np.ones(10, bool)
        if density < 1:
            for block in blocks:
                size = block.stop - block.start
                mask[block] = sorted_mask(x[block], int(density * size))
        return mask

    p = np.concatenate([START[n].reshape(-1) for n in SHAPES]).astype(np.float64)
    models = [p]
    for _ in range(rounds):
        mask = top(p, download)
        total = np.zeros(10)
        for client in range(clients):
            c = np.concatenate([centre(client)[n].reshape(-1) for n in SHAPES])
            w0 = w = p * mask
            for _ in range(steps):
                w = w - 0.25 * (w - c) * (mask if freeze else 1)
            delta = w - w0
            total += delta * (top(delta, upload) & (mask if freeze else True))
        p = p + total / clients
        models.append(p)
    return models


def flat(model):
    return np.concatenate([model[n].reshape(-1) for n in SHAPES])


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("download", "upload"), [(1, 1), (1, 0.3), (0.3, 1), (0.5, 0.3), (0.0, 0.5)]
)
def test_run_is_the_algorithm(play, scope, freeze, download, upload):
    strategy = FLASC(
        download_density=download,
        upload_density=upload,
        scope=scope,
        client_freeze=freeze,
        **PLAIN,
    )
    played = play(strategy, APP, 3, START, 4, STEP)
    expected = reference(4, 3, download, upload, scope, freeze)
    for model, weights in zip(played.models, expected, strict=True):
        assert flat(model) == pytest.approx(weights, abs=1e-5)


class Uniform(AdditiveStrategy):
    """FedAvg of clients that weigh the same."""

    equal_weights = True


@pytest.mark.parametrize(
    "make", [Adam, SGD, partial(TorchOptimizer, partial(torch.optim.AdamW, lr=0.1))]
)
def test_density_one_is_dense_bit_for_bit(task, initial, make):
    app = client_app(task, FLASCClient)
    models = []
    for strategy in (
        FLASC(download_density=1, upload_density=1, server_optimizer=make()),
        Uniform(server_optimizer=make()),
    ):
        grid = LocalGrid(app, 4, {"batch-size": 4, "lr": 0.1})
        models.append(from_record(strategy.start(grid, initial, num_rounds=3).arrays))
    assert all(np.array_equal(x, models[1][name]) for name, x in models[0].items())


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0])
def test_default_server_optimizer_is_torchs_adamw(size):
    rng = np.random.default_rng(0)
    ours = FLASC().server_optimizer
    weights = {"w": rng.standard_normal(50).astype(np.float32)}
    parameter = nn.Parameter(torch.tensor(weights["w"]))
    theirs = torch.optim.AdamW([parameter], lr=1e-3)
    for _ in range(5):
        move = size * rng.standard_normal(50)
        before = weights["w"]
        weights = ours.step(weights, {"w": move.copy()})
        parameter.grad = -torch.tensor(move, dtype=torch.float32)
        theirs.step()
        assert weights["w"] == pytest.approx(parameter.detach().numpy(), abs=1e-7)
        # Adam's step hardly depends on the size of what the clients changed.
        step = np.abs(weights["w"] - (1 - 1e-5) * before)
        assert step.max() > (5e-5 if size < 1e-8 else 5e-4)


# Weights outside the mask ------------------------------------------------------------


def test_weights_outside_the_mask_survive_and_come_back(play):
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

    data = {"c": torch.zeros(1, 2)}
    task = Task(
        lambda config: Zero(),
        lambda context: (data, data),
        lambda model, batch: 0.5 * ((model.w - batch["c"]) ** 2).sum(1),
    )
    app = client_app(task, FLASCClient)
    strategy = FLASC(
        download_density=0.5, upload_density=1, client_freeze=True, **PLAIN
    )
    config = {"lr": 0.5, "batch-size": 1, "local-epochs": 1}
    played = play(strategy, app, 1, {"w": np.float32([3, 2])}, 4, config)
    assert [m["w"].tolist() for m in played.models] == [
        [3, 2],
        [1.5, 2],  # the first is half of what it was, the second untouched
        [1.5, 1],  # now the second is larger
        [0.75, 1],
        [0.75, 0.5],
    ]


def test_clients_train_what_they_did_not_receive(play):
    strategy = FLASC(download_density=0.3, upload_density=1, **PLAIN)
    played = play(strategy, APP, 2, START, 1, STEP)
    moved = flat(played.models[1]) != flat(played.models[0])
    sent = sorted_mask(flat(START), 3)
    assert moved[~sent].all()


# What travels ------------------------------------------------------------------------


def exchanged(
    strategy, start, app=APP, clients=3, config=STEP, server_round=1, key="arrays"
):
    """Return what went down and up in one round, and the replies."""
    grid = LocalGrid(app, clients, config)
    sent = to_record(start)
    messages = list(strategy.configure_train(server_round, sent, ConfigRecord(), grid))
    down = [m.content.array_records["arrays"] for m in messages]
    replies = list(grid.send_and_receive(messages))
    assert all(reply.has_content() for reply in replies)
    up = [r.content.array_records[key] for r in replies]
    return down, up, replies


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("upload", [0.0, 0.1, 0.35, 1.0])
def test_no_more_than_k_values_travel_and_none_off_the_mask(freeze, upload):
    strategy = FLASC(
        download_density=0.5, upload_density=upload, client_freeze=freeze, **PLAIN
    )
    down, up, _ = exchanged(strategy, START)
    _, received = decode(down[0], START)
    assert num_values(down[0]) == 5
    for record in up:
        assert num_values(record) <= int(upload * 10)
        delta, sent = decode(record, START)
        for name in SHAPES:
            assert np.all(delta[name][~sent[name]] == 0)
            if freeze:
                assert not np.any(sent[name] & ~received[name])
                assert np.all(delta[name][~received[name]] == 0)


def test_ties_and_nothing_at_all():
    zeros = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    strategy = FLASC(download_density=0.35, upload_density=0.0, scope="global", **PLAIN)
    down, up, _ = exchanged(strategy, zeros)
    _, masks = decode(down[0], zeros)
    assert flat(masks).tolist() == [True] * 3 + [False] * 7
    assert [num_values(record) for record in up] == [0, 0, 0]


@pytest.mark.parametrize(("scope", "least"), [("global", 1), ("tensor", 2)])
def test_any_density_above_0_sends_something(scope, least):
    tiny = {"download_density": 1e-6, "upload_density": 1e-6, "scope": scope}
    down, up, _ = exchanged(FLASC(**tiny, **PLAIN), START)
    assert {num_values(record) for record in (*down, *up)} == {least}


def test_model_stays_without_upload(play):
    strategy = FLASC(upload_density=0.0, **PLAIN)
    played = play(strategy, APP, 2, START, 2, STEP)
    assert np.array_equal(flat(played.models[2]), flat(START))
    assert played.train(2)["num-replies"] == 2


def test_named_arrays_travel_whole():
    strategy = FLASC(download_density=0.2, upload_density=0.2, dense=["b"], **PLAIN)
    down, up, _ = exchanged(strategy, START)
    for record in (down[0], up[0]):
        _, masks = decode(record, START)
        assert masks["b"].all() and masks["a"].sum() == 1


@pytest.mark.parametrize(
    ("dense", "upload_dense", "down_of_b", "up_of_b"),
    [
        (["b"], (), 4, None),
        ((), ["b"], 1, 4),
        (["b"], ["a"], 4, 2),
        (["b"], None, 4, 4),
    ],
)
def test_arrays_travel_whole_one_way(dense, upload_dense, down_of_b, up_of_b):
    strategy = FLASC(
        download_density=0.5,
        upload_density=0.5,
        dense=dense,
        upload_dense=upload_dense,
        **PLAIN,
    )
    down, up, _ = exchanged(strategy, START)
    received, masks = decode(down[0], START)
    assert masks["b"].sum() == down_of_b
    for client, record in enumerate(up):
        change, sent = decode(record, START)
        if up_of_b is not None:
            assert sent["b"].sum() == up_of_b
        if upload_dense == ():  # what travelled whole competes with all the rest
            exact = flat(
                {
                    n: (1 - 0.75**2) * (c - received[n])
                    for n, c in centre(client).items()
                }
            )
            kept = exact * sorted_mask(exact, 5)
            assert num_values(record) == 5
            assert flat(change) == pytest.approx(kept, abs=1e-5)
            assert 0 < sent["b"].sum() < 4


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_change_is_counted_from_the_rounded_weights(precision):
    strategy = FLASC(download_density=1, upload_density=1, precision=precision, **PLAIN)
    down, up, _ = exchanged(strategy, START)
    received, _ = decode(down[0], START)
    for client, record in enumerate(up):
        delta, _ = decode(record, START)
        c = flat(centre(client))
        exact = (1 - 0.75**2) * (c - flat(received))
        again, _ = decode(
            encode(split(exact.astype(np.float32)), precision=precision), START
        )
        assert flat(delta) == pytest.approx(flat(again), abs=1e-2)


def split(vector):
    return {"a": vector[:6].reshape(2, 3), "b": vector[6:]}


def test_error_feedback_loses_nothing(play, spied):
    app, calls = spied(APP)
    strategy = FLASC(
        download_density=1,
        upload_density=0.2,
        precision="nf4",
        error_feedback=True,
        **PLAIN,
    )
    play(strategy, app, 1, START, 5, STEP)
    sent, trained = np.zeros(10), np.zeros(10)
    weights = flat(START).astype(np.float64)
    for call in calls:
        delta, masks = decode(call.reply.array_records["arrays"], START)
        assert flat(masks).sum() == 2
        received = flat(
            decode(encode(split(weights.astype(np.float32)), precision="nf4"), START)[0]
        )
        trained += (1 - 0.75**2) * (flat(centre(0)) - received)
        sent += flat(delta)
        weights += flat(delta)
    left = flat(from_record(calls[-1].state.array_records["personal/upload-residual"]))
    assert sent + left == pytest.approx(trained, abs=1e-3)


@pytest.mark.parametrize("precision", ["exact", "bfloat16", "nf4"])
def test_a_client_that_diverged_is_back_in_the_next_round(play, spied, precision):
    def diverging(message, context):
        config = message.content["config"]
        if (config["server-round"], context.node_config["partition-id"]) == (2, 0):
            changed = {
                **message.content,
                "config": ConfigRecord({**config, "lr": 1e30}),
            }
            message.content = RecordDict(changed)
        return APP(message, context)

    app = ClientApp()
    app.train()(diverging)
    app, calls = spied(app)
    strategy = FLASC(error_feedback=True, precision=precision, **PLAIN)
    played = play(strategy, app, 2, START, 4, STEP)
    assert [played.train(r)["num-dropped"] for r in (1, 2, 3, 4)] == [0, 1, 0, 0]
    for call in calls:
        for record in call.state.array_records.values():
            assert all(np.isfinite(x).all() for x in from_record(record).values())


# Masks over the rounds ---------------------------------------------------------------


def test_density_schedule(play):
    strategy = FLASC(download_density=Decay(1.0, 0.5, 2), upload_density=1, **PLAIN)
    counts = []
    for server_round in (1, 2, 3, 5):
        down, _, _ = exchanged(strategy, START, server_round=server_round)
        counts.append(num_values(down[0]))
    assert counts == [10, 10, 5, 2]
    played = play(strategy, APP, 2, START, 3, STEP)
    assert [played.train(r)["download-density"] for r in (1, 2, 3)] == [1, 1, 0.5]
    assert played.train(3)["upload-density"] == 1


def test_mask_that_is_fixed_after_a_round(play, tmp_path):
    def make():
        return FLASC(
            download_density=0.3,
            upload_density=1,
            client_freeze=True,
            fixed_mask_after=1,
            **PLAIN,
        )

    strategy = make()
    down, _, _ = exchanged(strategy, START)
    assert num_values(down[0]) == 10
    weights = split(np.arange(10, dtype=np.float32))
    first = decode(exchanged(strategy, weights, server_round=2)[0][0], START)[1]
    other = decode(exchanged(strategy, START, server_round=3)[0][0], START)[1]
    assert flat(first).tolist() == flat(other).tolist() == [False] * 7 + [True] * 3
    # A run that is continued keeps the mask.
    whole = play(make(), APP, 2, START, 4, STEP).models
    parts = [
        play(make(), APP, 2, START, rounds, STEP, checkpoint=tmp_path).models
        for rounds in (2, 4)
    ]
    assert np.array_equal(flat(whole[4]), flat(parts[1][-1]))


def test_evaluation_sees_what_clients_saw(play, spied):
    for eval_masked in (True, False):
        strategy = FLASC(
            download_density=0.3,
            upload_density=1,
            eval_masked=eval_masked,
            server_optimizer=SGD(1.0),
            **ANY,
        )
        grid = LocalGrid(APP, 2, STEP)
        down, _, replies = exchanged(strategy, START, clients=2)
        new, _ = strategy.aggregate_train(1, replies)
        asked = strategy.configure_evaluate(1, new, ConfigRecord(), grid)
        seen, _ = decode(next(iter(asked)).content["arrays"], START)
        mask = flat(decode(down[0], START)[1])
        expected = flat(from_record(new)) * (mask if eval_masked else 1)
        assert flat(seen) == pytest.approx(expected)
        assert flat(from_record(strategy.masked(new))) == pytest.approx(
            flat(from_record(new)) * mask
        )


# Clients that differ -----------------------------------------------------------------


def test_tiers_of_density():
    tiers = [Tier(0.1, 0.2), Tier(0.5, 0.1), Tier(1.0)]
    strategy = FLASC(tiers=tiers, upload_density=0.4, **PLAIN)
    down, up, _ = exchanged(strategy, START, clients=5)
    assert [num_values(x) for x in down] == [1, 5, 10, 1, 5]
    assert [num_values(x) for x in up] == [2, 1, 4, 2, 1]
    chosen = FLASC(tiers=tiers, tier_of=lambda client: 1, **PLAIN)
    assert {num_values(x) for x in exchanged(chosen, START)[0]} == {5}
    with pytest.raises(ValueError, match=r"tier_of\(0\)=3"):
        exchanged(FLASC(tiers=tiers, tier_of=lambda client: 3, **PLAIN), START)


class Lora(nn.Module):
    """One LoRA pair of rank 4 and a head, with peft's names."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.head = nn.Linear(2, 1)


LORA = Task(
    lambda config: Lora(),
    lambda context: ({"x": torch.ones(1, 3)}, {"x": torch.ones(1, 3)}),
    lambda model, batch: (
        model.head(model.lora_B["default"](model.lora_A["default"](batch["x"])))[:, 0]
        ** 2
    ),
)
A, B = "lora_A.default.weight", "lora_B.default.weight"


def lora_start():
    torch.manual_seed(3)
    return {n: x.numpy() for n, x in Lora().state_dict().items()}


# The tiers of the paper's code --------------------------------------------------------

FACTORS = {A: (4, 3), B: (2, 4), "head": (2, 2)}


class Factors(nn.Module):
    """Numbers with the names of a LoRA pair and a head."""

    def __init__(self):
        super().__init__()
        for name, (rows, columns) in FACTORS.items():
            *path, last = name.split(".")
            owner = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(torch.zeros(rows, columns)))


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in FACTORS.items()}


def wanted(context):
    numbers = drawn(int(context.node_config["partition-id"]))
    columns = {n: torch.from_numpy(x)[None] for n, x in numbers.items()}
    return columns, columns


WANTED = Task(lambda config: Factors(), wanted, distance)


def tiers_of_the_code(syshet, freeze, rounds=3):
    """The heterogeneous script in NumPy, one client a tier, ranks 1, 2, 4; SGD(1)."""
    ranks, densities = (1, 2, 4), (1 / 4, 1 / 2, 1)
    start = {n: x.astype(np.float64) for n, x in drawn(99).items()}
    models, names = [start], list(FACTORS)
    for _ in range(rounds):
        p = models[-1]
        total = {n: np.zeros_like(x) for n, x in p.items()}
        for client, (rank, density) in enumerate(zip(ranks, densities, strict=True)):
            mask = {n: np.ones(x.shape, bool) for n, x in p.items()}
            if syshet == "density":
                lora = np.concatenate([p[A].ravel(), p[B].ravel()])
                kept = sorted_mask(lora, int(density * lora.size))
                mask[A], mask[B] = kept[:12].reshape(4, 3), kept[12:].reshape(2, 4)
            elif syshet == "rank":
                mask[A][rank:] = mask[B][:, rank:] = False
            else:
                mask[A][np.argsort(np.sqrt((p[A] ** 2).sum(1)))[: 4 - rank]] = False
                mask[B][:, np.argsort(np.sqrt((p[B] ** 2).sum(0)))[: 4 - rank]] = False
            w0 = w = {n: p[n] * mask[n] for n in names}
            for _ in range(STEP["local-epochs"]):
                gradient = {n: w[n] - drawn(client)[n] for n in names}
                own = mask if freeze else dict.fromkeys(names, 1)
                w = {n: w[n] - STEP["lr"] * gradient[n] * own[n] for n in names}
            delta = np.concatenate([(w[n] - w0[n]).ravel() for n in names])
            if syshet == "density":
                delta = delta * sorted_mask(delta, int(density * delta.size))
            for n, part in zip(names, np.split(delta, [12, 20]), strict=True):
                total[n] += part.reshape(FACTORS[n])
        models.append({n: x + total[n] / 3 for n, x in p.items()})
    return models


DENSE = {"download_density": 1, "upload_density": 1}
OF_RANK = {**DENSE, "tiers": [Tier(rank=1), Tier(rank=2), Tier(rank=4)]}
OF_DENSITY = {"tiers": [Tier(d, d) for d in (1 / 4, 1 / 2, 1)]}


@pytest.mark.parametrize(
    ("syshet", "freeze", "options"),
    [
        ("rank", True, OF_RANK),
        ("rankl1", True, {**OF_RANK, "ranks": "factor"}),
        ("density", False, {**OF_DENSITY, "dense": ["head"], "upload_dense": ()}),
    ],
)
def test_tiers_are_those_of_the_papers_code(play, syshet, freeze, options):
    app = client_app(WANTED, FLASCClient)
    played = play(FLASC(**options, **PLAIN), app, 3, drawn(99), 3, STEP)
    for model, expected in zip(
        played.models, tiers_of_the_code(syshet, freeze), strict=True
    ):
        for name, x in expected.items():
            assert model[name] == pytest.approx(x, abs=1e-5)


class Products(nn.Module):
    """A LoRA pair of rank 3 as it is used: through its product."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 4, bias=False)})


def product_wanted(context):
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    columns = {"m": torch.tensor(rng.standard_normal((1, 4, 5)), dtype=torch.float32)}
    return columns, columns


def off_the_product(model, batch):
    product = model.lora_B["default"].weight @ model.lora_A["default"].weight
    return 0.5 * ((product - batch["m"]) ** 2).flatten(1).sum(1)


def test_tiers_hold_the_best_approximation_under_refactored_sgd(play):
    task = Task(lambda config: Products(), product_wanted, off_the_product)
    torch.manual_seed(5)
    start = {n: x.numpy() for n, x in Products().state_dict().items()}
    strategy = FLASC(**OF_RANK, **{**PLAIN, "server_optimizer": RefactoredSGD()})
    config = {"lr": 0.1, "batch-size": 1, "local-epochs": 2}
    app = client_app(task, FLASCClient)
    played = play(strategy, app, 3, start, 4, config)
    a, b = (start[n].astype(np.float64) for n in (A, B))
    for model in played.models[1:]:
        steps = []
        for client, rank in enumerate((1, 2, 4)):
            rng = np.random.default_rng(client)
            m = rng.standard_normal((1, 4, 5))[0]
            own_a, own_b = a[:rank], b[:, :rank]
            for _ in range(2):
                off = own_b @ own_a - m
                own_a, own_b = own_a - 0.1 * own_b.T @ off, own_b - 0.1 * off @ own_a.T
            change_a, change_b = np.zeros_like(a), np.zeros_like(b)
            change_a[:rank] = own_a - a[:rank]
            change_b[:, :rank] = own_b - b[:, :rank]
            steps.append((change_a, change_b))
        a = a + sum(x for x, _ in steps) / 3
        b = b + sum(x for _, x in steps) / 3
        u, s, v = np.linalg.svd(b @ a)
        scale = np.sqrt((a**2).sum() / 3)
        a, b = scale * v[:3], u[:, :3] * s[:3] / scale
        for rank in (1, 2, 3):
            held = model[B][:, :rank] @ model[A][:rank]
            assert held == pytest.approx(b[:, :rank] @ a[:rank], abs=1e-5)


def test_what_needs_old_coordinates_is_refused_under_refactored_sgd():
    app = client_app(TASK, FLASCClient)
    options = {**PLAIN, "server_optimizer": RefactoredSGD()}
    strategy = FLASC(error_feedback=True, **options)
    grid = LocalGrid(app, 2, STEP)
    with pytest.raises(ValueError, match="without error feedback under RefactoredSGD"):
        strategy.start(grid, to_record(START), num_rounds=1)
    with pytest.raises(ValueError, match="changes what coordinates mean"):
        FLASC(**options).start(
            grid, to_record(START), num_rounds=1, asynchronous=Asynchronous(1, 1)
        )


@pytest.mark.parametrize("aggregation", ["cohort", "senders"])
def test_tiers_of_rank(aggregation):
    start = lora_start()
    strategy = FLASC(
        download_density=1,
        upload_density=1,
        tiers=[Tier(rank=1), Tier(rank=4)],
        aggregation=aggregation,
        **PLAIN,
    )
    app = client_app(LORA, FLASCClient)
    down, up, replies = exchanged(strategy, start, app, clients=4)
    deltas = [decode(record, start)[0] for record in up]
    assert num_values(down[0]) == num_values(up[0]) == 3 + 2 + 3
    assert num_values(down[1]) == num_values(up[1]) == 12 + 8 + 3
    assert all(not d[A][1:].any() and not d[B][:, 1:].any() for d in deltas[::2])
    assert deltas[1][A][1:].any()
    new = from_record(strategy.aggregate_train(1, replies)[0])
    for name, axis in ((A, 0), (B, 1)):
        total = sum(d[name].astype(np.float64) for d in deltas)
        rest = 4 if aggregation == "cohort" else 2
        ranks = np.array([4, rest, rest, rest])
        divided = total / (ranks[:, None] if axis == 0 else ranks)
        assert new[name] - start[name] == pytest.approx(divided, abs=1e-6)


def test_senders_by_hand(reply, aggregate):
    strategy = FLASC(aggregation="senders", **PLAIN)
    sent = {"w": np.float32([1, 1, 1])}

    def sends(values, mask, examples=1.0):
        content = reply(weight=examples)
        mask = {"w": np.array(mask, bool)}
        content["arrays"] = encode({"w": np.float32(values)}, mask)
        return content

    cohort = [sends([4, 0, 9], [1, 0, 0]), sends([2, 6, 9], [1, 1, 0])]
    new, _ = aggregate(strategy, sent, cohort)
    assert new["w"].tolist() == [4, 7, 1]
    # A client without examples counts neither in the sum nor among the senders.
    new, _ = aggregate(strategy, sent, [*cohort, sends([7, 7, 7], [1, 1, 1], 0.0)])
    assert new["w"].tolist() == [4, 7, 1]
    new, _ = aggregate(
        FLASC(**PLAIN), sent, [*cohort, sends([7, 7, 7], [1, 1, 1], 0.0)]
    )
    assert new["w"].tolist() == [4, 4, 1]


# Replies -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda c: encode({"w": np.float32([1, np.nan])}), "not finite"),
        (lambda c: encode({"w": np.float32([1, 2, 3])}), "not the 1 expected"),
        (lambda c: encode({"w": np.float64([1, 2])}), "not the 1 expected"),
        (lambda c: to_record({"w": np.float32([1, 2])}), "it is not encoded"),
        (
            lambda c: to_record({PAYLOAD: c["arrays"][PAYLOAD].numpy()[:-1]}),
            "checksum is wrong",
        ),
    ],
)
def test_malformed_reply_is_left_out(reply, aggregate, caplog, spoil, reason):
    caplog.set_level("WARNING", logger="flwr")
    good, bad = reply(), reply()
    good["arrays"] = bad["arrays"] = encode({"w": np.float32([1, 2])})
    bad["arrays"] = spoil(bad)
    sent = {"w": np.zeros(2, np.float32)}
    new, metrics = aggregate(FLASC(**PLAIN), sent, [good, bad, good])
    assert new["w"].tolist() == [1, 2]
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert reason in caplog.text


def test_reply_without_arrays_is_left_out(reply, aggregate):
    good = reply()
    good["arrays"] = encode({"w": np.float32([1, 2])})
    sent = {"w": np.zeros(2, np.float32)}
    _, metrics = aggregate(FLASC(**PLAIN), sent, [good, reply()])
    assert metrics["num-dropped"] == 1


def test_counters_are_averaged_and_never_masked(reply, aggregate):
    sent = {"w": np.float32([5, 1]), "n": np.array(7), "flag": np.array([True, False])}
    contents = []
    for step in (1, 3):
        content = reply()
        content["arrays"] = encode(
            {
                "w": np.float32([1, 1]),
                "n": np.array(step),
                "flag": np.zeros(2, np.int64),
            }
        )
        contents.append(content)
    strategy = FLASC(download_density=0.5, **PLAIN)
    new, _ = aggregate(strategy, sent, contents)
    assert int(new["n"]) == 9 and new["n"].dtype == np.int64
    assert new["flag"].tolist() == [True, False]


def test_settings_are_picklable_and_shown(caplog):
    caplog.set_level("INFO", logger="flwr")
    strategy = FLASC(download_density=Decay(1, 0.9), fixed_mask_after=2)
    pickle.loads(pickle.dumps(strategy)).summary()
    assert "Decay(initial=1, rate=0.9, every=1)" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"download_density": 1.5}, "download_density=1.5"),
        ({"upload_density": -0.1}, "upload_density=-0.1"),
        ({"upload_density": lambda server_round: 2.0}, "upload_density=2.0"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"aggregation": "mean"}, "aggregation='mean'"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"fixed_mask_after": -1}, "fixed_mask_after=-1"),
        ({"tiers": ()}, "tiers="),
        ({"dense": "head"}, "dense='head'"),
        ({"upload_dense": "head"}, "upload_dense='head'"),
        ({"ranks": "svd"}, "ranks='svd'"),
        (
            {"server_optimizer": RefactoredSGD(), "fixed_mask_after": 1},
            r"fixed_mask_after=1 must be None under RefactoredSGD\(",
        ),
    ],
)
def test_settings_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        FLASC(**options)


@pytest.mark.parametrize(
    "make", [partial(Tier, 2.0), partial(Tier, rank=0), partial(Tier, Decay(2.0, 0.5))]
)
def test_tiers_and_schedules_out_of_range(make):
    with pytest.raises(ValueError, match="must be"):
        make()


# Privacy -----------------------------------------------------------------------------


def private(noise_multiplier, clipping=0.5, **options):
    mechanism = Mechanism(
        num_rounds=4,
        num_sampled_clients=3,
        population_size=3,
        clipping=clipping,
        noise_multiplier=noise_multiplier,
        factorization="identity",
    )
    return FLASC(
        mechanism=mechanism,
        server_optimizer=SGD(1.0),
        fraction_evaluate=0.0,
        download_density=0.5,
        upload_density=0.3,
        **options,
    )


def test_change_is_clipped_as_it_arrives(play):
    played = play(private(0.0), APP, 3, START, 1, STEP)
    _, up, _ = exchanged(private(0.0), START)
    total = np.zeros(10)
    for record in up:
        delta = flat(decode(record, START)[0]).astype(np.float64)
        total += delta * min(1, 0.5 / np.linalg.norm(delta))
    moved = flat(played.models[1]) - flat(START)
    assert moved == pytest.approx(total / 3, abs=1e-6)


def test_noise_is_dense(play):
    played = play(private(1.0), APP, 3, START, 1, STEP)
    assert np.all(flat(played.models[1]) != flat(START))


# Adapters ----------------------------------------------------------------------------


def texts(context):
    client = int(context.node_config["partition-id"])
    generator = torch.Generator().manual_seed(client)
    ids = torch.randint(5, 12, (10, 6), generator=generator)
    columns = {"input_ids": ids, "labels": (ids[:, 0] > 8).long()}
    return columns, columns


@pytest.fixture(scope="module")
def adapters(tiny_bert):
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.1
    )
    return lambda **options: AdapterModel(tiny_bert, config, **options)


CONFIG = {"lr": 0.1, "batch-size": 5, "local-epochs": 1}


def test_first_mask_takes_no_b(adapters):
    model = adapters()
    app = client_app(adapter_task(model, texts), FLASCClient)
    start = {n: x.numpy() for n, x in model({}).state_dict().items()}
    assert all(not x.any() for n, x in start.items() if "lora_B" in n)
    head = {"dense": ["modules_to_save"]}
    strategy = FLASC(download_density=0.25, upload_density=1, **head, **PLAIN)
    down, up, _ = exchanged(strategy, start, app, 2, {**CONFIG, "local-steps": 1})
    _, masks = decode(down[0], start)
    assert not any(mask.any() for name, mask in masks.items() if "lora_B" in name)
    # While B is zero nothing is known of A: the first step moves B and the head only.
    delta, _ = decode(up[0], start)
    assert all(not x.any() for name, x in delta.items() if "lora_A" in name)
    assert any(x.any() for name, x in delta.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("options", "trains"),
    [({}, True), ({"scope": "tensor", "dense": ()}, True), ({"dense": ()}, False)],
)
def test_new_adapter_is_trained_unless_its_head_is_masked_out(
    adapters, options, trains
):
    # Nothing of a new head is among the largest here, and through a head of zeros no
    # gradient reaches the adapters.
    model = adapters()
    app = client_app(adapter_task(model, texts), FLASCClient)
    start = {n: x.numpy() for n, x in model({}).state_dict().items()}
    strategy = FLASC(**options, **PLAIN)
    _, up, _ = exchanged(strategy, start, app, 1, {**CONFIG, "local-steps": 1})
    delta, _ = decode(up[0], start)
    assert trains == any(x.any() for n, x in delta.items() if "lora_B" in n)


def test_arrays_of_which_nothing_is_sent_are_named_once(caplog):
    caplog.set_level("WARNING", logger="flwr")
    start = {"a": START["a"], "b": np.zeros(4, np.float32)}
    for scope, times in (("tensor", 0), ("global", 1)):
        strategy = FLASC(scope=scope, **PLAIN)
        for server_round in (1, 2):
            exchanged(strategy, start, server_round=server_round)
        assert caplog.text.count("nothing of 1 of 2 arrays is sent, such as b") == times


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        (
            {
                "download_density": 0.25,
                "upload_density": 0.1,
                "dense": ["modules_to_save"],
            },
            (),
        ),
        ({"download_density": 1, "upload_density": 1}, ("lora_A",)),
        (
            {
                "download_density": 1,
                "upload_density": 1,
                "tiers": (Tier(rank=1), Tier()),
            },
            (),
        ),
    ],
)
def test_adapters_learn(adapters, tmp_path, options, frozen):
    model = adapters(frozen=frozen)
    app = client_app(adapter_task(model, texts), FLASCClient)
    strategy = FLASC(server_optimizer=Adam(0.05), **options)
    start = to_record({n: x.numpy() for n, x in model({}).state_dict().items()})
    result = strategy.start(LocalGrid(app, 3, CONFIG), start, num_rounds=5)
    assert all(m["num-errors"] == 0 for m in result.train_metrics_clientapp.values())
    losses = [m["loss"] for m in result.evaluate_metrics_clientapp.values()]
    assert losses[-1] < losses[0]
    model.save(strategy.masked(result.arrays), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


# Apps with a loop of their own -------------------------------------------------------


def stock_app(*mods, key="arrays"):
    """Return an app that knows nothing of FLASC, and the list of its trainings."""
    app, trained = ClientApp(mods=list(mods)), []

    def opened(message, context):
        config = message.content["config"]
        model = Vectors()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        return model, centres(context)[0], config

    @app.train()
    def train(message, context):
        model, data, config = opened(message, context)
        trained.append(context.node_config["partition-id"])
        optimizer = torch.optim.SGD(model.parameters(), lr=STEP["lr"])
        total = 0.0
        for _ in range(STEP["local-epochs"]):
            optimizer.zero_grad()
            loss = distance(model, data).mean()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / STEP["local-epochs"]
        metrics = MetricRecord({"num-examples": 1, "train-loss": total})
        records = {key: ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(records), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        model, data, _ = opened(message, context)
        metrics = {"num-examples": 1, "loss": float(distance(model, data).mean())}
        content = RecordDict({"metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return app, trained


def of_a_loop(**options):
    return FLASC(describe_arrays=True, server_optimizer=SGD(1.0), **{**ANY, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "global", "download_density": 0.3, "upload_density": 0.1},
        {"upload_density": 0.2, "error_feedback": True, "precision": "nf4"},
        {"tiers": (Tier(0.3), Tier(1.0, 0.2)), "precision": "bfloat16"},
        {"aggregation": "senders", "dense": ("b",)},
    ],
)
def test_mod_makes_a_client_of_flasc(play, spied, options):
    runs = []
    for app in (APP, stock_app(encoded())[0]):
        app, calls = spied(app)
        played = play(of_a_loop(**options), app, 3, START, 4, STEP)
        sizes = [serialized_bytes(call.reply) for call in calls]
        runs.append((played, sizes))
    (half, half_sizes), (mod, mod_sizes) = runs
    for one, two in zip(half.models, mod.models, strict=True):
        assert flat(one) == pytest.approx(flat(two), abs=1e-5)
    assert mod_sizes == half_sizes
    for server_round in (1, 4):
        for name, value in half.train(server_round).items():
            assert mod.train(server_round)[name] == pytest.approx(value, abs=1e-4)
        loss = half.evaluate(server_round)["loss"]
        assert mod.evaluate(server_round)["loss"] == pytest.approx(loss, abs=1e-4)


def test_mod_keeps_the_apps_keys_and_lets_other_strategies_pass(play):
    app, _ = stock_app(encoded(), key="my-arrays")
    *_, replies = exchanged(
        of_a_loop(fraction_evaluate=0.0), START, app, key="my-arrays"
    )
    assert set(replies[0].content) == {"my-arrays", "metrics"}
    assert set(replies[0].content["metrics"]) == {"num-examples", "train-loss"}
    played = play(of_a_loop(fraction_evaluate=0.0), app, 2, START, 1)
    assert played.train(1)["num-replies"] == 2
    dense = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    plain, _ = stock_app()
    runs = [
        play(AdditiveStrategy(server_optimizer=SGD(1.0), **ANY), a, 2, dense, 2)
        for a in (plain, stock_app(encoded())[0])
    ]
    assert np.array_equal(flat(runs[0].models[2]), flat(runs[1].models[2]))


def test_mod_leaves_the_message_as_it_was():
    app, _ = stock_app(encoded())
    strategy = of_a_loop(fraction_evaluate=0.0)
    grid = LocalGrid(app, 2, STEP)
    sent = to_record(START)
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), grid))
    before = dict(messages[0].content)
    list(grid.send_and_receive(messages))
    assert dict(messages[0].content) == before


@pytest.mark.parametrize("described", [False, True])
def test_app_without_mod_is_refused_before_it_trains(play, described):
    app, trained = stock_app()
    strategy = FLASC(describe_arrays=described, **PLAIN)
    with pytest.raises(EveryClientFailed, match=r"ClientApp\(mods=\[encoded\(\)\]\)"):
        play(strategy, app, 2, START, 2, STEP)
    assert trained == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, r"FLASC\(describe_arrays=True\)"),
        (
            {"client_freeze": True, "describe_arrays": True},
            "client half 'flasc'",
        ),
        (
            {"tiers": (Tier(rank=1),), "describe_arrays": True},
            "client half 'flasc'",
        ),
    ],
)
def test_what_the_mod_cannot_do_is_refused_before_it_trains(options, reason):
    app, trained = stock_app(encoded())
    strategy = FLASC(**PLAIN, **options)
    grid = LocalGrid(app, 2, STEP)
    sent = to_record(START)
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), grid))
    for reply in grid.send_and_receive(messages):
        assert re.search(reason, reply.error.reason)
    assert trained == []


def test_mod_says_which_arrays_a_reply_lacks():
    app = ClientApp(mods=[encoded()])

    @app.train()
    def train(message, context):
        records = {"arrays": to_record({"a": START["a"]}), "metrics": MetricRecord()}
        return Message(RecordDict(records), reply_to=message)

    grid = LocalGrid(app, 1)
    strategy = of_a_loop(fraction_evaluate=0.0)
    asked = strategy.configure_train(1, to_record(START), ConfigRecord(), grid)
    reply = next(iter(grid.send_and_receive(asked)))
    assert "missing ['b']" in reply.error.reason


def test_peft_app_with_the_mod_is_a_client_of_flasc(tmp_path):
    """As in FlowerTune: peft's own functions make and take the state."""
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def data(context):
        client = int(context.node_config["partition-id"])
        generator = torch.Generator().manual_seed(client)
        columns = {"input_ids": torch.randint(0, 30, (6, 5), generator=generator)}
        return columns, columns

    def get_model():
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return peft.get_peft_model(base, lora)

    app = ClientApp(mods=[packed, encoded()])

    @app.train()
    def train(message, context):
        model = get_model()
        state = message.content["arrays"].to_torch_state_dict()
        peft.set_peft_model_state_dict(model, state)
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=20.0)
        for _ in range(2):
            optimizer.zero_grad()
            loss = causal_lm_loss(model, data(context)[0]).mean()
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": 6, "train-loss": float(loss)})
        arrays = ArrayRecord(peft.get_peft_model_state_dict(model))
        records = {"arrays": arrays, "metrics": metrics}
        return Message(RecordDict(records), reply_to=message)

    model = AdapterModel(tmp_path, lora, "causal-lm")
    half = client_app(adapter_task(model, data), FLASCClient)
    own = {n: x.numpy() for n, x in model({}).state_dict().items()}
    pefts = {n.replace(".default", ""): x for n, x in own.items()}
    local = {"lr": 20.0, "batch-size": 6, "local-steps": 2}

    def strategy():
        return of_a_loop(scope="tensor", precision="bfloat16", fraction_evaluate=0.0)

    results, traffic = [], []
    for clients, start in ((half, own), (app, pefts)):
        grid = LocalGrid(clients, 3, local)
        run = strategy()
        tracker = Tracker(tmp_path / f"run-{len(results)}")
        result = run.start(grid, to_record(start), num_rounds=3, tracker=tracker)
        results.append(from_record(result.arrays))
        rows = read_metrics(tmp_path / f"run-{len(traffic)}")
        traffic.append([row["bytes/up"] for row in rows if "bytes/up" in row])
    assert traffic[0] == traffic[1]
    moved = 0.0
    for name, x in results[0].items():
        found = results[1][name.replace(".default", "")]
        assert found == pytest.approx(x, abs=1e-5)
        moved += float(np.abs(x - own[name]).sum())
    assert moved > 0.01
    with PackedGrid(LocalGrid(app, 2), num_clients=3) as grid:
        result = strategy().start(grid, to_record(pefts), num_rounds=3)
    for name, x in from_record(result.arrays).items():
        assert x == pytest.approx(results[1][name], abs=1e-6)


def test_client_is_told_nothing_else():
    down, _, replies = exchanged(FLASC(**PLAIN), START)
    assert list(down[0]) == [PAYLOAD]
    assert set(replies[0].content.array_records) == {"arrays"}
    assert isinstance(replies[0].content, RecordDict)
