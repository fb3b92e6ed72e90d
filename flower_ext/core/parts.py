"""Which arrays of a model stay with a client: filters on their names."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from flower_ext.core.errors import refuse

#: What a filter may be; None is the model's last layer.
Filter = str | Sequence[str] | Callable[[str], bool] | None

# In a message's configuration: the names of the arrays that stay with a client, and
# their places among all arrays of the model.
PERSONAL_NAMES = "personal-arrays"
PERSONAL_PLACES = "personal-places"
#: Key of the record of what they are at the start.
PERSONAL_START = "personal-start"


_ALL_SHARED = "where nothing stays with clients, FedAvg is the strategy"


def require_filter(
    personal: Filter, argument: str = "personal", cause: str = _ALL_SHARED
) -> Filter:
    """Refuse what is no filter."""
    patterns = [personal] if isinstance(personal, str) else personal
    if patterns is None or callable(patterns):
        return personal
    ok = isinstance(patterns, Sequence) and all(isinstance(x, str) for x in patterns)
    if not ok or not patterns:
        refuse(
            argument,
            personal,
            'a pattern of names such as "head.*", several, or a function of a name',
            cause,
        )
    return personal


def personal_names(
    names: Iterable[str], personal: Filter, argument: str = "personal"
) -> list[str]:
    """Return the names of the arrays that stay with a client, in the model's order.

    Parameters
    ----------
    names : iterable of str
        Of all arrays of the model, in its order.
    personal : str, sequence of str or callable, optional
        Patterns as of :mod:`fnmatch`, each of which must match, or a function ``name ->
        bool``. None is the last layer: all arrays whose names are that of the last one
        up to the last dot.
    argument : str
        What errors call the filter.

    Raises
    ------
    ValueError
        If it matches no array, or all of them.

    Examples
    --------
    >>> names = ["body.weight", "body.bias", "head.weight", "head.bias"]
    >>> personal_names(names, "head.*")
    ['head.weight', 'head.bias']
    >>> personal_names(names, None)
    ['head.weight', 'head.bias']
    >>> personal_names(names, lambda name: not name.startswith("body."))
    ['head.weight', 'head.bias']
    """
    names = list(names)
    found = matching_names(names, personal, argument)
    if len(found) == len(names):
        refuse_all(personal, names, argument)
    return found


def matching_names(names: Sequence[str], chosen: Filter, argument: str) -> list[str]:
    """Return the names that a filter matches, which may be all, but not none."""
    if callable(chosen):
        found = [name for name in names if chosen(name)]
    elif chosen is None:
        layer = names[-1].rpartition(".")[0]
        found = [name for name in names if name.rpartition(".")[0] == layer]
    else:
        patterns = [chosen] if isinstance(chosen, str) else chosen
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                _refuse_none(argument, pattern, names)
        found = [n for n in names if any(fnmatchcase(n, p) for p in patterns)]
    if not found:
        _refuse_none(argument, chosen, names)
    return found


def refuse_all(
    personal: Filter, names: Sequence[str], argument: str = "personal"
) -> None:
    """Refuse a filter that leaves nothing to share."""
    refuse(
        argument,
        personal,
        "a filter that leaves others",
        f"of {_shown(names)} it leaves none that is trained; clients that share "
        "nothing train alone, as LocalOnly's do",
    )


def _refuse_none(argument: str, personal: object, names: Sequence[str]) -> None:
    refuse(
        argument,
        personal,
        "a filter that matches arrays of the model",
        f"it matches none of {_shown(names)}; a layer's arrays are "
        '"<name of the layer>.*"',
    )


def _shown(names: Sequence[str]) -> str:
    return str(names if len(names) <= 8 else [*names[:4], "...", *names[-4:]])
