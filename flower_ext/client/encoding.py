"""The client's end of codecs: messages are decoded, and replies are encoded.

An app made by :func:`~flower_ext.client.app.client_app` does both. An app with a loop
of its own adds the mod :func:`encoded`, or :func:`upload` to choose its codec itself.
"""

import math
from collections.abc import Callable, Collection, Mapping
from hashlib import blake2b
from typing import NamedTuple, cast

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from flower_ext.client.half import client_of
from flower_ext.client.personal import Personal, forget_other_runs
from flower_ext.client.seeds import random_seed
from flower_ext.core.arrays import Arrays, from_record, is_averaged, to_record
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import ARRAYS_KEY, CLIENT_HALF_KEY, MODEL_NUMBER_KEY
from flower_ext.core.replies import array_key, read_arrays
from flower_ext.core.ties import TIED_KEY
from flower_ext.wire.chain import Chain
from flower_ext.wire.codec import Codec, Sending, Stage, is_encoded
from flower_ext.wire.masks import Masks
from flower_ext.wire.messages import (
    DESCRIPTION_KEY,
    UPLOAD_KEY,
    change,
    described_arrays,
)
from flower_ext.wire.registry import (
    CODECS,
    classes,
    decode,
    rebuild,
    require_codecs,
)
from flower_ext.wire.wrappers import ErrorFeedback, Sent
from flower_ext.wire.wrappers import upload as send

Codecs = Collection[type[Codec]]
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]

# Of a client's random numbers: 0 is the order of batches, 1 is dropout.
ENCODING = 2
_RESIDUAL = "upload-residual"
_RESIDUAL_ROUND = "upload-residual-round"


class Download(NamedTuple):
    """The arrays of a message, and what of them travelled: None is all."""

    arrays: Arrays
    masks: Masks | None


def read_download(
    record: ArrayRecord,
    config: Mapping[str, ConfigRecordValues],
    like: Callable[[], Arrays],
    codecs: Codecs = (),
) -> Download:
    """Read the model of a message, encoded or not.

    Parameters
    ----------
    record : ArrayRecord
        Says itself how it is encoded.
    config : ConfigRecord
        May describe the arrays.
    like : callable
        Returns arrays of the form that is expected unless they are described.
    codecs : collection of type of Codec
        The user's own classes.
    """
    if not is_encoded(record):
        return Download(from_record(record), None)
    expected = described_arrays(config)
    found = decode(record, like() if expected is None else expected, codecs)
    return Download(found.arrays, found.masks)


def upload_codec(
    config: Mapping[str, ConfigRecordValues], codecs: Codecs = ()
) -> Codec | None:
    """Return the codec that the server wants a change encoded with, if any."""
    text = config.get(UPLOAD_KEY)
    return None if text is None else rebuild(str(text), codecs)


def encode_upload(
    codec: Codec,
    changed: Arrays,
    state: RecordDict,
    *,
    server_round: int,
    seed: int,
    tied: Collection[str] = (),
    received: Masks | None = None,
    model_number: int = 0,
    began: Arrays | None = None,
) -> Sent:
    """Return a client's change as it travels, and the votes that go with it.

    Parameters
    ----------
    codec : Codec
        As the server told.
    changed : dict[str, ndarray]
        Trained minus received.
    state : RecordDict
        The client's own, in which a residual stays for the next time.
    server_round : int
        A residual of this round, or of a later one, is left of another run.
    seed : int
        Of what the codec draws.
    tied : collection of str
        Further names of tensors, of which only what is under the first travels.
    received : dict[str, ndarray of bool], optional
        The coordinates that it was sent.
    model_number : int
        Of the server's models, where it has several: each has a residual of its own.
    began : dict[str, ndarray], optional
        What it is a change of.
    """
    personal = Personal(state)
    of_model = f"-{model_number}" if model_number else ""
    left, left_in = _RESIDUAL + of_model, _RESIDUAL_ROUND + of_model
    changed = changed | {name: np.zeros_like(changed[name]) for name in tied}
    sending = Sending(
        np.random.default_rng(seed), silent=tied, received=received, began=began
    )
    kept = None
    is_ours = personal.number(left_in, math.inf) < server_round
    if codec.feedback and left in personal and is_ours:
        floats = {n: torch.from_numpy(x) for n, x in changed.items() if is_averaged(x)}
        try:
            found = personal.arrays(left, like=floats)
        except ValueError:  # of a change of other shapes, such as another slice
            found = {}
        kept = {name: x.numpy() for name, x in found.items()}
    sent = send(codec, changed, kept, sending)
    if sent.residual is not None:
        arrays = {name: torch.from_numpy(x) for name, x in sent.residual.items()}
        personal.save(**{left: arrays})
        personal.save(**{left_in: float(server_round)})
    elif codec.feedback:
        personal.drop(left)
    return sent


