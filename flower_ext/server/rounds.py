"""The rounds of a run: Flower's loop, with checkpoints and callbacks."""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from logging import INFO, WARNING
from pathlib import Path
from typing import Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flower_ext._flower import (
    InconsistentMessageReplies,
    PrivacyBudgetExhausted,
    in_simulation,
    log,
    log_strategy_start_info,
)
from flower_ext.core.errors import positive, refuse, whole
from flower_ext.core.nodes import NodeOrder, is_fixed, ordered_nodes, wait_for_nodes
from flower_ext.core.protocol import RUN_CLIENTS, RUN_KEY, RUN_NAME, RUN_RESUMED
from flower_ext.core.sampling import Purpose, TooFewClients
from flower_ext.server.asynchronous import Asynchronous
from flower_ext.server.at_work import Asking, AtWork, at_work, require_asynchronous
from flower_ext.server.callbacks import Callback, Callbacks
from flower_ext.server.checkpoint import Checkpoint, CheckpointError
from flower_ext.server.finished import (
    ClientReply,
    FinishedRound,
    RunInfo,
    Sent,
    client_replies,
    sent_messages,
)
from flower_ext.server.partial_sums import Summable, Summand, SummingGrid
from flower_ext.server.returned import messages_of, metrics_of, trained
from flower_ext.server.run_settings import text_of
from flower_ext.server.tracking import Tracker
from flower_ext.wire.codec import CANNOT_READ, SEALED
from flower_ext.wire.traffic import Traffic, measure

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class EveryClientFailed(InconsistentMessageReplies):
    """No client that was asked in the first round did its work."""


# The error of a silo whose privacy budget is spent: an end, and no failure of the run.
_SPENT = "SiloBudgetExhausted"


@runtime_checkable
class Adopting(Protocol):
    """A strategy that must know who was asked what, whoever chose them."""

    def adopt(
        self,
        purpose: Purpose,
        server_round: int,
        arrays: ArrayRecord,
        messages: list[Message],
        grid: Grid,
    ) -> None:
        """Learn what ``configure_train`` or ``configure_evaluate`` has returned."""


