"""Linear layers are found under every name under which a family's stack is published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blockpress.checkpoints import load_network
from blockpress.checkpoints.names import published_name
from blockpress.config import PRESETS, Family, ModelConfig
from blockpress.errors import CheckpointError, RequestError
from blockpress.model.layers import packed_weights
from blockpress.quantize.convert import convert_checkpoint
from blockpress.quantize.encoders import format_named
from tests.builders.files import tensors_of
from tests.conftest import RandomNetwork

FITTING = replace(PRESETS["tiny"](), hidden_size=64, intermediate_size=96, expert_size=32, dtype="bfloat16")
DENSE = {"num_experts": 0, "top_k_experts": 0, "expert_size": 0}
GEMMA4 = replace(FITTING, family="gemma4", canvas_length=1)
BY_ITSELF = replace(GEMMA4, family="gemma4_text", image_id=None)
CASES: dict[str, tuple[ModelConfig, Family | str]] = {
    "diffusion_gemma": (FITTING, "diffusion_gemma"),
    "diffusion_gemma, named as the encoder": (FITTING, "model.encoder.language_model."),
    "gemma4": (GEMMA4, "gemma4"),
    "gemma4, named as by itself": (GEMMA4, "gemma4_text"),
    "gemma4_text": (BY_ITSELF, "gemma4_text"),
    "gemma4, dense": (replace(GEMMA4, **DENSE), "gemma4"),
    "gemma4_text, dense": (replace(BY_ITSELF, **DENSE), "gemma4_text"),
}


def write(folder: Path, config: ModelConfig, named: Family | str, random_network: RandomNetwork) -> Path:
    """A checkpoint whose tensors have the names of a family, or those of its own under another prefix."""
    tensors = {}
    for ours, tensor in random_network(config).state_dict().items():
        name = published_name(ours, named if named in ("gemma4", "gemma4_text") else config.family)  # type: ignore[arg-type]
        if named.endswith(".") and (".mlp." in name or ".experts." in name or ".self_attn." in name):
            name = name.replace("model.decoder.", named)
        tensors[name] = tensor.to(torch.bfloat16).clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.mark.parametrize(("config", "named"), CASES.values(), ids=CASES.keys())
def test_every_linear_layer_is_made_smaller_and_loads_packed(
    config: ModelConfig, named: str, random_network: RandomNetwork, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", config, named, random_network)
    plain = load_network(source)
    done = convert_checkpoint(source, tmp_path / "out", format_named("int8"))
    network = load_network(tmp_path / "out")
    packed = {f"{home}.{leaf}" for home, module in network.named_modules() for leaf in packed_weights(module)}
    expected = {
        name
        for name, tensor in plain.state_dict().items()
        if tensor.ndim > 1 and any(part in name for part in ("self_attn.", "mlp.", "experts.", "self_conditioning."))
    }
    assert packed == expected and len(done.tensors) == len(expected) and not done.notes
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        one, other = (n.logits(n.read(ids, n.empty_cache(1))[0]).float() for n in (plain, network))
    assert float((one - other).norm() / one.norm()) < 0.1


def test_kept_stacked_experts_are_named_as_stored(random_network: RandomNetwork, tmp_path: Path) -> None:
    source = write(tmp_path / "source", BY_ITSELF, "gemma4_text", random_network)
    done = convert_checkpoint(source, tmp_path / "out", format_named("int8"), keep=["*layers.1.experts*"])
    assert r"re:model\.layers\.1\.experts\.(\d+\.)?(gate|up|gate_up)_proj$" in done.ignore
    assert "model.layers.1.experts.gate_up_proj" in tensors_of(tmp_path / "out")
    load_network(tmp_path / "out")


def test_a_refusal_says_what_would_help(random_network: RandomNetwork, tmp_path: Path) -> None:
    source = write(tmp_path / "source", replace(GEMMA4, **DENSE), "gemma4", random_network)
    for how, hint in (({"experts_only": True}, "no experts"), ({"keep": ["*"]}, "keep fewer")):
        with pytest.raises(RequestError) as caught:
            convert_checkpoint(source, tmp_path / "out", format_named("int8"), **how)  # type: ignore[arg-type]
        assert hint in caught.value.hint
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF") as refused:
        convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", format_named("int8"))
    assert "original" in refused.value.hint


def test_scalars_count_as_read(random_network: RandomNetwork, tmp_path: Path) -> None:
    source = write(tmp_path / "source", GEMMA4, "gemma4", random_network)
    tensors = tensors_of(source) | {"model.language_model.rotary_emb.inv_freq": torch.ones(())}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    seen: list[tuple[int, int]] = []
    convert_checkpoint(source, tmp_path / "out", format_named("int8"), progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1]
