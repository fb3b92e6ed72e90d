r"""DiLoCo: few rounds of many steps, of workers whose optimizers never stop.

A worker takes H inner steps of AdamW, from the shared model and from the moments that
it had; the mean of the workers' changes is the gradient of an outer optimizer, SGD with
Nesterov's momentum (Douillard et al. 2023, "DiLoCo: Distributed Low-Communication
Training of Language Models", arXiv:2311.08105, Algorithm 1):

.. math::
   \Delta = \frac{1}{K} \sum_k (w_k - w), \qquad
   m \leftarrow \mu m + \Delta, \qquad
   w \leftarrow w + \eta\,(\Delta + \mu m).

In Streaming DiLoCo the layers are dealt out to P fragments, which are exchanged in
turns, one every H / P steps (Douillard et al. 2025, "Streaming DiLoCo with overlapping
communication", arXiv:2501.18512, Algorithm 2).
"""

import re
from collections.abc import Hashable, Mapping
from logging import WARNING
from typing import Unpack, cast

import torch

from flower_ext._flower import log
from flower_ext.client.half import ClientHalf, Local, trainable
from flower_ext.client.optimizer_state import OptimizerState, groups
from flower_ext.client.personal import forget_other_states
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, is_averaged
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import refuse, whole
from flower_ext.core.protocol import (
    MODEL_NUMBER_KEY,
    STATE_KEY,
    Config,
    Payload,
    Reply,
    Round,
)
from flower_ext.core.states import new_id
from flower_ext.core.ties import equal_in_model
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import SGD
from flower_ext.server.options import AdditiveOptions

# Names of the arrays that are sent up in a round, where they are not all.
FRAGMENT_KEY = "diloco-fragment"
# What a client keeps between the rounds of its fragments: its model, what the server
# has in its place, and the round.
MODEL, SENT, ROUND = "diloco-model", "diloco-sent", "diloco-round"


class DiLoCoClient(ClientHalf):
    """Goes on with the state of its optimizer, and, in fragments, with its own model.

    A client begins with a new optimizer when it is first asked. One that diverges, so
    that its model or its optimizer's state is not finite, keeps the state that it had.
    """

    name = "diloco"
    post_processing = True  # sent and kept is what is trained, and how it got there
    sends_kept = True

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Put what came into the client's own model, if only a fragment came."""
        if local.phase == "evaluate":
            return arrays
        kept = MODEL, SENT, ROUND
        forget_other_states(local.personal, local.config, *groups(), *kept)
        self._fragment = cast("list[str]", local.config.get(FRAGMENT_KEY, []))
        if not self._fragment:
            return arrays
        like = local.model.state_dict()
        if unknown := set(self._fragment) - like.keys():
            refuse("fragment", sorted(unknown)[:5], f"of arrays {list(like)[:5]}")
        own, known = dict(arrays), dict(arrays)
        if like.keys() - arrays.keys():
            last = local.personal.number(ROUND, 0)
            if last != local.server_round - 1 or MODEL not in local.personal:
                refuse(
                    "the client's own model",
                    f"of round {last:g}" if last else None,
                    f"of round {local.server_round - 1}",
                    "the client has lost what it kept, or has diverged; it is sent the "
                    "whole model in its next round",
                )
            own = {**local.personal.arrays(MODEL, like=like), **own}
            known = {**local.personal.arrays(SENT, like=like), **known}
        # What is sent is the change from what the server has, not from the own model.
        self._known = local.came = known
        return own

    def optimizer(self, local: Local) -> torch.optim.Optimizer:
        """Return the task's optimizer, with the state that it had."""
        found = super().optimizer(local)
        self._state = OptimizerState(found, trainable(local.model), local.personal)
        return found

    def after_training(self, local: Local) -> None:
        """Keep the optimizer's state, and the model."""
        trained = trainable(local.model).values()
        finite = all(bool(torch.isfinite(p).all()) for p in trained)
        if not finite or not self._state.is_finite():
            problem = "training diverged: the optimizer keeps the state that it had"
            log(WARNING, problem)
            local.personal.drop(MODEL)
            return
        self._state.keep()
        if self._fragment:
            local.personal.save(**{MODEL: local.end, SENT: self._known})
            local.personal.save(**{ROUND: local.server_round})

    def model_to_send(self, local: Local) -> Tensors | None:
        """Return the arrays of the round's fragment."""
        end = local.end
        return {name: end[name] for name in self._fragment} or None


