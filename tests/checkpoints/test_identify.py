"""What a checkpoint says it is, wherever it says so, and whatever stands there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blockpress.checkpoints.identify import identify
from blockpress.config import ModelConfig
from tests.builders.gguf_files import narrow, write_gguf


def test_hf_quant_config_marks_weights_as_packed(copied: Callable[..., Path]) -> None:
    folder = copied()
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    kind = identify(folder)
    assert (kind.format, kind.method) == ("nvfp4", "modelopt")


@pytest.mark.parametrize(
    ("number", "name"), [(7, "Q8_0"), (999, "type 999"), ([1, 2], "type [1 2]"), ("x" * 99, "type " + "x" * 40)]
)
def test_gguf_file_types_have_names(number: object, name: str, tiny: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", narrow(tiny), keys={"general.file_type": number})
    assert identify(tmp_path / "a.gguf").format == name
