"""Fisher estimators against brute force and closed forms."""

import copy
import gc
import itertools
import math
import weakref
from functools import partial

import opacus
import peft
import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks as HOOKS_OF_ALL_OPTIMIZERS

from flower_ext.client.fisher import SquaredGradients, per_example
from flower_ext.client.tensors import tensor_record

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 0, 1], [6, 2, 2], [3, 3, 5]])
NUMBERS = torch.linspace(-2, 2, 20).reshape(5, 4).sin()
IMAGES = torch.linspace(-3, 3, 180).reshape(5, 1, 6, 6).cos()
LABELS = torch.tensor([0, 1, 2, 1, 0])


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.recurrent = kind(4, 3, batch_first=True)
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.recurrent(self.embedding(x))[0][:, -1])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.cell = nn.GRUCell(4, 3)

    def forward(self, x):
        state = torch.zeros(len(x), 3)
        for step in self.embedding(x).unbind(1):
            state = self.cell(step, state)
        return state


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.embedding(x).mean(1))


class PartlyFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3).requires_grad_(False)
        self.head = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.scale * self.head(self.body(x))


def mlp():
    return nn.Sequential(
        nn.Linear(4, 5), nn.LayerNorm(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)
    )


def cnn():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    net(IMAGES)  # running statistics that are not those of a batch
    return net


MODELS = {
    "mlp": (mlp, NUMBERS),
    "cnn": (cnn, IMAGES),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS),
    "cell": (Cell, TOKENS),
    "tied": (Tied, TOKENS),
    "partly-frozen": (PartlyFrozen, NUMBERS),
}
VECTORISED = {"mlp", "cnn", "tied", "partly-frozen"}


def cut(columns, size):
    return iter(
        [
            {name: column[i : i + size] for name, column in columns.items()}
            for i in range(0, len(columns["y"]), size)
        ]
    )


def brute_force(model, columns):
    """Loop over the examples with plain autograd."""
    trainable = {k: p for k, p in model.named_parameters() if p.requires_grad}
    sums = {k: torch.zeros_like(p) for k, p in trainable.items()}
    model.eval()
    for example in cut(columns, 1):
        loss = cross_entropy(model, example).sum()
        found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        for name, gradient in zip(trainable, found, strict=True):
            if gradient is not None:
                sums[name] += gradient**2
    return {name: total / len(columns["y"]) for name, total in sums.items()}


@pytest.fixture(params=MODELS)
def case(request):
    make, x = MODELS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return request.param, make(), {"x": x, "y": LABELS}


def test_per_example_is_brute_force(case):
    name, model, columns = case
    model.train()
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    before = {k: x.clone() for k, x in model.state_dict().items()}
    found = per_example(model, cross_entropy, cut(columns, 2))
    # Three batches in one pass each, or, after a try, one pass an example.
    assert len(calls) == 3 if name in VECTORISED else len(calls) in (5, 6)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    expected = brute_force(model, columns)
    assert list(found) == list(expected)
    for key, square in found.items():
        assert square.shape == expected[key].shape
        torch.testing.assert_close(square, expected[key], rtol=1e-4, atol=1e-9)


def test_per_example_does_not_depend_on_the_batches(case):
    _, model, columns = case
    one, all_ = (per_example(model, cross_entropy, cut(columns, n)) for n in (1, 5))
    for name, square in one.items():
        torch.testing.assert_close(square, all_[name], rtol=1e-4, atol=1e-9)


def test_loss_that_cannot_be_vectorised():
    model = nn.Linear(4, 3)

    def loss(model, batch):
        return cross_entropy(model, batch) * float(batch["x"].abs().sum().item() > 0)

    columns = {"x": NUMBERS, "y": LABELS}
    found = per_example(model, loss, cut(columns, 5))
    torch.testing.assert_close(found, brute_force(model, columns))


def test_loss_that_fails_says_so():
    def loss(model, batch):
        raise RuntimeError("no such column")

    with pytest.raises(RuntimeError, match="no such column"):
        per_example(nn.Linear(4, 3), loss, cut({"x": NUMBERS, "y": LABELS}, 5))


