"""Private LoRA, with both factors or with frozen A: sums, limits, noise."""

import math

import numpy as np
import peft
import pytest
import torch
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.client.adapters import AdapterModel, adapter_task
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import Mechanism, SiloPrivacy
from flower_ext.simulation import LocalGrid

CLIENTS, RANK, ALPHA = 3, 4, 6
STEPS = {"lr": 0.5, "batch-size": 4, "local-epochs": 3}
PLAN = {
    "num_rounds": 2,
    "num_sampled_clients": CLIENTS,
    "population_size": CLIENTS,
    "target_delta": 1e-2,
    "seed": 3,
}
FROZEN = pytest.mark.parametrize("frozen", [(), ("lora_A",)], ids=["both", "freeze-A"])


def mails(context):
    """Equally many examples, of words that differ from client to client."""
    client = int(context.node_config["partition-id"])
    generator = torch.Generator().manual_seed(client)
    ids = torch.randint(5, 12, (8, 5), generator=generator)
    labels = (ids[:, client] > 8).long()
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**columns, "labels": labels}, {**columns, "labels": labels}


@pytest.fixture(scope="module")
def adapted(tiny_bert):
    """Make the small encoder with LoRA and a head."""

    def make(frozen, rank=RANK):
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=ALPHA,
            task_type="SEQ_CLS",
            target_modules=["query", "value"],
        )
        return AdapterModel(tiny_bert, lora, frozen=frozen)

    return make


def run(model, strategy, rounds=2, **app):
    """Return the last model, and the replies of the last round."""
    seen = []

    class Tapped(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            seen[:] = super().send_and_receive(messages, timeout=timeout)
            return list(seen)

    grid = Tapped(client_app(adapter_task(model, mails), **app), CLIENTS, STEPS)
    initial = to_record({n: x.numpy() for n, x in model({}).state_dict().items()})
    result = strategy.start(grid, initial, num_rounds=rounds)
    assert not any(reply.has_error() for reply in seen)
    return from_record(result.arrays), seen


def quiet(**options):
    return AdditiveStrategy(fraction_evaluate=0.0, **options)


A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"


@FROZEN
@pytest.mark.parametrize("private", [False, True])
def test_the_mean_of_b_is_the_mean_of_the_products_where_a_is_frozen(
    aggregate, reply, frozen, private
):
    """Of clients of other sizes, and of clipped changes without noise."""
    rng = np.random.default_rng(0)
    a, sizes = rng.standard_normal((3, 5)), [1, 2, 5]
    sent = {B: np.zeros((6, 3))} | ({} if frozen else {A: a})
    trained = [
        {n: x + rng.standard_normal(x.shape) for n, x in sent.items()} for _ in sizes
    ]
    options, shares = {}, np.array(sizes) / 8
    if private:
        options["mechanism"] = Mechanism(**PLAN, noise_multiplier=0.0, clipping=1e3)
        shares = np.full(3, 1 / 3)
    replies = [reply(x, n) for x, n in zip(trained, sizes, strict=True)]
    new, _ = aggregate(quiet(**options), sent, replies)
    expected = sum(
        share * x[B] @ x.get(A, a) for share, x in zip(shares, trained, strict=True)
    )
    gap = np.abs(new[B] @ new.get(A, a) - expected).max()
    assert gap < 1e-12 if frozen else gap > 0.1


@FROZEN
def test_no_noise_is_fedavg_of_lora(adapted, frozen):
    """For clients of one size; the adapters of a silo are clipped nowhere."""
    model = adapted(frozen)
    expected, _ = run(model, quiet())
    mechanism = Mechanism(**PLAN, noise_multiplier=0.0, clipping=math.inf)
    found, _ = run(model, quiet(mechanism=mechanism))
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-8)
    start = {n: x.numpy() for n, x in model({}).state_dict().items()}
    moved = [name for name, x in start.items() if np.any(expected[name] != x)]
    assert any("lora_B" in name for name in moved)
    assert any("lora_A" in name for name in moved) == (not frozen)


@FROZEN
def test_noise_reaches_what_is_trained_and_nothing_else(adapted, frozen):
    """By a mechanism, and by DP-SGD in the silo; what is frozen is in no message."""
    model = adapted(frozen)
    privacy = {"noise_multiplier": 1.0, "clipping_norm": 0.1, "delta": 1e-3, "seed": 1}
    ways = (
        ({}, {"mechanism": Mechanism(**PLAN, noise_multiplier=1.0, clipping=0.1)}),
        ({"trainer": DPSGD(SiloPrivacy(**privacy))}, {}),
    )
    for app, options in ways:
        found, replies = run(model, quiet(**options), rounds=1, **app)
        assert any("lora_A" in name for name in found) == (not frozen)
        for name, x in model({}).state_dict().items():
            assert np.any(found[name] != x.numpy()), name
        for reply in replies:
            assert set(reply.content["arrays"]) == set(found)


