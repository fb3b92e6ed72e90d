"""RoundStrategy: one federated round, whatever the server makes of the replies.

::

    sample -> payload -> [clients train] -> read replies -> aggregate -> optimizer

A strategy that is a sum derives from
:class:`~flower_ext.server.additive.AdditiveStrategy`, which adds privacy and partial
sums. This class is its base, and that of strategies which must see all replies side by
side.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Unpack, cast

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
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
    log,
    quick_message,
)
from flower_ext.core.arrays import (
    Arrays,
    all_finite,
    finite_or_unchanged,
    from_record,
    is_averaged,
    layout,
    to_record,
)
from flower_ext.core.errors import fraction, refuse, whole
from flower_ext.core.protocol import (
    CLIENT_HALF_KEY,
    HAS_STATE,
    WRONG_HALF,
    Config,
    Metrics,
    Payload,
    Phase,
    Reply,
    ReplyKeys,
    Round,
)
from flower_ext.core.replies import (
    NOT_FINITE,
    MalformedReply,
    aggregate_metrics,
    array_key,
    log_dropped,
    sort_replies,
    unreadable,
)
from flower_ext.core.sampling import Sampler, UniformSampler
from flower_ext.core.spread import Spread
from flower_ext.core.ties import (
    TIED_KEY,
    TIED_TO_KEY,
    Ties,
    equal_in_all,
    read_ties,
)
from flower_ext.privacy.private_sum import PrivateSum
from flower_ext.server.asynchronous import Asynchronous
from flower_ext.server.callbacks import Callback
from flower_ext.server.cohorts import Cohorts
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import SGD, ServerOptimizer, State, keep_variances
from flower_ext.server.options import FedAvgOptions, by_name, require_known
from flower_ext.server.partial_sums import Version
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import Tracker
from flower_ext.wire.codec import Codec, Sending, is_encoded, seal
from flower_ext.wire.messages import (
    DESCRIPTION_KEY,
    UPLOAD_KEY,
    Uploads,
    describe_arrays,
)
from flower_ext.wire.registry import classes, describe

if TYPE_CHECKING:
    from flower_ext.client.half import ClientHalf

_NOT_HELD = "the new model, or the server optimizer, would not be finite"


@dataclass
class Core:
    """What a strategy keeps of its run, in one place.

    It is the private attribute ``_core``, and so stays on the server: moments are
    large, and seeds are secret.

    Attributes
    ----------
    server_optimizer, download, upload
        As the strategy was given them.
    private : PrivateSum or None
        The mechanism at work, if there is one.
    rounds : dict[str, Round]
        The last round of each phase.
    cohorts : Cohorts
        Who is asked, drawn by the sampler.
    understood : bool
        Whether any reply of the run has been usable.
    tied : dict[str, str] or None
        The tied tensors; None before the first replies, or under a mechanism before
        the first model.
    contents : dict
        In an asynchronous run, what each kind of client is sent in this round.
    versions : dict[int, Version]
        In an asynchronous run, of the nodes whose replies are about to be summed.
    """

    server_optimizer: ServerOptimizer
    cohorts: Cohorts
    download: Codec | None = None
    upload: Codec | None = None
    private: PrivateSum | None = None
    rounds: dict[Phase, Round] = field(default_factory=dict)
    understood: bool = False
    tied: Ties | None = None
    contents: dict[Hashable, RecordDict] = field(default_factory=dict)
    versions: dict[int, Version] = field(default_factory=dict)


@dataclass
class Outcome:
    """What the server made of the replies of a round.

    Attributes
    ----------
    used : list of RecordDict
        Contents of the replies that were used.
    direction : dict[str, ndarray] or None
        The direction in which the model moves; None keeps it.
    metrics : dict
        The strategy's own metrics.
    problem : str
        Why the model is kept, if it is.
    spread : Spread or None
        How far the clients' changes are apart, where the optimizer asks for it.
    """

    used: list[RecordDict]
    direction: Arrays | None = None
    metrics: Metrics = field(default_factory=dict)
    problem: str = ""
    spread: Spread | None = None


class RoundStrategy(FedAvg):
    """A federated round, and the base of strategies that are not sums.

    It differs from Flower's :class:`~flwr.serverapp.strategy.FedAvg` in these points:

    * cohorts are seeded, and clients may be sent different payloads;
    * replies are read in client order, so that the result does not depend on who
      finished first;
    * a reply that is malformed, not finite, ambiguous or was not asked for is left out
      and counted: it neither ends the run nor spoils the model;
    * integer arrays keep their dtype;
    * a server optimizer moves the model;
    * runs are saved, continued and tracked.

    Parameters
    ----------
    *flowers
        Flower's own options by position, as its FedAvg takes them.
    server_optimizer, sampler, min_replies, download, upload
        See :class:`~flower_ext.server.options.RoundOptions`.
    **options
        Flower's own options, see :class:`~flower_ext.server.options.FedAvgOptions`.

    Notes
    -----
    A subclass overrides :meth:`aggregate`, and where it needs them :meth:`tell`,
    :meth:`variant`, :meth:`payload`, :meth:`download_codec`, :meth:`upload_codec`,
    :meth:`finish`, :meth:`report_evaluate`, :meth:`state_dict` and :meth:`settings`.
    Every hook is told the round, and which client it is about. The metrics of a round
    hold ``num-replies``, ``num-errors`` and ``num-dropped`` beside the clients' own.
    """

    #: The client half whose replies the strategy needs; None takes any.
    client_half: "ClassVar[type[ClientHalf] | None]" = None
    #: Whether a server optimizer can be told how far the clients' changes are apart.
    tells_spread: ClassVar[bool] = False
    #: The lines that a client with a training loop of its own adds for this strategy.
    drop_in: ClassVar[DropIn] = DropIn()
    #: Metrics of replies that the strategy reads itself and that are not averaged.
    consumed_metrics: tuple[str, ...] = ()
    #: Keys of array records in a reply that are not its model.
    other_arrays: ClassVar[tuple[str, ...]] = ()
    #: Why replies of a round must all be to the model of that round, so that there is
    #: no asynchronous run; empty where they need not.
    needs_rounds: ClassVar[str] = ""

    def __init__(
        self,
        *flowers: object,
        server_optimizer: ServerOptimizer | None = None,
        sampler: Sampler | None = None,
        min_replies: int = 1,
        download: Codec | None = None,
        upload: Codec | None = None,
        **options: Unpack[FedAvgOptions],
    ) -> None:
        silent = type(self).aggregate is RoundStrategy.aggregate
        if silent and type(self)._combine is RoundStrategy._combine:
            raise TypeError(
                f"{type(self).__name__} must have aggregate(round, replies), or derive "
                "from AdditiveStrategy"
            )
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
                "an instance, such as Adam(0.01) of flower_ext.server.optimizers; "
                "torch's in TorchOptimizer(make)",
            )
        if server_optimizer and server_optimizer.needs_spread and not self.tells_spread:
            refuse(
                "server_optimizer",
                server_optimizer,
                f"one that needs the direction alone, with {type(self).__name__}",
                "it is no sum of the clients' changes",
            )
        self.min_replies = min_replies
        for name, codec in (("download", download), ("upload", upload)):
            hook = f"{name}_codec"
            if not isinstance(codec, Codec | None):
                refuse(name, codec, "a Codec", "an instance, such as TopK(0.1)")
            if codec and getattr(type(self), hook) is not getattr(RoundStrategy, hook):
                refuse(name, codec, "left out", f"{type(self).__name__} has its own")
        if upload is not None:
            describe(upload.at(1))
        cohorts = Cohorts(sampler or UniformSampler())
        self._core = Core(server_optimizer or SGD(), cohorts, download, upload)

    @property
    def server_optimizer(self) -> ServerOptimizer:
        """The optimizer that moves the model along the direction."""
        return self._core.server_optimizer

    @property
    def sampler(self) -> Sampler:
        """The sampler that draws the cohorts."""
        return self._core.cohorts.sampler

    @property
    def _keys(self) -> ReplyKeys:
        """The keys under which things are found in a reply."""
        return ReplyKeys(self.arrayrecord_key, self.weighted_by_key, self.other_arrays)

    @property
    def _hides_cohorts(self) -> bool:
        """Whether nothing that depends on a cohort may leave the server."""
        private = self._core.private
        return private is not None and private.mechanism.hides_cohorts

    # What a strategy says ---------------------------------------------------------

    def tell(self, round: Round) -> Config:
        """Return what clients are told besides the user's configuration."""
        return {}

    def variant(self, client: int, round: Round) -> Hashable:
        """Return which payload a client is sent; by default None, the same for all."""
        return None

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Return what the clients of a variant are sent; made once for all of them."""
        return Payload(round.sent)

    def download_codec(self, variant: Hashable, round: Round) -> Codec | None:
        """Return how the payload of a kind travels; None is as it is."""
        codec = self._core.download
        return None if codec is None else codec.at(round.number)

    def upload_codec(self, variant: Hashable, round: Round) -> Codec | None:
        """Return how clients of a kind send their change; None is their model.

        It is one for all kinds, or for none, with settings as they please.
        """
        codec = self._core.upload
        return None if codec is None else codec.at(round.number)

    def aggregate(self, round: Round, replies: Sequence[Reply]) -> Arrays:
        """Return the direction to move the model along.

        Parameters
        ----------
        round : Round
            The round.
        replies : sequence of Reply
            At least ``min_replies``, in client order.

        Returns
        -------
        dict[str, ndarray]
            What to add to ``round.sent``, in float64.

        Notes
        -----
        It must not change any state, since it may be called again: a reply over which
        it raises :class:`~flower_ext.core.replies.MalformedReply` is left out. Replies
        that are not finite or lack their number of examples have been left out before.
        """
        raise TypeError(f"{type(self).__name__} has no aggregate()")

    def finish(self, round: Round, replies: Sequence[Reply]) -> Metrics:
        """Change the state that crosses rounds, and return the round's metrics."""
        return {}

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return metrics of an evaluation from its usable replies."""
        return {}

    # The round --------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort that trains and send each client its payload.

        Raises
        ------
        PrivacyBudgetExhausted
            If a mechanism has no budget, or no planned round, left for it.
        TooFewClients
            If the sampler is to stop a run that is short of clients.
        """
        if self.fraction_train == 0.0:
            return []
        sent = from_record(arrays)
        for name, array in sent.items():
            if array.dtype.kind not in "fiub":
                refuse(f"array {name!r}", array.dtype, "of floats, integers or flags")
        self._prepare(sent)
        return self._send(server_round, arrays, sent, config, grid, "train")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort that evaluates and send each client its payload.

        Nobody is asked where the answers would be withheld.
        """
        noisy = self._noisy_evaluation
        if not self._evaluates or (noisy and not noisy.evaluates(server_round)):
            return []
        sent = from_record(arrays)
        return self._send(server_round, arrays, sent, config, grid, "evaluate")

    def _prepare(self, sent: Arrays) -> None:
        """Look at the model before a cohort is drawn to train it."""

    def adopt(
        self,
        phase: Phase,
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
        nodes = [message.metadata.dst_node_id for message in messages]
        cohorts = self._core.cohorts
        own = cohorts.drawn.get(phase) == server_round
        if not nodes or (own and cohorts.asked[phase].keys() >= set(nodes)):
            return
        if phase == "train":
            self._require_own_messages(own)
        cohorts.adopt(grid, phase, nodes, added=own)
        if not own:
            round = self._round_of(server_round, from_record(arrays), phase)
            self._core.rounds[phase] = round

    def _require_own_messages(self, own: bool) -> None:
        cause = ""
        if self._core.private:
            cause = "who is asked is what the mechanism accounts for; choose a sampler"
        elif not own and (
            self.client_half
            or self._core.upload
            or type(self).tell is not RoundStrategy.tell
        ):
            cause = "the clients must be told the strategy's settings"
        if cause:
            refuse(
                "configure_train",
                f"{type(self).__name__}'s own",
                "one that returns messages of super().configure_train",
                cause,
            )

    def _send(
        self,
        server_round: int,
        arrays: ArrayRecord,
        sent: Arrays,
        config: ConfigRecord,
        grid: Grid,
        phase: Phase,
    ) -> list[Message]:
        """Draw a cohort; make the payload of each kind of client, and its messages."""
        train = phase == "train"
        cohort = self._core.cohorts.draw(
            grid,
            phase,
            server_round,
            share=self.fraction_train if train else self.fraction_evaluate,
            least=self.min_train_nodes if train else self.min_evaluate_nodes,
            available=self.min_available_nodes,
            private=self._core.private,
        )
        config["server-round"] = server_round  # where Flower's strategies leave it
        hidden = self._hides_cohorts
        places = [] if hidden else list(cohort.values())  # a hook could tell of them
        cohorts = self._core.cohorts
        round = self._round_of(server_round, sent, phase, places)
        if not hidden:
            round = replace(
                round,
                trained=frozenset(cohorts.trained),
                answered=frozenset(cohorts.answered),
                answered_before=cohorts.answered_before(server_round),
            )
        round = replace(round, told={**config, **self.tell(round)})
        contents: dict[Hashable, RecordDict] = {}
        if train and cohorts.seats is not None:  # others are asked in this round, too
            self._core.contents = contents
        return self._address(cohort, round, arrays, contents)

    def _address(
        self,
        cohort: Mapping[int, int],
        round: Round,
        arrays: ArrayRecord,
        contents: dict[Hashable, RecordDict],
    ) -> list[Message]:
        """Make the messages to a cohort; ``contents`` has what kinds are sent."""
        kinds = {node: self.variant(client, round) for node, client in cohort.items()}
        uploads = self._uploads(dict.fromkeys(kinds.values()), round)
        reader = Uploads.of(uploads.values()) if uploads else round.upload
        if reader != round.upload:
            round = replace(round, upload=reader)
        self._core.rounds[round.phase] = round
        for variant in dict.fromkeys(kinds.values()):
            if variant in contents:
                continue
            # Draws by the place among the kinds would tell who else is asked.
            place = 0 if self._hides_cohorts else len(contents)
            content = self._content(variant, place, round, arrays)
            if variant in uploads:
                told = content.config_records[self.configrecord_key]
                told[UPLOAD_KEY] = describe(uploads[variant])
            contents[variant] = content
        train = round.phase == "train"
        kind = MessageType.TRAIN if train else MessageType.EVALUATE
        return [quick_message(contents[kinds[node]], node, kind) for node in cohort]

    def _uploads(
        self, kinds: Iterable[Hashable], round: Round
    ) -> dict[Hashable, Codec]:
        """Return the codec of each kind's upload; nobody trains in an evaluation."""
        if round.phase == "evaluate":
            return {}
        found = {kind: self.upload_codec(kind, round) for kind in kinds}
        codecs = {kind: codec for kind, codec in found.items() if codec is not None}
        if codecs and len(codecs) < len(found):
            cause = "Exact() sends a change as it is"
            refuse("upload_codec(...)", None, "a codec for all kinds, or none", cause)
        for kind, codec in codecs.items():
            if self._core.private:
                self._core.private.require_upload(codec)
            down = self.download_codec(kind, round)
            if down and not down.lossless and _needs_began(codec):
                cause = f"the server must know what clients began with: {codec}"
                refuse("download", down, "lossless, such as Nonzero()", cause)
            if codec.feedback and not self.server_optimizer.keeps_coordinates:
                cause = "residuals would be added to other coordinates than they are of"
                bound = "without error feedback under " + repr(self.server_optimizer)
                refuse("upload_codec(...)", codec, bound, cause)
        return codecs

    def _round_of(
        self, number: int, sent: Arrays, phase: Phase, cohort: Sequence[int] = ()
    ) -> Round:
        plan = self._core.private.mechanism if self._core.private else None
        return Round(
            number,
            sent,
            phase=phase,
            population=plan.population_size if plan else len(self._core.cohorts.places),
            private=plan is not None,
            cohort=cohort,
            ties=self._ties,
        )

    def _content(
        self, variant: Hashable, place: int, round: Round, arrays: ArrayRecord
    ) -> RecordDict:
        """Return what a kind is sent; the model's own record is not made again."""
        payload = self.payload(variant, round)
        told = ConfigRecord({**round.told, **payload.config})
        if self.client_half is not None:
            told[CLIENT_HALF_KEY] = self.client_half.name
        if ties := self._told_ties:
            told[TIED_KEY], told[TIED_TO_KEY] = list(ties), [*ties.values()]
        record = _as_record(payload.arrays, round, arrays)
        codec = self.download_codec(variant, round)
        if codec is not None:
            sent = from_record(record)
            record = _encoded(codec, sent, round, place)
            if codec.described or self._is_no_model(sent, round):
                told[DESCRIPTION_KEY] = describe_arrays(sent)
        return RecordDict(
            {
                self.arrayrecord_key: record,
                self.configrecord_key: told,
                **{key: to_record(x) for key, x in payload.beside.items()},
            }
        )

    def _is_no_model(self, sent: Arrays, round: Round) -> bool:
        """Whether clients cannot know from their own model what is sent to them."""
        if self.client_half is not None:
            # Here, since it loads torch, which other strategies do without.
            from flower_ext.client.half import ClientHalf

            if self.client_half.receive is not ClientHalf.receive:
                return True
        return layout(sent) != layout(round.sent)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies and move the model."""
        if "train" not in self._core.rounds:
            if not list(replies):
                return None, None
            raise AggregationError("aggregate_train needs configure_train before it")
        sent = self._core.rounds["train"].sent
        quiet = self._hides_cohorts
        sorted_ = sort_replies(replies, self._core.cohorts.asked["train"], quiet=quiet)
        if not self._core.understood and not sorted_.usable and not quiet:
            for line in "\n".join(sorted_.errors).splitlines():
                if WRONG_HALF in line:
                    raise InconsistentMessageReplies(line)
        if not quiet:
            nodes = (message.metadata.src_node_id for message in sorted_.usable)
            self._core.cohorts.note_answers(server_round, nodes)
        self._tell_sampler("train", sorted_.usable)
        found = self._combine(sorted_.usable, sorted_.dropped)
        metrics = MetricRecord()
        if self._tells_metrics:
            metrics = aggregate_metrics(
                found.used,
                self.weighted_by_key,
                self.train_metrics_aggr_fn,
                self.consumed_metrics,
            )
        metrics.update(found.metrics)
        if not quiet:
            log_dropped(sorted_.dropped, server_round)
            metrics["num-replies"] = len(found.used)
            metrics["num-errors"] = len(sorted_.errors)
            metrics["num-dropped"] = sorted_.dropped.total()
        if found.direction is None:
            log(WARNING, "round %s: %s: the model is kept", server_round, found.problem)
            return None, metrics
        self.server_optimizer.see(found.spread)
        new = self._move(sent, found.direction)
        if new is None:
            log(WARNING, "round %s: %s: the model is kept", server_round, _NOT_HELD)
            return None, metrics
        # Noise knows no sign; by halves a variance stays one, however often it falls.
        private = self._core.private
        noisy = private is not None and private.mechanism.is_private
        new = keep_variances(new, sent, 0.5 if noisy else 0.0)
        if noisy:  # a mask with infinities is no weight
            new |= {name: x for name, x in sent.items() if not all_finite([x])}
        if not self._core.private and found.used:
            self._core.tied = self._agree_on_ties(found.used, sent)
        new |= {name: new[first] for name, first in self._ties.items()}
        return to_record(new), metrics

    def _combine(self, usable: list[Message], dropped: Counter[str]) -> Outcome:
        """Aggregate what can be read; count the rest in ``dropped``."""
        round = self._core.rounds["train"]
        replies = []
        for message in usable:
            reply = replace(self._reply(message, "train"), finite=True)
            try:
                _require_numbers(reply, round)
            except MalformedReply as problem:
                dropped[str(problem)] += 1
            else:
                replies.append(reply)
        direction = None
        # It is pure: where it stumbles over a reply, it is asked again without that.
        while direction is None and len(replies) >= self.min_replies:
            try:
                direction = self.aggregate(round, replies)
            except MalformedReply as problem:
                left = [r for r in replies if r.client != problem.client]
                if len(left) == len(replies):  # of no single reply
                    raise
                dropped[str(problem)] += 1
                replies = left
        self._require_understood(bool(replies), dropped)
        used = [reply.content for reply in replies]
        if direction is None:
            few = f"{len(used)} usable replies, at least {self.min_replies} are needed"
            return Outcome(used, problem=few)
        try:
            return Outcome(used, direction, self.finish(round, replies))
        except MalformedReply as problem:
            log(WARNING, "no report: %s", problem)
            return Outcome(used, direction)

    def _require_understood(self, used: bool, left_out: Counter[str]) -> None:
        """End a run whose first round has replies that the strategy cannot read.

        Raises
        ------
        InconsistentMessageReplies
            If none could be used, for another reason than that it was not finite.
        """
        self._core.understood |= used or NOT_FINITE in left_out
        if left_out and not self._core.understood and not self._hides_cohorts:
            half = self.client_half
            raise InconsistentMessageReplies(
                f"{type(self).__name__} can use no reply of its first round"
                + (f", which needs the client half {half.__name__}" if half else "")
                + f": {next(iter(left_out))}"
            )

    def _tell_sampler(self, phase: Phase, replies: Iterable[Message]) -> None:
        """Tell a sampler that hears them what clients report."""
        if self.sampler.hears:
            told = {
                message.metadata.src_node_id: self._reply(message, phase).numbers()
                for message in replies
            }
            self._core.cohorts.hear(phase, told)

    def _reply(self, message: Message, phase: Phase) -> Reply:
        client = self._core.cohorts.asked[phase][message.metadata.src_node_id]
        return Reply(message.content, client, self._keys)

    @property
    def _ties(self) -> Ties:
        """The further names of tensors, each with the first, as far as known."""
        return self._core.tied or {}

    @property
    def _told_ties(self) -> Ties:
        """The ties that clients must have, too."""
        return {}

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

        Then the optimizer's moments stay as they were. An array that is absent from the
        direction stays as it is, and so do its moments.
        """
        optimizer = self.server_optimizer
        before = copy.deepcopy(optimizer.state_dict())
        moving = {name: x for name, x in sent.items() if name in direction}
        new = {**sent, **(optimizer.step(moving, direction) if moving else {})}
        moments = (x for slot in optimizer.state_dict().values() for x in slot.values())
        if finite_or_unchanged(new, sent) and all_finite(moments):
            return new
        optimizer.load_state_dict(before)
        return None

    @property
    def _tells_metrics(self) -> bool:
        """Whether averages of the clients' own metrics may be reported."""
        private = self._core.private
        return private is None or private.mechanism.unprotected_metrics

    @property
    def _evaluates(self) -> bool:
        """Whether clients are asked to evaluate: if anybody is to read the answers."""
        own = type(self).aggregate_evaluate is not RoundStrategy.aggregate_evaluate
        told = self._tells_metrics or own or self._noisy_evaluation is not None
        return self.fraction_evaluate > 0 and told

    @property
    def _noisy_evaluation(self) -> PrivateSum | None:
        """What releases means of the clients' metrics with noise, if it is to."""
        private = self._core.private
        return private if private and private.evaluation else None

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the metrics of the clients that evaluated."""
        noisy = self._noisy_evaluation
        if noisy and not noisy.evaluates(server_round):
            return None
        quiet = self._hides_cohorts
        sorted_ = sort_replies(
            replies, self._core.cohorts.asked["evaluate"], quiet=quiet
        )
        self._tell_sampler("evaluate", sorted_.usable)
        used = []
        for message in sorted_.usable:
            reply = self._reply(message, "evaluate")
            try:
                reply.require_examples()
            except MalformedReply as problem:
                sorted_.dropped[str(problem)] += 1
            else:
                used.append(reply)
        if not quiet:
            log_dropped(sorted_.dropped, server_round)
        if noisy:  # also if nobody has replied, which must not show
            told = [reply.numbers() for reply in used if reply.num_examples > 0]
            if not quiet:
                _warn_of_unknown(noisy, told)
            return MetricRecord(noisy.release_evaluation(server_round, told))
        if not used or not self._tells_metrics:
            return None
        metrics = aggregate_metrics(
            [reply.content for reply in used],
            self.weighted_by_key,
            self.evaluate_metrics_aggr_fn,
            (*self.consumed_metrics, HAS_STATE),
        )
        try:
            metrics.update(self.report_evaluate(used, self._core.rounds["evaluate"]))
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
        asynchronous: Asynchronous | None = None,
    ) -> Result:
        """Run the rounds as Flower does, with four options more.

        Parameters
        ----------
        grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config,
        evaluate_fn
            As in :meth:`flwr.serverapp.strategy.Strategy.start`. Of a strategy with a
            client half, evaluations are told the settings of local training that are in
            ``train_config``, too, unless ``evaluate_config`` has others.
        checkpoint : path, optional
            Folder to save the run in after each round, and to continue it from.
        tracker : Tracker, optional
            Told of every round.
        callbacks : sequence of Callback, optional
            Told of every round, after the tracker.
        asynchronous : Asynchronous, optional
            Let clients train at any time: a round is an update of the model, made of
            the contributions of so many clients. For strategies that are sums.

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
            asynchronous=asynchronous,
        )

    def state_dict(self) -> dict[str, object]:
        """Return what crosses rounds: JSON values and arrays, nested by name."""
        cohorts = self._core.cohorts
        return {
            "sampler": self.sampler.state_dict(),
            "server-optimizer": self.server_optimizer.state_dict(),
            "server-optimizer-kind": self.server_optimizer.kind,
            "tied": self._core.tied,
            # Who has taken part is as secret as the cohorts.
            "trained": [] if self._hides_cohorts else sorted(cohorts.trained),
            "answered": [] if self._hides_cohorts else sorted(cohorts.answered),
            "answered-last": [cohorts.last[0], sorted(cohorts.last[1])],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where a run with the same settings was saved."""
        self.sampler.load_state_dict(cast("Mapping[str, object]", state["sampler"]))
        kind = self.server_optimizer.kind
        if state["server-optimizer-kind"] != kind:
            raise ValueError(
                f"the saved run used the server optimizer "
                f"{state['server-optimizer-kind']}, this one {kind}"
            )
        moments = cast(State, state["server-optimizer"])
        self.server_optimizer.load_state_dict(moments)
        self._core.tied = cast("Ties | None", state["tied"])
        self._core.cohorts.trained = set(cast("list[int]", state["trained"]))
        self._core.cohorts.answered = set(cast("list[int]", state["answered"]))
        number, places = cast("tuple[int, list[int]]", state["answered-last"])
        self._core.cohorts.last = number, frozenset(places)

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> %s settings:", type(self).__name__)
        for name, value in self.settings().items():
            log(INFO, "\t│\t├── %s: %s", name, value)
        super().summary()

    def settings(self) -> dict[str, object]:
        """Return the settings that :meth:`summary` logs, by name."""
        seed = "secret" if self.sampler.is_secret else self.sampler.seed
        codecs = {"Download": self._core.download, "Upload": self._core.upload}
        return {
            "Server optimizer": self.server_optimizer,
            "Sampler": f"{type(self.sampler).__name__}(seed={seed})",
            "Minimum replies": self.min_replies,
            **{name: codec for name, codec in codecs.items() if codec is not None},
        }


def _warn_of_unknown(noisy: PrivateSum, told: Sequence[Mapping[str, float]]) -> None:
    """Say which metrics are noise alone, since no client knows them by that name."""
    known = {name for metrics in told for name in metrics}
    for name in noisy.mechanism.evaluation.bounds if noisy.mechanism.evaluation else ():
        if told and name not in known:
            log(
                WARNING,
                "no client reports a number %r, only %s: the mean is noise about the "
                "middle of its bounds",
                name,
                sorted(known),
            )


def _needs_began(codec: Codec) -> bool:
    return is_dataclass(codec) and any(x.needs_began for x in classes(codec))


def _as_record(
    found: Arrays | ArrayRecord, round: Round, arrays: ArrayRecord
) -> ArrayRecord:
    """Return a payload's arrays as a record: that of the model is there already."""
    if isinstance(found, ArrayRecord):
        return found
    return arrays if found is round.sent else to_record(found)


def _encoded(codec: Codec, sent: Arrays, round: Round, place: int) -> ArrayRecord:
    """Return the record of one kind of client, sealed, with draws of its own."""
    seed = round.told.get("seed", 0)
    draws = [seed if isinstance(seed, int) and seed >= 0 else 0, round.number, place]
    ties = {name: x for name, x in round.ties.items() if {name, x} <= sent.keys()}
    generator = np.random.default_rng([*draws, round.phase == "train"])
    return seal(codec.encode(sent, Sending(generator, tied=ties)))


def _require_numbers(reply: Reply, round: Round) -> None:
    """Refuse a reply without its number of examples, or with infinities of its own.

    Raises
    ------
    MalformedReply
        If an array of real numbers has a NaN or an infinity that the model of the
        round has not.
    """
    reply.require_examples()
    for record in reply.content.array_records.values():
        if is_encoded(record):  # looked at when it is decoded
            continue
        try:
            arrays = from_record(record)
        except (ValueError, TypeError, EOFError) as error:
            raise MalformedReply(f"arrays cannot be read: {error}") from error
        for name, x in arrays.items():
            if is_averaged(x) and name not in round.infinite and not all_finite([x]):
                raise MalformedReply(NOT_FINITE)