@dataclass
class _Phase:
    """What one phase of a round cost."""

    down: Traffic
    asked: int = 0
    up: Traffic = field(default_factory=Traffic)
    seconds: float = 0.0
    replies: list[Message] = field(default_factory=list)


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    *,
    num_rounds: int = 3,
    timeout: float = 3600,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: EvaluateFn | None = None,
    checkpoint: Path | str | None = None,
    tracker: Tracker | None = None,
    callbacks: Sequence[Callback] = (),
    new_clients: bool = False,
    asynchronous: Asynchronous | None = None,
) -> Result:
    """Run any Flower strategy, ours or Flower's own.

    Does what :meth:`flwr.serverapp.strategy.Strategy.start` does, in the same order.
    Beside it, ``checkpoint`` names a folder: the run is saved there after each round,
    and continued from there if it was saved before; ``callbacks`` see every round, and
    ``tracker`` is the first of them.

    Parameters
    ----------
    strategy : Strategy
        With ``checkpoint`` it must have ``state_dict`` and ``load_state_dict``.
    grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config,
    evaluate_fn
        As in :meth:`flwr.serverapp.strategy.Strategy.start`. Each configuration is
        copied once for the whole run: what ``configure_train`` changes in it, such as a
        learning rate that decays, stays changed, also in a run that is continued.
    checkpoint : path, optional
        Folder of the saved rounds; made if missing. A relative one is below the folder
        in which the process of the ServerApp was started, which under ``flwr run`` is
        that of the SuperLink; the log says the whole path.
    tracker : Tracker, optional
        Writes the metrics of each round.
    callbacks : sequence of Callback, optional
        Called in their order, see :mod:`flower_ext.server.callbacks`: they see each
        finished round before it is saved, with their own states, and may end the run.
    new_clients : bool (default: False)
        Let clients forget what they keep of other runs on this grid, such as models of
        their own, the first time that they are asked. Otherwise they go on with it, as
        with all of ``context.state``. What they have spent is never forgotten. Not with
        ``checkpoint``, which has their states.
    asynchronous : Asynchronous, optional
        Let clients train at any time. A round is then an update of the model, and an
        :class:`~flower_ext.AdditiveStrategy` is needed. ``timeout`` is for each client.

    Returns
    -------
    Result
        Of all rounds, those before an interruption included; of fewer than
        ``num_rounds`` if the privacy budget or the eligible clients end sooner, or a
        callback ends it.

    Raises
    ------
    EveryClientFailed
        If in the first round of this run, or of its continuation, every client that was
        asked to train failed, or did not answer in time. Nothing of that round is
        aggregated or released. Where cohorts are secret no reply ends a run.
    CheckpointError
        Before the first round, if the folder cannot be written or holds a run of
        another strategy or model. A round that cannot be saved later, for want of
        space, is reported in the log and the run goes on; under a mechanism with noise
        the run stops, and nothing of that round is released.
    """
    _require_types(strategy, grid, initial_arrays, evaluate_fn, tracker, callbacks)
    watching = Callbacks([*([tracker] if tracker else []), *callbacks])
    whole("num_rounds", num_rounds, 0)
    positive("timeout", timeout)
    mechanism = getattr(strategy, "mechanism", None)
    if mechanism and num_rounds > mechanism.num_rounds:
        refuse(
            "num_rounds",
            num_rounds,
            f"<= {mechanism.num_rounds}",
            "the mechanism's noise is planned for no more",
        )
    # One record each for the whole run, as in Flower's loop: a strategy changes it from
    # round to round.
    train_config = _record("train_config", train_config)
    evaluate_config = _record("evaluate_config", evaluate_config)
    if getattr(strategy, "client_half", None):
        evaluate_config = _told_settings(train_config, evaluate_config)
    if isinstance(strategy, FedAvg):
        _require_nodes(strategy, grid)
    log(INFO, "Starting %s strategy:", type(strategy).__name__)
    if num_rounds == 0:
        log(WARNING, "num_rounds=0 trains nothing: the initial model is returned")
    log_strategy_start_info(num_rounds, initial_arrays, train_config, evaluate_config)
    strategy.summary()
    log(INFO, "")

    configs = {"train_config": train_config, "evaluate_config": evaluate_config}
    run = _Run(
        strategy,
        grid,
        Result(arrays=initial_arrays),
        num_rounds,
        timeout,
        configs,
        evaluate_fn,
        watching,
    )
    if asynchronous is not None:
        additive = require_asynchronous(asynchronous, strategy, grid)
        run.at_work = at_work(asynchronous, additive, grid, timeout)
    if new_clients:
        if checkpoint is not None:
            cause = "a saved run goes on with the states of its clients"
            refuse("new_clients", new_clients, "False with a checkpoint", cause)
        run.about[RUN_CLIENTS] = secrets.token_hex(8)
    if checkpoint is None:
        return run.play()
    run.saved = Checkpoint(
        checkpoint,
        strategy,
        configs,
        grid=grid,
        callbacks=watching,
        run_config=getattr(getattr(grid, "run", None), "override_config", None),
        releases=run.releases,
        at_work=run.at_work,
    )
    with run.saved.locked():
        return run.play()


