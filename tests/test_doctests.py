"""The examples in the docstrings run, those of the installed package."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import flower_ext

MODULES = [
    found.name
    for found in pkgutil.walk_packages(flower_ext.__path__, "flower_ext.")
    if not found.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    module = import_module(name)
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(module).failed == 0


def test_every_module_is_looked_at():
    assert {
        "flower_ext.strategies.fedfish",
        "flower_ext.privacy.factorizations.blt",
    } <= set(MODULES)