def test_per_example_of_no_examples_is_nothing():
    found = per_example(nn.Linear(4, 3), cross_entropy, iter([]))
    assert {name: float(x.abs().sum()) for name, x in found.items()} == {
        "weight": 0,
        "bias": 0,
    }


def test_per_example_keeps_evaluation_mode():
    model = nn.Linear(4, 3).eval()
    per_example(model, cross_entropy, cut({"x": NUMBERS, "y": LABELS}, 5))
    assert not model.training


# While training -------------------------------------------------------------------


class Branches(nn.Module):
    """Two numbers; a pass reaches ``a``, ``b`` or both."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))
        self.b = nn.Parameter(torch.ones(()))

    def forward(self, x, gradients):
        return x * sum(getattr(self, name) * g for name, g in gradients.items())


class Steps:
    """One training step after the other that gives each parameter its gradient.

    A step has as many equal examples as it is told; the learning rate is 0.
    """

    def __init__(self, model, squares, watched):
        self.model, self.squares, self.watched = model, squares, watched
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def __call__(self, gradients, examples=1):
        self.optimizer.zero_grad()
        x = torch.ones(examples, dtype=self.model.a.dtype)
        self.model(x, gradients).mean().backward()
        if not self.watched:
            self.squares.add(examples)
        self.optimizer.step()


def feed(model, squares, passes, watched):
    """Run steps; tell of each if the model is not being watched."""
    step = Steps(model, squares, watched)
    for gradients in passes:
        step(gradients)


def collector(watched, model, **options):
    squares = SquaredGradients(model, **options)
    return squares.watch() if watched else squares


def found(squares):
    return {name: float(x) for name, x in squares.mean().items()}


both_ways = pytest.mark.parametrize("watched", [False, True])


@both_ways
def test_window_is_the_last_epoch(watched):
    model = Branches()
    squares = collector(watched, model, window=2)
    feed(model, squares, [{"a": g, "b": -2.0 * g} for g in (9, 8, 7, 5, 1, 3)], watched)
    assert found(squares) == {"a": (1 + 9) / 2, "b": (4 + 36) / 2}


@both_ways
@pytest.mark.parametrize(
    ("passes", "skip", "mean"),
    [
        (0, 0, 0.0),
        (1, 0, 1.0),
        (2, 2, 0.0),
        (3, 2, 9.0),
        (5, 2, (9 + 16 + 25) / 3),
        (6, 2, 36.0),
    ],
)
def test_skipped_and_unfinished_windows(watched, passes, skip, mean):
    model = Branches()
    squares = collector(watched, model, window=3, skip=skip)
    feed(model, squares, [{"a": i + 1, "b": i + 1} for i in range(passes)], watched)
    assert found(squares) == pytest.approx({"a": mean, "b": mean})


@both_ways
def test_parameter_that_some_passes_leave_out(watched):
    model = Branches()
    squares = collector(watched, model, window=3)
    epochs = [[10.0, 11.0, 12.0], [4.0, 6.0, 8.0]]
    passes = [
        {"a": g, "b": g} if i == 1 else {"a": g}
        for epoch in epochs
        for i, g in enumerate(epoch)
    ]
    feed(model, squares, passes, watched)
    # Its gradient is 0 in the other two passes of the last epoch.
    assert found(squares) == {"a": pytest.approx(116 / 3), "b": 36 / 3}


@both_ways
def test_parameter_that_the_last_epoch_leaves_out(watched):
    model = Branches()
    squares = collector(watched, model, window=2)
    feed(model, squares, [{"a": 1, "b": 5}] * 2 + [{"a": 2}] * 2, watched)
    assert found(squares) == {"a": 4.0, "b": 0.0}


def test_mean_stops_watching():
    model = Branches()
    squares = SquaredGradients(model, window=1).watch()
    step = Steps(model, squares, watched=True)
    step({"a": 2.0, "b": 1.0})
    assert found(squares)["a"] == 4.0
    step({"a": 3.0, "b": 1.0})
    assert found(squares)["a"] == 4.0


@both_ways
def test_half_precision_does_not_underflow(watched):
    model = Branches().half()
    squares = collector(watched, model, window=2)
    tiny = float(torch.tensor(1e-4, dtype=torch.float16))
    assert float(torch.tensor(tiny, dtype=torch.float16) ** 2) == 0
    feed(model, squares, [{"a": tiny, "b": 100.0}, {"a": tiny, "b": 1000.0}], watched)
    assert model.a.grad.dtype == torch.float16
    assert squares.mean()["a"].dtype == torch.float32
    # 1000 squared is beyond float16.
    assert found(squares) == {
        "a": pytest.approx(tiny**2),
        "b": pytest.approx(505_000),
    }


@both_ways
def test_sparse_gradients(watched):
    model = nn.Embedding(3, 2, sparse=True)
    squares = collector(watched, model, window=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for rows in ([0, 0, 1], [1]):
        optimizer.zero_grad()
        model(torch.tensor(rows)).sum().div(len(rows)).backward()
        if not watched:
            squares.add(len(rows))
        optimizer.step()
    # Sums of the examples' gradients, squared, over four examples.
    expected = torch.tensor([[4.0, 4.0], [1.0 + 1.0, 1.0 + 1.0], [0.0, 0.0]]) / 4
    torch.testing.assert_close(squares.mean()["weight"], expected)


def test_frozen_parameters_have_no_fisher():
    squares = SquaredGradients(PartlyFrozen(), window=1)
    assert list(squares.mean()) == ["scale", "unused", "head.weight", "head.bias"]


def test_gradients_and_training_are_left_alone():
    """Watching changes no bit of what is learned."""
    states = []
    for watched in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = mlp()
            squares = SquaredGradients(model, window=2)
            if watched:
                squares.watch()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(4):
                optimizer.zero_grad()
                cross_entropy(model, {"x": NUMBERS, "y": LABELS}).mean().backward()
                optimizer.step()
            states.append(model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_record_holds_the_mean_in_order():
    model = Branches()
    squares = SquaredGradients(model, window=1).watch()
    Steps(model, squares, watched=True)({"a": 2.0, "b": 3.0})
    record = squares.record()
    assert [(k, float(x.numpy())) for k, x in record.items()] == [("a", 4), ("b", 9)]
    assert record["a"].shape == ()
    assert list(tensor_record({"z": torch.ones(2), "a": torch.ones(1)})) == ["z", "a"]


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "2"])
def test_window_must_hold_a_pass(window):
    with pytest.raises(ValueError, match=rf"window={window!r} must be an integer >= 1"):
        SquaredGradients(Branches(), window)


# Batches of any size --------------------------------------------------------------


def expected_square(sizes):
    """The estimate's mean over independent batches of +1 or -1, by enumeration.

    One example of ``a * s`` has gradient s, so that F = 1 and m = 0 at this solution.
    """
    total = 0.0
    draws = list(itertools.product([1.0, -1.0], repeat=sum(sizes)))
    for draw in draws:
        model = Branches()
        squares = SquaredGradients(model)
        for batch in torch.tensor(draw).split(list(sizes)):
            model.zero_grad()
            (model.a * batch).mean().backward()
            squares.add(len(batch))
        total += found(squares)["a"]
    return total / len(draws)


@pytest.mark.parametrize("sizes", [(1,), (5,), (4, 1), (2, 2, 2), (1, 1, 1, 1)])
def test_batches_of_any_size_estimate_the_same_fisher(sizes):
    assert expected_square(sizes) == pytest.approx(1.0)


def test_a_short_last_batch_adds_little_away_from_a_solution():
    """Equal examples of gradient 3: F + (sum b^2 / sum b - 1) m^2 in closed form."""
    for sizes, expected in (((32, 32), 32 * 9), ((32, 1), 1025 / 33 * 9)):
        model = Branches()
        squares = SquaredGradients(model)
        step = Steps(model, squares, watched=False)
        for size in sizes:
            step({"a": 3.0}, examples=size)
        assert found(squares)["a"] == pytest.approx(expected)


# Loops of one's own ---------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x)))


class OwnSGD(torch.optim.SGD):
    """As SCAFFOLD's and its like: the step calls that of the base class."""

    def step(self, closure=None):
        return super().step(closure)


