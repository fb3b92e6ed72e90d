"""The ClientApp: messages in, replies out, for any strategy of the pack.

:func:`client_app` makes a complete ClientApp from a :class:`Task` and the client halves
that strategies may ask for. For a training loop of one's own, strategies export plain
functions beside their halves.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from logging import ERROR
from typing import TypeVar, cast

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.encoding import (
    ENCODING,
    Codecs,
    Mod,
    encode_upload,
    read_download,
    upload_codec,
)
from flower_ext.client.half import (
    Beside,
    ClientHalf,
    HalfFactory,
    Local,
    LocalSettings,
    client_of,
)
from flower_ext.client.personal import forget_other_runs, kept_unless_done
from flower_ext.client.seeds import random_seed, same_globals, seed_all
from flower_ext.client.task import Batch, Task, evaluate, num_examples, tied_names
from flower_ext.client.tensors import Tensors, read_tensors, reply_tensors
from flower_ext.client.trainer import Plain, Trainer
from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import refuse
from flower_ext.core.meeting import MeetingApp
from flower_ext.core.protocol import (
    ARRAYS_KEY,
    CLIENT_HALF_KEY,
    CONFIG_KEY,
    HAS_STATE,
    METRICS_KEY,
    MODEL_NUMBER_KEY,
    RECEIVED,
    RUN_KEY,
    WRONG_HALF,
    Metrics,
    Phase,
)
from flower_ext.core.ties import TIED_KEY, TIED_TO_KEY
from flower_ext.wire.codec import is_encoded
from flower_ext.wire.masks import Masks
from flower_ext.wire.messages import change
from flower_ext.wire.registry import require_codecs

R = TypeVar("R", ArrayRecord, ConfigRecord)

# Of a node's configuration.
_WHICH_CLIENT = ("partition-id", "num-partitions")


def client_app(
    task: Task,
    *halves: HalfFactory,
    trainer: Trainer = Plain(),  # noqa: B008 (it keeps nothing)
    codecs: Codecs = (),
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Make a ClientApp that trains and evaluates, for any strategy of the pack.

    Parameters
    ----------
    task : Task
        What is learned.
    *halves : type of ClientHalf
        Client halves that the server may ask for, as classes or partials of them.
        Plain local training, which FedAvg and its like need, is always there.
    trainer : Trainer (default: Plain())
        How steps are taken, by every half: plain ones, or those of DP-SGD,
        ``DPSGD(privacy)``.
    codecs : sequence of type of Codec
        Codecs of your own that the server may ask for; those of the package are known.
    mods : sequence of callable
        Flower mods, such as :func:`~flower_ext.simulation.packed`.

    Returns
    -------
    ClientApp
        Replies to ``train`` with the trained arrays, or their change encoded as the
        server asks for, ``num-examples``, ``train-loss`` and what the half adds; to
        ``evaluate`` with ``num-examples``, ``loss`` and the task's metrics on the
        client's test data.

    Notes
    -----
    Learning rate, epochs and the other settings of local training (see
    :class:`~flower_ext.client.half.LocalSettings`) come from the message's
    configuration (``train_config``) or the run config. The result depends on seed,
    round and client only.
    """
    if not isinstance(task, Task):
        refuse("task", task, "a Task", "Task(model, data, loss)")
    if isinstance(task.model, nn.Module):
        cause = "lambda run_config: Net()"
        refuse(
            "Task.model", type(task.model).__name__, "a function that makes it", cause
        )
    _require_arguments("Task.model", task.model, "run_config")
    _require_arguments("Task.data", task.data, "context")
    _require_arguments("Task.loss", task.loss, "model", "batch")
    _require_arguments("Task.metrics", task.metrics, "model", "batch")
    if not isinstance(trainer, Trainer):
        refuse("trainer", trainer, "a Trainer", "Plain() or DPSGD(privacy)")
    known: dict[str, HalfFactory] = {ClientHalf.name: ClientHalf}
    for half in halves:
        owner = _owner(half)
        name = getattr(owner, "name", None)
        if not callable(half) or not isinstance(name, str):
            refuse("halves", half, "classes derived from ClientHalf")
        if isinstance(owner, type):
            trainer.admit(owner)
        known[str(name)] = half
    open_ = partial(_open, task, known, trainer, require_codecs(codecs))
    # What mods draw, such as noise, goes on from client to client.
    around = nullcontext if mods else same_globals
    app = MeetingApp(trainer.at_once, around, mods=list(mods))

    @app.train()
    def train_(message: Message, context: Context) -> Message:
        with _telling(trainer), kept_unless_done(context.state):
            with same_globals():
                local, half = open_(message, context)
                _require_told_ties(local.model, local.config)
                loss = local.session.train(local, half)
                half.after_training(local)
                arrays, metrics = half.records(local)
                trained = half.model_to_send(local)
                trained = local.end if trained is None else dict(trained)
            record, votes = _trained(local, trained)
            values: Metrics = {
                "num-examples": num_examples(local.train),
                "train-loss": loss,
                **metrics,
                **votes,
            }
            values = half.release(local.session.report(values))
            content = RecordDict(
                {
                    ARRAYS_KEY: record,
                    **{key: _record(group) for key, group in arrays.items()},
                    METRICS_KEY: MetricRecord(values),
                }
            )
            local.session.end()
            if tied := _ties(local, trained):
                content[TIED_KEY] = ConfigRecord({**tied})
            return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate_(message: Message, context: Context) -> Message:
        with _telling(trainer), kept_unless_done(context.state):
            with same_globals():
                local, half = open_(message, context)
                own = half.model_to_evaluate(local)
                received: Metrics = {}
                if own is None or half.compares:
                    received = {**evaluate(task, local.model, local.test)}
                values: Metrics = {
                    "num-examples": num_examples(local.test),
                    **(received if own is None else local.measure(own)),
                    **half.evaluate(local),
                }
                if half.compares:
                    values |= {RECEIVED + name: x for name, x in received.items()}
                if type(half).keeps:
                    values[HAS_STATE] = float(not half.keeps or any(local.personal))
                values = local.session.report_evaluation(values, local, own)
                values = half.release(values)
            content = RecordDict({METRICS_KEY: MetricRecord(values)})
            local.session.end()
            return Message(content, reply_to=message)

    return app