class _Run:
    """One run: who takes part, and what it has come to so far."""

    def __init__(
        self,
        strategy: Strategy,
        grid: Grid,
        result: Result,
        num_rounds: int,
        timeout: float,
        configs: Mapping[str, ConfigRecord],
        evaluate_fn: EvaluateFn | None,
        callbacks: Callbacks,
    ) -> None:
        self.strategy = strategy
        self.grid = grid
        self.result = result
        self.num_rounds = num_rounds
        self.timeout = timeout
        self.configs = configs
        self.evaluate_fn = evaluate_fn
        self.callbacks = callbacks
        self.saved: Checkpoint | None = None
        self.at_work: AtWork | None = None  # in an asynchronous run
        self.about = ConfigRecord()  # what clients are told of the run
        self.done = 0  # rounds that the checkpoint had
        self.clients: list[ClientReply] = []  # of the round, where anybody asks
        self.messages: list[Sent] = []
        self.mechanism = mechanism = getattr(strategy, "mechanism", None)
        self.releases = mechanism is not None and mechanism.is_private
        self.hidden = mechanism is not None and mechanism.hides_cohorts

    def play(self) -> Result:
        """Play the rounds that are left."""
        self._restore()
        error: BaseException | None = None
        try:
            self._play()
        except BaseException as problem:
            error = problem
            raise
        finally:
            if self.at_work:
                self.at_work.close()
            self.callbacks.end(error)
        return self.result

    def _play(self) -> None:
        reason = self.callbacks.begin(self._info())
        begun = time.monotonic()
        if self.done == 0:
            self._evaluate_centrally(0)
        current = self.done
        # A reason may be there from the start: the last saved round ended the run.
        while current < self.num_rounds and not reason:
            try:
                messages = self._ask_to_train(current + 1)
            except (PrivacyBudgetExhausted, TooFewClients) as end:
                if current == 0:
                    raise
                reason = str(end)
            else:
                current += 1
                reason = self._round(current, messages)
        if reason and current < self.num_rounds:
            log(WARNING, "The run ends after round %s: %s", current, reason)
        self._conclude(time.monotonic() - begun)

    def _restore(self) -> None:
        """Take over the last saved round, if there is one."""
        if self.saved:
            log(INFO, "Rounds are saved in %s", self.saved.contents())
            self.done = self.saved.restore(self.result, self.num_rounds)
        if self.done == self.num_rounds > 0:
            log(INFO, "The run is already complete: its result is returned")

    def _info(self) -> RunInfo:
        """Describe the run to those who watch it."""
        strategy, mechanism = self.strategy, self.mechanism
        settings = strategy.settings() if hasattr(strategy, "settings") else {}
        if self.at_work:
            own = text_of(self.at_work.settings.settings())
            settings = {**settings, "Asynchronous": own}
        return RunInfo(
            self.num_rounds,
            self.done,
            type(strategy).__name__,
            settings,
            evaluates=self.evaluate_fn is not None,
            private=mechanism is not None,
            withheld=mechanism is not None and not mechanism.unprotected_metrics,
            noised=_noised(strategy),
            hidden=self.hidden,
        )

    def _round(self, current: int, messages: list[Message]) -> str | None:
        """Play one round; return why the run is to end with it, or None."""
        self.clients, self.messages = [], []
        train = self._train(current, messages)
        if self.saved and self.releases:
            # Nobody has seen the round: what is repeated is no second release.
            self._save_or_stop(self.saved, current)
        if (metrics := self.result.train_metrics_clientapp.get(current)) is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
        evaluate = self._evaluate(current, train)
        self._evaluate_centrally(current)
        reason = self.callbacks.round(self._finished(current, train, evaluate))
        # After the callbacks, whose states are part of what is saved.
        if self.saved:
            self.saved.save(current, self.result)
        self.callbacks.require_sound()
        return reason

    def _ask_to_train(self, current: int) -> list[Message]:
        """Begin a round: return the messages that ask clients to train."""
        log(INFO, "")
        log(INFO, "[ROUND %s/%s]", current, self.num_rounds)
        config = self.configs["train_config"]
        self.callbacks.configure(current, config)
        arrays = self.result.arrays
        if self.at_work:
            self.at_work.open(current, arrays)
        found = self.strategy.configure_train(current, arrays, config, self.grid)
        messages = messages_of("configure_train", found)
        self._adopt("train", current, messages)
        self._name(messages)
        if self.at_work:
            self.at_work.begin(messages)
        return messages

    def _name(self, messages: list[Message]) -> None:
        """Name the run to those who train, if it is saved."""
        if self.saved:
            _tell_run(messages, self.saved.folder, self.done)

    def _adopt(self, purpose: Purpose, current: int, messages: list[Message]) -> None:
        """Tell the strategy whom it has asked, if it must know; name the clients'."""
        self._name_clients(messages)
        if isinstance(self.strategy, Adopting):
            arrays = self.result.arrays
            self.strategy.adopt(purpose, current, arrays, messages, self.grid)

    def _name_clients(self, messages: list[Message]) -> None:
        """Say of which run the clients are, where they begin anew."""
        if self.about:
            for message in messages:
                message.content[RUN_KEY] = self.about

    def _train(self, current: int, messages: list[Message]) -> _Phase:
        """Let clients train, and take over the model that comes of it."""
        strategy = self.strategy
        with self._discretion():
            if self.at_work:
                train = self._gather(self.at_work)
            else:
                train = self._exchange("train", messages, self._summand())
            if self._is_first(current) and (reason := _all_failed(train)):
                # Before anything is released: the rounds to come would end as this.
                raise EveryClientFailed(_every("train", current, reason))
            arrays, metrics = trained(strategy.aggregate_train(current, train.replies))
        train.replies = []  # free them before the evaluation
        if self.at_work:
            metrics = MetricRecord({**(metrics or {}), **self.at_work.metrics()})
        if arrays is not None:
            self.result.arrays = arrays
        if metrics is not None:
            self.result.train_metrics_clientapp[current] = metrics
        return train

    def _summand(self) -> Summand | None:
        strategy = self.strategy
        return strategy.summand() if isinstance(strategy, Summable) else None

    def _gather(self, at_work: AtWork) -> _Phase:
        """Let clients train until an update is complete."""
        train, begun = _Phase(Traffic()), time.monotonic()
        while at_work.missing:
            works = at_work.next(self._ask_more)
            at_work.expect(works)
            messages = at_work.messages(works)
            self._name(messages)  # some may have been asked before an interruption
            grid = at_work.exchange_on()
            part = self._exchange("train", messages, self._summand(), grid)
            at_work.take(works, part.replies)
            train.down, train.up = train.down + part.down, train.up + part.up
            train.asked += part.asked
            train.replies += part.replies
        train.seconds = time.monotonic() - begun
        return train

    def _ask_more(self) -> list[Message]:
        """Ask further clients, with the model as it is."""
        assert isinstance(self.strategy, Asking)
        messages = self.strategy.ask_more(self.result.arrays, self.grid)
        self._name_clients(messages)
        self._name(messages)
        return messages

    def _save_or_stop(self, saved: Checkpoint, current: int) -> None:
        if not saved.save(current, self.result):
            raise CheckpointError(
                f"round {current} could not be saved and was not released: a run "
                "under a mechanism that goes on unsaved would release it again when "
                "it is resumed. Make room and start again, it continues"
            )

    def _evaluate(self, current: int, train: _Phase) -> _Phase:
        """Let clients evaluate the new model."""
        strategy, arrays = self.strategy, self.result.arrays
        config = self.configs["evaluate_config"]
        found = strategy.configure_evaluate(current, arrays, config, self.grid)
        messages = messages_of("configure_evaluate", found)
        self._adopt("evaluate", current, messages)
        with self._discretion():
            evaluate = self._exchange("evaluate", messages)
        if self._is_first(current) and (reason := _all_failed(evaluate)):
            text = _every("evaluate", current, reason)
            if not train.asked:
                raise EveryClientFailed(text)
            log(WARNING, "%s\nfraction_evaluate=0.0 asks nobody to evaluate.", text)
        metrics = metrics_of(
            "aggregate_evaluate", strategy.aggregate_evaluate(current, evaluate.replies)
        )
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            self.result.evaluate_metrics_clientapp[current] = metrics
        return evaluate

    def _evaluate_centrally(self, current: int) -> None:
        """Evaluate the model at the server, if the user has said how."""
        if self.evaluate_fn is None:
            return
        found = self.evaluate_fn(current, self.result.arrays)
        if (metrics := metrics_of("evaluate_fn", found)) is not None:
            self.result.evaluate_metrics_serverapp[current] = metrics
            if current:
                log(INFO, "Global evaluation\n\t└──> MetricRecord: %s", metrics)
            else:
                log(INFO, "Initial global evaluation results: %s", metrics)

    def _finished(self, current: int, train: _Phase, evaluate: _Phase) -> FinishedRound:
        """Describe a round; what tells a secret cohort is withheld."""
        result, hidden = self.result, self.hidden
        return FinishedRound(
            current,
            result.arrays,
            train=result.train_metrics_clientapp.get(current),
            evaluate=result.evaluate_metrics_clientapp.get(current),
            central=result.evaluate_metrics_serverapp.get(current),
            seconds_train=None if hidden else train.seconds,
            seconds_evaluate=None if hidden else evaluate.seconds,
            down=None if hidden else train.down + evaluate.down,
            up=None if hidden else train.up + evaluate.up,
            clients=tuple(self.clients),
            messages=tuple(self.messages),
        )

    def _exchange(
        self,
        purpose: Purpose,
        messages: list[Message],
        summand: Summand | None = None,
        grid: Grid | None = None,
    ) -> _Phase:
        """Send messages, wait for the replies, and count the bytes of both."""
        grid = grid or self.grid
        # Nobody may see what single clients say under a mechanism.
        told, listed = (
            asked and self.mechanism is None
            for asked in (self.callbacks.need_clients, self.callbacks.need_messages)
        )
        places = NodeOrder(ordered_nodes(self.grid)) if told or listed else {}
        begun = time.monotonic()
        phase = _Phase(measure(messages), len(messages))
        if listed:
            self.messages += sent_messages(purpose, messages, places, up=False)
        if summand is not None and isinstance(grid, SummingGrid):
            replies = grid.send_and_sum(messages, summand, timeout=self.timeout)
        else:
            replies = grid.send_and_receive(messages, timeout=self.timeout)
        phase.replies = list(replies)
        phase.up = measure(phase.replies)
        phase.seconds = time.monotonic() - begun
        if told:
            self.clients += client_replies(purpose, phase.replies, places)
        if listed:
            self.messages += sent_messages(purpose, phase.replies, places, up=True)
        return phase

    def _conclude(self, seconds: float) -> None:
        log(INFO, "")
        spent = "" if self.hidden else f" in {seconds:.2f}s"
        log(INFO, "Strategy execution finished%s", spent)
        log(INFO, "")
        log(INFO, "Final results:")
        log(INFO, "")
        for line in str(self.result).splitlines():
            log(INFO, "\t%s", line)
        log(INFO, "")

    def _is_first(self, current: int) -> bool:
        """Whether failures of every client end the run: where they may show at all."""
        return current == self.done + 1 and not self.hidden

    def _discretion(self) -> AbstractContextManager[None]:
        """Return what keeps a secret cohort out of the log."""
        return _silence() if self.hidden else nullcontext()


