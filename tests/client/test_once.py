"""A model that loss and metrics call alike computes once, and any other as always."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flower_ext.client.once import forward_once
from flower_ext.client.task import Task, evaluate
from flower_ext.data.char_gru import CharGRU

X = torch.arange(12.0).reshape(6, 2)


class Counting(nn.Module):
    """Counts its forward passes; takes and returns what it is told to."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.wrap = wrap
        self.calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.wrap(self.layer(x["x"] if isinstance(x, dict) else x) * scale)


def task(loss, metric):
    return Task(
        lambda config: Counting(),
        lambda context: ({"x": X}, {"x": X}),
        lambda model, batch: loss(model, batch).sum(1),
        lambda model, batch: {"metric": metric(model, batch).sum(1)},
    )


def plain(model, batch):
    return model(batch["x"])


def in_mode(mode):
    def call(model, batch):
        with mode(model):
            return model(batch["x"]).detach()

    return call


class Training:
    """A model in training mode for a time, as for dropout in evaluation."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.model.train()

    def __exit__(self, *_):
        self.model.eval()


SAME = {
    "as it is": (plain, plain),
    "an option": (lambda m, b: m(b["x"], scale=2.0), lambda m, b: m(b["x"], scale=2.0)),
    "a container": (lambda m, b: m({"x": b["x"]}), lambda m, b: m({"x": b["x"]})),
}
OTHERS = {
    "another tensor": (plain, lambda m, b: m(b["x"].clone())),
    "another option": (plain, lambda m, b: m(b["x"], scale=2.0)),
    "written to": (plain, lambda m, b: m(b["x"].add_(1))),
    "result written to": (lambda m, b: m(b["x"]).mul_(3), plain),
    "gradients": (plain, in_mode(lambda model: torch.enable_grad())),
    "training": (plain, in_mode(Training)),
    "autocast": (plain, in_mode(lambda model: torch.autocast("cpu"))),
}


@pytest.mark.parametrize("loss, metric", [*SAME.values(), *OTHERS.values()])
def test_values_are_those_of_two_passes(loss, metric):
    torch.manual_seed(0)
    model = Counting().eval()
    batch = {"x": X.clone()}
    with torch.no_grad():
        expected = [
            float(f(model, batch).sum(1).double().sum() / 6) for f in (loss, metric)
        ]
    model.calls = 0
    found = evaluate(task(loss, metric), model, {"x": X.clone()})
    assert [found["loss"], found["metric"]] == pytest.approx(expected, rel=1e-12)
    assert model.calls == (1 if (loss, metric) in SAME.values() else 2)


def test_each_batch_is_computed():
    model = Counting()
    evaluate(task(plain, plain), model, {"x": X}, batch_size=2)
    assert model.calls == 3
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("wrap", "calls"),
    [
        (lambda y: (y, None), 1),
        (lambda y: {"logits": y}, 1),
        (lambda y: SimpleNamespace(logits=y), 2),  # who knows what is done to it
    ],
)
def test_what_cannot_be_compared_is_computed_again(wrap, calls):
    model = Counting(wrap)
    with torch.no_grad(), forward_once(model):
        model(X)
        model(X)
    assert model.calls == calls


def test_a_tensor_that_is_gone_is_not_taken_for_a_new_one():
    model = Counting()
    with torch.no_grad(), forward_once(model):
        found = [model(torch.full((1, 2), float(i))) for i in range(20)]
        again = [model.layer(torch.full((1, 2), float(i))) for i in range(20)]
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_a_forward_of_its_own_is_put_back_after_an_error():
    model = nn.Linear(2, 1)
    own = model.forward = lambda x: x
    with pytest.raises(RuntimeError, match="wrong"), forward_once(model):
        raise RuntimeError("wrong")
    assert model.forward is own


def test_scripted_and_compiled_models_evaluate():
    model = torch.jit.script(nn.Linear(2, 3))
    found = evaluate(task(plain, plain), model, {"x": X})
    assert found["loss"] == pytest.approx(float(model(X).sum() / 6))
    compiled = torch.compile(Counting(), backend="eager")
    assert evaluate(task(plain, plain), compiled, {"x": X})["loss"] == pytest.approx(
        float(compiled(X).sum() / 6)
    )


def test_a_recurrent_model_is_the_same():
    torch.manual_seed(0)
    model = CharGRU(8).eval()
    text = torch.randint(0, 80, (4, 9))
    with torch.no_grad(), forward_once(model):
        first, again = model(text), model(text)
    assert first is again
    assert torch.equal(first, model(text))
