"""A checkpoint takes the place of another: nothing that spoke of the older one stays, nor a trace of one that failed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blockpress.checkpoints import load_network, save_checkpoint
from blockpress.checkpoints.atomic import REPORT, staged
from blockpress.checkpoints.safetensors.stream import StreamReader
from blockpress.config import GenerationConfig
from blockpress.errors import CheckpointError
from blockpress.quantize.convert import COPIED_FILES, convert_checkpoint
from blockpress.quantize.encoders import format_named
from blockpress.quantize.synthetic import synthesize


def older(folder: Path) -> Path:
    """A directory in which a quantised checkpoint of another model lies, and a file of the user's."""
    folder.mkdir()
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    for name in (REPORT, "model-00001-of-00002.safetensors", "tokenizer.json", "notes.txt"):
        (folder / name).write_text("{}")
    return folder


def test_files_of_the_older_checkpoint_are_removed(single: Path, tmp_path: Path) -> None:
    """The file that ModelOpt writes would be taken for the new weights' own, and the tokenizer for theirs."""
    synthesize("tiny", older(tmp_path / "random"))
    assert load_network(tmp_path / "random").config.vocab_size == 64
    convert_checkpoint(single, older(tmp_path / "smaller"), format_named("fp8"))
    for folder, own in ((tmp_path / "random", set()), (tmp_path / "smaller", {REPORT})):
        left = {file.name for file in folder.iterdir()}
        assert left & {*COPIED_FILES, REPORT, "hf_quant_config.json"} - {"generation_config.json"} == own
        assert "notes.txt" in left and "model-00001-of-00002.safetensors" not in left


def test_a_save_removes_files_that_describe_the_older_weights(single: Path, tmp_path: Path) -> None:
    network = load_network(single)
    save_checkpoint(older(tmp_path / "out"), network, generation=GenerationConfig(), kept_from=single)
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert not left & {REPORT, "hf_quant_config.json"} and {"notes.txt", "tokenizer.json"} <= left
    load_network(tmp_path / "out")


def test_a_failed_save_leaves_no_directory(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CheckpointError, match="GiB left"):
        convert_checkpoint(single, tmp_path / "out", format_named("fp8"))
    assert not (tmp_path / "out").exists()

    def stop(staging: Path) -> None:
        (staging.parent / "theirs").write_text("stays")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "mine") as staging:
        stop(staging)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["theirs"]


def test_a_source_that_cannot_be_read_is_not_the_target(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MalformedToolCallEvent:
        name = "source.safetensors"

        def seek(self, place: int) -> None:
            raise OSError(5, "Input/output error")

        def close(self) -> None:
            pass

    real = StreamReader.__init__

    def broken(self: StreamReader, file: Path) -> None:
        real(self, file)
        self._file.close()
        self._file = MalformedToolCallEvent()  # type: ignore[assignment]

    monkeypatch.setattr(StreamReader, "__init__", broken)
    with pytest.raises(CheckpointError, match=r"source\.safetensors' cannot be read"):
        convert_checkpoint(single, tmp_path / "out", format_named("fp8"))
