"""Messages of clients at work, in the form in which a checkpoint keeps them.

What a message holds is kept as it is, codecs' records too; the model of its round is
kept once, however many messages hold it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flower_ext.core.held import fields_of
from flower_ext.core.protocol import Round
from flower_ext.server.run_settings import decode_value, encode_value


def save_round(round: Round) -> dict[str, object]:
    """Return what a client's term depends on; how it encodes is in its message."""
    return {
        "number": round.number,
        "sent": dict(round.sent),
        "told": {key: encode_value(value) for key, value in round.told.items()},
        "population": round.population,
        "ties": dict(round.ties),
    }


def restore_round(saved: Mapping[str, Any]) -> Round:
    """Return the round, as far as a client's term depends on it."""
    told = {key: decode_value(value) for key, value in saved["told"].items()}
    return Round(
        saved["number"],
        dict(saved["sent"]),
        told,
        population=saved["population"],
        ties=saved["ties"],
    )


def save_content(content: RecordDict, model: ArrayRecord) -> dict[str, object]:
    """Return the records of a message; ``model`` is that of its round."""
    return {
        key: {"model": True} if record is model else _saved_record(record)
        for key, record in content.items()
    }


def _saved_record(record: ArrayRecord | ConfigRecord | MetricRecord) -> object:
    if not isinstance(record, ArrayRecord):
        return {"config": {key: encode_value(value) for key, value in record.items()}}
    arrays = {}
    for name, array in record.items():
        dtype, shape, stype, data = fields_of(array)
        about = [dtype, list(shape), stype]
        arrays[name] = {"about": about, "data": np.frombuffer(data, np.uint8)}
    return {"arrays": arrays}


def restore_content(saved: Mapping[str, Any], model: ArrayRecord) -> RecordDict:
    """Return the records of a message."""
    content = RecordDict()
    for key, record in saved.items():
        [(kind, found)] = record.items()
        if kind == "model":
            content[key] = model
        elif kind == "arrays":
            content[key] = ArrayRecord(
                {name: _restored_array(array) for name, array in found.items()}
            )
        else:
            values = {name: decode_value(value) for name, value in found.items()}
            content[key] = ConfigRecord(values)
    return content


def _restored_array(saved: Mapping[str, Any]) -> Array:
    dtype, shape, stype = saved["about"]
    return Array(dtype, tuple(shape), stype, saved["data"].tobytes())
