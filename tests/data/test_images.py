import gzip
import hashlib
import shutil
import struct

import numpy as np
import pytest

from flower_ext.data import DataError, images, load


def test_digits_are_stratified_in_file_order(digits, without_pip):
    data = load("mnist-small")
    assert data["train"]["label"][:] == [0] * 8 + [1] * 8
    assert data["test"]["label"][:] == [0] * 2 + [1] * 2
    # The i-th picture is filled with i and shows the digit i % 2.
    assert [int(image[0, 0]) for image in data["test"]["image"]] == [8, 18, 9, 19]
    assert len(np.unique([i[3, 3] for s in data.values() for i in s["image"]])) == 20


def test_images_are_uint8_arrays_also_after_reopening(digits, without_pip):
    for _ in range(2):
        batch = load("mnist-small")["train"][:3]
        assert batch["image"].shape == (3, 28, 28)
        assert batch["image"].dtype == np.uint8
        assert batch["label"] == [0, 0, 0]


@pytest.fixture
def clothes(tmp_path, cache, monkeypatch):
    """The four Fashion-MNIST files with 30 and 10 pictures, in an own folder."""
    folder = tmp_path / "own"
    folder.mkdir()
    sums = {}
    for prefix, count in (("train", 30), ("t10k", 10)):
        pictures = np.arange(count, dtype=np.uint8).repeat(784).tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        contents = {
            f"{prefix}-images-idx3-ubyte.gz": struct.pack(">4i", 2051, count, 28, 28)
            + pictures,
            f"{prefix}-labels-idx1-ubyte.gz": struct.pack(">2i", 2049, count) + labels,
        }
        for name, content in contents.items():
            (folder / name).write_bytes(gzip.compress(content))
            sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(images, "FASHION_FILES", sums)
    monkeypatch.setenv("FLOWER_EXT_DATA_DIR", str(folder))
    return folder


def test_fashion_from_own_folder(clothes):
    data = load("fashion-mnist")
    assert (len(data["train"]), len(data["test"])) == (30, 10)
    row = data["train"][29]
    assert (row["label"], row["image"].dtype) == (9, np.uint8)
    assert (row["image"] == 29).all()
    assert data["train"].features["label"].int2str(9) == "Ankle boot"


def test_fashion_with_an_altered_file(clothes):
    path = clothes / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"altered"))
    found = hashlib.sha256(b"altered").hexdigest()
    with pytest.raises(DataError, match=f"{path.name}.*expected .*found {found}"):
        load("fashion-mnist")


def test_fashion_with_half_a_file(clothes):
    path = clothes / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=f"{path.name} is damaged"):
        load("fashion-mnist")


@pytest.fixture
def no_files(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_DEBIAN_DIR", tmp_path / "nowhere")
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_fashion_off_debian(no_files):
    with pytest.raises(
        DataError,
        match=r"needs apt-get.*FLOWER_EXT_DATA_DIR.*zalando-datasets/fashion_mnist",
    ):
        load("fashion-mnist")


def test_fashion_when_apt_fails(no_files):
    for tool in ("apt-get", "dpkg-deb"):
        (no_files / tool).write_text(
            "#!/bin/sh\necho E: Unable to locate package >&2; exit 100\n"
        )
        (no_files / tool).chmod(0o755)
    assert shutil.which("apt-get") is not None
    with pytest.raises(DataError, match=r"Unable to locate.*apt-get update"):
        load("fashion-mnist")
