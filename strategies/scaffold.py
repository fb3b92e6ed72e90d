r"""Scaffold: clients that correct every step for how their data differ from the rest.

With many local steps on data that differ, clients drift apart, each towards a minimum
of its own, and the average of where they arrive is not the minimum of the average. In
Scaffold client k keeps a control :math:`c_k`, its guess of its own gradient, and knows
the mean :math:`c` of all of them. It steps along

.. math:: y \leftarrow y - \eta\,(g_k(y) - c_k + c),

which at a common solution is no step at all (Karimireddy, Kale, Mohri, Reddi, Stich and
Suresh 2020, "SCAFFOLD: stochastic controlled averaging for federated learning", ICML,
arXiv 1910.06378).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from logging import WARNING
from typing import Literal, Unpack, cast, get_args

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.groups import mean_gradient
from flower_ext.client.half import ClientHalf, Local, trainable
from flower_ext.client.loops import NO_STEPS, before_steps, is_received
from flower_ext.client.personal import (
    Personal,
    forget_other_runs,
    forget_other_states,
)
from flower_ext.client.task import num_examples
from flower_ext.client.tensors import Tensors, read_tensors, tensor_record
from flower_ext.core.arrays import Arrays, all_finite, is_parameter, zeros_like
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import one_of, refuse
from flower_ext.core.protocol import (
    STATE_KEY,
    Config,
    Metrics,
    Payload,
    Reply,
    Round,
    model_in,
    told,
)
from flower_ext.core.states import new_id
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

CONTROL = "control"
CHANGE = "control-change"
OPTION_KEY = "scaffold-option"
# What a client keeps: its control.
OWN = "scaffold-control"

Option = Literal["I", "II"]


class Controls:
    r"""The controls of one client in one round.

    Parameters
    ----------
    control : dict[str, Tensor]
        :math:`c`, the server's.
    personal : Personal
        What the client keeps: :math:`c_k`, under the same names; 0 at first.

    Attributes
    ----------
    trained : callable
        ``() -> bool``: whether the model was trained, where that can be told.

    Examples
    --------
    >>> from flwr.app import RecordDict
    >>> model = nn.Linear(1, 1, bias=False)
    >>> controls = Controls({"weight": torch.ones(1, 1)}, Personal(RecordDict()))
    >>> model.weight.grad = torch.full((1, 1), 4.0)
    >>> controls.correct(trainable(model))
    >>> float(model.weight.grad), float(controls.new()["weight"])
    (5.0, 4.0)
    """

    def __init__(self, control: Tensors, personal: Personal) -> None:
        self._personal = personal
        found = personal.arrays(OWN, like=control)
        self.own = own = {name: x.to(control[name]) for name, x in found.items()}
        self._shift = {name: x - own[name] for name, x in control.items()}
        self._sums = {name: torch.zeros_like(x) for name, x in control.items()}
        self._steps: Counter[str] = Counter()
        self.trained: Callable[[], bool] = lambda: False

    @classmethod
    def of(cls, model: nn.Module, message: Message, context: Context) -> "Controls":
        """Return those of a client with a training loop of its own, and set to work.

        One line before the training, with the received model; and
        ``"control-change": controls.change()`` in the reply.

        Parameters
        ----------
        model : torch.nn.Module
            With the received weights.
        message : Message
            The server's.
        context : Context
            The client's, whose state keeps :math:`c_k`.
        """
        record = message.content.array_records.get(CONTROL)
        if record is None:
            sent = sorted(message.content)
            refuse("message", sent, f"with {CONTROL!r}", "is the strategy Scaffold?")
        config = told(message.content)
        if config.get(OPTION_KEY) == "I":
            refuse("option", "I", "'II'", "a loop of one's own does not read all data")
        devices = {name: p.device for name, p in model.named_parameters()}
        control = {
            name: x.to(devices.get(name, x.device))
            for name, x in read_tensors(record).items()
        }
        forget_other_runs(message.content, context.state)
        personal = Personal(context.state)
        forget_other_states(personal, config, OWN)
        controls = cls(control, personal)
        received = model_in(message.content, (CONTROL,))
        before_steps(model, lambda own, _: controls.correct(own), received)
        found = weakref.ref(model)  # the hook keeps the controls, and not the model
        controls.trained = lambda: bool((m := found()) and not is_received(m, received))
        return controls

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add :math:`c - c_k` to the gradients of a step, before it is taken."""
        for name, p in parameters.items():
            if name in self._shift and p.grad is not None:
                for group in (self._shift, self._sums):  # a loop may move its model
                    group[name] = group[name].to(p.device)
                self._sums[name] += p.grad
                self._steps[name] += 1
                p.grad += self._shift[name]

    def new(self) -> Tensors:
        r"""Return :math:`c_k^+` by option II, without a step the old one.

        It is the mean of the gradients that were corrected. With plain SGD of rate
        :math:`\eta` over E steps that is the paper's
        :math:`c_k - c + (x - y) / (E\eta)`; with any other optimizer it still is a
        gradient, which that is not.
        """
        steps = max(self._steps.values(), default=0)
        return {n: x / steps for n, x in self._sums.items()} if steps else self.own

    def keep(self, new: Tensors | None = None) -> dict[str, Tensor]:
        """Keep the new control, by default :meth:`new`; return its change.

        One that is not finite is dropped: the old one stays, and the change is 0.
        """
        new = self.new() if new is None else new
        if not all(bool(torch.isfinite(x).all()) for x in new.values()):
            problem = "the control is not finite, training diverged: the old one stays"
            log(WARNING, problem)
            new = self.own
        self._personal.save(**{OWN: new})
        return {name: x - self.own[name].to(x) for name, x in new.items()}

    def change(self) -> ArrayRecord:
        """Keep the new control; return its change as the record that is sent."""
        if not self._steps and self.trained():
            raise ValueError(NO_STEPS)
        return tensor_record(self.keep())


