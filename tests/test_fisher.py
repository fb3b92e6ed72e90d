"""Fisher estimators against brute force and closed forms."""

import pytest
import torch
from torch import nn

from flower_ext.fisher import SquaredGradients, per_example, tensor_record

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


def backward(model, gradients):
    """Run one backward pass that gives each parameter its gradient."""
    model.zero_grad()
    sum(getattr(model, name) * g for name, g in gradients.items()).backward()


def feed(model, squares, passes, watched):
    """Run passes; tell of each if the model is not being watched."""
    for gradients in passes:
        backward(model, gradients)
        if not watched:
            squares.add()


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
    backward(model, {"a": 2.0, "b": 1.0})
    assert found(squares)["a"] == 4.0
    backward(model, {"a": 3.0, "b": 1.0})
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
    for rows in ([0, 0, 1], [1]):
        model.zero_grad()
        model(torch.tensor(rows)).sum().backward()
        if not watched:
            squares.add()
    expected = torch.tensor([[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
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


def test_minibatch_squares_of_equal_examples_are_those_of_one():
    """A hand-sized value: loss w * x with x = 3 in every example."""
    model = Branches()
    for _ in range(2):
        squares = SquaredGradients(model, window=1).watch()
        (model.a * torch.full((4,), 3.0)).mean().backward()
        assert found(squares)["a"] == 9.0
        model.zero_grad()


def test_record_holds_the_mean_in_order():
    model = Branches()
    squares = SquaredGradients(model, window=1).watch()
    backward(model, {"a": 2.0, "b": 3.0})
    record = squares.record()
    assert [(k, float(x.numpy())) for k, x in record.items()] == [("a", 4), ("b", 9)]
    assert record["a"].shape == ()
    assert list(tensor_record({"z": torch.ones(2), "a": torch.ones(1)})) == ["z", "a"]


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "2"])
def test_window_must_hold_a_pass(window):
    with pytest.raises(ValueError, match=rf"window={window!r} must be an integer >= 1"):
        SquaredGradients(Branches(), window)
