"""AdditiveStrategy: one federated round, for every strategy that is a sum.

A strategy is two functions: ``contribution``, one client's term, and ``update``, what
the server makes of the sum of the terms. The round in between is written here once::

    sample -> broadcast -> [clients train] -> contribution -> sum -> update -> optimizer

With a mechanism of :mod:`flower_ext.privacy`, contributions are clipped before the sum
and noise is added to it.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import ClassVar, Unpack, cast

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from flower_ext._flower import (
    AggregationError,
    InconsistentMessageReplies,
    in_simulation,
    log,
)
from flower_ext.client.half import ClientHalf
from flower_ext.core.arrays import (
    Arrays,
    Term,
    all_finite,
    finite_or_unchanged,
    from_record,
    subtract,
    to_record,
    zeros_like,
)
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import fraction, refuse, whole
from flower_ext.core.nodes import NodeOrder, is_fixed, ordered_nodes, wait_for_nodes
from flower_ext.core.protocol import CLIENT_HALF_KEY, WRONG_HALF, Metrics
from flower_ext.core.replies import (
    MalformedReply,
    aggregate_metrics,
    array_key,
    log_dropped,
    read_arrays,
    read_scalar,
    sort_replies,
    unreadable,
)
from flower_ext.core.sampling import Purpose, Sampler, TooFewClients, UniformSampler
from flower_ext.core.ties import (
    TIED_KEY,
    TIED_TO_KEY,
    Ties,
    equal_in_all,
    equal_in_model,
    read_ties,
)
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.privacy.private_sum import PrivateSum
from flower_ext.server.callbacks import Callback
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import SGD, ServerOptimizer, State, keep_variances
from flower_ext.server.options import FedAvgOptions, by_name, require_known
from flower_ext.server.partial_sums import NOT_FINITE, PackSum, Summand, Summed
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import Tracker

Config = Mapping[str, ConfigRecordValues]

# Enough for the sum to be read and written rarely, few enough to be held at a time.
_TERMS_AT_A_TIME = 16
_NOT_HELD = "the new model, or the server optimizer, would not be finite"
# What no contribution depends on, some of it large and some secret.
_ON_THE_SERVER = (
    "server_optimizer",
    "sampler",
    "train_metrics_aggr_fn",
    "evaluate_metrics_aggr_fn",
    "_sent",
    "_looked_at",
    "_clients",
    "_cohort",
    "_evaluators",
)


class AdditiveStrategy(FedAvg):
    r"""Federated averaging as a sum, and the base of the pack's strategies.

    At its defaults it is Flower's :class:`~flwr.serverapp.strategy.FedAvg`:
    contribution :math:`n_k \Delta_k`, update :math:`\sum n_k\Delta_k / \sum n_k`.
    Against it: cohorts are seeded; replies are added in client order in float64, so
    that the result does not depend on who finished first; integer arrays keep their
    dtype (their weighted mean is rounded; exact while change times total weight is
    below 2**53); a reply that is malformed, not finite,
    ambiguous or unasked for is left out and counted instead of ending the run or
    spoiling the model.

    Parameters
    ----------
    *flowers
        Flower's own options by position, as its FedAvg takes them.
    server_optimizer, sampler, min_replies, mechanism
        See :class:`~flower_ext.server.options.AdditiveOptions`.
    **options
        Flower's own options, see :class:`~flower_ext.server.options.FedAvgOptions`.

    Notes
    -----
    A subclass overrides :meth:`contribution` and :meth:`update`, and, where it needs
    them, :meth:`zero`, :meth:`report`, :meth:`client_config`, :meth:`state_dict` and
    :meth:`settings`. Round metrics hold ``num-replies``, ``num-errors`` and
    ``num-dropped`` beside the clients' own, unless a mechanism counts on secret
    cohorts.

    Examples
    --------
    >>> from flower_ext.server.optimizers import Adam
    >>> strategy = AdditiveStrategy(fraction_train=0.1, server_optimizer=Adam())
    """

    #: The client half whose replies the strategy needs; None takes any.
    client_half: ClassVar[type[ClientHalf] | None] = None
    #: What a client with a training loop of its own adds to be one of this strategy's.
    drop_in: ClassVar[DropIn] = DropIn()
    #: Metrics that the strategy reads itself; averaging them would mean nothing.
    consumed_metrics: tuple[str, ...] = ()
    #: Keys of array records in a reply that are not its model.
    other_arrays: ClassVar[tuple[str, ...]] = ()
    #: Under a mechanism, what brings parts and scalars to the size of the others.
    scales: ClassVar[Mapping[str, float]] = {}

    def __init__(
        self,
        *flowers: object,
        server_optimizer: ServerOptimizer | None = None,
        sampler: Sampler | None = None,
        min_replies: int = 1,
        mechanism: Mechanism | None = None,
        **options: Unpack[FedAvgOptions],
    ) -> None:
        options = by_name(flowers, options)
        require_known(type(self), options)
        super().__init__(**options)
        fraction("fraction_train", self.fraction_train)
        fraction("fraction_evaluate", self.fraction_evaluate)
        whole("min_train_nodes", self.min_train_nodes, 0)
        whole("min_evaluate_nodes", self.min_evaluate_nodes, 0)
        whole("min_available_nodes", self.min_available_nodes, 0)
        whole("min_replies", min_replies, 1)
        if not isinstance(sampler, Sampler | None):
            refuse("sampler", sampler, "a Sampler", "an instance, not the class")
        if not isinstance(server_optimizer, ServerOptimizer | None):
            refuse(
                "server_optimizer",
                server_optimizer,
                "a ServerOptimizer",
                "wrap a torch.optim factory in TorchOptimizer(factory)",
            )
        self.server_optimizer = server_optimizer or SGD()
        self.sampler = sampler or UniformSampler()
        self.min_replies = min_replies
        self._private: PrivateSum | None = None
        if mechanism is not None:
            self._private = self._under(mechanism, options)
        self._sent: Arrays | None = None
        # Node ids are new in every run, a client's place among the nodes is not.
        self._clients: Mapping[int, int] = {}
        self._cohort: dict[int, int] = {}
        self._evaluators: dict[int, int] = {}
        self._number = 0  # what the sampler was last told to be the round of training
        self._configured: dict[Purpose, int] = {}  # the last round of each
        self._understood = False  # whether any reply has ever been usable
        self._tied: Ties | None = None  # not known before replies, or a first model
        self._looked_at: Arrays | None = None  # the model that has, if any, infinities
        self._infinite: frozenset[str] = frozenset()

    def _under(self, mechanism: Mechanism, options: FedAvgOptions) -> PrivateSum:
        """Put the round under a mechanism."""
        if not isinstance(mechanism, Mechanism):
            refuse("mechanism", mechanism, "a Mechanism, or None")
        for name in ("fraction_train", "min_train_nodes"):
            if name in options:
                refuse(
                    name,
                    options[name],
                    "left out with a mechanism",
                    f"the cohort is its num_sampled_clients={mechanism.cohort}",
                )
        if mechanism.is_private and self.min_replies > 1:
            refuse(
                "min_replies",
                self.min_replies,
                "1 with a mechanism",
                "whether a round is released must not depend on the replies",
            )
        # Another strategy may have been given the same: each run remembers its own.
        if mechanism.hides_cohorts:
            self.sampler.take_seed()
        self.sampler = copy.deepcopy(self.sampler)
        return PrivateSum(mechanism, self.sampler, self.scales)

    @property
    def mechanism(self) -> Mechanism | None:
        """What makes the run private, if it is."""
        return self._private.mechanism if self._private else None

    @property
    def _hides_cohorts(self) -> bool:
        """Whether nothing that depends on a cohort may leave the server."""
        return self.mechanism is not None and self.mechanism.hides_cohorts

    # What a strategy says ---------------------------------------------------------

    def contribution(self, reply: RecordDict, sent: Arrays) -> Contribution:
        """Return one client's term; it depends on arguments and settings only.

        Parameters
        ----------
        reply : RecordDict
            The content of one reply.
        sent : dict[str, ndarray]
            The model that was broadcast.

        Raises
        ------
        MalformedReply
            If the reply lacks something or has it in another form.
        """
        return Contribution({DELTA: self.delta(reply, sent)}, self.weight(reply))

    def zero(self, sent: Arrays) -> Contribution:
        """Return the contribution of a client that changes nothing: its layout.

        Whatever :meth:`contribution` may return must be in it, or a mechanism would
        have no noise for it.
        """
        return Contribution({DELTA: zeros_like(sent)})

    def update(self, total: Total) -> Arrays:
        """Return the direction to move the model along; may consume ``total``."""
        return total.mean()

    def divisor(self, total: Total) -> float:
        """Return what the sum is divided by; where it is 0 the model is kept."""
        return total.weight

    def report(self, total: Total) -> Metrics:
        """Return metrics of the round; called before :meth:`update`."""
        return {}

    def report_evaluate(self, replies: list[Message]) -> Metrics:
        """Return metrics of an evaluation, from its usable replies."""
        return {}

    def client_config(self) -> Config:
        """Return what clients are told besides the user's configuration."""
        return {}

    def client_of(self, node: int) -> int:
        """Return the place of a node among the nodes, the same in every run."""
        return self._clients[node]

    def delta(self, reply: RecordDict, sent: Arrays) -> dict[str, Term]:
        """Return the client's model minus the model that it was sent.

        A tensor that the client has under several names counts under the first.
        """
        key = array_key(reply, self.arrayrecord_key, self.other_arrays)
        new = read_arrays(reply, key, sent)
        tied = self._ties if self._private else read_ties(reply, sent)
        infinite = self._infinite_in(sent)
        return {
            name: subtract(
                x if name in tied else new[name], x, finite=name not in infinite
            )
            for name, x in sent.items()
        }

    def _infinite_in(self, sent: Arrays) -> frozenset[str]:
        """Return the arrays of a model with infinities or NaN: looked for once."""
        if self._looked_at is not sent:
            self._looked_at = sent
            self._infinite = frozenset(
                name for name, x in sent.items() if not all_finite([x])
            )
        return self._infinite

    def weight(self, reply: RecordDict) -> float:
        """Return the metric ``weighted_by_key`` of a reply; 1 under a mechanism."""
        weight = read_scalar(reply, self.weighted_by_key)
        return 1.0 if self._private else weight

    # The round --------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort that trains and broadcast the model.

        Raises
        ------
        PrivacyBudgetExhausted
            If a mechanism has no budget, or no planned round, left for it.
        TooFewClients
            If the sampler is to stop a run that is short of clients.
        """
        if self.fraction_train == 0.0:
            return []
        if self._private:
            self._private.require_budget()
        self._sent = from_record(arrays)
        for name, array in self._sent.items():
            if array.dtype.kind not in "fiub":
                refuse(f"array {name!r}", array.dtype, "of floats, integers or flags")
        if self._private:
            self._private.open(self.zero(self._sent))
            if self._tied is None:
                self._tied = equal_in_model(self._sent)
                _warn_of_ties(self._tied)
        messages = self._broadcast(server_round, arrays, config, grid, "train")
        asked = [message.metadata.dst_node_id for message in messages]
        self._cohort = {node: self._clients[node] for node in asked}
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort that evaluates and broadcast the model.

        Nobody is asked where the answers would be withheld.
        """
        if not self._evaluates:
            return []
        messages = self._broadcast(server_round, arrays, config, grid, "evaluate")
        asked = [message.metadata.dst_node_id for message in messages]
        self._evaluators = {node: self._clients[node] for node in asked}
        return messages

    def adopt(
        self,
        purpose: Purpose,
        server_round: int,
        arrays: ArrayRecord,
        messages: list[Message],
        grid: Grid,
    ) -> None:
        """Take over whom a subclass's own ``configure_train`` has asked, and what.

        Such a method may leave out messages of ``super().configure_train``, change
        them, or write all of them itself.

        Raises
        ------
        ValueError
            If the strategy depends on its own messages: under a mechanism clients are
            drawn as they are accounted for, and some clients must be told settings.
        """
        asked = [message.metadata.dst_node_id for message in messages]
        own = self._configured.get(purpose) == server_round
        cohort = self._cohort if purpose == "train" else self._evaluators
        if not asked or (own and cohort.keys() >= set(asked)):
            return
        if purpose == "train":
            self._require_own_messages(own)
        if not own:
            cohort.clear()
            self._clients = NodeOrder(ordered_nodes(grid))
            if purpose == "train":
                self._sent = from_record(arrays)
        cohort.update({node: self._clients[node] for node in asked})

    def _require_own_messages(self, own: bool) -> None:
        cause = ""
        if self._private:
            cause = "who is asked is what the mechanism accounts for; choose a sampler"
        elif not own and (self.client_half or self.client_config()):
            cause = "the clients must be told the strategy's settings"
        if cause:
            refuse(
                "configure_train",
                f"{type(self).__name__}'s own",
                "one that returns messages of super().configure_train",
                cause,
            )

    def _broadcast(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        purpose: Purpose,
    ) -> list[Message]:
        cohort = self._draw(server_round, grid, purpose)
        self._configured[purpose] = server_round
        if not self._hides_cohorts:
            log(
                INFO,
                "configure_%s: Sampled %s nodes (out of %s)",
                purpose,
                len(cohort),
                len(self._clients),
            )
        config["server-round"] = server_round  # where Flower's strategies leave it
        told = ConfigRecord({**config, **self.client_config()})
        if self.client_half is not None:
            told[CLIENT_HALF_KEY] = self.client_half.name
        if self._private and self._ties:
            told[TIED_KEY], told[TIED_TO_KEY] = list(self._ties), [*self._ties.values()]
        content = RecordDict(
            {self.arrayrecord_key: arrays, self.configrecord_key: told}
        )
        kind = MessageType.TRAIN if purpose == "train" else MessageType.EVALUATE
        return [Message(content, node, kind) for node in cohort]

    def _draw(self, server_round: int, grid: Grid, purpose: Purpose) -> list[int]:
        """Return the nodes of a cohort; wait for nodes where there are too few."""
        share, least = (
            (self.fraction_train, self.min_train_nodes)
            if purpose == "train"
            else (self.fraction_evaluate, self.min_evaluate_nodes)
        )
        sampler = self._private.sampler if self._private else self.sampler
        number, quiet = server_round, self._hides_cohorts
        if self._private:
            if purpose == "train":
                self._number = self._private.number(server_round)
            number = self._number or server_round
        while True:
            nodes = wait_for_nodes(
                grid,
                min_available_nodes=self.min_available_nodes,
                **{f"min_{purpose}_nodes": least},
            )
            self._clients = NodeOrder(nodes)
            # In a simulation ids are new in every run; places are the partitions.
            names = range(len(nodes)) if in_simulation(grid) else nodes
            if self._private and purpose == "train":
                self._private.require_nodes(len(nodes))
                size = self._private.mechanism.cohort
            else:
                size = max(int(len(nodes) * share), least)
            try:
                chosen = sampler.sample(names, size, number, purpose)
            except TooFewClients as problem:
                if sampler.when_short != "wait" or is_fixed(grid):
                    raise
                log(INFO, "%s; waiting for others to connect", problem)
                time.sleep(1)
                continue
            if self._private:
                self._private.require_population(sampler.num_known)
                noisy = self._private.accountant is not None and not quiet
                if purpose == "train" and noisy and 2 * len(chosen) < size:
                    log(
                        WARNING,
                        "round %s has %s of its %s planned clients: %s are connected, "
                        "and some may have to wait. The rest is noise",
                        server_round,
                        len(chosen),
                        size,
                        len(nodes),
                    )
            return [nodes[i] for i in chosen] if names is not nodes else chosen

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up the contributions and move the model."""
        if self._sent is None:
            if not list(replies):
                return None, None
            raise AggregationError("aggregate_train needs configure_train before it")
        quiet = self._hides_cohorts
        sorted_ = sort_replies(replies, self._cohort, quiet=quiet)
        if not self._understood and not sorted_.usable and not quiet:
            for line in "\n".join(sorted_.errors).splitlines():
                if WRONG_HALF in line:
                    raise InconsistentMessageReplies(line)
        total, used = self._add_up(sorted_.usable, sorted_.dropped)
        counts: Metrics = {}
        if not quiet:
            log_dropped(sorted_.dropped, server_round)
            counts = {
                "num-replies": len(used),
                "num-errors": len(sorted_.errors),
                "num-dropped": sorted_.dropped.total(),
            }
        if problem := self._problem(total):
            log(WARNING, "round %s: %s: the model is kept", server_round, problem)
            return None, MetricRecord(counts)
        metrics = MetricRecord()
        if self._tells_metrics:
            metrics = aggregate_metrics(
                used,
                self.weighted_by_key,
                self.train_metrics_aggr_fn,
                self.consumed_metrics,
            )
        if self._private:
            self._private.require_number(self._number)
            total = self._private.release(total)
            metrics.update(self._private.metrics())
        metrics.update(self.report(total))
        metrics.update(counts)
        new = self._move(self._sent, self.update(total))
        if new is None:
            log(WARNING, "round %s: %s: the model is kept", server_round, _NOT_HELD)
            return None, metrics
        # Noise knows no sign; by halves a variance stays one, however often it falls.
        noisy = self._private is not None and self._private.mechanism.is_private
        new = keep_variances(new, self._sent, 0.5 if noisy else 0.0)
        if noisy:  # a mask with infinities is no weight
            new |= {name: x for name, x in self._sent.items() if not all_finite([x])}
        if not self._private and used:
            self._tied = self._agree_on_ties(used, self._sent)
        new |= {name: new[first] for name, first in self._ties.items()}
        return to_record(new), metrics

    @property
    def _ties(self) -> Ties:
        """The further names of tensors, each with the first, as far as known."""
        return self._tied or {}

    def _agree_on_ties(self, used: list[RecordDict], sent: Arrays) -> Ties:
        """Return the ties that most replies tell of.

        Loops of the user's own do not tell. There, arrays that were equal and that all
        replies return equal are taken for one.
        """
        told = Counter(
            tie for content in used for tie in read_ties(content, sent).items()
        )
        if told:
            return {tie[0]: tie[1] for tie, n in told.items() if 2 * n > len(used)}
        records = [
            content.get(array_key(content, self.arrayrecord_key, self.other_arrays))
            for content in used
        ]
        return equal_in_all(records, sent)

    def _move(self, sent: Arrays, direction: Arrays) -> Arrays | None:
        """Return the new model, or None if it, or the optimizer, does not stay finite.

        Then the optimizer's moments stay as they were.
        """
        optimizer = self.server_optimizer
        before = copy.deepcopy(optimizer.state_dict())
        new = optimizer.step(sent, direction)
        moments = (x for slot in optimizer.state_dict().values() for x in slot.values())
        if finite_or_unchanged(new, sent) and all_finite(moments):
            return new
        optimizer.load_state_dict(before)
        return None

    @property
    def _tells_metrics(self) -> bool:
        """Whether averages of the clients' own metrics may be reported."""
        return not self._private or self._private.mechanism.unprotected_metrics

    @property
    def _evaluates(self) -> bool:
        """Whether clients are asked to evaluate: if anybody is to read the answers."""
        own = type(self).aggregate_evaluate is not AdditiveStrategy.aggregate_evaluate
        return self.fraction_evaluate > 0 and (self._tells_metrics or own)

    def _add_up(
        self, replies: list[Message], dropped: Counter[str]
    ) -> tuple[Total, list[RecordDict]]:
        """Sum the usable contributions; count the others in ``dropped``.

        That none spoils the model is checked on their sum, which costs one pass a
        round instead of one a reply; only where one does are those to blame looked for.
        """
        total, used, left_out = self._sum(replies)
        assert self._sent is not None
        if not self._private and not total.can_move(self._sent):
            total, used, left_out = self._sum(replies, check=True)
        dropped += left_out
        self._understood |= bool(used) or NOT_FINITE in left_out
        if left_out and not self._understood and not self._hides_cohorts:
            half = self.client_half
            raise InconsistentMessageReplies(
                f"{type(self).__name__} can use no reply of its first round"
                + (f", which needs the client half {half.__name__}" if half else "")
                + f": {next(iter(left_out))}"
            )
        return total, used

    def _sum(
        self, replies: list[Message], *, check: bool = False
    ) -> tuple[Total, list[RecordDict], Counter[str]]:
        """Return the sum, what is in it, and the reasons to leave others out."""
        summand = self._summand(self, self._private)
        total, used, left_out = Total(), [], Counter[str]()
        waiting: list[Contribution] = []
        nodes = {reply.metadata.src_node_id for reply in replies}
        merged: set[PackSum] = set()
        for reply in replies:
            content = reply.content
            try:
                if isinstance(content, Summed):
                    pack = _whole_pack(content, nodes)
                else:
                    pack = None
                    waiting.append(summand.term(content, check=check))
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

        It has a copy of the strategy with its settings, the model that was broadcast,
        and the clipping norm, but neither noise nor seeds. None where the replies must
        arrive as they are: an ``aggregate_train`` of a subclass's own may read them.
        """
        own = type(self).aggregate_train is not AdditiveStrategy.aggregate_train
        if own or self._sent is None:
            return None
        bare = copy.copy(self)
        vars(bare).update(dict.fromkeys(_ON_THE_SERVER))
        bare._private = self._private.clipper() if self._private else None
        return self._summand(bare, bare._private)

    def _summand(
        self, strategy: "AdditiveStrategy", private: PrivateSum | None
    ) -> Summand:
        assert self._sent is not None
        return Summand(
            self._sent,
            strategy.weight,
            strategy.contribution,
            strategy.zero(self._sent).shapes(),
            private.clip if private else None,
        )

    def _problem(self, total: Total) -> str:
        """Say why the model cannot be moved, if so.

        Under noise it always can: that nobody replied must not show.
        """
        if self._private and self._private.mechanism.is_private:
            return ""
        weight = self.divisor(total) if total.count else 0.0
        if total.count < self.min_replies or weight <= 0:
            return (
                f"{total.count} usable replies of total weight {weight:g}, at "
                f"least {self.min_replies} are needed"
            )
        assert self._sent is not None
        fits = total.can_move(self._sent)
        return "" if fits else "the model cannot hold the sum of the replies"

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the metrics of the clients that evaluated."""
        quiet = self._hides_cohorts
        sorted_ = sort_replies(replies, self._evaluators, quiet=quiet)
        used = []
        for reply in sorted_.usable:
            try:
                self.weight(reply.content)
            except MalformedReply as problem:
                sorted_.dropped[str(problem)] += 1
            except Exception as error:  # no reply ends a run
                sorted_.dropped[unreadable(error)] += 1
            else:
                used.append(reply)
        if not quiet:
            log_dropped(sorted_.dropped, server_round)
        if not used or not self._tells_metrics:
            return None
        metrics = aggregate_metrics(
            [reply.content for reply in used],
            self.weighted_by_key,
            self.evaluate_metrics_aggr_fn,
            self.consumed_metrics,
        )
        try:
            metrics.update(self.report_evaluate(used))
        except Exception as error:  # no reply ends a run
            log(WARNING, "no report: %s", unreadable(error), exc_info=True)
        return metrics

    # The run ----------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        checkpoint: Path | str | None = None,
        tracker: Tracker | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Result:
        """Run the rounds as Flower does, with three options more.

        Parameters
        ----------
        grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config,
        evaluate_fn
            As in :meth:`flwr.serverapp.strategy.Strategy.start`.
        checkpoint : path, optional
            Folder to save the run in after each round, and to continue it from.
        tracker : Tracker, optional
            Told of every round.
        callbacks : sequence of Callback, optional
            Told of every round, after the tracker.

        Returns
        -------
        Result
            Flower's result; ``arrays`` is the initial model if no round changed it.

        Raises
        ------
        ValueError
            If the mechanism is planned for fewer rounds.
        """
        if isinstance(initial_arrays, ArrayRecord) and not initial_arrays:
            refuse("initial_arrays", {}, "a model", "an ArrayRecord without arrays")
        return run_rounds(
            self,
            grid,
            initial_arrays,
            num_rounds=num_rounds,
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
            checkpoint=checkpoint,
            tracker=tracker,
            callbacks=callbacks,
        )

    def state_dict(self) -> dict[str, object]:
        """Return what crosses rounds: JSON values and arrays, nested by name."""
        state: dict[str, object] = {
            "sampler": self.sampler.state_dict(),
            "server-optimizer": self.server_optimizer.state_dict(),
            "server-optimizer-kind": self.server_optimizer.kind,
            "tied": self._tied,
        }
        if self._private:
            state["privacy"] = self._private.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where a run with the same settings was saved."""
        if ("privacy" in state) != bool(self._private):
            raise ValueError(
                "the saved run had a mechanism, or had none, other than this one"
            )
        self.sampler.load_state_dict(cast("Mapping[str, object]", state["sampler"]))
        if self._private:
            self._private.load_state_dict(
                cast("Mapping[str, object]", state["privacy"])
            )
        kind = self.server_optimizer.kind
        if state["server-optimizer-kind"] != kind:
            raise ValueError(
                f"the saved run used the server optimizer "
                f"{state['server-optimizer-kind']}, this one {kind}"
            )
        moments = cast(State, state["server-optimizer"])
        self.server_optimizer.load_state_dict(moments)
        self._tied = cast("Ties | None", state["tied"])

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> %s settings:", type(self).__name__)
        for name, value in self.settings().items():
            log(INFO, "\t│\t├── %s: %s", name, value)
        super().summary()

    def settings(self) -> dict[str, object]:
        """Return the settings that :meth:`summary` logs, by name."""
        seed = "secret" if self.sampler.is_secret else self.sampler.seed
        described: dict[str, object] = {
            "Server optimizer": self.server_optimizer,
            "Sampler": f"{type(self.sampler).__name__}(seed={seed})",
            "Minimum replies": self.min_replies,
        }
        if self._private:
            described |= self._private.settings()
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


def _whole_pack(content: Summed, nodes: set[int]) -> PackSum:
    """Return the sum that a client is in, if it is one of clients that replied."""
    if content.problem:
        raise MalformedReply(content.problem)
    if content.pack is None or not content.pack.clients <= nodes:
        raise MalformedReply("added up with clients that are not in the round")
    return content.pack