def seeded_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def mean_loss(model, rows):
    return nn.functional.cross_entropy(model(NUMBERS[rows]), LABELS[rows])


BATCHES = (slice(0, 2), slice(2, 5))


def by_hand(model=None):
    """Squares of summed gradients over the number of examples, without the package."""
    model = model or seeded_net()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rows in BATCHES:
        loss = nn.functional.cross_entropy(
            model(NUMBERS[rows]), LABELS[rows], reduction="sum"
        )
        for s, g in zip(
            total, torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            s += g**2
    names = [name for name, _ in model.named_parameters()]
    return {name: s / 5 for name, s in zip(names, total, strict=True)}


def train(model, optimizer, call=None):
    for rows in BATCHES:
        optimizer.zero_grad()
        mean_loss(model if call is None else call, rows).backward()
        optimizer.step()


def plain_loop(model):
    train(model, torch.optim.SGD(model.parameters(), lr=0.0))


def scaled_loop(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for rows in BATCHES:
        optimizer.zero_grad()
        scaler.scale(mean_loss(model, rows)).backward()
        scaler.step(optimizer)
        scaler.update()


def fused_scaled_loop(model):
    """The scaler hands its scale to the optimizer instead of dividing by it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for rows in BATCHES:
        optimizer.zero_grad()
        scaler.scale(mean_loss(model, rows)).backward()
        scaler.step(optimizer)
        scaler.update()


def overflowing_loop(model, **options):
    """Steps whose gradients are not finite are left out by the scaler."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for rows in (BATCHES[0], None, BATCHES[1]):
        optimizer.zero_grad()
        loss = mean_loss(model, BATCHES[0] if rows is None else rows)
        scaler.scale(loss * math.inf if rows is None else loss).backward()
        scaler.step(optimizer)
        scaler.update()


def fused_overflowing_loop(model):
    overflowing_loop(model, fused=True)


def accumulating_loop(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for rows in BATCHES:
        size = rows.stop - rows.start
        for row in range(rows.start, rows.stop):
            (mean_loss(model, slice(row, row + 1)) / size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def closure_loop(model):
    """As Lightning does; gradients exist only once the closure was called."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for rows in BATCHES:

        def closure(rows=rows):
            optimizer.zero_grad()
            loss = mean_loss(model, rows)
            loss.backward()
            return loss

        optimizer.step(closure)


def own_optimizer_loop(model):
    torch.optim.SGD(model.parameters())  # both classes' steps have torch's hooks
    train(model, OwnSGD(model.parameters(), lr=0.0))


def nesterov_loop(model):
    """Where an optimizer may use the gradients' memory."""
    options = {"momentum": 0.9, "nesterov": True, "foreach": True}
    train(model, torch.optim.SGD(model.parameters(), lr=0.0, **options))


def two_optimizers_loop(model):
    optimizers = [
        torch.optim.SGD(part.parameters(), lr=0.0)
        for part in (model.hidden, model.head)
    ]
    for rows in BATCHES:
        model.zero_grad()
        mean_loss(model, rows).backward()
        for optimizer in optimizers:
            optimizer.step()


def evaluating_loop(model):
    """Forward passes that nothing is learned from, with gradients and without."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for rows in BATCHES:
        optimizer.zero_grad()
        model(NUMBERS)
        with torch.no_grad():
            model(NUMBERS)
        mean_loss(model, rows).backward()
        optimizer.step()


def copying_loop(model):
    """As FedProx: a copy of the watched model is called, too."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    other = torch.optim.SGD(copied.parameters(), lr=0.0)
    for rows in BATCHES:
        optimizer.zero_grad()
        mean_loss(model, rows).backward()
        mean_loss(copied, BATCHES[0]).backward()
        other.step()
        optimizer.step()


def compiled_loop(model):
    compiled = torch.compile(model, backend="eager")
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), call=compiled)
    torch.compiler.reset()


LOOPS = [
    plain_loop,
    scaled_loop,
    fused_scaled_loop,
    overflowing_loop,
    fused_overflowing_loop,
    accumulating_loop,
    closure_loop,
    own_optimizer_loop,
    nesterov_loop,
    two_optimizers_loop,
    evaluating_loop,
    copying_loop,
    compiled_loop,
]


@pytest.mark.parametrize("loop", LOOPS)
def test_watched_loops_give_the_fisher_of_their_gradients(loop):
    model = seeded_net()
    fisher = SquaredGradients(model).watch()
    loop(model)
    record = fisher.record()
    for name, square in by_hand().items():
        numpy = torch.from_numpy(record[name].numpy().copy())
        torch.testing.assert_close(numpy, square, rtol=1e-4, atol=1e-9)


def test_window_is_of_optimizer_steps_when_gradients_accumulate():
    model = seeded_net()
    fisher = SquaredGradients(model, window=2).watch()
    for _ in range(2):
        accumulating_loop(model)
    torch.testing.assert_close(fisher.mean(), by_hand())


def test_gradients_count_as_they_are_clipped():
    model = seeded_net()
    fisher = SquaredGradients(model).watch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = BATCHES[1]
    mean_loss(model, rows).backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    optimizer.step()
    squares = sum(float(x.sum()) for x in fisher.mean().values())
    assert norm > 0.1
    assert squares == pytest.approx(3 * 0.01**2, rel=1e-3)


def test_only_the_optimizer_that_is_named_counts():
    model = seeded_net()
    ours, other = (torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2))
    fisher = SquaredGradients(model).watch(optimizer=ours)
    mean_loss(model, BATCHES[0]).backward()
    other.step()
    model.zero_grad()
    train(model, ours)
    torch.testing.assert_close(fisher.mean(), by_hand())


def test_other_models_and_optimizers_are_left_alone():
    model, other = seeded_net(), seeded_net()
    fisher = SquaredGradients(model).watch()
    plain_loop(other)
    plain_loop(model)
    plain_loop(other)
    torch.testing.assert_close(fisher.mean(), by_hand())


def test_nothing_stays_behind_after_a_client_that_fails():
    gc.collect()
    before = len(HOOKS_OF_ALL_OPTIMIZERS)
    model = seeded_net()
    fisher = SquaredGradients(model).watch()
    assert len(HOOKS_OF_ALL_OPTIMIZERS) == before + 1
    gone = weakref.ref(fisher)
    del fisher, model
    gc.collect()
    assert gone() is None
    assert len(HOOKS_OF_ALL_OPTIMIZERS) == before


def test_the_size_of_batches_may_be_said():
    class Encoder(Net):
        def encode(self, x):
            return self.forward(x)

    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loop(fisher):
        optimizer.zero_grad()
        model.encode(NUMBERS).square().mean().backward()
        optimizer.step()
        return fisher

    with pytest.raises(RuntimeError, match="nothing says how many examples"):
        loop(SquaredGradients(model).watch()).record()
    said = loop(SquaredGradients(model).watch(batch_size=5)).record()
    gradient = model.head.bias.grad
    assert said["head.bias"].numpy() == pytest.approx((5 * gradient**2).numpy())


def test_an_update_by_hand_is_refused():
    model = seeded_net()
    fisher = SquaredGradients(model).watch()
    mean_loss(model, BATCHES[0]).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    with pytest.raises(RuntimeError, match="no step of a torch optimizer"):
        fisher.record()


def test_a_client_that_does_not_train_knows_nothing():
    record = SquaredGradients(seeded_net()).watch().record()
    assert not any(x.numpy().any() for x in record.values())


def test_a_parameter_that_comes_later_is_refused():
    model = seeded_net()
    fisher = SquaredGradients(model).watch()
    model.head = nn.Linear(3, 3)
    plain_loop(model)
    with pytest.raises(RuntimeError, match=r"'head\.\w+' is trained, and was not"):
        fisher.record()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd' must be a torch.optim.Optimizer"),
        ({"batch_size": 0}, "batch_size=0 must be an integer >= 1"),
    ],
)
def test_bad_settings_of_watching_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SquaredGradients(Net()).watch(**options)