@contextmanager
def _telling(trainer: Trainer) -> Iterator[None]:
    """Keep what an error says from the server where it may quote the data.

    Errors of this package are told: they do not.
    """
    try:
        yield
    except Exception as error:
        at = error.__traceback__
        while at and at.tb_next:
            at = at.tb_next
        where = str(at.tb_frame.f_globals.get("__name__")) if at else ""
        if not trainer.discreet or where.partition(".")[0] == "flower_ext":
            raise
        log(ERROR, "the client failed, and does not tell the server why", exc_info=True)
        raise RuntimeError(
            f"{type(error).__name__} in {where}: what it says may quote the client's "
            "data, and is in the log of the client only"
        ) from None


def _require_arguments(name: str, function: object, *given: str) -> None:
    """Refuse a function that cannot be called as it will be, before a client is."""
    try:
        signature = inspect.signature(cast(Callable[..., object], function))
    except (TypeError, ValueError):  # none, or one of C that does not say
        return
    try:
        signature.bind(*given)
    except TypeError:
        called = getattr(function, "__name__", type(function).__name__)
        cause = f"lambda {', '.join(given)}: ... makes one of another function"
        refuse(name, called, f"a function of ({', '.join(given)})", cause)


def _owner(half: HalfFactory) -> object:
    """Return the class behind a partial of it."""
    return half.func if isinstance(half, partial) else half


def _record(group: ArrayRecord | Tensors) -> ArrayRecord:
    return group if isinstance(group, ArrayRecord) else reply_tensors(group)