def encoded(*codecs: type[Codec]) -> Mod:
    """Return a Flower mod that encodes and decodes for an app with a loop of its own.

    The app's functions stay as they are: they receive the arrays, and reply with all
    that they trained; the mod sends the change in its place, under the same key,
    encoded as the server asks for. Other messages pass through. A strategy that encodes
    what it sends must describe its arrays, as ``download=Described(codec)`` does.

    Parameters
    ----------
    *codecs : type of Codec
        Classes of your own, beside those of the package.

    Returns
    -------
    callable
        For ``ClientApp(mods=[encoded()])``, or ``mods=[packed, encoded()]``.

    Notes
    -----
    Codecs that choose among what was received, as FLASC's with ``client_freeze`` and
    tiers of rank do, are refused: what the loop does with gradients is not the mod's to
    say.
    """
    return _mod(require_codecs(codecs))


def upload(codec: Codec, *codecs: type[Codec]) -> Mod:
    """Return the mod :func:`encoded` of a client that chooses how its change travels.

    The server reads what its strategy names, by ``upload=AnyOf(codec, ...)``, or a
    single codec of the same kind; settings are the client's. Whether what is left out
    is kept for the next round stays the server's choice,
    ``upload=ErrorFeedback(AnyOf(...))``.

    Parameters
    ----------
    codec : Stage or Chain
        Of uploads, such as ``TopK(1 / 16)``.
    *codecs : type of Codec
        Further classes of your own that the strategy names.

    Returns
    -------
    callable
        For ``ClientApp(mods=[upload(codec)])``.

    Notes
    -----
    Where the server does not accept the codec the client fails, before its app trains:
    it would send more than it was to. Under a mechanism the change is clipped as it was
    decoded, so that the guarantee does not depend on what clients choose.
    """
    if not isinstance(codec, Stage | Chain) or codec.within_received:
        bound = "a codec, bare or a Chain, that chooses among all coordinates"
        refuse("codec", codec, bound, "error feedback is for the server to ask for")
    new = (cls for cls in classes(codec) if cls not in CODECS)
    return _mod(require_codecs((*new, *codecs)), codec)


def _mod(own: Codecs, wish: Codec | None = None) -> Mod:
    def mod(
        message: Message,
        context: Context,
        call_next: Callable[[Message, Context], Message],
    ) -> Message:
        content = message.content
        key = _model_key(content)
        config = _told(content)
        codec = upload_codec(config, own)
        record = content.array_records.get(key)
        kind = message.metadata.message_type.partition(".")[0]
        if wish and record is not None and kind == MessageType.TRAIN:
            _require_no_freeze(codec, config)
            codec = _chosen(wish, codec, int(cast(int, config.get("server-round", 1))))
        if record is None or not (codec or is_encoded(record)):
            return call_next(message, context)
        forget_other_runs(content, context.state)
        _require_no_freeze(codec, config)
        received = read_download(record, config, _not_described, own).arrays
        message.content = RecordDict({**content, key: to_record(received)})
        try:
            reply = call_next(message, context)
        finally:
            message.content = content
        if codec and reply.has_content() and kind == MessageType.TRAIN:
            reply.content = _encoded_reply(
                reply.content,
                key,
                received,
                codec,
                context,
                {**context.run_config, **config},
            )
        return reply

    return mod