def fragments_of(sent: Arrays, number: int) -> list[list[str]]:
    """Deal the layers of a model out to fragments, in turns.

    Of layers 0, 1, 2, ... fragment p has those with numbers p, p + P, p + 2P, ..., the
    paper's strided pattern. A layer is all arrays whose names have a common beginning
    up to the first number in them, ``model.layers.3.``, or else up to the last dot.
    Arrays that are equal in the model, as tied embeddings are, stay together.

    Parameters
    ----------
    sent : dict[str, ndarray]
        The model.
    number : int
        Of fragments, P.

    Returns
    -------
    list of list of str
        The names of each fragment's arrays, in the model's order.

    Raises
    ------
    ValueError
        If there are fewer layers with arrays of real numbers than fragments.

    Examples
    --------
    >>> import numpy as np
    >>> names = ["embed.weight", "layers.0.w", "layers.0.b", "layers.1.w", "head.w"]
    >>> sent = {name: np.arange(3.0) + i for i, name in enumerate(names)}
    >>> fragments_of(sent, 2)
    [['embed.weight', 'layers.1.w'], ['layers.0.w', 'layers.0.b', 'head.w']]
    """
    layers: dict[str, list[str]] = {}
    home = {name: _layer(name) for name in sent}
    for name, first in equal_in_model(sent).items():
        home[name] = home[first]
    for name in sent:
        layers.setdefault(home[name], []).append(name)
    dealt = [own for own in layers.values() if any(is_averaged(sent[n]) for n in own)]
    if number > len(dealt):
        cause = f"the model has the layers {list(layers)[:5]}, which are not divided"
        refuse("fragments", number, f"at most {len(dealt)}", cause)
    place = {name: i % number for i, own in enumerate(dealt) for name in own}
    return [[n for n in sent if place.get(n, 0) == p] for p in range(number)]


def _layer(name: str) -> str:
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return numbered[0] if numbered else name.rpartition(".")[0]