# One client, all ranks --------------------------------------------------------------

WIDTH, SCALE = 5, 1.5


def points(context=None):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, WIDTH, generator=generator)
    columns = {"x": x, "y": (x[:, 0] > x[:, 1]).long()}
    return columns, columns


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


class Line(nn.Module):
    """A linear layer; as such, or frozen with an adapter of all ranks, A orthogonal."""

    def __init__(self, ranks):
        super().__init__()
        self.q = nn.Linear(WIDTH, 2, bias=False)
        start = np.linspace(-0.4, 0.5, 2 * WIDTH).reshape(2, WIDTH)
        self.q.weight.data = torch.tensor(start, dtype=torch.float32)
        if ranks:
            lora = peft.LoraConfig(
                r=WIDTH, lora_alpha=SCALE * WIDTH, target_modules=["q"]
            )
            peft.inject_adapter_in_model(lora, self)
            turn = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH,) * 2))
            a = self.q.lora_A["default"]
            a.weight.data = torch.tensor(turn[0], dtype=torch.float32)
            a.requires_grad_(False)

    def forward(self, x):
        return self.q(x)


def dense(config, ranks, **app):
    """Return the weights after rounds of one client."""
    task = Task(lambda _: Line(ranks), points, loss)
    initial = {n: x.numpy() for n, x in Line(ranks).state_dict().items()}
    strategy = quiet(min_train_nodes=1, min_available_nodes=1)
    grid = LocalGrid(client_app(task, **app), 1, {"batch-size": 8, **config})
    result = strategy.start(grid, to_record(initial), num_rounds=3)
    assert result.train_metrics_clientapp[3]["num-errors"] == 0
    model = Line(ranks)
    model.load_state_dict(
        {n: torch.tensor(x) for n, x in from_record(result.arrays).items()}
    )
    with torch.no_grad():
        return model(torch.eye(WIDTH)).T.numpy()


@pytest.mark.parametrize("private", [False, True])
def test_all_ranks_of_one_client_are_the_dense_step(private):
    """W moves by s^2 times its own step; B's gradient is s times as long as W's."""

    def trainer(bound):
        if not private:
            return {}
        privacy = SiloPrivacy(noise_multiplier=0.0, clipping_norm=bound, delta=1e-3)
        return {"trainer": DPSGD(privacy)}

    found = dense({"lr": 0.2}, True, **trainer(0.3))
    expected = dense({"lr": 0.2 * SCALE**2}, False, **trainer(0.3 / SCALE))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    unclipped = dense({"lr": 0.2 * SCALE**2}, False)
    assert (np.abs(expected - unclipped).max() > 1e-2) == private
    assert np.abs(found - Line(False).q.weight.detach().numpy()).max() > 0.05


# What noise does to a product -------------------------------------------------------


@FROZEN
@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_noise_in_both_factors_is_amplified(aggregate, reply, frozen, noise):
    r"""Of a product that nobody moves, :math:`(B + N_B)(A + N_A) - BA`.

    Its mean square is :math:`\sigma^2 (m \|A\|^2 + n \|B\|^2) + \sigma^4 m n r`; with
    frozen A it is :math:`\sigma^2 m \|A\|^2`.
    """
    m, n, rank, runs = 6, 5, 3, 200
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((rank, n)) / 2, rng.standard_normal((m, rank)) / 2
    sent = {B: b} | ({} if frozen else {A: a})
    squares = []
    for seed in range(runs):
        plan = {**PLAN, "num_rounds": 1, "seed": seed, "noise_multiplier": noise}
        strategy = quiet(mechanism=Mechanism(**plan, clipping=1.0))
        new, _ = aggregate(strategy, sent, [reply(sent) for _ in range(CLIENTS)])
        squares.append(np.sum((new[B] @ new.get(A, a) - b @ a) ** 2))
    variance = (noise / CLIENTS) ** 2
    expected = variance * m * np.sum(a**2)
    if not frozen:
        expected += variance * n * np.sum(b**2) + variance**2 * m * n * rank
    error = np.std(squares) / math.sqrt(runs)
    assert abs(np.mean(squares) - expected) < 4 * error
    assert error < 0.1 * expected
