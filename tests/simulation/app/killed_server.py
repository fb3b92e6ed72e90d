"""A script: rounds of personal clients with a checkpoint; the server is killed.

``python killed_server.py FOLDER GRID WHEN...``: one server after the other, each of
which goes on with what the one before has saved. WHEN is ``train:2:7`` (client 7 kills
the server in round 2), ``flush:3:4`` (while round 3 is saved, before the fourth file is
on the disk), ``rename:3`` or ``renamed:3`` (before or after round 3 has its name), or
``never``.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord
from personal import app

from flower_ext import AdditiveStrategy
from flower_ext.core.arrays import from_record
from flower_ext.server import checkpoint, saved_states
from flower_ext.simulation import LocalGrid, PackedGrid

CLIENTS = 12


def die():
    """End as if the power had gone."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch(what, server_round, count):
    """Die while a round is saved."""
    name, seen = f"round-{server_round:05d}", []
    save, flush, rename = checkpoint.Checkpoint.save, checkpoint.flush, Path.rename

    def saving(self, current, result):
        seen.append(current)
        return save(self, current, result)

    def flushing(path):
        if seen and seen[-1] == server_round:
            seen.append(server_round)
            if len(seen) > server_round + count - 1:
                die()
        flush(path)

    def renaming(self, target):
        if what == "rename" and Path(target).name == name:
            die()
        rename(self, target)
        if what == "renamed" and Path(target).name == name:
            die()

    checkpoint.Checkpoint.save = saving
    Path.rename = renaming
    if what == "flush":
        checkpoint.flush = saved_states.flush = flushing


def digest(arrays):
    """Return a digest of every bit."""
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays.values())).hexdigest()


def serve(folder, kind, when):
    """Run or resume; return what there is in the end, and after the same run anew."""
    what, *numbers = when.split(":")
    config = ConfigRecord()
    if what == "train":
        config["kill"], config["server"] = list(map(int, numbers)), os.getpid()
    elif what != "never":
        watch(what, int(numbers[0]), int((numbers + ["1"])[1]))
    if kind == "local":
        grid = LocalGrid(app, CLIENTS)
    else:
        grid = PackedGrid(
            num_clients=CLIENTS,
            client_app="pairs:app",
            num_workers=2,
            num_examples=[2, 5] * (CLIENTS // 2),
        )
    again = play(grid, kind, config, folder)
    # As good as a new grid, with workers that have imported what they need.
    grid.states.close()
    return {"again": again, "whole": play(grid, kind, config, f"{folder}-whole")}


def play(grid, kind, config, folder):
    """Run or resume; return digests of model, states and metrics."""
    if kind == "local":
        rounds = 5
        strategy = AdditiveStrategy(fraction_train=0.5, fraction_evaluate=0.0)
    else:
        from flower_ext.strategies.ditto import Ditto

        rounds = 20
        strategy = Ditto(fraction_train=0.25, fraction_evaluate=0.25)
    initial = ArrayRecord({"w": Array(np.linspace(-1, 1, 20_000, dtype=np.float32))})
    told = {k: config[k] for k in config}
    configure = strategy.configure_train

    def tell(current, arrays, settings, grid):
        """Tell clients whom to kill, which is no setting of the run."""
        return configure(current, arrays, ConfigRecord({**settings, **told}), grid)

    strategy.configure_train = tell
    result = strategy.start(grid, initial, num_rounds=rounds, checkpoint=folder)
    states = {c: grid.states.read(c) for c in sorted(grid.states.versions())}
    return {
        "model": digest(from_record(result.arrays)),
        "states": {
            client: [digest(from_record(x)) for x in state.array_records.values()]
            for client, state in states.items()
        },
        "rounds": len(result.train_metrics_clientapp),
        "metrics": hashlib.sha256(
            repr(
                [result.train_metrics_clientapp, result.evaluate_metrics_clientapp]
            ).encode()
        ).hexdigest(),
    }


def main(folder, kind, *moments):
    """Let a server run up to each moment; print the last one's result and all ends.

    Each is a fork of this process, which has only imported what they need.
    """
    ends, (reader, writer) = [], os.pipe()
    for when in moments:
        child = os.fork()
        if not child:
            os.write(writer, json.dumps(serve(folder, kind, when)).encode())
            sys.exit()
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    found = json.loads(os.read(reader, 2**16)) if ends[-1] == 0 else {}
    print(json.dumps({**found, "ends": ends}))


if __name__ == "__main__":
    main(*sys.argv[1:])
