"""Muon and AdamW as one optimizer: what is whose, and that it is both of torch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flower_ext.client import MuonAdamW
from flower_ext.client.half import LocalSettings
from flower_ext.client.loops import before_steps
from flower_ext.client.muon import Joined


class Words(nn.Module):
    """An embedding, a hidden layer with a norm, a kernel, and an output layer."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.norm(torch.relu(self.hidden(self.embed(x))))
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def made(model, maker, **settings):
    settings = LocalSettings(**{"learning_rate": 0.02, "weight_decay": 0.1, **settings})
    local = SimpleNamespace(model=model, settings=settings)
    return maker.make(dict(model.named_parameters()), local)


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


@pytest.mark.parametrize(
    ("maker", "tied", "hidden"),
    [
        (MuonAdamW(), False, {"hidden.weight"}),
        (MuonAdamW(), True, {"hidden.weight"}),
        (MuonAdamW("embed.*"), False, {"hidden.weight", "head.weight"}),
        (MuonAdamW(lambda name: "hidden" in name), False, None),
    ],
)
def test_hidden_matrices_are_muons(maker, tied, hidden):
    model = Words(tied)
    hidden = hidden or {"embed.weight", "head.weight"}
    optimizer = made(model, maker)
    muon, adamw = optimizer.param_groups
    assert names_of(model, muon) == hidden
    assert names_of(model, adamw) == dict(model.named_parameters()).keys() - hidden
    assert {(group["lr"], group["weight_decay"]) for group in (muon, adamw)} == {
        (0.02, 0.1)
    }


def test_no_matrix_is_refused():
    with pytest.raises(ValueError, match="none is left for Muon"):
        made(nn.Linear(3, 2), MuonAdamW())
    with pytest.raises(ValueError, match="momentum=1.0 must be in the open interval"):
        MuonAdamW(momentum=1.0)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_its_steps_are_those_of_both_and_go_on_from_a_state_dict():
    model = Words()
    theirs = copy.deepcopy(model)
    optimizer = made(model, MuonAdamW(momentum=0.9, betas=(0.8, 0.9)))
    own = dict(theirs.named_parameters())
    hidden = own.pop("hidden.weight")
    both = {"lr": 0.02, "weight_decay": 0.1}
    apart = [
        torch.optim.Muon(
            [hidden], momentum=0.9, adjust_lr_fn="match_rms_adamw", **both
        ),
        torch.optim.AdamW(own.values(), betas=(0.8, 0.9), **both),
    ]
    for seed in range(6):
        if seed == 3:  # another object goes on
            again = made(model, MuonAdamW(momentum=0.9, betas=(0.8, 0.9)))
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = again
        for net in (model, theirs):
            gradients(net, seed)
        optimizer.step()
        for part in apart:
            part.step()
        for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(ours, other)
    assert len(optimizer.state) == len([*model.parameters()])


def test_a_step_with_a_closure_returns_the_loss():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = Joined(torch.optim.SGD([p], 0.5))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert p.item() == 0.0


def test_what_corrects_steps_does_so_once():
    """Hooks on all optimizers of a process see the joined one, and not its parts."""
    model = Words()
    seen = []
    before_steps(model, lambda own, optimizer: seen.append((set(own), optimizer)))
    optimizer = made(model, MuonAdamW())
    for _ in range(2):
        gradients(model, 0)
        optimizer.step()
    assert seen == [(dict(model.named_parameters()).keys(), optimizer)] * 2
