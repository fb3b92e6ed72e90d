"""Clipping by layer in one backward pass: against torch.func, and under attack."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from flower_ext import DPSGD, client_app
from flower_ext.client import OnePassClipping
from flower_ext.client.half import ClientHalf, Local, LocalSettings
from flower_ext.client.noisy_steps import NoisePlan, NoisySteps
from flower_ext.client.one_pass import OnePassSteps
from flower_ext.client.task import Task
from flower_ext.core.arrays import to_record
from flower_ext.privacy import SiloPrivacy
from flower_ext.privacy.layer_sums import SINGLE_SLACK
from flower_ext.simulation import LocalGrid

SIZE = 6


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.out(
            torch.tanh(self.norm(self.conv(x.view(-1, 1, 4, 4)))).flatten(1)
        )


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, stride=2)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(x.view(-1, 2, 8))).flatten(1))


class Text(nn.Module):
    """Sequences: of small layers, and of one that is too large to be formed."""

    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        tokens = (x.abs() * 3).long().clamp(max=7)
        return self.out(torch.tanh(self.mix(self.norm(self.embed(tokens)))).mean(1))


class Wide(Text):
    def __init__(self):
        super().__init__(width=320)


class Middle(Text):
    def __init__(self):
        super().__init__(width=96)


class Twice(Text):
    def forward(self, x):
        tokens = (x.abs() * 3).long().clamp(max=7)
        hidden = self.mix(torch.tanh(self.mix(self.norm(self.embed(tokens)))))
        return self.out(torch.tanh(hidden).mean(1))


class Tied(Text):
    def __init__(self):
        super().__init__()
        del self.out
        self.back = nn.Linear(4, 8, bias=False)
        self.back.weight = self.embed.weight

    def forward(self, x):
        tokens = (x.abs() * 3).long().clamp(max=7)
        return self.back(torch.tanh(self.mix(self.norm(self.embed(tokens))))).mean(1)


class Scaled(nn.Module):
    """A parameter without dimensions, which Opacus differentiates by torch.func."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 5)
        self.scale = Scale()

    def forward(self, x):
        return self.scale(self.first(x))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * self.by


def one_layer():
    return nn.Linear(16, 3)


def frozen_start():
    return nn.Sequential(
        nn.Linear(16, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 3)
    )


def both(layer):
    return [f"{layer}.weight", f"{layer}.bias"]


LAYERS = {  # names of the parameters of each layer
    Image: [both("conv"), both("norm"), both("out")],
    Signal: [both("conv"), both("out")],
    Text: [["embed.weight"], both("norm"), both("mix"), both("out")],
    Tied: [["embed.weight"], both("norm"), both("mix")],
    Scaled: [both("first"), ["scale.by"]],
    one_layer: [["weight", "bias"]],
    frozen_start: [both("2")],
}
LAYERS |= dict.fromkeys([Wide, Middle, Twice], LAYERS[Text])
# Linear, and sees one vector an example.
SINGLE = {"out.weight", "first.weight", "2.weight", "weight"}


def cross_entropy(model, batch):
    losses = nn.functional.cross_entropy(
        model(batch["x"]), batch["y"], reduction="none"
    )
    return batch["weight"] * losses


def columns(size=SIZE):
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(size, 16, generator=generator),
        "y": torch.randint(0, 3, (size,), generator=generator),
        "weight": torch.ones(size),
    }


def steps(
    net, clip, split="uniform", data=None, loss=cross_entropy, arrays=None, drawn=None
):
    """The steps of one training on a model of fixed weights, and that model."""
    torch.manual_seed(3)
    model = net()
    # Out of the way of the two layers that the modules begin with alike.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
        for name, value in (arrays or {}).items():
            model.get_parameter(name).copy_(value)
    data = columns() if data is None else data
    local = Local(
        task=Task(lambda config: net(), lambda context: (data, data), loss),
        model=model,
        train=data,
        test=data,
        settings=LocalSettings(learning_rate=1.0, batch_size=SIZE),
        config=ConfigRecord(),
        context=Context(1, 1, {"partition-id": 0}, RecordDict(), {}),
        device=torch.device("cpu"),
    )
    plan = NoisePlan(1, 1.0, drawn or len(data["y"]), clip, 0.0)
    if split == "flat":
        return NoisySteps(local, ClientHalf(), plan, "ghost"), model
    return OnePassSteps(local, ClientHalf(), plan, split), model


def summed(*how, **more):
    """By name, what noise would be added to."""
    taken, model = steps(*how, **more)
    data = taken.local.train
    _, found = taken.summed(data)
    taken.end()
    return {n: found[p].double() for n, p in model.named_parameters() if p in found}


