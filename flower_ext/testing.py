"""The conformance suites for strategies and for codecs, ours and others'.

In the tests of a strategy, or of a codec, of one's own::

    from flower_ext.testing import check_codec, check_strategy

    def test_conformance():
        check_strategy(MyStrategy)
        check_codec(MyCodec)
"""

import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
    UserConfig,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from flower_ext._flower import CLIENT_RAISED
from flower_ext.client.app import client_app
from flower_ext.client.half import ClientHalf
from flower_ext.client.seeds import seed_torch
from flower_ext.client.task import Batch, Task
from flower_ext.core.arrays import Arrays, from_record, layout, to_record
from flower_ext.core.protocol import ARRAYS_KEY
from flower_ext.core.replies import MalformedReply
from flower_ext.core.states import Stateful
from flower_ext.server.strategy import RoundStrategy
from flower_ext.simulation.local import LocalGrid
from flower_ext.wire.codec import PAYLOAD, Codec, Sending, num_values, seal
from flower_ext.wire.registry import classes, decode, describe, rebuild

CLIENTS = 3


class ConformanceError(AssertionError):
    """A strategy that breaks the contract; the message lists every broken rule."""


@dataclass
class Report:
    """What :func:`check_strategy` found.

    Attributes
    ----------
    passed : list of str
        Rules that hold.
    limitations : dict[str, str]
        Rules of robustness that do not hold, and why; allowed for a strategy that
        does not promise them.
    """

    passed: list[str] = field(default_factory=list)
    limitations: dict[str, str] = field(default_factory=dict)


def check_strategy(
    factory: Callable[[], Strategy],
    app: ClientApp | None = None,
    *,
    initial: Callable[[Arrays], Arrays] | None = None,
    robust: bool | None = None,
) -> Report:
    """Check that a strategy keeps the contract of Flower's Message API.

    It must construct, run, keep the model in a round without replies (under a
    mechanism with noise: release it nevertheless), average what is left when some
    clients fail, in training and in evaluation, not depend on the order of replies,
    mutate nothing that it was given (but for ``server-round`` in the configuration),
    keep names and shapes, be picklable, and continue from ``state_dict`` if it has one.
    A robust strategy also keeps dtypes, of integer arrays too, accepts extra records,
    and leaves out hostile replies: missing, extra, misshapen, unreadable or non-finite
    arrays, weights and other metrics it needs that are missing, no numbers or too large
    for float32, clients that reply twice or were not asked; finds metrics under
    whatever key, and stays finite whatever they are.

    Parameters
    ----------
    factory : callable
        Makes a new strategy; usually the class itself.
    app : ClientApp, optional
        Makes the replies; it must train whatever float arrays it receives. By default a
        tiny linear model on made-up data, with the client half that the strategy names
        in ``client_half``; the data has the columns ``x`` (float32, 3), ``y`` (int64, 0
        or 1) and ``group`` (int64, 0 or 1).
    initial : callable, optional
        Makes of one model's arrays what the strategy starts from: for several models,
        ``lambda model: {f"{i}/{name}": x for i in range(2) for name, x in
        model.items()}``. By default it is the model itself.
    robust : bool, optional
        Whether robustness is required; by default for an
        :class:`~flower_ext.RoundStrategy`. Otherwise it is only reported.

    Returns
    -------
    Report
        What passed, and limitations that are allowed.

    Raises
    ------
    ConformanceError
        If a required rule is broken.

    Examples
    --------
    >>> from flower_ext import AdditiveStrategy
    >>> report = check_strategy(AdditiveStrategy)
    >>> report.limitations
    {}
    """
    report = Report()
    broken: dict[str, str] = {}
    strategy = factory()
    if robust is None:
        robust = isinstance(strategy, RoundStrategy)
    half = getattr(strategy, "client_half", None)
    clients = _clients_with(half) if app is None else Remembering(app)
    expected: dict[int, Arrays] = {}
    rules: list[tuple[Callable[[_Bench], None], bool]]
    rules = [(rule, True) for rule in _CONTRACT]
    rules += [(rule, robust) for rule in _ROBUSTNESS]
    for rule, required in rules:
        name = str(rule.__doc__).partition("\n")[0].rstrip(".").lower()
        try:
            rule(_Bench(factory, clients, initial, expected))
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            (broken if required else report.limitations)[name] = why
        else:
            report.passed.append(name)
    if broken:
        raise ConformanceError(
            f"{len(broken)} of {len(rules)} rules are broken:\n"
            + "\n".join(f"- {name}: {why}" for name, why in broken.items())
        )
    return report