# Names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        partial(torch.compile, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
)
def test_names_are_those_of_the_model_inside(wrap):
    model = seeded_net()
    fisher = SquaredGradients(wrap(model)).watch()
    assert list(fisher.mean()) == [name for name, _ in model.named_parameters()]
    outer = list(wrap(model).state_dict())
    assert list(SquaredGradients(wrap(model)).mean(outer)) == outer


def adapted(**options):
    options = {"r": 2, "target_modules": ["hidden"], **options}
    return peft.get_peft_model(Net(), peft.LoraConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["head"]},
        {"bias": "lora_only"},
    ],
)
def test_names_of_an_adapter_are_those_that_peft_sends(options):
    model = adapted(**options)
    sent = peft.get_peft_model_state_dict(model)
    fisher = SquaredGradients(model).watch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mean_loss(model, BATCHES[0]).backward()
    optimizer.step()
    record = fisher.record()
    assert set(record) == set(sent)
    assert all(record[name].shape == sent[name].shape for name in sent)


def test_names_of_an_adapter_may_be_the_models_own():
    model = adapted()
    arrays = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(SquaredGradients(model).mean(arrays)) == set(arrays)
    with pytest.raises(ValueError, match="must be names with that of parameter"):
        SquaredGradients(model).mean(["head.weight"])


