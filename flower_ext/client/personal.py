"""Personal state: what stays with a client over rounds, and never travels."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from flower_ext.client.tensors import Tensors, read_tensors, tensor_record
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import RUN_CLIENTS, RUN_KEY, STATE_KEY, Config

#: Keys of a client's ``context.state`` that begin so are its personal state.
PERSONAL = "personal/"

# Key of a client's state: of which run what it keeps is, where runs begin anew.
_OF_RUN = "run-of-personal-state"

# Ends the name of a number of a client's: for which strategy it keeps a group.
_OF_STATE = "-of"

Numbers = Mapping[str, float]


class Personal:
    """Named groups of arrays and numbers that a client keeps for its later rounds.

    They are records of the client's ``context.state``, one a name, under keys that
    begin with ``personal/``: whoever saves that state saves them, and nobody sends it.

    Parameters
    ----------
    state : RecordDict
        The client's ``context.state``.
    device : torch.device, optional
        Where arrays are wanted.

    Notes
    -----
    Messages to a client that fails leave what it has kept as it was, see
    :func:`kept_unless_done`.

    Examples
    --------
    >>> personal = Personal(RecordDict())
    >>> personal.number("visits", 0)
    0
    >>> personal.save(visits=1, residual={"w": torch.ones(2)})
    >>> personal.number("visits", 0)
    1
    >>> personal.arrays("residual", like={"w": torch.zeros(2)})
    {'w': tensor([1., 1.])}
    """

    def __init__(self, state: RecordDict, device: torch.device | None = None) -> None:
        self._state, self._device = state, device

    def __contains__(self, name: str) -> bool:
        """Whether something was saved under a name."""
        return PERSONAL + name in self._state

    def __iter__(self) -> Iterator[str]:
        """Yield the names that something was saved under."""
        for key in self._state:
            if key.startswith(PERSONAL):
                yield key.removeprefix(PERSONAL)

    def arrays(
        self, name: str, *, like: Tensors, first: Tensors | None = None
    ) -> dict[str, Tensor]:
        """Return a group of arrays.

        Parameters
        ----------
        name : str
            Of the group.
        like : dict[str, Tensor]
            Names and shapes that it must have.
        first : dict[str, Tensor], optional
            What it is before anything was saved; zeros by default.

        Raises
        ------
        ValueError
            If what was saved has other names or shapes.
        """
        record = self._state.array_records.get(PERSONAL + name)
        if record is None:
            if first is not None:
                return dict(first)
            return {key: torch.zeros_like(x) for key, x in like.items()}
        found = read_tensors(record, self._device)
        kept, wanted = _shapes(found), _shapes(like)
        for key in {**kept, **wanted}:
            if kept.get(key) != wanted.get(key):
                refuse(
                    f"personal array {key!r} of {name!r}",
                    kept.get(key),
                    f"{wanted.get(key)}",
                    "was it saved for another model?",
                )
        return {key: found[key] for key in like}

    def group(self, name: str) -> dict[str, Tensor]:
        """Return a group of arrays whatever it has, on the CPU; none before."""
        record = self._state.array_records.get(PERSONAL + name)
        return {} if record is None else read_tensors(record)

    def number(self, name: str, default: float) -> float:
        """Return a number, or the default before one was saved."""
        return self.numbers(name).get(name, default)

    def numbers(self, name: str) -> dict[str, float]:
        """Return a group of numbers, none before they were saved."""
        record = self._state.metric_records.get(PERSONAL + name, MetricRecord())
        return cast("dict[str, float]", dict(record))

    def save(self, **groups: Tensors | Numbers | float) -> None:
        """Keep groups of arrays, groups of numbers, and numbers, by their names.

        A group replaces what was there under its name.
        """
        for name, group in groups.items():
            record: ArrayRecord | MetricRecord
            if not isinstance(group, Mapping):
                record = MetricRecord({name: group})
            elif all(isinstance(x, Tensor) for x in group.values()):
                record = tensor_record(cast(Tensors, group))
            else:
                record = MetricRecord(dict(cast(Numbers, group)))
            self._state[PERSONAL + name] = record

    def drop(self, name: str) -> None:
        """Forget a group, if there is one."""
        self._state.pop(PERSONAL + name, None)


def forget_other_runs(content: RecordDict, state: RecordDict) -> None:
    """Drop what a client has kept in another run, if that of a message begins anew.

    Parameters
    ----------
    content : RecordDict
        Of the message.
    state : RecordDict
        The client's ``context.state``.
    """
    run = _run_named_in(content, RUN_KEY)
    if run is None or run == _run_named_in(state, _OF_RUN):
        return
    for key in [key for key in state if key.startswith(PERSONAL)]:
        del state[key]
    state[_OF_RUN] = ConfigRecord({RUN_CLIENTS: run})


def _run_named_in(records: RecordDict, key: str) -> ConfigRecordValues | None:
    record = records.get(key)
    return record.get(RUN_CLIENTS) if isinstance(record, ConfigRecord) else None


def forget_other_states(personal: Personal, config: Config, *groups: str) -> None:
    """Drop groups that a client has kept for another strategy than the one that asks.

    A new strategy on a grid that was used before begins at 0, and so must its clients.

    Parameters
    ----------
    personal : Personal
        The client's.
    config : ConfigRecord
        What the server tells.
    *groups : str
        Names of what was kept; the first also tells for whom.
    """
    asking = float(cast(float, config.get(STATE_KEY, 0.0)))
    if personal.number(groups[0] + _OF_STATE, asking) != asking:
        for group in groups:
            personal.drop(group)
    personal.save(**{groups[0] + _OF_STATE: asking})


def _shapes(arrays: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in arrays.items()}


@contextmanager
def kept_unless_done(state: RecordDict) -> Iterator[None]:
    """Put personal state back as it was if what is done here raises."""
    # Records are replaced and never changed, so that the old ones are enough.
    before = {key: record for key, record in state.items() if key.startswith(PERSONAL)}
    try:
        yield
    except BaseException:
        for key in [key for key in state if key.startswith(PERSONAL)]:
            del state[key]
        state.update(before)
        raise
