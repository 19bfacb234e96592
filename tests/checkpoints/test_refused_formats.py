"""What makes a quantised checkpoint unreadable, each with its own error: tensors, scales, methods, arguments."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockpress.checkpoints import load_network
from blockpress.errors import (
    BlockpressError,
    CheckpointError,
    ConfigError,
    DamagedFile,
    MissingWeights,
    ShapeMismatch,
    UnexpectedWeights,
)
from tests.builders.files import change_json, change_tensors, refusal
from tests.builders.quantised import FORMS, write

NAMES = ("fp8 channel", "int8 group asymmetric", "int4 group asymmetric", "nvfp4", "modelopt nvfp4")
QUERY = "model.decoder.layers.0.self_attn.q_proj"
EXPERT = "model.decoder.layers.1.experts.2.down_proj"
STACK = "model.decoder.layers.1.experts.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("whole")
    return {name: write(home / name.replace(" ", "-"), FORMS[name]).folder for name in NAMES}


def damage(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def instead_of_experts(stack: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if re.search(r"layers\.1\.experts\.\d\.down_proj", name)]:
            del tensors[name]
        tensors[STACK] = stack

    return change


REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], type[BlockpressError], str]] = {
    "no scale": ("fp8 channel", drop(f"{QUERY}.weight_scale"), MissingWeights, f"lacks 1 tensor: {QUERY}.weight_scale"),
    "no outer scale": ("nvfp4", drop(f"{QUERY}.weight_global_scale"), MissingWeights, "q_proj.weight_global_scale"),
    "no outer scale of ModelOpt": (
        "modelopt nvfp4",
        drop(f"{EXPERT}.weight_scale_2"),
        MissingWeights,
        "weight_scale_2",
    ),
    "no zero point": ("int4 group asymmetric", drop(f"{QUERY}.weight_zero_point"), MissingWeights, "zero_point"),
    "no codes": (
        "int4 group asymmetric",
        drop(f"{QUERY}.weight_packed"),
        MissingWeights,
        f"lacks 1 tensor: {QUERY}.weight",
    ),
    "an expert missing": (
        "nvfp4",
        drop(*(f"{EXPERT}.{part}" for part in ("weight_packed", "weight_scale", "weight_global_scale"))),
        MissingWeights,
        f"lacks 1 tensor: {EXPERT}.weight_packed",
    ),
    "an expert too many": (
        "fp8 channel",
        put(EXPERT.replace("experts.2", "experts.3") + ".weight", torch.ones(64, 32)),
        UnexpectedWeights,
        "takes 1 tensor: .*experts.3.down_proj.weight",
    ),
    "both packed and not": (
        "nvfp4",
        put(f"{QUERY}.weight", torch.ones(32, 64)),
        UnexpectedWeights,
        f"holds both {QUERY}.weight and {QUERY}.weight_packed",
    ),
    "floats with scales": (
        "fp8 channel",
        damage(f"{QUERY}.weight", Tensor.float),
        ShapeMismatch,
        "stored as F32, and weight_scale",
    ),
    "a stack of 8-bit floats": (
        "fp8 channel",
        instead_of_experts(torch.zeros(3, 64, 32, dtype=torch.float8_e4m3fn)),
        ShapeMismatch,
        f"{STACK} is stored as F8_E4M3",
    ),
    "a stack of integers": (
        "int8 group asymmetric",
        instead_of_experts(torch.zeros(3, 64, 32, dtype=torch.int8)),
        ShapeMismatch,
        f"{STACK} is stored as I8",
    ),
    "scales of another shape": (
        "fp8 channel",
        damage(f"{QUERY}.weight_scale", lambda t: t.T.contiguous()),
        ShapeMismatch,
        r"weight_scale has the shape \[1, 32\], the config asks for \[32, 1\] or \[32\]",
    ),
    "fewer groups": (
        "nvfp4",
        damage(f"{QUERY}.weight_scale", lambda t: t[:, :2].contiguous()),
        ShapeMismatch,
        r"\[32, 2\], the config asks for \[32, 4\]",
    ),
    "scales of integers": (
        "fp8 channel",
        damage(f"{QUERY}.weight_scale", Tensor.int),
        ShapeMismatch,
        "weight_scale is stored as I32",
    ),
    "codes of another type": (
        "nvfp4",
        damage(f"{QUERY}.weight_packed", Tensor.char),
        ShapeMismatch,
        "weight_packed is stored as I8",
    ),
    "codes of another width": (
        "int4 group asymmetric",
        damage(f"{QUERY}.weight_packed", lambda t: t[:, 1:].contiguous()),
        CheckpointError,
        "q_proj is stored as integers packed to the shape",
    ),
    "a shape of its own": (
        "int4 group asymmetric",
        damage(f"{QUERY}.weight_shape", lambda t: t.flip(0)),
        ShapeMismatch,
        r"weight_shape says \[64, 32\], the config asks for \[32, 64\]",
    ),
    "a packed norm": (
        "fp8 channel",
        put("model.decoder.norm.weight_scale", torch.ones(1)),
        UnexpectedWeights,
        "takes model.decoder.norm.weight_scale",
    ),
    "a norm in eight bits": (
        "fp8 channel",
        damage("model.decoder.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        ShapeMismatch,
        "norm.weight is stored as F8_E4M3",
    ),
    "an expert in another format": (
        "fp8 channel",
        lambda t: (t.pop(f"{EXPERT}.weight_scale"), t.update({f"{EXPERT}.weight": torch.ones(64, 32)})),
        ShapeMismatch,
        "experts.2.down_proj as plain",
    ),
    "columns in another order": (
        "int4 group asymmetric",
        put(f"{QUERY}.weight_g_idx", torch.ones(64).int()),
        CheckpointError,
        "weight_g_idx",
    ),
    "scales of AWQ": (
        "modelopt nvfp4",
        put(f"{QUERY}.pre_quant_scale", torch.ones(64)),
        BlockpressError,
        "pre_quant_scale",
    ),
    "another library's packing": (
        "nvfp4",
        put(f"{QUERY}.qweight", torch.ones(4, 4).int()),
        CheckpointError,
        "nothing here reads .*qweight",
    ),
}
for what, value in {"nan": torch.nan, "inf": torch.inf, "negative": -1.0, "zero": 0.0}.items():
    for form, part in (
        ("fp8 channel", "weight_scale"),
        ("nvfp4", "weight_global_scale"),
        ("modelopt nvfp4", "weight_scale_2"),
    ):
        REFUSED[f"a {what} scale: {form} {part}"] = (
            form,
            damage(f"{EXPERT}.{part}", with_first(value)),
            DamagedFile,
            f"{part} holds a scale of",
        )
for what, value in {"nan": torch.nan, "negative": -1.0}.items():
    REFUSED[f"a {what} scale of a group"] = (
        "nvfp4",
        damage(f"{EXPERT}.weight_scale", with_first(value)),
        DamagedFile,
        "weight_scale holds a scale of",
    )


@pytest.mark.parametrize(("form", "change", "kind", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_do_not_belong_together_are_refused(
    form: str, change: Callable[[dict[str, Tensor]], Any], kind: type[BlockpressError], text: str,
    whole: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(whole[form], tmp_path / "copy"))
    change_tensors(folder, change)
    error = refusal(folder)
    assert isinstance(error, kind)
    with pytest.raises(kind, match=text):
        raise error


def test_groups_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS["int4 group asymmetric"]).folder
    change_json(
        folder / "config.json",
        lambda d: d["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=24),
    )
    error = refusal(folder)
    assert type(error) is ShapeMismatch
    assert "groups of 24 do not divide" in error.message


def test_a_zero_scale_is_accepted_for_tiny_values(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["nvfp4"], tmp_path / "copy"))
    change_tensors(folder, damage(f"{QUERY}.weight_scale", with_first(0.0)))
    weight = load_network(folder).layers[0].self_attn.q_proj.weight
    assert not weight.unpack(torch.float32)[0, :16].any()


SAID: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    "awq": ({"quant_method": "awq"}, "quant_method is 'awq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    "fp8 of DeepSeek": ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "rotated": ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config"),
    "fewer experts": ({"moe_sparsity_config": {"method": "prune", "num_experts": [2, 2]}}, "moe_sparsity_config"),
    "not compressed": ({"quantization_status": "calibration"}, "quantization_status is 'calibration'"),
    "6 bits": ({"format": "mxfp6-pack-quantized"}, "format is 'mxfp6-pack-quantized'"),
    "sparse codes": ({"format": "marlin-24"}, "format is 'marlin-24'"),
    "an unknown field": ({"rotation": "random"}, "quantization_config.rotation is 'random'"),
    "a preset": ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16"),
    "no group": ({"config_groups": {}}, "config_groups"),
    "a pattern that is none": ({"ignore": ["re:("]}, "ignore holds 're:\\('"),
    "AWQ of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'"),
    "int4 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "quant_algo is 'W4A16_AWQ'"),
}
ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "columns in another order": ({"actorder": "group"}, "actorder is 'group'"),
    "weights quantised on the way": ({"dynamic": True}, "dynamic is True"),
    "16 bits": ({"num_bits": 16}, "num_bits is 16"),
    "6-bit floats": ({"num_bits": 6, "type": "float"}, "num_bits is 6"),
    "a strategy of activations": ({"strategy": "token"}, "strategy is 'token'"),
    "an unknown argument": ({"codebook": [1]}, "codebook"),
}


@pytest.mark.parametrize(("said", "text"), SAID.values(), ids=SAID.keys())
def test_unknown_methods_are_refused_by_name(
    said: dict[str, Any], text: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole["nvfp4"], tmp_path / "copy"))
    change_json(folder / "config.json", lambda d: d["quantization_config"].update(said))
    error = refusal(folder)
    assert type(error) is ConfigError
    with pytest.raises(ConfigError, match=text):
        raise error


@pytest.mark.parametrize(("said", "text"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_unknown_arguments_are_refused_by_name(
    said: dict[str, Any], text: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole["int4 group asymmetric"], tmp_path / "copy"))
    change_json(
        folder / "config.json",
        lambda d: d["quantization_config"]["config_groups"]["group_0"]["weights"].update(said),
    )
    error = refusal(folder)
    assert type(error) is ConfigError
    with pytest.raises(ConfigError, match=text):
        raise error


def test_a_matrix_uses_the_scheme_of_its_group(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["int4 group asymmetric"], tmp_path / "copy"))

    def add_a_group(data: dict[str, Any]) -> None:
        groups = data["quantization_config"]["config_groups"]
        wider = groups["group_0"]["weights"] | {"group_size": 32}
        groups["group_1"] = groups["group_0"] | {"targets": ["re:.*down_proj"], "weights": wider}

    change_json(folder / "config.json", add_a_group)
    error = refusal(folder)
    assert type(error) is ShapeMismatch
    assert "down_proj.weight_scale has the shape" in error.message
    change_json(folder / "config.json", lambda d: d["quantization_config"].update(ignore=["re:.*down_proj"]))
    load_network(folder)  # by name no group reaches it any more, and one of them is what is there


@pytest.mark.parametrize("form", NAMES)
def test_a_packed_tie_must_equal_its_twin(form: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole[form], tmp_path / "copy"))
    twin = QUERY.replace("decoder", "encoder.language_model")

    def copy_parts(tensors: dict[str, Tensor]) -> None:
        tensors |= {name.replace(QUERY, twin): tensors[name].clone() for name in list(tensors) if QUERY + "." in name}

    change_tensors(folder, copy_parts)
    load_network(folder)
    change_tensors(folder, damage(f"{twin}.weight_scale", lambda t: torch.full_like(t, 2)))
    error = refusal(folder)
    assert type(error) is UnexpectedWeights
    assert f"differs from {QUERY}.weight, to which it is tied" in error.message