def _ties(local: Local, arrays: Tensors) -> dict[str, str]:
    """Return the further names of tied tensors, of those that travel."""
    ties = tied_names(local.model)
    return {n: first for n, first in ties.items() if {n, first} <= arrays.keys()}


def _trained(local: Local, arrays: Tensors) -> tuple[ArrayRecord, Mapping[str, float]]:
    """Return what the client sends: its model, or its change encoded, and votes."""
    if local.upload is None:
        return reply_tensors(arrays), {}
    # The change from what the server has under a name, as it would find it itself. A
    # half that was sent several models, or none, has it from what it began with.
    came = {
        name: x
        for name, x in local.came.items()
        if name in arrays and x.shape == arrays[name].shape
    }
    began = {**local.loaded, **came}
    if unknown := arrays.keys() - began.keys():
        refuse("model_to_send(...)", sorted(unknown), "arrays of the model")
    start, end = (
        {name: tensors[name].detach().cpu().numpy() for name in arrays}
        for tensors in (began, arrays)
    )
    masks = local.masks
    sent = encode_upload(
        local.upload,
        {name: change(x, start[name]) for name, x in end.items()},
        local.context.state,
        server_round=local.server_round,
        seed=local.seed(ENCODING),
        tied=_ties(local, arrays),
        received=masks and {n: x for n, x in masks.items() if n in arrays},
        model_number=local.model_number,
        began=start,
    )
    return sent.record, sent.votes


def _choose(known: Mapping[str, HalfFactory], config: ConfigRecord) -> ClientHalf:
    keys = {name: getattr(_owner(half), "asked_by", "") for name, half in known.items()}
    for key in keys.values():
        if "-" in key and (other := key.replace("-", "_")) in config:
            refuse(f"configuration {other!r}", config[other], f"spelt {key!r}")
    asked = (name for name, key in keys.items() if key in config)
    name = str(config.get(CLIENT_HALF_KEY) or next(asked, ClientHalf.name))
    if name not in known:
        raise ValueError(
            f"{WRONG_HALF} {name!r}, this ClientApp has {sorted(known)}: add its class "
            "to client_app(task, ...)"
        )
    return known[name]()


def _require_told_ties(model: nn.Module, config: ConfigRecord) -> None:
    """Refuse to be one of a run that takes layers for one which only start alike."""
    names, firsts = config.get(TIED_KEY, []), config.get(TIED_TO_KEY, [])
    own = tied_names(model) if names else {}
    for name, first in zip(
        cast("list[str]", names), cast("list[str]", firsts), strict=True
    ):
        if own.get(name, name) != own.get(first, first):
            raise ValueError(
                f"the server takes {first!r} and {name!r} for one tensor, since they "
                "are equal in its initial model; here they are two: let them start "
                "from different values"
            )


def _require_whole_ties(begun: Tensors, came: Tensors, model: nn.Module) -> None:
    """Refuse to load over what was sent what a client kept of the same tensor."""
    if begun.keys() <= came.keys():  # nothing is of the client's own
        return
    for name, first in tied_names(model).items():
        apart = (name in came) != (first in came) and {name, first} <= begun.keys()
        if apart and not torch.equal(begun[name].cpu(), begun[first].cpu()):
            refuse(
                "receive(...)",
                [first, name],
                "equal arrays",
                "they are one tensor, which the server knows under one name: it is "
                "shared under both or under none",
            )