class _Model(nn.Module):
    """A linear model with a 0-d parameter and, on demand, an integer buffer."""

    def __init__(self, counter: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))
        if counter:
            self.register_buffer("counter", torch.tensor(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * self.scale
        return out


def _make_model(config: UserConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        seed_torch(0)
        return _Model(bool(config["counter"]))


@cache
def _initial(counter: bool) -> Arrays:
    model = _make_model({"counter": counter})
    return {name: x.numpy() for name, x in model.state_dict().items()}


def _data(context: Context) -> tuple[Batch, Batch]:
    client = int(context.node_config["partition-id"])
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(10 + 5 * client, 3, generator=generator)
    columns = {"x": x, "y": (x[:, 0] > 0).long(), "group": (x[:, 1] > 0).long()}
    return columns, columns


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def _sample_labels(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    chances = model(batch["x"]).detach().softmax(1)
    return {**batch, "y": chances.multinomial(1, generator=generator)[:, 0]}


_TASK = Task(_make_model, _data, _loss, sample_labels=_sample_labels)


class Remembering(ClientApp):
    """Clients that answer at once what they were asked before.

    For tests of a server: training takes longer than all the rest. An answer must
    depend on the message and the context only. Errors are not remembered.

    Parameters
    ----------
    app : ClientApp
        Makes the answers.
    """

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self._app = app
        self._known: dict[bytes, bytes] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        asked = message.metadata.message_type, message.content
        config = context.node_config, context.run_config
        key = pickle.dumps((asked, config, context.state))
        if key not in self._known:
            reply = self._app(message, context)
            if reply.has_error():
                return reply
            self._known[key] = pickle.dumps((reply.content, context.state))
        content, context.state = pickle.loads(self._known[key])
        return Message(content, reply_to=message)


@cache
def _clients_with(half: type[ClientHalf] | None) -> Remembering:
    """Make the clients of all strategies that have this half, in all checks."""
    return Remembering(client_app(_TASK, *([half] if half else [])))


class _Bench:
    """A strategy at work with a few clients, step by step."""

    def __init__(
        self,
        factory: Callable[[], Strategy],
        clients: Remembering,
        initial: Callable[[Arrays], Arrays] | None,
        expected: dict[int, Arrays] | None = None,
        *,
        counter: bool = False,
    ) -> None:
        self.factory = factory
        self.initial = initial
        self._expected = {} if expected is None else expected
        self.clients = clients
        self.strategy = factory()
        config: UserConfig = {"batch-size": 5, "lr": 0.5, "counter": counter}
        self.grid = LocalGrid(clients, CLIENTS, config)
        model = {name: x.copy() for name, x in _initial(counter).items()}
        self.sent = to_record(initial(model) if initial else model)

    def anew(self, *, counter: bool = False) -> "_Bench":
        """Return a bench with a new strategy."""
        return _Bench(self.factory, self.clients, self.initial, counter=counter)

    def ask(self, server_round: int = 1) -> list[Message]:
        """Configure a round and return its instructions, by node."""
        messages = self.strategy.configure_train(
            server_round, self.sent, ConfigRecord(), self.grid
        )
        return sorted(messages, key=lambda message: message.metadata.dst_node_id)

    def replies(self, server_round: int = 1) -> list[Message]:
        """Return the honest replies of a round, by node."""
        return list(self.grid.send_and_receive(self.ask(server_round)))

    def evaluations(self) -> list[Message]:
        """Return the honest replies to an evaluation, by node."""
        messages = self.strategy.configure_evaluate(
            1, self.sent, ConfigRecord(), self.grid
        )
        replies = self.grid.send_and_receive(messages)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def aggregate(self, replies: list[Message], server_round: int = 1) -> Arrays:
        """Return the new model, which must be laid out as the one that was sent."""
        record, _ = self.strategy.aggregate_train(server_round, replies)
        if record is None:
            raise AssertionError("the model was kept although there were replies")
        new, sent = from_record(record), from_record(self.sent)
        _require(
            [(name, x.shape, x.dtype.kind) for name, x in new.items()]
            == [(name, x.shape, x.dtype.kind) for name, x in sent.items()],
            f"sent {layout(sent)}, got {layout(new)}",
        )
        return new

    def without(self, clients: int) -> Arrays:
        """Return what a new strategy makes of the replies but the first ones."""
        if clients not in self._expected:
            other = self.anew()
            self._expected[clients] = other.aggregate(other.replies()[clients:])
        return self._expected[clients]


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _same(left: Arrays, right: Arrays, what: str) -> None:
    for name, array in left.items():
        np.testing.assert_allclose(
            array, right[name], rtol=1e-5, atol=1e-6, err_msg=f"{what}: {name}"
        )


def _error(to: Message) -> Message:
    return Message(Error(CLIENT_RAISED, "on purpose"), reply_to=to)


# The contract ---------------------------------------------------------------------


def _runs(bench: _Bench) -> None:
    """Runs two rounds."""
    before = from_record(bench.sent)
    honest = bench.anew().replies()
    result = bench.strategy.start(bench.grid, bench.sent, num_rounds=2)
    after = from_record(result.arrays)
    _require(list(after) == list(before), f"{list(before)} became {list(after)}")
    _require(all(np.all(np.isfinite(x)) for x in after.values()), "not finite")
    # Where clients keep their models, there is nothing to move the server's by.
    silent = not any(any(r.content.array_records.values()) for r in honest)
    _require(
        silent or any(np.any(after[name] != x) for name, x in before.items()),
        "two rounds of training left the model as it was",
    )


def _nobody(bench: _Bench, replies: list[Message], what: str) -> None:
    record, _ = bench.strategy.aggregate_train(1, replies)
    mechanism = getattr(bench.strategy, "mechanism", None)
    if mechanism is not None and mechanism.is_private:
        _require(record is not None, f"{what} released nothing: that tells who replied")
    else:
        _require(record is None, f"{what} returned arrays")


def _empty(bench: _Bench) -> None:
    """Keeps the model in a round without replies."""
    bench.ask()
    _nobody(bench, [], "aggregate_train(1, [])")


def _all_errors(bench: _Bench) -> None:
    """Keeps the model in a round of errors only."""
    _nobody(bench, [_error(m) for m in bench.ask()], "aggregate_train of errors")


def _partial(bench: _Bench) -> None:
    """Ignores error replies."""
    instructions = bench.ask()
    honest = list(bench.grid.send_and_receive(instructions))
    mixed = [_error(instructions[0]), *honest[1:]]
    _same(bench.aggregate(mixed), bench.without(1), "one error reply")


def _order(bench: _Bench) -> None:
    """Does not depend on the order of replies."""
    other = bench.anew()
    _same(
        bench.aggregate(bench.replies()),
        other.aggregate(other.replies()[::-1]),
        "replies in reverse",
    )


def _mutates_nothing(bench: _Bench) -> None:
    """Mutates nothing that it was given."""
    config = ConfigRecord({"lr": 0.5})
    model = {name: array.data for name, array in bench.sent.items()}
    replies = list(
        bench.grid.send_and_receive(
            bench.strategy.configure_train(1, bench.sent, config, bench.grid)
        )
    )
    before = pickle.dumps([reply.content for reply in replies])
    bench.aggregate(replies)
    config.pop("server-round", None)
    _require(dict(config) == {"lr": 0.5}, f"the configuration became {config}")
    _require(
        before == pickle.dumps([reply.content for reply in replies]),
        "the replies were changed",
    )
    _require(
        model == {name: array.data for name, array in bench.sent.items()},
        "the model that was sent was changed",
    )


def _pickles(bench: _Bench) -> None:
    """Is picklable."""
    # With noise a copy would repeat releases: it is allowed before the first one.
    mechanism = getattr(bench.strategy, "mechanism", None)
    if mechanism is None or not mechanism.is_private:
        bench.aggregate(bench.replies())
    copy: Strategy = pickle.loads(pickle.dumps(bench.strategy))
    replies = bench.replies(2)
    expected = bench.aggregate(replies, 2)
    bench.strategy = copy
    bench.ask(2)
    _same(bench.aggregate(replies, 2), expected, "after pickling")


def _state(bench: _Bench) -> None:
    """Continues from its saved state."""
    if not isinstance(bench.strategy, Stateful):
        return
    bench.aggregate(bench.replies())
    other = bench.anew()
    _require(isinstance(other.strategy, Stateful), "no load_state_dict")
    saved = pickle.loads(pickle.dumps(bench.strategy.state_dict()))
    other.strategy.load_state_dict(saved)  # type: ignore[attr-defined]
    replies = bench.replies(2)
    expected = bench.aggregate(replies, 2)
    other.ask(2)
    _same(other.aggregate(replies, 2), expected, "after load_state_dict")


def _evaluates(bench: _Bench) -> None:
    """Ignores error replies to an evaluation."""
    honest = bench.evaluations()
    mixed = [_error(reply) for reply in honest[:1]] + honest[1:]
    expected = bench.strategy.aggregate_evaluate(1, honest[1:])
    found = bench.strategy.aggregate_evaluate(1, mixed)
    _require(found == expected, f"{found} with one error reply, without: {expected}")
    bench.strategy.aggregate_evaluate(1, [_error(reply) for reply in honest])
    bench.strategy.aggregate_evaluate(1, [])


_CONTRACT = (
    _runs,
    _empty,
    _all_errors,
    _partial,
    _order,
    _mutates_nothing,
    _pickles,
    _state,
    _evaluates,
)

# Robustness -----------------------------------------------------------------------


def _dtypes(bench: _Bench) -> None:
    """Arrays keep their dtype."""
    new = bench.aggregate(bench.replies())
    sent = from_record(bench.sent)
    _require(layout(new) == layout(sent), f"{layout(sent)} became {layout(new)}")


def _integers(bench: _Bench) -> None:
    """Integer arrays keep their dtype and value."""
    bench = bench.anew(counter=True)
    new = bench.aggregate(bench.replies())
    for name, x in new.items():
        if x.dtype.kind == "i":
            _require(int(x) == 5, f"{name} of 5 became {x}")


def _extra_record(bench: _Bench) -> None:
    """Accepts extra records in a reply."""
    replies = bench.replies()
    for key, record in (("note", ConfigRecord({"a": 1})), ("more", ArrayRecord())):
        replies[0].content[key] = record
    _same(bench.aggregate(replies), bench.without(0), "extra records")


def _twice(bench: _Bench) -> None:
    """Leaves out a client that replied twice."""
    replies = bench.replies()
    _same(bench.aggregate([replies[0], *replies]), bench.without(1), "two replies")


def _unasked(bench: _Bench) -> None:
    """Leaves out a client that was not asked."""
    replies = bench.replies()
    stranger = Message(replies[0].content, dst_node_id=77, message_type="train")
    replies[0] = Message(replies[0].content, reply_to=stranger)
    _same(bench.aggregate(replies), bench.without(1), "a stranger's reply")


def _own_metrics(bench: _Bench) -> None:
    """Leaves out a reply whose metrics for the strategy itself are not there."""
    for name in getattr(bench.strategy, "consumed_metrics", ()):
        for value in (None, float("nan")):
            other = bench.anew()
            replies = other.replies()
            if _set_metric(replies[0].content, name, value):
                _same(other.aggregate(replies), other.without(1), f"{name}={value}")


def _evaluates_anything(bench: _Bench) -> None:
    """Takes hostile replies to an evaluation without failing."""
    replies = [reply for reply in bench.evaluations() if reply.has_content()]
    if not replies:
        return
    honest = replies[0].content
    for name in {name for record in honest.metric_records.values() for name in record}:
        for value in (None, *_ODD_NUMBERS):
            content = RecordDict({key: record.copy() for key, record in honest.items()})
            _set_metric(content, name, value)
            replies[0].content = content
            bench.strategy.aggregate_evaluate(1, replies)
    replies[0].content = _under_other_keys(honest)
    bench.strategy.aggregate_evaluate(1, replies)
    replies[0].content = RecordDict()
    bench.strategy.aggregate_evaluate(1, [*replies, replies[-1]])


def _other_metric_keys(bench: _Bench) -> None:
    """Finds metrics under whatever key."""
    replies = bench.replies()
    replies[0].content = _under_other_keys(replies[0].content)
    _same(bench.aggregate(replies), bench.without(0), "metrics under another key")


def _under_other_keys(content: RecordDict) -> RecordDict:
    """Rename the MetricRecords of a reply."""
    return RecordDict(
        {
            f"odd-{key}" if isinstance(record, MetricRecord) else key: record
            for key, record in content.items()
        }
    )


def _odd_numbers(bench: _Bench) -> None:
    """Stays finite whatever numbers a reply has."""
    metrics = bench.replies()[0].content.metric_records
    for name in sorted({name for record in metrics.values() for name in record}):
        for value in _ODD_NUMBERS:
            other = bench.anew()
            replies = other.replies()
            _set_metric(replies[0].content, name, value)
            new = other.aggregate(replies)
            finite = all(np.all(np.isfinite(x)) for x in new.values())
            _require(finite, f"{name}={value} made the model not finite")


def _set_metric(
    content: RecordDict, name: str, value: float | list[float] | None
) -> bool:
    """Change a metric, or delete it, and say whether it was there."""
    found = False
    for record in content.metric_records.values():
        if name in record:
            found = True
            del record[name]
            if value is not None:
                record[name] = value
    return found


_ODD_NUMBERS: tuple[float | list[float], ...] = (
    float("nan"),
    float("-inf"),
    -1,
    1e300,
    2**84,
    10**400,
    [],
    [1.0, 2.0, 3.0],
)

# Changes the content of a reply to a strategy.
Tamper = Callable[[RecordDict, Strategy], None]


def _with_array(array: Array | None, name: str = "linear.weight") -> Tamper:
    def tamper(content: RecordDict, _: Strategy) -> None:
        record = content.array_records[ARRAYS_KEY]
        if array is None:
            # A client may send something else than a model, or no array at all.
            sent = filter(None, (record, *content.array_records.values()))
            record = next(sent, record)
            record.pop(name if name in record else next(iter(record), name), None)
        else:
            record[name] = array

    return tamper


def _with_weight(value: float | list[float] | None) -> Tamper:
    def tamper(content: RecordDict, strategy: Strategy) -> None:
        name = getattr(strategy, "weighted_by_key", "num-examples")
        _set_metric(content, name, value)

    return tamper


def _without_arrays(content: RecordDict, _: Strategy) -> None:
    del content[ARRAYS_KEY]


def _leaves_out(what: str, tamper: Tamper) -> Callable[[_Bench], None]:
    """Make the rule that a reply tampered with is left out."""

    def rule(bench: _Bench) -> None:
        replies = bench.replies()
        tamper(replies[0].content, bench.strategy)
        _same(bench.aggregate(replies), bench.without(1), what)

    rule.__doc__ = f"Leaves out a reply with {what}."
    return rule


_honest = Array(np.ones((2, 3), np.float32))
_ROBUSTNESS = (
    _dtypes,
    _integers,
    _extra_record,
    _twice,
    _unasked,
    _leaves_out("no arrays", _without_arrays),
    _leaves_out("an array missing", _with_array(None)),
    _leaves_out("an unknown array", _with_array(_honest, "unknown")),
    _leaves_out("a wrong shape", _with_array(Array(np.ones((3, 2), np.float32)))),
    _leaves_out("a shape to broadcast", _with_array(Array(np.ones(3, np.float32)))),
    _leaves_out("a wrong dtype", _with_array(Array(np.ones((2, 3), np.complex64)))),
    _leaves_out("texts for numbers", _with_array(Array(np.full((2, 3), "x")))),
    _leaves_out("a NaN", _with_array(Array(np.full((2, 3), np.nan, np.float32)))),
    _leaves_out("an infinity", _with_array(Array(np.full((2, 3), np.inf, np.float32)))),
    _leaves_out(
        "bytes cut off",
        _with_array(Array("float32", (2, 3), "numpy.ndarray", _honest.data[:-4])),
    ),
    _leaves_out(
        "bytes of no array",
        _with_array(Array("float32", (2, 3), "numpy.ndarray", b"no array")),
    ),
    _leaves_out("numbers beyond float32", _with_array(Array(np.full((2, 3), 1e300)))),
    _leaves_out("no weight", _with_weight(None)),
    _leaves_out("a negative weight", _with_weight(-1.0)),
    _leaves_out("a weight of NaN", _with_weight(float("nan"))),
    _leaves_out("a list for a weight", _with_weight([1.0, 2.0])),
    _leaves_out("a weight of 1e300", _with_weight(1e300)),
    _leaves_out("a weight of 84 bits", _with_weight(2**84)),
    _other_metric_keys,
    _odd_numbers,
    _own_metrics,
    _evaluates_anything,
)


# Codecs ---------------------------------------------------------------------------


def check_codec(factory: Callable[[], Codec], *, told: bool = True) -> Report:
    """Check that a codec keeps its promises.

    What it wrote it must read back in the names, order, shapes and dtypes of what is
    expected, without its settings; integers and flags exactly; all bit for bit if it is
    ``lossless``, right on average if it is ``unbiased``. What is not finite must not
    become so, equal draws must give equal bytes, and the arrays must stay as they were.
    Whatever is wrong with a record must be a ``MalformedReply``, in memory that does
    not depend on how long it is.

    Parameters
    ----------
    factory : callable
        Makes the codec; usually a partial of its class.
    told : bool (default: True)
        Whether a message can name it, as clients need of the codec of their uploads.

    Returns
    -------
    Report
        What passed.

    Raises
    ------
    ConformanceError
        If a promise is broken.

    Examples
    --------
    >>> from flower_ext.wire import NF4
    >>> len(check_codec(NF4).passed)
    11
    """
    report = Report()
    broken: dict[str, str] = {}
    for rule in (*_CODEC_RULES, *([_is_told] if told else [])):
        name = str(rule.__doc__).partition("\n")[0].rstrip(".").lower()
        try:
            rule(factory().at(1))
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            report.passed.append(name)
    if broken:
        raise ConformanceError(
            f"{len(broken)} rules are broken:\n"
            + "\n".join(f"- {name}: {why}" for name, why in broken.items())
        )
    return report


def _sending(seed: int = 0) -> Sending:
    return Sending(np.random.default_rng(seed))


def _many_arrays() -> list[Arrays]:
    """Return models of all that may come: precisions, no array, no number, no axis."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((6, 50))
    alike = np.repeat(np.array([1, -1, 0.5], np.float32), 40)
    wide: Arrays = {f"w{t}": normal.astype(t) for t in ("f2", "f4", "f8")}
    counters: Arrays = {
        "n": np.array(7),
        "flag": np.array([True, False]),
        "u": np.array([9], np.uint8),
    }
    odd: Arrays = {
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(-2.5, np.float32),
        "turned": np.asfortranarray(normal.astype(np.float32))[::2],
        "zeros": np.zeros(70, np.float32),
        "tiny": np.array([1e-40, -1e-40, 0.0], np.float32),
    }
    return [{}, wide, {"z": alike, "a": alike[::-1].copy(), **counters}, odd, counters]


def _round_trip(codec: Codec) -> None:
    """Returns the arrays that are expected, lossless if it says so."""
    for arrays in _many_arrays():
        before = {name: x.copy() for name, x in arrays.items()}
        found = codec.decode(codec.encode(arrays, _sending()), arrays)
        _require(list(layout(found).items()) == list(layout(arrays).items()), "layout")
        for name, x in arrays.items():
            _require(np.array_equal(x, before[name]), f"{name} was changed")
            _require(found[name].flags.writeable, f"{name} cannot be written to")
            same = found[name].tobytes() == x.tobytes()
            _require(same or not codec.lossless, f"{name} is not what it was")


def _exact_integers(codec: Codec) -> None:
    """Returns integers and flags exactly."""
    for arrays in _many_arrays():
        found = codec.decode(codec.encode(arrays, _sending()), arrays)
        for name, x in arrays.items():
            exact = x.dtype.kind == "f" or np.array_equal(found[name], x)
            _require(exact, f"{x} became {found[name]}")


def _says_itself(codec: Codec) -> None:
    """Writes records that can be read without its settings, sealed or not."""
    own = classes(codec)
    for arrays in _many_arrays():
        record = codec.encode(arrays, _sending())
        expected = codec.decode(record, arrays)
        for x in (record, seal(record)):
            found = decode(x, arrays, own).arrays
            same = all(found[n].tobytes() == expected[n].tobytes() for n in arrays)
            _require(same, "its class reads something else than it does itself")


def _deterministic(codec: Codec) -> None:
    """Writes the same bytes for the same draws."""
    for arrays in _many_arrays():
        one, two = (codec.encode(arrays, _sending(3))[PAYLOAD].data for _ in range(2))
        _require(one == two, "the bytes differ: are they of another generator?")


def _not_finite(codec: Codec) -> None:
    """Keeps what is not finite so."""
    for bad in (np.nan, np.inf, -np.inf):
        for at in (0, 70, -1):
            x = np.ones(130, np.float32)
            x[at] = bad
            for w in (x, x.reshape(26, 5)):
                found = codec.decode(codec.encode({"w": w}, _sending()), {"w": w})["w"]
                _require(not np.isfinite(found).all(), f"{bad} at {at} became finite")


def _takes_ties(codec: Codec) -> None:
    """Chooses of tied arrays the same coordinates, and keeps silent ones zero."""
    x = np.random.default_rng(1).standard_normal((18, 5)).astype(np.float32)
    arrays = {"a": x, "b": x.copy(), "c": np.zeros_like(x)}
    sending = Sending(np.random.default_rng(0), tied={"b": "a"}, silent=("c",))
    found = codec.unpack(codec.encode(arrays, sending), arrays)
    if found.masks is not None:
        same = np.array_equal(found.masks["a"], found.masks["b"])
        _require(same, "the masks of two names of one tensor differ")
    _require(not found.arrays["c"].any(), "zeros became something")


def _counts(codec: Codec) -> None:
    """Counts its values."""
    for arrays in _many_arrays():
        record = codec.encode(arrays, _sending())
        count, size = num_values(record), sum(x.size for x in arrays.values())
        found = codec.unpack(record, arrays)
        _require(count == found.values, f"{count} are announced")
        if codec.lossless and found.masks is not None:  # the rest was zero
            size = sum(int(mask.sum()) for mask in found.masks.values())
        right = count == size if codec.lossless else 0 <= count <= size
        _require(right, f"{count} values of {size} numbers")


def _unbiased(codec: Codec) -> None:
    """Is right on average, if it says so."""
    if codec.lossless or not codec.unbiased:
        return
    # A matrix, since some codecs look at rows.
    x = np.random.default_rng(5).standard_normal((12, 5)).astype(np.float32)
    draws = 400
    found = np.stack(
        [
            codec.decode(codec.encode({"w": x}, _sending(seed)), {"w": x})["w"]
            for seed in range(draws)
        ]
    ).astype(np.float64)
    error = np.abs(found.mean(0) - x)
    # Five standard errors of the mean: one of 60 in 30,000 checks is above. A value
    # that seldom moves may not have moved at all: each has at least the mean deviation.
    deviation = np.maximum(found.std(0), found.std(0).mean())
    allowed = 5 * deviation / np.sqrt(draws) + 1e-6
    _require(bool((error <= allowed).all()), f"the mean is off by {error.max():.3g}")


def _hostile(codec: Codec) -> None:
    """Refuses whatever is wrong with a record, and nothing else happens."""
    arrays = {
        "w": np.random.default_rng(2).standard_normal((9, 30)).astype(np.float32),
        "n": np.array([3, 4]),
    }
    honest = bytes(codec.encode(arrays, _sending())[PAYLOAD].numpy())
    rng = np.random.default_rng(0)
    bodies = [honest[4:i] for i in range(4, len(honest), 7)]
    for _ in range(400):
        altered = bytearray(honest[4:])
        for at in rng.integers(0, len(altered), 1 + int(rng.integers(3))):
            altered[at] = int(rng.integers(256))
        bodies.append(bytes(altered))
    for body in bodies:
        record = _signed(body)
        num_values(record)
        try:
            found = codec.decode(record, arrays)
        except MalformedReply:
            continue
        _require(
            layout(found) == layout(arrays), f"{layout(arrays)} is {layout(found)}"
        )
    flipped = bytearray(honest)
    flipped[-1] ^= 1
    others = {"w": arrays["w"].T, "n": arrays["n"]}
    for record, like in (
        (_payload_record(flipped), arrays),
        (_signed(honest[4:] + b"\0"), arrays),
        (_payload_record(honest), others),
        (_payload_record(honest), {"w": arrays["w"]}),
        (ArrayRecord(), arrays),
        (ArrayRecord({"w": Array(arrays["w"])}), arrays),
    ):
        try:
            codec.decode(record, like)
        except MalformedReply:
            continue
        raise AssertionError("a record that is wrong was read")


def _signed(body: bytes) -> ArrayRecord:
    """Return the record of a payload whose checksum is right, whatever it holds."""
    return _payload_record(struct.pack("<I", zlib.crc32(body)) + body)


def _payload_record(payload: bytes | bytearray) -> ArrayRecord:
    return ArrayRecord({PAYLOAD: Array(np.frombuffer(payload, np.uint8))})


def _bounded(codec: Codec) -> None:
    """Reads in memory that the arrays account for, whatever is sent."""
    arrays = {"w": np.ones((20, 5), np.float32)}
    honest = bytes(codec.encode(arrays, _sending())[PAYLOAD].numpy())
    head = 4 + 1 + 2 * len(codec.stages) + 12
    size = 1 << 21
    for fill in (b"\0", b"\1", b"\x7f", b"\xff", struct.pack("<I", size)):
        for keep in (head, (head + len(honest)) // 2, len(honest)):
            body = honest[4:keep] + (fill * size)[: size + 4]
            record = _signed(body)
            tracemalloc.start()
            try:
                codec.decode(record, arrays)
            except MalformedReply:
                pass
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            _require(peak < 1 << 18, f"{peak} bytes were held for 400 bytes of arrays")


def _is_told(codec: Codec) -> None:
    """Can be named in a message."""
    again = rebuild(describe(codec), classes(codec))
    _require(again == codec, f"{codec} became {again}")
    _require(codec.at(2) is codec, "at() of a codec of a round changes it")
    _require(pickle.loads(pickle.dumps(codec)) == codec, "pickling changes it")


_CODEC_RULES = (
    _round_trip,
    _exact_integers,
    _says_itself,
    _deterministic,
    _not_finite,
    _takes_ties,
    _counts,
    _unbiased,
    _hostile,
    _bounded,
)
