"""AdditiveStrategy: a federated round for every strategy that is a sum.

A strategy is two functions: ``contribution``, one client's term, and ``update``, what
the server makes of the sum of the terms. The round in between is written once::

    sample -> payload -> [clients train] -> contribution -> sum -> update -> optimizer

With a mechanism of :mod:`flower_ext.privacy`, contributions are clipped before the sum
and noise is added to it.
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from logging import WARNING
from typing import Unpack, cast

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from flower_ext._flower import log
from flower_ext.core.arrays import Arrays
from flower_ext.core.contribution import DELTA, WEIGHT, Contribution, Total, no_change
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import Config, Decoder, Metrics, Reply, Round
from flower_ext.core.replies import MalformedReply
from flower_ext.core.spread import Spread, take_spread, with_squares
from flower_ext.core.ties import Ties, equal_in_model
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.privacy.private_evaluation import PrivateEvaluation
from flower_ext.privacy.private_sum import PrivateSum
from flower_ext.server.cohorts import Seats
from flower_ext.server.options import RoundOptions
from flower_ext.server.partial_sums import PackSum, Summand, Summed, Version
from flower_ext.server.strategy import Outcome, RoundStrategy
from flower_ext.wire.messages import UPLOAD_KEY, Uploads
from flower_ext.wire.registry import classes, rebuild

# Terms that are added to the sum together: many, so that the sum is read and written
# rarely, but few enough to be held in memory at a time.
_TERMS_AT_A_TIME = 16
# Public attributes of Flower's FedAvg on which no contribution depends: functions,
# which may not be picklable.
_FLOWERS = {"train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"}

# What samplers guarantee of rounds, and cannot where places are filled one by one.
_OF_ROUNDS = {"poisson", "cyclic-poisson", "balls-in-bins", "limited", "all"}


class AdditiveStrategy(RoundStrategy):
    r"""Federated averaging as a sum, and the base of most of the pack's strategies.

    At its defaults it is Flower's :class:`~flwr.serverapp.strategy.FedAvg`, with the
    contribution :math:`n_k \Delta_k` and the update
    :math:`\sum n_k\Delta_k / \sum n_k`. In addition to what
    :class:`~flower_ext.server.strategy.RoundStrategy` does, contributions are added up
    in client order and in float64, on the server or in the workers that ran the
    clients, and a mechanism can make the run differentially private. The weighted mean
    of integer arrays is rounded; it is exact while change times total weight is below
    2**53.

    Parameters
    ----------
    *flowers
        Flower's own options by position, as its FedAvg takes them.
    mechanism, **options
        See :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    A subclass overrides :meth:`contribution` and :meth:`update`, and where it needs
    them :meth:`zero`, :meth:`find_ties`, :meth:`advance`, :meth:`report` and those of
    :class:`~flower_ext.server.strategy.RoundStrategy`, except ``aggregate`` and
    ``finish``. Contributions may be made in other processes, which get those attributes
    of the strategy whose names do not begin with ``_``: settings are public, state that
    stays on the server is not. Under a mechanism that counts on secret cohorts, the
    numbers of replies, errors and dropped replies are not among the metrics.

    Examples
    --------
    >>> from flower_ext.server.optimizers import Adam
    >>> strategy = AdditiveStrategy(fraction_train=0.1, server_optimizer=Adam())
    """

    tells_spread = True
    #: Whether all clients with examples weigh the same, whatever number they have.
    equal_weights: bool = False
    #: Whether contributions have a weight of their own: ``Contribution(weight=...)``.
    declares_weight: bool = False
    #: Shapes of the contribution's scalars, by name.
    scalars: Mapping[str, tuple[int, ...]] = {}
    #: Under a mechanism, factors that are applied to parts and scalars before clipping
    #: and undone afterwards; they bring all to about the size of the change.
    scales: Mapping[str, float] = {}

    def __init__(
        self,
        *flowers: object,
        mechanism: Mechanism | None = None,
        **options: Unpack[RoundOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        if mechanism is not None:
            self._core.private = self._under(mechanism, options)

    def _under(self, mechanism: Mechanism, options: RoundOptions) -> PrivateSum:
        """Put the round under a mechanism."""
        if not isinstance(mechanism, Mechanism):
            refuse("mechanism", mechanism, "a Mechanism, or None")
        if self.server_optimizer.needs_spread:
            refuse(
                "server_optimizer",
                self.server_optimizer,
                "one that needs the sum alone, with a mechanism",
                "the norms of the clients' changes are neither clipped nor noised",
            )
        for name in ("fraction_train", "min_train_nodes"):
            if name in options:
                refuse(
                    name,
                    options[name],
                    "left out with a mechanism",
                    f"the cohort is its num_sampled_clients={mechanism.cohort}",
                )
        if self.sampler.hears:
            refuse(
                "sampler",
                type(self.sampler).__name__,
                "one that hears no reports, with a mechanism",
                "whom it asks depends on the clients' data, and no noise hides that",
            )
        if mechanism.is_private and self.min_replies > 1:
            refuse(
                "min_replies",
                self.min_replies,
                "1 with a mechanism",
                "whether a round is released must not depend on the replies",
            )
        if mechanism.evaluation:
            self._require_gate(mechanism.evaluation, options)
        # The user may give the same sampler to another strategy; each run has its own
        # memory of who took part.
        if mechanism.hides_cohorts:
            self.sampler.take_seed()
        self._core.cohorts.sampler = copy.deepcopy(self._core.cohorts.sampler)
        private = PrivateSum(mechanism, self._core.cohorts.sampler, self.scales)
        half = self.client_half
        if half is not None and half.sends_kept:
            private.require_no_memory("a client half that keeps", half.__name__)
        return private

    def _require_gate(
        self, evaluation: PrivateEvaluation, options: RoundOptions
    ) -> None:
        """Refuse what would pass a private evaluation by, or not be heard."""
        for name in ("fraction_evaluate", "evaluate_metrics_aggr_fn"):
            if name in options:
                cause = "means are over its num_sampled_clients, all of equal weight"
                refuse(name, options[name], "left out with PrivateEvaluation", cause)
        if type(self).aggregate_evaluate is not RoundStrategy.aggregate_evaluate:
            refuse(
                "evaluation",
                evaluation,
                f"left out with {type(self).__name__}",
                "its own aggregate_evaluate reads what clients measured without noise",
            )

    @property
    def mechanism(self) -> Mechanism | None:
        """What makes the run private, if it is."""
        return self._core.private.mechanism if self._core.private else None

    @property
    def private_sum(self) -> PrivateSum | None:
        """The mechanism at work in this run, for audits."""
        return self._core.private

    # What a strategy says ---------------------------------------------------------

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return one client's term; it depends on arguments and settings only.

        Parameters
        ----------
        reply : Reply
            What the client has answered.
        round : Round
            The round, with the model that was sent.

        Raises
        ------
        MalformedReply
            If the reply lacks something or has it in another form.
        """
        return Contribution({DELTA: reply.delta(round)})

    def zero(self, sent: Arrays) -> Contribution:
        """Return the contribution of a client that changes nothing: its layout.

        Everything that :meth:`contribution` may return must be in it, since a mechanism
        adds noise to nothing else. By default these are the change, a weight if
        contributions declare one, and :attr:`scalars`; a strategy with further parts
        overrides it.
        """
        return no_change(sent, self.scalars, weighs=self.declares_weight)

    def find_ties(self, sent: Arrays) -> Ties:
        """Return, under a mechanism, which arrays of the model are one tensor.

        No reply may tell it there. By default arrays that are equal in the first model
        are taken for one, and clients that hold two refuse to train. A strategy whose
        model is several models, which may start alike, looks at each apart, and answers
        for what it finds.

        Returns
        -------
        dict[str, str]
            Further names of tensors, each with the first.
        """
        return equal_in_model(sent)

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the direction to move the model along; it changes no state."""
        return total.mean()

    def advance(self, total: Total, round: Round) -> None:
        """Change the state that crosses rounds; called once a round, after `update`."""

    def report(self, total: Total, round: Round) -> Metrics:
        """Return metrics of the round; called before :meth:`update`."""
        return {}

    # The round --------------------------------------------------------------------

    @property
    def _told_ties(self) -> Ties:
        if type(self).find_ties is not AdditiveStrategy.find_ties:
            return {}  # under names that need not be those of a client's model
        return self._ties if self._core.private else {}

    def _prepare(self, sent: Arrays) -> None:
        if self._core.private:
            self._core.private.require_budget()
            self._core.private.open(self.zero(sent))
            if self._core.tied is None:
                self._core.tied = self.find_ties(sent)
                _warn_of_ties(self._core.tied)

    def _combine(self, usable: list[Message], dropped: Counter[str]) -> Outcome:
        """Add up, make the sum private, and ask the strategy for its direction."""
        round = self._core.rounds["train"]
        total, used = self._add_up(usable, dropped)
        spread = self._take_spread(total)
        zero = self.zero(round.sent)
        if problem := self._problem(total):
            if self._core.private:
                total = total.uncarried()
            total.fill(zero)
            enough = total.count >= self.min_replies
            own = self.report(total, round) if enough and total.is_finite() else {}
            return Outcome(used, None, own, problem)
        metrics: Metrics = {}
        if self._core.private:
            self._core.private.require_number(self._core.cohorts.number)
            total = self._core.private.release(total).uncarried()
            metrics = {**self._core.private.metrics()}
        total.fill(zero)
        metrics |= self.report(total, round)
        direction = self.update(total, round)
        if self._core.versions:
            direction = self._damped(direction, usable, used)
        self.advance(total, round)
        return Outcome(used, direction, metrics, spread=spread)

    def _take_spread(self, total: Total) -> Spread | None:
        """Return how far the changes are apart, where the optimizer asks for it."""
        if not self.server_optimizer.needs_spread:
            return None
        return take_spread(total, _no_parameters(self._core.rounds["train"]))

    def _add_up(
        self, replies: list[Message], dropped: Counter[str]
    ) -> tuple[Total, list[RecordDict]]:
        """Sum the usable contributions; count the others in ``dropped``.

        Whether any of them spoils the model is seen from the sum, which costs one pass
        a round and not one a reply. Only if one does, each is checked to find it.
        """
        total, used, left_out = self._sum(replies)
        sent = self._core.rounds["train"].sent
        if not self._core.private and not total.can_move(sent):
            total, used, left_out = self._sum(replies, check=True)
        dropped += left_out
        self._require_understood(bool(used), left_out)
        return total, used

    def _sum(
        self, replies: list[Message], *, check: bool = False
    ) -> tuple[Total, list[RecordDict], Counter[str]]:
        """Return the sum, what is in it, and the reasons to leave others out."""
        summand = self._summand()
        total, used, left_out = Total(), [], Counter[str]()
        waiting: list[Contribution] = []
        nodes = {reply.metadata.src_node_id for reply in replies}
        merged: set[PackSum] = set()
        for reply in replies:
            content, node = reply.content, reply.metadata.src_node_id
            try:
                if isinstance(content, Summed):
                    pack = _pack_of(content)
                    if pack not in merged and not pack.clients <= nodes:
                        raise MalformedReply(_NOT_IN_THE_ROUND)
                else:
                    pack = None
                    waiting.append(summand.term(content, node, check=check))
            except MalformedReply as problem:
                left_out[str(problem)] += 1
                continue
            used.append(content)
            if len(waiting) == _TERMS_AT_A_TIME or pack:
                total.add(*waiting)
                waiting.clear()
            if pack and pack not in merged:
                merged.add(pack)
                total.merge(pack.total)
        total.add(*waiting)
        return total, used, left_out

    def summand(self) -> Summand | None:
        """Return what makes the terms of this round's replies in another process.

        It has the strategy's settings, the model that was sent, and the clipping norm,
        but neither noise nor seeds nor state. None where the replies must arrive as
        they are: an ``aggregate_train`` of a subclass's own may read them.
        """
        own = type(self).aggregate_train is not RoundStrategy.aggregate_train
        return None if own or "train" not in self._core.rounds else self._summand()

    def _summand(self) -> Summand:
        bare = object.__new__(type(self))
        vars(bare).update(
            {
                name: value
                for name, value in vars(self).items()
                if not name.startswith("_") and name not in _FLOWERS
            }
        )
        round, cohorts = self._core.rounds["train"], self._core.cohorts
        return Summand(
            bare,
            _without_cohort(round),
            # Of all nodes where a worker may not know who else is in the cohort.
            cohorts.places if self._hides_cohorts else dict(cohorts.asked["train"]),
            self._keys,
            self.zero(round.sent).shapes(),
            self._core.private.clipper().clip if self._core.private else None,
            {node: _bare(version) for node, version in self._core.versions.items()},
            partial(with_squares, left_out=_no_parameters(round))
            if self.server_optimizer.needs_spread
            else None,
        )

    def _problem(self, total: Total) -> str:
        """Say why the model cannot be moved, if so.

        Under noise it always can: that nobody replied must not show.
        """
        if self._core.private and self._core.private.mechanism.is_private:
            return ""
        weight = total.weight
        if self._core.private:  # a declared weight is still part of the clipped vector
            weight = float(total.scalars.get(WEIGHT, weight))
        if total.count < self.min_replies or weight <= 0:
            return (
                f"{total.count} usable replies of total weight {weight:g}, at "
                f"least {self.min_replies} are needed"
            )
        fits = total.can_move(self._core.rounds["train"].sent)
        return "" if fits else "the model cannot hold the sum of the replies"

    # Asynchronous runs ------------------------------------------------------------

    def no_asynchronous_run(self) -> str:
        """Return why clients must take part in whole rounds; empty if they need not."""
        if self._core.private:
            return (
                "a mechanism accounts for cohorts that are drawn at once from all "
                "clients, and for sums whose terms weigh alike; here the next client "
                "is drawn from those who are not at work, and fast ones take part more "
                "often"
            )
        for hook in ("configure_train", "aggregate_train"):
            if getattr(type(self), hook) is not getattr(RoundStrategy, hook):
                return f"its own {hook} is written for whole rounds"
        if self.sampler.guarantee().kind in _OF_ROUNDS:
            return (
                f"its {type(self.sampler).__name__} draws whole rounds, and here "
                "places are filled as they become free: choose UniformSampler"
            )
        if not self.server_optimizer.keeps_coordinates:
            return (
                f"its {type(self.server_optimizer).__name__} changes what coordinates "
                "mean, and stale clients answer in the old ones"
            )
        return self.needs_rounds

    def let_in(self, seats: Seats | None) -> None:
        """Ask clients as ``seats`` says from now on; None asks for whole rounds."""
        self._core.cohorts.let_in(seats)
        if seats is None:
            self._core.contents, self._core.versions = {}, {}

    def ask_more(self, arrays: ArrayRecord, grid: Grid) -> list[Message]:
        """Ask further clients to train in the round that was last configured.

        Parameters
        ----------
        arrays : ArrayRecord
            The model, as ``configure_train`` was given it.
        grid : Grid
            Of the clients.
        """
        core = self._core
        round = core.rounds["train"]
        cohort = core.cohorts.draw(
            grid,
            "train",
            round.number,
            share=self.fraction_train,
            least=self.min_train_nodes,
            available=self.min_available_nodes,
        )
        seen = frozenset(core.cohorts.trained)
        return self._address(
            cohort, replace(round, trained=seen), arrays, core.contents
        )

    def last_asked(self) -> tuple[Round, Mapping[int, int]]:
        """Return the round of the clients that were last asked, and their places."""
        return self._core.rounds["train"], self._core.cohorts.asked["train"]

    def reader_of(self, told: Config) -> Decoder | None:
        """Return what reads the change of a client that was told this."""
        text = told.get(UPLOAD_KEY)
        own = classes(self._core.upload) if self._core.upload else ()
        return Uploads.of([rebuild(text, own)]) if isinstance(text, str) else None

    def take_up(self, versions: Mapping[int, Version]) -> None:
        """Expect the replies of these nodes, each to the model of its version."""
        core = self._core
        places = {node: core.cohorts.places[node] for node in versions}
        core.cohorts.asked["train"] = places
        core.versions = dict(versions)
        core.rounds["train"] = replace(
            core.rounds["train"], cohort=sorted(places.values())
        )

    def _damped(
        self, direction: Arrays, usable: list[Message], used: list[RecordDict]
    ) -> Arrays:
        """Return the direction times the mean factor of what is in the sum.

        With equal weights that divides by the number of contributions, as FedBuff does,
        and not by the sum of their factors: where all are stale the step is short.
        """
        ids = {id(content) for content in used}
        factors = [
            self._core.versions[message.metadata.src_node_id].factor
            for message in usable
            if id(message.content) in ids
        ]
        mean = math.fsum(factors) / len(factors)
        if mean == 1.0:
            return direction
        return {name: mean * x for name, x in direction.items()}

    # The run ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Return what crosses rounds: JSON values and arrays, nested by name."""
        state = super().state_dict()
        if self._core.private:
            state["privacy"] = self._core.private.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where a run with the same settings was saved."""
        if ("privacy" in state) != bool(self._core.private):
            raise ValueError(
                "the saved run had a mechanism, or had none, other than this one"
            )
        super().load_state_dict(state)
        if self._core.private:
            self._core.private.load_state_dict(
                cast("Mapping[str, object]", state["privacy"])
            )

    def settings(self) -> dict[str, object]:
        """Return the settings that :meth:`summary` logs, by name."""
        described = super().settings()
        if self._core.private:
            described |= self._core.private.settings()
            if not self._evaluates:
                asked = "fraction_evaluate=0" if self._tells_metrics else _WITHHELD
                described["Evaluation"] = f"clients are not asked: {asked}"
        return described


_WITHHELD = "their metrics would be withheld; evaluate_fn measures at the server"


def _warn_of_ties(ties: Ties) -> None:
    for name, first in ties.items():
        log(
            WARNING,
            "arrays %r and %r are equal and taken for one tensor, since under a "
            "mechanism no reply may tell. If they only start alike, start them apart",
            first,
            name,
        )


def _no_parameters(round: Round) -> frozenset[str]:
    """Return the names of what is averaged plainly under every server optimizer."""
    return frozenset(round.sent) - frozenset(round.parameters)


def _without_cohort(round: Round) -> Round:
    nobody: frozenset[int] = frozenset()
    return replace(
        round, cohort=(), trained=nobody, answered=nobody, answered_before=nobody
    )


def _bare(version: Version) -> Version:
    return version._replace(round=_without_cohort(version.round))


_NOT_IN_THE_ROUND = "added up with clients that are not in the round"


def _pack_of(content: Summed) -> PackSum:
    """Return the sum that a client is in."""
    if content.pack is None:
        raise MalformedReply(content.problem or _NOT_IN_THE_ROUND)
    return content.pack
