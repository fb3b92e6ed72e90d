"""Several models in one payload: the arrays of model j are named ``j/name``."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from flower_ext.core.arrays import Arrays, Lazy, layout
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import Reply, Round
from flower_ext.core.ties import Ties, equal_in_model, read_ties

T = TypeVar("T")


def stack(models: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """Return the arrays of all models, each under its model's number.

    Examples
    --------
    >>> stack([{"w": 1.0}, {"w": 2.0}])
    {'0/w': 1.0, '1/w': 2.0}
    """
    return {f"{j}/{k}": x for j, model in enumerate(models) for k, x in model.items()}


def model_of(arrays: Mapping[str, T], number: int) -> dict[str, T]:
    """Return the arrays of one model under their own names.

    Examples
    --------
    >>> model_of({"0/w": 1.0, "1/w": 2.0}, 1)
    {'w': 2.0}
    """
    prefix = f"{number}/"
    return {
        name.removeprefix(prefix): x
        for name, x in arrays.items()
        if name.startswith(prefix)
    }


def unstack(arrays: Mapping[str, T]) -> list[dict[str, T]]:
    """Return the models; the inverse of :func:`stack`.

    Examples
    --------
    >>> unstack({"0/w": 1.0, "1/w": 2.0})
    [{'w': 1.0}, {'w': 2.0}]
    """
    numbers = {name.partition("/")[0] for name in arrays if "/" in name}
    return [model_of(arrays, j) for j in range(len(numbers))]


def require_models(arrays: Arrays, count: int, name: str) -> None:
    """Refuse arrays that are not so many models of one form."""
    models = [model_of(arrays, j) for j in range(count)]
    alike = all(layout(model) == layout(models[0]) for model in models)
    if not models[0] or not alike or sum(map(len, models)) != len(arrays):
        refuse(
            "initial_arrays",
            list(arrays)[:4],
            f"{name}={count} models of one form, '0/...' to '{count - 1}/...'",
            "initial_models(make_model, num_models) of flower_ext.client.several",
        )


def find_ties_of_several(arrays: Arrays) -> Ties:
    """Return the ties within each model, and none between models that start alike."""
    return {
        f"{j}/{name}": f"{j}/{first}"
        for j, model in enumerate(unstack(arrays))
        for name, first in equal_in_model(model).items()
    }


def change_of_one(reply: Reply, round: Round, number: int) -> dict[str, Lazy]:
    """Return the change of the one model that a client has trained.

    Its arrays have the names that they have among several. A tied tensor moves under
    all its names, or under a mechanism, where it must count once, under the first.
    """
    start = model_of(round.sent, number)
    found = reply.change(round, start).arrays
    tied: Mapping[str, str] = {}
    if not round.private:
        tied = read_ties(reply.content, start)
    return {
        key: found[tied.get(name, name)]
        for name in start
        if (key := f"{number}/{name}") not in round.ties
    }