def _model_key(content: RecordDict) -> str:
    encoded = [key for key, x in content.array_records.items() if is_encoded(x)]
    return encoded[0] if encoded else array_key(content, ARRAYS_KEY)


def _told(content: RecordDict) -> ConfigRecord:
    """Return the configuration in which the server speaks of codecs."""
    for config in content.config_records.values():
        if UPLOAD_KEY in config or DESCRIPTION_KEY in config:
            return config
    return ConfigRecord()


def _not_described() -> Arrays:
    raise ValueError(
        "the mod encoded() needs the names and shapes of the arrays: make the strategy "
        "with download=Described(codec), or FLASC(describe_arrays=True)"
    )


def _require_no_freeze(codec: Codec | None, config: ConfigRecord) -> None:
    if codec and codec.within_received:
        half = config.get(CLIENT_HALF_KEY, "plain")
        raise ValueError(
            f"clients may change only what they received, which needs the client half "
            f"{half!r}, in client_app(task, ...): the mod encoded() cannot freeze what "
            "an app's loop trains"
        )


def _chosen(wish: Codec, told: Codec | None, server_round: int) -> Codec:
    """Return the client's own codec of a round, if the server reads it."""
    accepted = {_tags(stages): stages for stages in told.accepted} if told else {}
    if told is None or _tags(wish.stages) not in accepted:
        names = [
            " of ".join(x.__name__ for x in stages) for stages in accepted.values()
        ]
        bound = f"what the server reads, {sorted(names) or 'plain arrays only'}"
        refuse("upload", wish, bound, "its strategy needs upload=AnyOf(codec, ...)")
    own = wish.at(server_round)
    return ErrorFeedback(own) if told.feedback else own


def _tags(stages: tuple[type[Stage], ...]) -> tuple[bytes, ...]:
    return tuple(stage.tag for stage in stages)


def _encoded_reply(
    content: RecordDict,
    key: str,
    received: Arrays,
    codec: Codec,
    context: Context,
    settings: Mapping[str, ConfigRecordValues],
) -> RecordDict:
    """Return the content of an app's reply with the upload in the model's place."""
    key = array_key(content, key)
    trained = read_arrays(content, key, received)
    changed = {
        name: change(trained[name].astype(x.dtype, copy=False), x)
        for name, x in received.items()
    }
    tied = _alike(trained, received)
    for name, first in tied.items():  # the last that was loaded is where it began
        changed[first] = change(
            trained[name].astype(received[name].dtype), received[name]
        )
    seed, server_round = (
        int(cast(int, settings.get(key, 0))) for key in ("seed", "server-round")
    )
    sent = encode_upload(
        codec,
        changed,
        context.state,
        server_round=server_round,
        # As client_app draws.
        seed=random_seed(seed, server_round, client_of(context), ENCODING),
        tied=tied,
        model_number=int(cast(int, settings.get(MODEL_NUMBER_KEY, 0))),
        began=received,
    )
    content = RecordDict({**content, key: sent.record})
    if sent.votes:
        where, metrics = next(iter(content.metric_records.items()))
        content[where] = MetricRecord({**metrics, **sent.votes})
    if tied:
        content[TIED_KEY] = ConfigRecord({**tied})
    return content


def _alike(trained: Arrays, received: Arrays) -> dict[str, str]:
    """Return names of arrays that came back equal to an earlier one, and changed: ties.

    A codec may have cut the copies of what was sent apart.
    """
    groups: dict[object, list[str]] = {}
    for name, x in trained.items():
        if is_averaged(x) and x.size > 1:
            bits = blake2b(x.tobytes()).digest()
            groups.setdefault((x.dtype, x.shape, bits), []).append(name)
    return {
        name: names[0]
        for names in groups.values()
        if not all(np.array_equal(trained[n], received[n]) for n in names)
        for name in names[1:]
    }