def by_hand(net, clip, split, data=None):
    """Gradients per example by torch.func, clipped by layer, in float64."""
    taken, model = steps(net, clip, data=data)
    taken.end()
    data = taken.local.train
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x, y, weight):
        out = functional_call(model, parameters, (x[None],))
        return weight * nn.functional.cross_entropy(out, y[None])

    each = vmap(grad(loss), (None, 0, 0, 0))(
        trained, data["x"], data["y"], data["weight"]
    )
    each = {n: g.double().reshape(SIZE, -1) for n, g in each.items()}
    sizes = [sum(trained[n].numel() for n in layer) for layer in LAYERS[net]]
    total = {}
    for names, size in zip(LAYERS[net], sizes, strict=True):
        share = size / sum(sizes) if split == "dimension" else 1 / len(sizes)
        norm = torch.cat([each[n] for n in names], 1).norm(dim=1)
        left = 1 - SINGLE_SLACK if SINGLE & set(names) else 1.0
        factors = (left * clip * math.sqrt(share) / norm).clamp(max=1.0)
        total |= {n: (factors @ each[n]).view_as(trained[n]) for n in names}
    return total


@pytest.mark.parametrize("net", LAYERS)
@pytest.mark.parametrize(("clip", "split"), [(0.05, "dimension"), (0.5, "uniform")])
def test_each_layer_of_each_example_is_clipped_as_torch_func_does(net, split, clip):
    found, expected = summed(net, clip, split), by_hand(net, clip, split)
    assert found.keys() == expected.keys()
    for name in expected:
        bound = 2e-6 * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=bound)
    if clip < 0.1:  # something was clipped
        free = by_hand(net, 1e9, split)
        assert any((free[n] - expected[n]).abs().max() > 1e-2 for n in free)


def test_the_splits_differ():
    one, other = (by_hand(Text, 0.1, split) for split in ("uniform", "dimension"))
    assert any((one[n] - other[n]).abs().max() > 1e-2 for n in one)