def _open(
    task: Task,
    known: Mapping[str, HalfFactory],
    trainer: Trainer,
    codecs: Codecs,
    message: Message,
    context: Context,
) -> tuple[Local, ClientHalf]:
    """Read a message: the half, settings, model with its weights, the client's data."""
    content = message.content
    model_sent = _require(content, ARRAYS_KEY, ArrayRecord)
    config = _require(content, CONFIG_KEY, ConfigRecord)
    forget_other_runs(content, context.state)
    half = _choose(known, config)
    settings = LocalSettings.read(config, context.run_config)
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What is random in a model and not sent must agree between clients; a random split
    # of a client's data must be the same in every round.
    seed_all(settings.seed)
    model = half.make_model(task, context.run_config, config)
    seed_all(random_seed(settings.seed, 0, client_of(context)))
    train_data, test_data = _columns(_data_of(task, context), device)
    arrays, masks = _read_model(model_sent, config, model, codecs)
    about_run = content.get(RUN_KEY)
    local = Local(
        task=task,
        model=model.to(device),
        train=train_data,
        test=test_data,
        settings=settings,
        config=config,
        context=context,
        device=device,
        run=about_run if isinstance(about_run, ConfigRecord) else ConfigRecord(),
        upload=upload_codec(config, codecs),
        masks=masks,
        received=Beside(
            (key, read_tensors(group, device))
            for key, group in content.items()
            if key != ARRAYS_KEY and isinstance(group, ArrayRecord)
        ),
        came=arrays,
        loaded=arrays,
        phase=cast(Phase, message.metadata.message_type.partition(".")[0]),
    )
    local.model_number = int(local.number(MODEL_NUMBER_KEY, 0))
    local.session = trainer.session(local, half)
    begun = half.receive(local, arrays)
    _require_whole_ties(begun, arrays, local.model)
    # Masks are of what came, which need not be what the model begins with.
    shapes = {name: tuple(x.shape) for name, x in begun.items()}
    if masks is not None and shapes != {n: m.shape for n, m in masks.items()}:
        local.masks = None
    local.load(begun)
    return local, half


def _require(content: RecordDict, key: str, kind: type[R]) -> R:
    """Return a record of a message."""
    record = content.get(key)
    if not isinstance(record, kind):
        raise ValueError(
            f"no {kind.__name__} {key!r} in the message, which has "
            f"{sorted(content)}: the strategy's arrayrecord_key and "
            f"configrecord_key must be {ARRAYS_KEY!r} and {CONFIG_KEY!r}"
        )
    return record


def _read_model(
    record: ArrayRecord, config: ConfigRecord, model: nn.Module, codecs: Codecs
) -> tuple[dict[str, Tensor], Masks | None]:
    """Return the arrays that were sent, and what of them was if it was not all."""
    if not is_encoded(record):
        return read_tensors(record), None

    def like() -> Arrays:
        return {name: x.cpu().numpy() for name, x in model.state_dict().items()}

    found = read_download(record, config, like, codecs)
    # A tensor with several names begins with what it is given last.
    last = {first: name for name, first in tied_names(model).items()}
    arrays = {k: found.arrays.get(last.get(k, k), x) for k, x in found.arrays.items()}
    return {name: torch.from_numpy(x) for name, x in arrays.items()}, found.masks


def _data_of(task: Task, context: Context) -> object:
    """Return what the task has of a client; say what a node lacks that tells which."""
    try:
        return task.data(context)
    except KeyError as error:
        node, missing = context.node_config, error.args[0] if error.args else None
        if missing not in _WHICH_CLIENT or missing in node:
            raise
        refuse(
            "node_config",
            dict(node),
            f"one with {missing!r}",
            "a simulation says it; in a deployment each SuperNode is started with its "
            "own, --node-config 'partition-id=0 num-partitions=10'",
        )


def _columns(found: object, device: torch.device) -> tuple[Batch, Batch]:
    """Return a client's training and test data on a device, NumPy's as torch's."""
    advice = "(train, test), each a dict of tensors whose first axis counts examples"
    if not isinstance(found, tuple | list) or len(found) != 2:
        refuse("the task's data", type(found).__name__, advice)
    columns: list[Batch] = []
    for data in found:
        if not isinstance(data, Mapping):
            cause = "load it once and stack it: batches are made here"
            refuse("the task's data", type(data).__name__, advice, cause)
        for name, column in data.items():
            if not isinstance(column, Tensor | np.ndarray):
                refuse(f"column {name!r}", type(column).__name__, "a tensor")
        columns.append({k: torch.as_tensor(x).to(device) for k, x in data.items()})
    return columns[0], columns[1]
