"""Command line: ``python -m flower_ext.data [fetch NAME ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flower_ext.data.cache import cache_root, is_intact, prepared_dir
from flower_ext.data.catalogue import CATALOGUE, Entry
from flower_ext.data.errors import DataError
from flower_ext.data.loading import find, load, location
from flower_ext.data.models import MODELS, is_unpacked, model_folder


def main(arguments: list[str] | None = None) -> int:
    """List the data sets and models, or fetch some.

    Parameters
    ----------
    arguments : list of str or None
        Command line without the program's name; None takes the process's own.

    Returns
    -------
    int
        0, or 1 when something could not be fetched.
    """
    options = _parser().parse_args(arguments, argparse.Namespace(cache_dir=None))
    if options.command != "fetch":
        _list(cache_root(options.cache_dir))
        return 0
    try:
        # First all names: a typing error in the last should not wait for downloads.
        for name in options.names:
            if "/" not in name and name not in MODELS:
                find(name)
        for name in options.names:
            if name in MODELS:
                print(f"{name}: {model_folder(name, cache_dir=options.cache_dir)}")
                continue
            load(name, cache_dir=options.cache_dir)
            print(f"{name}: {_where(name, options.cache_dir)}")
    except (DataError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--cache-dir",
        metavar="DIR",
        # Otherwise the subcommand's default would undo an option given before it.
        default=argparse.SUPPRESS,
        help="default: $FLOWER_EXT_CACHE, else flower-ext in the user's cache",
    )
    parser = argparse.ArgumentParser(
        prog="python -m flower_ext.data",
        description="List the data sets and models, or fetch them ahead of a run.",
        parents=[shared],
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list what there is (default)", parents=[shared])
    fetch = commands.add_parser(
        "fetch", help="fetch and prepare data sets or models", parents=[shared]
    )
    fetch.add_argument("names", nargs="+", metavar="NAME")
    return parser


def _list(root: Path) -> None:
    header = ("name", "train + test", "clients", "download", "licence", "cached")
    rows = [header]
    rows += [
        (e.name, e.examples, e.clients, e.size, e.licence, _cached(e, root))
        for e in CATALOGUE.values()
    ]
    rows += [
        (
            m.name,
            "model",
            m.what,
            m.size,
            m.licence,
            "yes" if is_unpacked(m, root) else "no",
        )
        for m in MODELS.values()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(f"\ncache: {root}")


def _cached(entry: Entry, root: Path) -> str:
    """Whether the data set is prepared, with whichever options."""
    folder = prepared_dir(root, entry.name).parent
    found = [*folder.glob(entry.name), *folder.glob(f"{entry.name},*")]
    return "yes" if any(is_intact(path) for path in found) else "no"


def _where(name: str, cache_dir: str | None) -> str:
    if "/" in name:
        return "in the Hugging Face cache"
    return str(location(name, cache_dir))


if __name__ == "__main__":
    sys.exit(main())
