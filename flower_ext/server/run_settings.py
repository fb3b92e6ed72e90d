"""What a saved run must have in common with the run that continues it.

Settings are compared as texts, by name. Words of a configuration may be secrets: only
their digests are kept.
"""

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues

from flower_ext.core.arrays import from_record

Settings = dict[str, str]
Configs = Mapping[str, ConfigRecord]

# Options of other types, such as samplers, are described by the strategy's settings().
_PLAIN = (bool, int, float, str, list, tuple, dict, np.ndarray, np.generic, type(None))
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_BYTES = "$bytes"
_DIGEST = "sha256:"


def settings_of(strategy: object, configs: Configs) -> Settings:
    """Return the settings that decide a run's result, as texts by name.

    They are what the strategy's ``settings()`` returns, the options of its constructor
    that it keeps under their own names, and every value of the configurations.
    """
    found = {name: text_of(value) for name, value in _options(strategy)}
    described = getattr(strategy, "settings", None)
    if callable(described):
        found |= {name: text_of(value) for name, value in described().items()}
    for config, record in configs.items():
        found |= {f"{config}[{k!r}]": v for k, v in readable(record).items()}
    return found


def _options(strategy: object) -> Iterator[tuple[str, object]]:
    """Yield the constructor's options, but for seeds, which may be secret."""
    for cls in type(strategy).__mro__:
        if "__init__" in vars(cls) and cls is not object:
            for name in inspect.signature(cls).parameters:
                # The strategy itself stands for an option that is not kept: it is of no
                # plain type, and so left out.
                value = vars(strategy).get(name, strategy)
                if "seed" not in name and (
                    isinstance(value, _PLAIN) or inspect.isroutine(value)
                ):
                    yield name, value


def text_of(value: object) -> str:
    """Return a setting as a text, by which it is compared."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if inspect.isroutine(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return _ADDRESS.sub("", repr(value) if not isinstance(value, str) else value)


def _guarded(value: ConfigRecordValues | None) -> str:
    # A word may be a password or a path; numbers are readable where they differ.
    values = value if isinstance(value, list) else [value]
    if all(isinstance(v, int | float | None) for v in values):
        return repr(value)
    return _DIGEST + hashlib.sha256(repr(value).encode()).hexdigest()


def readable(config: Mapping[str, ConfigRecordValues]) -> Settings:
    """Return the values of a configuration as texts; of words their digests."""
    return {key: _guarded(value) for key, value in config.items()}


def differences(own: Settings, *saved: Settings) -> list[str]:
    """Say which settings are in none of ``saved`` as they are in ``own``.

    A setting may be what it was when the saved run began, or what the run had made of
    it when it was saved. Where one change shows under two names, one is said, the
    option's.
    """
    # Options are written in lower case: with cases swapped they are sorted first.
    said: dict[tuple[str, str], str] = {}
    for name in sorted(own.keys() | saved[0].keys(), key=str.swapcase):
        values = [one.get(name, "absent") for one in saved]
        now = own.get(name, "absent")
        if now not in values:
            what = f"{name} was {values[0]}, is now {now}"
            hidden = any(v.startswith(_DIGEST) for v in (now, values[0]))
            said.setdefault((values[0], now), f"{name} is another" if hidden else what)
    return list(said.values())


def digest(arrays: ArrayRecord) -> str:
    """Return a digest of names, layout and values of a model."""
    hashed = hashlib.sha256()
    for name, array in from_record(arrays).items():
        hashed.update(f"{name} {array.dtype} {array.shape}".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


class Changes:
    """What a run makes of its configurations, such as a learning rate that decays.

    Parameters
    ----------
    configs : Mapping[str, ConfigRecord]
        As they are at the start; the run changes them in place.
    """

    def __init__(self, configs: Configs) -> None:
        self._configs = configs
        self._before = {name: dict(record) for name, record in configs.items()}
        self._changed: dict[str, set[str]] = {name: set() for name in configs}

    def state_dict(self) -> dict[str, object]:
        """Return the values that have changed, and the names of those that are gone."""
        # A key that has once changed is saved from then on, also when it changes back.
        state: dict[str, object] = {}
        for config, record in self._configs.items():
            before, changed = self._before[config], self._changed[config]
            for key in before.keys() | record.keys():
                if _guarded(before.get(key)) != _guarded(record.get(key)):
                    changed.add(key)
            state[config] = {
                "set": {k: encode_value(v) for k, v in record.items() if k in changed},
                "gone": sorted(changed - record.keys()),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Make the same changes to the configurations of a run that is continued."""
        for config, record in self._configs.items():
            new, gone = state[config]["set"], state[config]["gone"]
            assert isinstance(new, dict) and isinstance(gone, list)
            record.update({key: decode_value(value) for key, value in new.items()})
            for key in gone:
                record.pop(key, None)
            self._changed[config] |= {*new, *gone}


def encode_value(value: object) -> object:
    """Return a value of a configuration as JSON has it."""
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    if isinstance(value, list):
        return [encode_value(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return {"$float": str(value)}
    return value


def decode_value(value: object) -> ConfigRecordValues:
    """Return what :func:`encode_value` was given."""
    if isinstance(value, dict):
        if _BYTES in value:
            return bytes.fromhex(value[_BYTES])
        return float(value["$float"])
    if isinstance(value, list):
        return [decode_value(v) for v in value]  # type: ignore[return-value]
    return value  # type: ignore[return-value]
