r"""FedDyn: a proximal term whose centre moves, until clients and server agree.

FedProx holds clients back, and so only makes their bias smaller. FedDyn gives client k
a linear term beside the proximal one,

.. math:: \min_y\; F_k(y) - \langle h_k, y \rangle + \frac{\alpha}{2} \|y - x\|^2,
   \qquad h_k \leftarrow h_k - \alpha (y_k - x),

so that :math:`h_k` becomes the client's gradient, and a common solution is one that no
client moves away from (Algorithm 1 of Acar, Zhao, Matas, Mattina, Whatmough and
Saligrama 2021, "Federated learning based on dynamic regularization", ICLR,
arXiv 2111.04263).

Both terms together are, up to a constant, the proximal term
:math:`\frac{\alpha}{2} \|y - (x - s_k)\|^2` with :math:`s_k = -h_k / \alpha`, the sum
of all moves of the client. That is how it is computed here.
"""

from collections.abc import Mapping
from logging import WARNING
from typing import Unpack, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.encoding import Mod
from flower_ext.client.half import ClientHalf, Local, Proximal, trainable
from flower_ext.client.mods import Answer, add_metrics, asked, drawn
from flower_ext.client.personal import Personal, forget_other_states
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, finite_or_unchanged, is_parameter
from flower_ext.core.contribution import Contribution, Total
from flower_ext.core.errors import positive
from flower_ext.core.protocol import STATE_KEY, Config, Metrics, Reply, Round
from flower_ext.core.states import new_id
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

ALPHA_KEY = "feddyn-alpha"
# What a client keeps: the sum of its moves.
MOVES = "feddyn-moves"


def keep_move(personal: Personal, start: Tensors, end: Tensors) -> None:
    """Add a client's move to the sum of its moves.

    A sum that would not be finite stays as it was.
    """
    moves = personal.arrays(MOVES, like=start)
    # In half precision a sum of many moves would lose the small ones.
    wide = {
        n: x.to(torch.promote_types(x.dtype, torch.float32)) for n, x in start.items()
    }
    new = {n: moves[n].to(x) + end[n].to(x) - x for n, x in wide.items()}
    if all(bool(torch.isfinite(x).all()) for x in new.values()):
        personal.save(**{MOVES: new})
    else:
        log(WARNING, "the moves are not finite, training diverged: the old sum stays")