class DiLoCo(AdditiveStrategy):
    r"""Few rounds of many inner steps, with an outer optimizer of the mean change.

    Against FedAvg: clients keep the state of their optimizer between rounds, all weigh
    the same, as in the paper, and the server steps by Nesterov's momentum. The inner
    optimizer is the task's, ``Task(optimizer=...)``, such as AdamW, and H its
    ``local-steps``. Works with the client half :class:`DiLoCoClient`; with
    :class:`~flower_ext.client.OptimizerState` in a loop of one's own, unless there are
    fragments.

    Parameters
    ----------
    fragments : int (default: 1)
        P. In each round one of P parts of the model travels up, and the one of the
        round before down, so that ``local-steps`` are H / P; see :func:`fragments_of`.
        1 is DiLoCo.
    *flowers, **options
        Server optimizer, by default ``SGD(0.7, momentum=0.9, nesterov=True)``, sampler,
        mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If there are fragments under a mechanism, or more of them than layers: the
        latter before a client is asked. At the client, if its optimizer or model was
        changed between rounds, or has a state that cannot be kept, see
        :class:`~flower_ext.client.OptimizerState`.

    Notes
    -----
    With ``SGD()`` on the server and plain SGD on clients of equally many examples it is
    FedAvg; with ``SGD(rate, momentum)`` and one step, synchronous SGD with momentum. A
    single client and ``SGD()`` is one uninterrupted run of its optimizer, and
    ``SGD(rate)`` with a rate below 1 is Lookahead (Zhang et al. 2019,
    arXiv:1907.08610).

    **Fragments.** A client trains its whole model in each round. What it has of the
    other fragments stays its own until their turn, when their change is that of all
    rounds since; the outer momentum of a fragment moves only then. A client needs a
    model of its own for that: whoever did not answer in the round before, being new,
    away, or late, is sent the whole model and begins from it. A client that has lost
    its own says so by an error, and is sent the whole model in the next round. The
    server's model, which is evaluated, is that of the last exchange of each fragment.

    **What is kept.** On a client: what its optimizer has, twice the model for AdamW,
    and with fragments its model and the server's. It never travels, is part of a
    checkpoint, and is of one ``DiLoCo()``: a new one begins with new optimizers.

    **Privacy.** A change reveals what that of FedAvg does. Under a mechanism each
    change is clipped, and the sum noised; what a client keeps is made of its own data
    and of what was released, and the guarantee is as ever. With fragments a mechanism
    is refused: it would noise arrays that do not travel, and whether a client has a
    model of its own depends on who took part. Under ``DPSGD`` the state is made of
    noisy gradients, and costs nothing.

    **Deviations.** Streaming DiLoCo also lets a transfer overlap with further steps,
    after which a worker mixes its own values with those that come; here a round waits
    for its replies, and they replace the worker's. Its fragments are of whole
    transformer blocks; here embeddings and final layers are dealt out as layers, too.
    Batches are drawn anew in each round.

    Examples
    --------
    >>> strategy = DiLoCo(fragments=4)
    >>> strategy.server_optimizer
    SGD(learning_rate=0.7, momentum=0.9, nesterov=1)
    """

    client_half = DiLoCoClient
    drop_in = DropIn(
        fill_in="with OptimizerState of flower_ext.client:\n"
        "state = OptimizerState.of(optimizer, model, msg, context), once the\n"
        "optimizer is made, and state.keep() after the training",
        silent=True,
    )
    equal_weights = True

    def __init__(
        self,
        *flowers: object,
        fragments: int = 1,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        if options.get("server_optimizer") is None:
            options["server_optimizer"] = SGD(0.7, momentum=0.9, nesterov=True)
        self.fragments = whole("fragments", fragments, 1, "1 exchanges the whole model")
        if fragments > 1 and options.get("mechanism") is not None:
            cause = "a mechanism releases all arrays in every round"
            refuse("fragments", fragments, "1 under a mechanism", cause)
        super().__init__(*flowers, **options)
        self._names: list[list[str]] = []
        self._id = new_id()

    def no_asynchronous_run(self) -> str:
        """Return why clients must take part in whole rounds; empty if they need not."""
        if self.fragments > 1:
            return "each round exchanges one fragment, and stale clients another one"
        return super().no_asynchronous_run()

    def tell(self, round: Round) -> Config:
        """Tell clients whose state they keep, and which arrays they send."""
        told: dict[str, float | int | list[str]] = {STATE_KEY: self._id}
        if self.fragments > 1:
            if {n for names in self._names for n in names} != round.sent.keys():
                self._names = fragments_of(round.sent, self.fragments)
            place = (round.number - 1) % self.fragments
            # A residual of error feedback is of one fragment, as of one of many models.
            told |= {FRAGMENT_KEY: self._names[place], MODEL_NUMBER_KEY: place}
        return told

    def variant(self, client: int, round: Round) -> Hashable:
        """Return whether a client has all but the last fragment."""
        streams = self.fragments > 1 and round.phase == "train"
        return streams and client in round.answered_before

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Send the fragment that has moved, and to new clients the whole model."""
        if not variant:
            return Payload(round.sent)
        moved = self._names[(round.number - 2) % self.fragments]
        return Payload({name: round.sent[name] for name in moved})

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of the arrays that travel in this round."""
        sent = {name: round.sent[name] for name in _told(round)}
        return Contribution({DELTA: reply.change(round, start=sent or None).arrays})

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the mean change of these arrays; others, and their momentum, stay."""
        mean = total.mean()
        return {name: mean[name] for name in _told(round) or mean}

    def state_dict(self) -> dict[str, object]:
        """Add the fragments, and whose state clients keep."""
        return {**super().state_dict(), "fragments": self._names, "id": self._id}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take them over."""
        super().load_state_dict(state)
        self._names = cast("list[list[str]]", state["fragments"])
        self._id = cast(float, state["id"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Fragments": self.fragments, **super().settings()}


def _told(round: Round) -> list[str]:
    return cast("list[str]", round.told.get(FRAGMENT_KEY, []))
