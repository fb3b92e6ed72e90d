"""Model folders: unpacked once, never in part."""

from dataclasses import replace

import pytest

from flower_ext.data import DataError, model_folder, models
from flower_ext.data.__main__ import main


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Put a small wheel where the user's own files are, as the package of a model."""

    def make(leave_out=(), name="albert-smiles"):
        import hashlib
        import zipfile

        model = models.MODELS[name]
        file = tmp_path / model.package.file
        with zipfile.ZipFile(file, "w") as archive:
            for member in model.files:
                if member not in leave_out:
                    archive.writestr(model.inside + member, f"content of {member}")
            archive.writestr("rxnmapper/core.py", "raise SystemExit")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        package = replace(model.package, sha256=digest)
        monkeypatch.setitem(models.MODELS, name, replace(model, package=package))
        monkeypatch.setenv("FLOWER_EXT_DATA_DIR", str(tmp_path))
        return file

    return make


def test_unpacked_once(wheel, cache):
    file = wheel()
    folder = model_folder("albert-smiles")
    assert folder == cache / "models" / "albert-smiles-0.4.3"
    assert {path.name for path in folder.iterdir()} == set(
        models.MODELS["albert-smiles"].files
    )
    file.unlink()
    assert model_folder("albert-smiles") == folder
    assert (folder / "vocab.txt").read_text() == "content of vocab.txt"


def test_lost_file_is_unpacked_again(wheel, cache):
    wheel()
    folder = model_folder("albert-smiles")
    (folder / "config.json").unlink()
    assert (model_folder("albert-smiles") / "config.json").is_file()


def test_incomplete_wheel_leaves_nothing(wheel, cache):
    wheel(leave_out=["vocab.txt"])
    with pytest.raises(DataError, match="cannot unpack"):
        model_folder("albert-smiles")
    assert list((cache / "models").iterdir()) == []


def test_command_line(wheel, cache, capsys):
    wheel()
    assert main(["fetch", "albert-smiles"]) == 0
    assert "albert-smiles: " in capsys.readouterr().out
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    cached = [line.split()[0] for line in lines if line.endswith("yes")]
    assert cached == ["albert-smiles"]


def test_unknown_model():
    with pytest.raises(ValueError, match="must be one of the models"):
        model_folder("bert")


def test_gguf_needs_a_converter(wheel, cache, monkeypatch):
    wheel(name="smollm2")
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install gguf"):
        model_folder("smollm2")
    assert list((cache / "models").iterdir()) == []


def test_gguf_is_converted_once(wheel, cache, monkeypatch):
    wheel(name="smollm2")
    made = models.MODELS["smollm2"].made
    converted = []

    def convert(folder, file):
        converted.append((folder / file).read_text())
        (folder / file).unlink()
        for name in made:
            (folder / name).touch()

    monkeypatch.setattr(models, "_convert", convert)
    folder = model_folder("smollm2")
    assert {path.name for path in folder.iterdir()} == set(made)
    assert model_folder("smollm2") == folder
    assert converted == ["content of SmolLM2-135M-Instruct.Q4_1.gguf"]