# Opacus ---------------------------------------------------------------------------


def private_loop(model, watch_at, noise, **options):
    """Train with Opacus; return the Fisher, and what its optimizer released."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = torch.utils.data.TensorDataset(100 * NUMBERS, LABELS)
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    fisher = SquaredGradients(model).watch() if watch_at == "before" else None
    module, private, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=0.1,
        **options,
    )
    if watch_at == "after":
        fisher = SquaredGradients(model).watch()
    if watch_at == "module":
        fisher = SquaredGradients(module).watch(optimizer=private)
    released = []
    for x, y in loader:
        private.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        private.step()
        released.append([p.grad.clone() for p in model.parameters()])
    by_parameter = zip(*released, strict=True)
    return fisher, [torch.stack(g).square().mean(0) for g in by_parameter]


@pytest.mark.parametrize("poisson_sampling", [False, True])
@pytest.mark.parametrize("watch_at", ["before", "after", "module"])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_under_opacus_the_fisher_is_of_what_is_released(
    watch_at, noise, poisson_sampling
):
    """Neither raw gradients nor how many examples a Poisson batch had."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Net()
        fisher, released = private_loop(
            model, watch_at, noise, poisson_sampling=poisson_sampling
        )
    record = fisher.record()
    assert list(record) == [name for name, _ in model.named_parameters()]
    for array, square in zip(record.values(), released, strict=True):
        assert array.numpy() == pytest.approx(square.numpy(), rel=1e-4)
    total = sum(float(x.numpy().sum()) for x in record.values())
    if not noise:  # each released gradient is clipped to 0.1, and is a mean over 3
        assert total <= 0.1**2 * (1 + 1e-3)


def test_raw_gradients_of_a_private_model_are_refused():
    model = seeded_net()
    squares = SquaredGradients(model)
    private_loop(model, None, noise=1.0)
    for call in (
        lambda: squares.add(5),
        lambda: per_example(model, cross_entropy, iter([])),
    ):
        with pytest.raises(ValueError, match="under Opacus.* would void the privacy"):
            call()
