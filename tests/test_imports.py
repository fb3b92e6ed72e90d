"""What is imported, and what waits until it is used."""

import json
import subprocess
import sys
from pathlib import Path

import flower_ext

# Large, and of use to some only.
SELDOM = {
    "dp_accounting",
    "matplotlib",
    "opacus",
    "peft",
    "ray",
    "tensorboard",
    "torch._dynamo",
    "transformers",
}


def loaded(statement):
    """Return the modules that a new interpreter has loaded after a statement."""
    command = f"{statement}; import json, sys; print(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_the_package_costs_nothing():
    assert not loaded("import flower_ext") & (SELDOM | {"flwr", "numpy", "torch"})


def test_what_is_seldom_used_is_imported_late():
    packages = ["", ".data", ".privacy", ".simulation", ".strategies"]
    statements = [f"from flower_ext{package} import *" for package in packages]
    statements.append("import flower_ext.client.adapters, flower_ext.runs.report")
    found = loaded("; ".join(statements))
    assert {"flower_ext", "torch"} <= found
    assert not found & SELDOM


def test_servers_and_workers_without_torch_start_without_it():
    modules = ["server.additive", "simulation.local", "simulation.worker"]
    found = loaded(f"import {', '.join(f'flower_ext.{name}' for name in modules)}")
    assert "torch" not in found


def test_commands_are_imported_once():
    """``python -m`` warns of a module that its package has imported before."""
    package = Path(flower_ext.__file__).parent
    commands = [
        ".".join(["flower_ext", *path.relative_to(package).with_suffix("").parts])
        for path in package.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text("utf-8")
    ]
    assert "flower_ext.simulation.gpus" in commands
    for command in commands:
        run = [sys.executable, "-W", "error::RuntimeWarning", "-m", command, "--help"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command