class FedDynClient(ClientHalf):
    """Adds the dynamic regularizer, and keeps the sum of its moves.

    A client that is asked for the first time begins with 0, and one without examples
    does not move. Under DP-SGD the term is added after clipping and noise: it is made
    of trained models, and costs nothing.
    """

    name = "feddyn"
    sends_kept = True
    post_processing = True

    def begin(self, local: Local) -> None:
        """Put the centre of the proximal term where this client's is."""
        names = trainable(local.model).keys() & local.start.keys()
        self._start = {n: x for n, x in local.start.items() if n in names}
        forget_other_states(local.personal, local.config, MOVES)
        moves = local.personal.arrays(MOVES, like=self._start)
        centre = {name: x - moves[name] for name, x in self._start.items()}
        self._term = Proximal(centre, local.number(ALPHA_KEY, 0.0), "alpha")
        self._term.require_stable(local)

    def regularizer(self, model: nn.Module) -> Tensor | None:
        """Return both terms, as one proximal term."""
        return self._term(model)

    def after_training(self, local: Local) -> None:
        """Keep the sum of all moves."""
        keep_move(local.personal, self._start, local.end)

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Say with which strength the model was trained."""
        return {}, {ALPHA_KEY: self._term.strength}


def dynamic() -> Mod:
    """Return the mod that makes a training loop of one's own that of :class:`FedDyn`.

    For ``ClientApp(mods=[dynamic()])``. The regularizer's gradient is added to each
    step of a torch optimizer. For other strategies it does nothing.
    """

    def mod(message: Message, context: Context, call_next: Answer) -> Message:
        found = asked(FedDynClient.name, message, context, call_next)
        if not found or found[0].phase == "evaluate":
            return call_next(message, context)
        client, config = found
        personal, begun = Personal(context.state), client.received.to_torch_state_dict()
        start = {n: x for n, x in begun.items() if is_parameter(n, x.numpy())}
        forget_other_states(personal, config, MOVES)
        moves = personal.arrays(MOVES, like=start)
        centre = ArrayRecord(begun | {n: x - moves[n] for n, x in start.items()})
        strength = float(cast(float, config[ALPHA_KEY]))
        with drawn(client.received, centre, strength, "alpha") as pull:
            reply = client.answer()
        if reply.has_content():
            trained = client.model_of(reply)[1]
            pull.require_steps(client.received, trained)
            keep_move(personal, start, trained.to_torch_state_dict())
            add_metrics(reply, {ALPHA_KEY: strength})
        return reply

    return mod


class FedDyn(AdditiveStrategy):
    r"""Federated averaging of clients whose regularizer follows their moves.

    Against FedAvg: clients that trained all weigh the same, as in the paper, each has
    the regularizer above, and the server goes further than the average,

    .. math::
       h \leftarrow h - \frac{\alpha}{N} \sum_{k \in P} (y_k - x), \qquad
       x \leftarrow \frac{1}{|P|} \sum_{k \in P} y_k - \frac{h}{\alpha},

    where N is the number of all clients, those of the cohort or not. Works with the
    client half :class:`FedDynClient`, or with the mod :func:`dynamic` for a training
    loop of one's own.

    Parameters
    ----------
    alpha : float (default: 0.1)
        :math:`\alpha > 0`: how strongly clients are held back. SGD needs
        :math:`\alpha < 2 / \text{learning rate}`. Towards 0 clients train as in FedAvg,
        but it is not FedAvg: the server still adds the sum of all past moves. The paper
        takes 0.001 to 0.1.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        At the client, before it has trained, if :math:`\alpha` is too large for its
        learning rate.

    Notes
    -----
    As many bytes as FedAvg, in both directions: :math:`h_k` stays with the client and
    :math:`h` with the server. The paper's clients solve their problem exactly; here
    they take the local steps that they are given, which changes the way to the solution
    and not the solution. Only trained parameters have an :math:`h`; BatchNorm's
    statistics are averaged.

    :math:`h` is the mean of the clients' :math:`h_k` only while every reply arrives and
    all clients stay: a client whose reply was lost or dropped has moved on, and what
    one that leaves, or that lost its state, has moved stays part of :math:`h`. A sum of
    moves that is not finite, at a client or at the server, is dropped for the one
    before, with a warning.

    **Privacy.** What is sent is as with FedAvg, and a mechanism protects it in the same
    way: :math:`h` is made of the noisy means. It adds up the noise of all rounds,
    :math:`x` with it, so that a private run wants few rounds or little noise.

    Examples
    --------
    >>> strategy = FedDyn(alpha=0.01, fraction_train=0.1)
    """

    client_half = FedDynClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.feddyn import dynamic", mod="dynamic()"
    )
    needs_rounds = (
        "the sum of all moves is that of the clients' only while all count alike"
    )
    equal_weights = True
    consumed_metrics = (ALPHA_KEY,)

    def __init__(
        self,
        *flowers: object,
        alpha: float = 0.1,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        cause = "0 would leave h undefined; FedAvg is AdditiveStrategy"
        self.alpha = positive("alpha", alpha, cause)
        self._moves: Arrays = {}
        self._id = new_id()

    def tell(self, round: Round) -> Config:
        """Tell clients the strength, and whose moves they are to keep."""
        return {ALPHA_KEY: self.alpha, STATE_KEY: self._id}

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the move of a client that had the regularizer, and says so."""
        reply.number(ALPHA_KEY)
        return super().contribution(reply, round)

    def update(self, total: Total, round: Round) -> Arrays:
        r"""Return the mean move minus :math:`h / \alpha`."""
        mean, moves = total.mean(), self._moves_after(total, round)
        return {name: x + moves.get(name, 0.0) for name, x in mean.items()}

    def advance(self, total: Total, round: Round) -> None:
        r"""Add to the sum of all moves, :math:`-h / \alpha`."""
        new = self._moves_after(total, round)
        if new is self._moves:
            problem = "round %s: the moves would not be finite: the old sum stays"
            log(WARNING, problem, round.number)
        self._moves = new

    def _moves_after(self, total: Total, round: Round) -> Arrays:
        """Return the sum after this round, or the old one if it would not be finite."""
        mean, share = total.mean(), total.weight / round.population
        sent = {n: x for n, x in round.parameters.items() if n in mean}
        new = {n: self._moves.get(n, 0.0) + share * mean[n] for n in sent}
        with np.errstate(over="ignore", invalid="ignore"):
            moved = {n: (x + mean[n] + new[n]).astype(x.dtype) for n, x in sent.items()}
        return new if finite_or_unchanged(moved, sent) else self._moves

    def state_dict(self) -> dict[str, object]:
        """Add the sum of all moves."""
        return {**super().state_dict(), "moves": self._moves, "id": self._id}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the sum of all moves."""
        super().load_state_dict(state)
        self._moves = dict(cast(Arrays, state["moves"]))
        self._id = cast(float, state["id"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Alpha": self.alpha, **super().settings()}
