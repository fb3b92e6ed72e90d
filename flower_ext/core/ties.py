"""Tied tensors: one tensor that a model has under several names.

An output layer that shares its weight with the embedding is in a state_dict twice. If
the copies were summed, masked or noised apart, they would differ, and a client would
load one of them. A tie maps each further name of a tensor to the first of its names.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import NDArray

from flower_ext.core.arrays import is_averaged, view

# A reply's record under the first key holds the client's ties. Under a mechanism no
# client is asked: the server finds them in the model and tells clients, as two lists,
# the further names and the first name of each.
TIED_KEY = "tied"
TIED_TO_KEY = "tied-to"

Ties = dict[str, str]


def read_ties(reply: RecordDict, like: Mapping[str, NDArray]) -> Ties:
    """Return the ties that a reply states: further names with the first of each.

    Entries that do not fit ``like``, the model that was sent, are left out.
    """
    record = reply.get(TIED_KEY)
    if not isinstance(record, ConfigRecord):
        return {}
    return {
        name: first
        for name, first in record.items()
        if isinstance(first, str)
        and name in like
        and first in like
        and first not in record  # a first name is not tied to another: no chains
        and like[name].dtype == like[first].dtype
        and like[name].shape == like[first].shape
    }


def equal_in_all(records: Sequence[object], sent: Mapping[str, NDArray]) -> Ties:
    """Return float arrays that equal an earlier one in the model and in all replies."""
    ties: Ties = {}
    if not all(isinstance(record, ArrayRecord) for record in records):
        return ties  # nothing is in all of them: the model need not be looked at
    firsts: dict[object, list[str]] = {}
    for name, array in sent.items():
        if not _tells(array):
            continue
        # Many layers have the same shape. Their first entries tell all but copies
        # apart, so that few arrays are compared as a whole.
        begin = array.flat[:16].tobytes()
        alike = firsts.setdefault((array.dtype, array.shape, begin), [])
        for first in alike:
            if _equal(array, sent[first]) and all(
                _equal_in(record, name, first) for record in records
            ):
                ties[name] = first
                break
        else:
            alike.append(name)
    return ties


def equal_in_model(sent: Mapping[str, NDArray]) -> Ties:
    """Return the ties that can be seen in the model alone, without any reply.

    Equal arrays count as tied. Arrays of one value throughout, as biases are at the
    start, may be equal by chance: they count only where their whole layer equals
    another layer.
    """
    equal = equal_in_all([], sent)
    sure = {
        name: first
        for name, first in equal.items()
        if not _equal(sent[name], np.broadcast_to(sent[name].flat[0], sent[name].shape))
    }
    for name, first in list(sure.items()):
        layer, _, part = name.rpartition(".")
        other, _, twin = first.rpartition(".")
        if part == twin:  # the same part of two layers, which may be one layer
            sure |= _whole_layer(sent, f"{layer}.", f"{other}.", sure)
    return sure


def _whole_layer(
    sent: Mapping[str, NDArray], layer: str, other: str, sure: Ties
) -> Ties:
    """Return the ties of one layer to another one, if they are equal throughout."""
    own = [name for name in sent if name.startswith(layer)]
    twins = {name: other + name.removeprefix(layer) for name in own}
    for name, twin in twins.items():
        if twin not in sent or not _equal(sent[name], sent[twin]):
            return {}
    # Not with whatever else is equal: other layers' biases may be zeros as well.
    return {n: sure.get(twin, twin) for n, twin in twins.items() if _tells(sent[n])}


def _tells(array: NDArray) -> bool:
    """Whether it says something that it equals another: single numbers often do."""
    return is_averaged(array) and array.size > 1


def _equal_in(record: object, name: str, first: str) -> bool:
    if not isinstance(record, ArrayRecord) or not {name, first} <= record.keys():
        return False
    return _equal(view(record[name]), view(record[first]))


def _equal(left: NDArray, right: NDArray) -> bool:
    return bool(np.array_equal(left, right, equal_nan=True))
