"""Which codecs there are: by the tags in a record, and by name in a message."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields

from flwr.app import ArrayRecord
from flwr.common import NDArray

from flower_ext.core.errors import refuse
from flower_ext.wire.chain import Chain, FixedMask, TopK
from flower_ext.wire.codec import TAG, Codec, Decoded, Stage, unpack
from flower_ext.wire.one_bit import OneBit
from flower_ext.wire.permutation import Permutation
from flower_ext.wire.pruned import Kept, Nonzero
from flower_ext.wire.qsgd import QSGD
from flower_ext.wire.random_k import RandomK
from flower_ext.wire.rotated import DRIVE, EDEN
from flower_ext.wire.rows import Rows
from flower_ext.wire.terngrad import TernGrad
from flower_ext.wire.three_lc import ThreeLC
from flower_ext.wire.universal import UniversalCode
from flower_ext.wire.value_codes import NF4, BFloat16, Exact
from flower_ext.wire.vote import Voted
from flower_ext.wire.wrappers import AnyOf, Described, ErrorFeedback

#: The codecs of this package, which every app knows.
CODECS: tuple[type[Codec], ...] = (
    Exact,
    BFloat16,
    NF4,
    UniversalCode,
    QSGD,
    TernGrad,
    ThreeLC,
    OneBit,
    DRIVE,
    EDEN,
    FixedMask,
    TopK,
    RandomK,
    Rows,
    Permutation,
    Nonzero,
    Kept,
    Chain,
    ErrorFeedback,
    Described,
    Voted,
    AnyOf,
)


def describe(codec: Codec) -> str:
    """Return the text by which a message names a codec and its settings.

    Settings at their default are left out.

    Raises
    ------
    ValueError
        Unless :func:`rebuild` makes the same codec of it.

    Examples
    --------
    >>> describe(Chain(TopK(0.25), NF4()))
    '["Chain",["TopK",{"density":0.25}],["NF4"]]'
    """
    try:
        text = json.dumps(_described(codec), separators=(",", ":"), allow_nan=False)
        same = rebuild(text, classes(codec)) == codec
    except (TypeError, ValueError):
        same = False
    if not same:
        refuse(
            "codec",
            codec,
            "a frozen dataclass, made anew by its numbers, words, tuples and codecs",
            "a message must be able to name it, with what is known of its round",
        )
    return text


def _described(codec: Codec) -> list[object]:
    """Return name, codecs in it, and settings that are not those by default."""
    within: list[object] = []
    settings = {}
    for item in fields(codec):  # type: ignore[arg-type]
        value = getattr(codec, item.name)
        inner = value if isinstance(value, tuple) else (value,)
        if inner and all(isinstance(x, Codec) for x in inner):
            within += [_described(x) for x in inner]
        elif item.default is MISSING or value != item.default:
            settings[item.name] = value
    return [type(codec).__name__, *within, *([settings] if settings else [])]


def classes(codec: Codec) -> set[type[Codec]]:
    """Return the class of a codec, and those of the codecs in it."""
    found = {type(codec)}
    for item in fields(codec):  # type: ignore[arg-type]
        value = getattr(codec, item.name)
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, Codec):
                found |= classes(x)
    return found


def rebuild(text: str, own: Iterable[type[Codec]] = ()) -> Codec:
    """Return the codec that :func:`describe` named.

    Parameters
    ----------
    text : str
        From a message.
    own : iterable of type of Codec
        The user's own classes, beside :data:`CODECS`.

    Raises
    ------
    ValueError
        If it is no such text, or names a codec or setting that is not known.

    Examples
    --------
    >>> rebuild('["TopK",{"density":0.25}]').density
    0.25
    """
    known = {cls.__name__: cls for cls in (*CODECS, *own)}
    try:
        return _rebuilt(json.loads(text), known)
    except (TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{text[:200]!r} describes no codec: {error}") from error


def _rebuilt(described: object, known: Mapping[str, type[Codec]]) -> Codec:
    if not isinstance(described, list) or not described:
        raise TypeError(f"{described!r} is no list with a name")
    name, *parts = described
    if name not in known:
        raise ValueError(
            f"this ClientApp does not know the codec {name!r}: "
            f"client_app(task, ..., codecs=[{name}])"
        )
    settings = parts.pop() if parts and isinstance(parts[-1], dict) else {}
    values = {k: tuple(x) if isinstance(x, list) else x for k, x in settings.items()}
    return known[name](*(_rebuilt(part, known) for part in parts), **values)


def decode(
    record: ArrayRecord,
    like: Mapping[str, NDArray],
    own: Collection[type[Codec]] = (),
) -> Decoded:
    """Return what any known codec wrote: the record says which it was.

    Parameters
    ----------
    record : ArrayRecord
        As :meth:`Codec.encode` makes it, sealed or not.
    like : Mapping[str, ndarray]
        Arrays of the names, dtypes and shapes that are expected.
    own : collection of type of Codec
        The user's own classes.

    Raises
    ------
    MalformedReply
        If the record cannot be read.
    """
    stages = {cls.tag: cls for cls in (*CODECS, *own) if issubclass(cls, Stage)}

    def find(tags: Sequence[bytes]) -> list[type[Stage]]:
        unknown = [tag for tag in tags if tag not in stages]
        if unknown:
            raise ValueError(
                f"no codec here has the tag {unknown[0]!r}: "
                "client_app(task, ..., codecs=[...]) names those of your own"
            )
        return [stages[tag] for tag in tags]

    return unpack(record, like, find)


def require_codecs(own: object) -> tuple[type[Codec], ...]:
    """Return the user's own codec classes, checked.

    Raises
    ------
    ValueError
        If one is no class of codecs, or has the name or the tag of another.
    """
    if not isinstance(own, Iterable):
        refuse("codecs", own, "a sequence of classes derived from Codec")
    found = tuple(own)
    names = {cls.__name__: cls for cls in CODECS}
    tags = {cls.tag: _owner(cls) for cls in CODECS if issubclass(cls, Stage)}
    for cls in found:
        if not isinstance(cls, type) or not issubclass(cls, Codec):
            refuse("codecs", cls, "a class derived from Codec", "not an instance")
        if names.setdefault(cls.__name__, cls) is not cls:
            refuse("codecs", cls.__name__, "a name that no other codec has")
        if issubclass(cls, Stage):
            if not isinstance(cls.tag, bytes) or len(cls.tag) != TAG:
                refuse(f"{cls.__name__}.tag", cls.tag, f"{TAG} bytes")
            if tags.setdefault(cls.tag, _owner(cls)) is not _owner(cls):
                refuse(f"{cls.__name__}.tag", cls.tag, "one that no other codec has")
    return found


def _owner(stage: type[Stage]) -> type:
    """Return the class that a tag is of: what it writes is read alike."""
    return next(cls for cls in stage.__mro__ if "tag" in vars(cls))