@pytest.mark.parametrize(("drawn", "left"), [(1024, 1 - SINGLE_SLACK), (1025, 1.0)])
def test_one_layer_is_clipped_as_ever(drawn, left):
    # What is planned decides: as many examples are here both times.
    found = summed(one_layer, 0.3, drawn=drawn)
    flat = summed(one_layer, left * 0.3, "flat")
    for name in flat:
        if left == 1.0:
            assert torch.equal(found[name], flat[name])
        torch.testing.assert_close(found[name], flat[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", [Text, Image])
def test_without_clipping_it_is_the_gradient_of_the_sum(net):
    taken, model = steps(net, 1e30)
    total, found = taken.summed(taken.local.train)
    taken.end()
    loss = cross_entropy(model, taken.local.train).sum()
    loss.backward()
    assert total == pytest.approx(float(loss.detach()))
    for p in model.parameters():
        torch.testing.assert_close(
            found[p].double(), p.grad.double(), rtol=1e-5, atol=1e-5
        )


def test_a_step_leaves_nothing_behind():
    taken, model = steps(Text, 1.0)
    for _ in range(2):
        _, first = taken.summed(taken.local.train)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    _, again = taken.summed(taken.local.train)
    for p in first:
        assert torch.equal(first[p], again[p])
    taken.end()
    assert not any(m._backward_hooks for m in model.modules())


def test_an_empty_batch_has_no_sum():
    taken, _ = steps(Text, 1.0)
    assert taken.summed({k: x[:0] for k, x in columns().items()}) == (0.0, {})


class Unused(Text):
    def forward(self, x):
        self.out(torch.zeros(len(x), 4))
        return super().forward(x)


def test_what_a_model_computes_and_does_not_use_changes_nothing():
    found, expected = summed(Unused, 0.1), summed(Text, 0.1)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


class Again(Text):
    """Computes a use of its middle anew after the backward pass has seen the other."""

    def forward(self, x):
        tokens = (x.abs() * 3).long().clamp(max=7)
        first = checkpoint(self.mix, self.norm(self.embed(tokens)), use_reentrant=True)
        return self.out(torch.tanh(self.mix(torch.tanh(first))).mean(1))


def test_a_layer_that_is_used_again_in_the_backward_pass_is_refused():
    taken, model = steps(Text, 1.0)
    model.forward = Again.forward.__get__(model)
    with pytest.raises(ValueError, match="Linear was used again after its gradients"):
        taken.summed(taken.local.train)


# No weights let an example move the sum by more -------------------------------------


def cancelling(net, large, rest):
    """Weights under which the terms of two tokens cancel, but for a rest."""
    width = net().mix.in_features
    embed = 0.1 * torch.randn(8, width)
    embed[:2] = 0.0
    embed[0, 0], embed[1, 0] = large, -large
    embed[:2, 1] = rest
    # What is not normalised reaches the middle as it is.
    return {"embed.weight": embed, "mix.weight": torch.zeros(width, width)}


def amplifying(net, large, rest):
    """Weights under which gradients of the classes cancel on their way back."""
    width = net().mix.in_features
    head = {"out.weight": large * torch.ones(3, width)}
    return {**head, "embed.weight": rest / large * torch.randn(8, width)}


def moved(net, weights, clip, **how):
    """How far the victim moves the sum, over all parameters."""
    sums = []
    for weight in (0.0, 1.0):
        data = columns(24)
        data["x"][5] = torch.tensor([0.0, 0.4] * 8)  # the tokens 0 and 1 in turn
        data["weight"][5] = weight
        sums.append(summed(net, clip, data=data, arrays=weights, **how))
    return math.sqrt(
        sum(float((sums[1][n] - x).norm() ** 2) for n, x in sums[0].items())
    )


def without_norm(net):
    def made():
        model = net()
        model.norm = nn.Identity()
        return model

    return made


@pytest.mark.parametrize("net", [Text, Twice, Wide])
@pytest.mark.parametrize(
    ("weights", "large", "rest"),
    [
        (cancelling, 1e4, 3.0),
        (cancelling, 1.5e8, 2e4),
        (cancelling, 1e20, 1.0),
        (amplifying, 1e8, 1.0),
        (amplifying, 1e12, 1e-3),
    ],
)
def test_no_weights_let_one_example_move_the_sum_by_more(net, weights, large, rest):
    found = moved(without_norm(net), weights(net, large, rest), 1.0)
    assert 1e-3 < found <= 1.0


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    exponents=st.lists(st.integers(-12, 12), min_size=4, max_size=4),
    split=st.sampled_from(["uniform", "dimension"]),
    seed=st.integers(0, 100),
)
def test_no_scale_of_a_layer_does_either(exponents, split, seed):
    generator = torch.Generator().manual_seed(seed)
    names = ["embed.weight", "norm.weight", "mix.weight", "out.weight"]
    model = Text()
    weights = {
        n: 10.0**e * torch.randn(model.get_parameter(n).shape, generator=generator)
        for n, e in zip(names, exponents, strict=True)
    }
    try:
        assert moved(Text, weights, 0.5, split=split) <= 0.5
    except ValueError as error:
        assert "has the received model diverged" in str(error)


# The trainer ------------------------------------------------------------------------


def train(trainer, data=None, loss=cross_entropy, **config):
    data = columns(40) if data is None else data
    task = Task(lambda config: Text(), lambda context: (data, data), loss)
    grid = LocalGrid(client_app(task, trainer=trainer), 1)
    torch.manual_seed(0)
    arrays = to_record({k: 0.5 * x.numpy() for k, x in Text().state_dict().items()})
    record = ConfigRecord({"server-round": 1, "lr": 1.0, "batch-size": 8, **config})
    content = RecordDict({"arrays": arrays, "config": record})
    message = Message(content, next(iter(grid.get_node_ids())), "train")
    [reply] = grid.send_and_receive([message])
    assert reply.has_content(), reply.error.reason
    new = {name: a.numpy() for name, a in reply.content["arrays"].items()}
    change = {n: new[n] - arrays[n].numpy() for n in new}
    return change, dict(reply.content["metrics"])


NOISY = {"noise_multiplier": 1.5, "clipping_norm": 0.2, "delta": 1e-3, "seed": 2}


def test_noise_and_account_are_those_of_the_whole_clipping_norm():
    def flat(model, batch):
        return 0 * model(batch["x"]).sum(1)

    privacy = SiloPrivacy(**NOISY)
    found, spent = train(OnePassClipping(privacy), loss=flat, **{"local-steps": 60})
    noise = np.concatenate([x.ravel() for x in found.values()]) * 8 / math.sqrt(60)
    count = noise.size
    assert abs(noise.std() / 0.3 - 1) < 5 / math.sqrt(2 * count)
    _, flat_spent = train(DPSGD(privacy), loss=flat, **{"local-steps": 60})
    assert spent["example-epsilon"] == flat_spent["example-epsilon"]
    assert "train-loss" not in spent


def test_a_seed_repeats_a_split_and_no_other():
    privacy = SiloPrivacy(**NOISY)
    one, again, other = (
        train(OnePassClipping(privacy, split=split), **{"local-steps": 3})[0]
        for split in ("uniform", "uniform", "dimension")
    )
    assert all(np.array_equal(one[n], again[n]) for n in one)
    assert not np.allclose(one["mix.weight"], other["mix.weight"], atol=1e-3)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='by hand' must be one of"):
        OnePassClipping(SiloPrivacy(**NOISY), split="by hand")
