"""Files that must be there after a crash, and copies that cost nothing."""

import os
import shutil
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(path: Path, other: Path) -> None:
    """Give a file that nobody will change a second name; copy it where none can be."""
    try:
        other.hardlink_to(path)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(path, other)