class ScaffoldClient(ClientHalf):
    """Corrects every step by the controls, and keeps its own.

    A client that is asked for the first time begins with 0; one without examples keeps
    what it has. Works with any optimizer and with DP-SGD: see :class:`Scaffold`.
    """

    name = "scaffold"
    sends_kept = True
    # Of option II, whose control is made of the steps; option I is refused below.
    post_processing = True

    def begin(self, local: Local) -> None:
        """Read the controls, and find the new one by option I."""
        control = local.received[CONTROL]
        forget_other_states(local.personal, local.config, OWN)
        self._controls = Controls(control, local.personal)
        self._gradient: Tensors | None = None
        if local.config.get(OPTION_KEY) == "I" and num_examples(local.train):
            local.session.measures()  # it is not private
            local.model.eval()
            found = read_tensors(mean_gradient(local, self.objective), local.device)
            self._gradient = {name: found[name].to(x) for name, x in control.items()}

    def after_backward(self, model: nn.Module) -> None:
        """Correct the gradients."""
        self._controls.correct(trainable(model))

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Keep the new control, and send its change."""
        return {CHANGE: self._controls.keep(self._gradient)}, {}


class Scaffold(AdditiveStrategy):
    r"""Federated averaging of clients that correct their steps.

    Against FedAvg: clients that trained all weigh the same, as in the paper; each sends
    the change of its control beside that of its model, and the server keeps their mean,

    .. math::
       x \leftarrow x + \frac{1}{|S|} \sum_{k \in S} (y_k - x), \qquad
       c \leftarrow c + \frac{1}{N} \sum_{k \in S} (c_k^+ - c_k),

    (Algorithm 1), where N is the number of all clients, those of the cohort or not. All
    controls begin at 0, so that the first round is FedAvg with equal weights. Works
    with the client half :class:`ScaffoldClient`, or with :meth:`Controls.of` in a loop
    of one's own.

    Parameters
    ----------
    option : {"II", "I"} (default: "II")
        What a client's new control is: the mean of the gradients of its local steps,
        which costs nothing, or, by option I, the gradient of its loss at the received
        model, in evaluation mode, which costs a pass over its data.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`;
        the paper's global step size is the server optimizer's.

    Notes
    -----
    Twice as much travels, in both directions. Codecs are for the model only; controls
    travel as they are, in float32 or wider. Only trained parameters are corrected, not
    BatchNorm's statistics, which are averaged.

    The paper writes :math:`c_k - c + (x - y)/(E\eta)` for option II, which for its
    plain SGD is the mean of the gradients. With momentum or Adam it is no gradient of
    anything; the mean is, and is what is used here, so that any local optimizer may be
    corrected. The paper's theorems are for plain SGD.

    The mean of the clients' controls is :math:`c` only while every reply arrives and
    all clients stay: a client whose reply was lost or dropped has changed its control,
    and the server does not know; the control of one that leaves, or that lost its
    state, stays part of :math:`c`. A control that is not finite, at a client or at the
    server, is dropped for the one before, with a warning.

    **Privacy.** A control is a gradient of the client's data: it says more of them than
    a change of the model over many steps. The control stays with the client, and its
    change is sent, which adds up to it. Under a mechanism both changes are one clipped
    vector, and both sums are noised, :math:`c` among them; what a client keeps is made
    of its own data and of what was released. The change of a control is as large as a
    gradient, that of a model as a gradient times steps and learning rate:
    ``Mechanism(scales={"control-change": steps * learning_rate})`` gives both a like
    share of the norm. The noise of all rounds adds up in :math:`c`. Under ``DPSGD`` the
    control of option II is made of noisy gradients only, and costs nothing; option I
    reads the data and is refused.

    Examples
    --------
    >>> strategy = Scaffold(fraction_train=0.1)
    """

    client_half = ScaffoldClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.scaffold import Controls",
        before="controls = Controls.of({model}, {message}, {context})",
        records={CHANGE: "controls.change()"},
    )
    needs_rounds = (
        "the server's control is the mean of the clients' only while all their "
        "changes count alike"
    )
    equal_weights = True
    other_arrays = (CHANGE,)

    def __init__(
        self,
        *flowers: object,
        option: Option = "II",
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.option = one_of("option", option, get_args(Option))
        self._control: Arrays = {}
        self._id = new_id()

    def tell(self, round: Round) -> Config:
        """Tell clients the option, and whose controls they are to keep."""
        return {OPTION_KEY: self.option, STATE_KEY: self._id}

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Send the control to those who train."""
        if round.phase == "evaluate":
            return Payload(round.sent)
        control = {
            name: x.astype(_wide(round.sent[name]))
            for name, x in self._control_of(round).items()
        }
        return Payload(round.sent, beside={CONTROL: control})

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the changes of model and control."""
        change = reply.arrays(CHANGE, like=round.parameters)
        return Contribution({DELTA: reply.delta(round), CHANGE: change})

    def zero(self, sent: Arrays) -> Contribution:
        """Return a change of both that is 0."""
        parameters = {n: x for n, x in sent.items() if is_parameter(n, x)}
        return Contribution(
            {DELTA: zeros_like(sent), CHANGE: zeros_like(parameters)},
        )

    def advance(self, total: Total, round: Round) -> None:
        """Move the control by the sum of the changes over the number of all clients."""
        share = total.weight / round.population
        mean = total.mean(CHANGE)
        new = {n: x + share * mean[n] for n, x in self._control_of(round).items()}
        with np.errstate(over="ignore"):
            sent = [x.astype(_wide(round.sent[name])) for name, x in new.items()]
        if all_finite(sent):
            self._control = new
        else:
            problem = "round %s: the control would not be finite: the old one stays"
            log(WARNING, problem, round.number)

    def _control_of(self, round: Round) -> Arrays:
        if not self._control:
            return {n: np.zeros(x.shape) for n, x in round.parameters.items()}
        return self._control

    def state_dict(self) -> dict[str, object]:
        """Add the control."""
        own = {"control": self._control, "id": self._id}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the control."""
        super().load_state_dict(state)
        self._control = cast(Arrays, dict(cast(Arrays, state["control"])))
        self._id = cast(float, state["id"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Option": self.option, **super().settings()}


def _wide(array: np.typing.NDArray[np.generic]) -> np.dtype[np.generic]:
    """Return the type of an array's control: its own, float32 at the least."""
    return np.result_type(array, np.float32)