def _noised(strategy: object) -> tuple[str, ...]:
    private = getattr(strategy, "private_sum", None)
    return private.evaluation.names if private and private.evaluation else ()


def _require_types(
    strategy: object,
    grid: object,
    initial_arrays: object,
    evaluate_fn: object,
    tracker: object,
    callbacks: object,
) -> None:
    """Refuse what is commonly mistaken for the right thing."""
    if not isinstance(strategy, Strategy):
        refuse("strategy", strategy, "a Strategy", "an instance, not the class")
    if not hasattr(grid, "send_and_receive"):
        refuse("grid", grid, "a Grid", "the one that Flower hands to the ServerApp")
    if not isinstance(initial_arrays, ArrayRecord):
        cause = "ArrayRecord(model.state_dict()), or ArrayRecord([array, ...])"
        refuse("initial_arrays", type(initial_arrays), "an ArrayRecord", cause)
    if not callable(evaluate_fn) and evaluate_fn is not None:
        refuse("evaluate_fn", evaluate_fn, "a function (server_round, arrays)")
    if not isinstance(tracker, Tracker | None):
        refuse("tracker", tracker, "a Tracker", "Tracker('results/run-1')")
    if not isinstance(callbacks, Iterable):
        refuse("callbacks", callbacks, "a list of Callbacks")


