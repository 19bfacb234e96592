"""From a name to a directory: what is there is found, and what is not is said with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from blockpress.checkpoints import load_config, load_generation, load_network, locate, resolve, shipped
from blockpress.errors import CheckpointError, ModelNotFound

OPENERS = [resolve, load_config, load_network]


@pytest.fixture
def package(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package directory that ships one model, and a directory beside it that is none."""
    models = tmp_path / "package" / "models"
    shutil.copytree(single, models / "some-model")
    (models / "notes").mkdir()
    shutil.copytree(single, tmp_path / "package" / "outside")
    monkeypatch.setattr(locate.resources, "files", lambda name: models.parent)
    return models


def test_a_directory_resolves_to_itself(single: Path) -> None:
    assert resolve(single) == resolve(str(single)) == single


def test_a_shipped_model_is_found_by_name(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped() == {"some-model": package / "some-model"}
    assert resolve("some-model") == package / "some-model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-model").mkdir()
    assert resolve("some-model") == package / "some-model", "a directory that is no checkpoint hides nothing"


def test_a_checkpoint_in_the_working_directory_comes_before_a_shipped_one(
    package: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(single, tmp_path / "some-model")
    assert resolve("some-model") == Path("some-model")


def test_the_home_directory_is_written_with_a_tilde(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(single.parent))
    assert resolve(f"~/{single.name}") == single


@pytest.mark.parametrize("name", ["", "sudoku-femto", "google/some-model", "notes", "../outside", "a\0b", "x" * 5000])
def test_an_unknown_name_lists_the_shipped_ones_and_says_download(package: Path, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name)
    assert repr(name) in caught.value.message
    assert "some-model" in caught.value.hint
    assert "download" in caught.value.hint and "blockpress pull" in caught.value.hint


def test_a_gguf_file_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(file) == resolve(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(f"~/{file.name}") == file
    with pytest.raises(ModelNotFound):
        resolve(tmp_path / "other.gguf")


def test_a_directory_comes_before_the_cache(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(single, tmp_path / "me" / "some-model")
    shutil.copytree(single, tmp_path / "hub" / "models--me--some-model" / "snapshots" / ("a" * 40))
    (tmp_path / "hub" / "models--me--some-model" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--some-model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve("me/some-model").name == "a" * 40
    monkeypatch.chdir(tmp_path)
    assert resolve("me/some-model") == Path("me/some-model")


def test_without_shipped_models_the_hint_says_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate.resources, "files", lambda name: tmp_path)
    assert shipped() == {}
    with pytest.raises(ModelNotFound, match="shipped models: none"):
        resolve("sudoku-femto")


@pytest.mark.parametrize("opener", OPENERS)
def test_a_directory_without_config_is_no_checkpoint(opener: object, tmp_path: Path) -> None:
    assert callable(opener)
    with pytest.raises(CheckpointError, match=r"is no checkpoint: there is no config.json") as caught:
        opener(tmp_path)
    assert "weights" in caught.value.hint


@pytest.mark.parametrize("opener", OPENERS)
def test_another_file_is_no_checkpoint(opener: object, single: Path) -> None:
    assert callable(opener)
    with pytest.raises(CheckpointError, match="is a file, not a checkpoint"):
        opener(single / "model.safetensors")


@pytest.mark.parametrize("opener", OPENERS)
def test_an_empty_path_is_no_checkpoint(opener: object, tmp_path: Path) -> None:
    assert callable(opener)
    with pytest.raises(ModelNotFound, match="nowhere"):
        opener(tmp_path / "nowhere")


def test_every_reader_refuses_what_is_no_checkpoint(single: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_generation(tmp_path, load_config(single))