def _require_nodes(strategy: FedAvg, grid: Grid) -> None:
    """Refuse to wait for nodes that cannot come, before the first round trains."""
    if is_fixed(grid) or in_simulation(grid):
        needed = {"min_available_nodes": strategy.min_available_nodes}
        if strategy.fraction_train:
            needed["min_train_nodes"] = strategy.min_train_nodes
        if strategy.fraction_evaluate:
            needed["min_evaluate_nodes"] = strategy.min_evaluate_nodes
        if len(needed) > 1:
            wait_for_nodes(grid, **needed)


def _all_failed(phase: _Phase) -> str:
    """Return the first reason if every client failed; nobody asked is no failure."""
    if not phase.asked or not all(reply.has_error() for reply in phase.replies):
        return ""
    reasons = [reply.error.reason or "" for reply in phase.replies]
    if reasons and all(_SPENT in reason for reason in reasons):
        return ""
    for reply in phase.replies:
        node, why = reply.metadata.src_node_id, reply.error.reason
        log(INFO, "\t> Received error in reply from node %d: %s", node, why)
    reason = next(filter(None, reasons), "no reply in time")
    return f"{CANNOT_READ}\n{reason}" if SEALED in reason else reason


def _every(what: str, server_round: int, reason: str) -> str:
    return (
        f"every client that was asked to {what} in round {server_round} failed. The "
        f"first one's reason: {reason}"
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Log nothing of an exchange: a grid names the clients that are slow or fail."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tell_run(messages: Iterable[Message], folder: Path, done: int) -> None:
    """Name the run to its clients, and say that it was resumed: some keep accounts."""
    about = ConfigRecord({RUN_NAME: sha256(bytes(folder)).hexdigest()[:32]})
    if done:
        about[RUN_RESUMED] = done
    for message in messages:
        message.content[RUN_KEY] = about


def _told_settings(train: ConfigRecord, evaluate: ConfigRecord) -> ConfigRecord:
    """Return what evaluations are told, with how clients train unless they say else.

    Some clients train in an evaluation, or leave out what they do not train on.
    """
    # Here, since it loads torch, which other strategies do without.
    from flower_ext.client.half import SETTINGS

    rates = {"lr", "learning-rate"}
    own = evaluate.keys() | (rates if rates & evaluate.keys() else set())
    told = {k: x for k, x in train.items() if k in SETTINGS and k not in own}
    return ConfigRecord({**told, **evaluate})


def _record(name: str, config: ConfigRecord | None) -> ConfigRecord:
    """Return a copy for this run: its changes are none of the next run's."""
    if not isinstance(config, Mapping | None):
        refuse(name, config, "a ConfigRecord, or None", "ConfigRecord({'lr': 0.1})")
    return ConfigRecord(dict(config or {}))
