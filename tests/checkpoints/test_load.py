"""What loading refuses and what it takes: names, ties, types, devices, arguments.

Every refusal is one line of ours with a hint (`refusal` checks it), whatever the library said.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockpress.checkpoints import load_config, load_generation, load_network
from blockpress.checkpoints.safetensors import load
from blockpress.config import ModelConfig
from blockpress.errors import (
    BlockpressError,
    CheckpointError,
    ConfigError,
    DamagedFile,
    MissingWeights,
    RequestError,
    ShapeMismatch,
    UnexpectedWeights,
)
from tests.builders.checkpoints import Copied
from tests.builders.files import change_json, change_tensors, refusal, same, tensors_of

EMBEDDING = "model.decoder.embed_tokens.weight"
QUERY = "model.decoder.layers.0.self_attn.q_proj.weight"
CANVAS_SCALAR = "model.decoder.layers.1.layer_scalar"
CAUSAL_SCALAR = "model.encoder.language_model.layers.1.layer_scalar"

Change = Callable[[dict[str, Tensor]], Any]


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


REFUSED: dict[str, tuple[Change, type[BlockpressError], str]] = {
    "a tensor missing": (lambda t: t.pop(QUERY), MissingWeights, f"lacks 1 tensor: {QUERY}"),
    "a layer missing": (
        lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
        MissingWeights,
        "lacks 22 tensors: .* and 19 more",
    ),
    "a scalar missing from both passes": (
        lambda t: (t.pop(CANVAS_SCALAR), t.pop(CAUSAL_SCALAR)),
        MissingWeights,
        CANVAS_SCALAR,
    ),
    "the canvas's scalar missing": (lambda t: t.pop(CANVAS_SCALAR), MissingWeights, CANVAS_SCALAR),
    "a tensor left over": (
        put("model.decoder.layers.0.self_attn.sinks", torch.zeros(4)),
        UnexpectedWeights,
        "takes 1 tensor: model.decoder.layers.0.self_attn.sinks",
    ),
    "a layer left over": (put("model.decoder.layers.2.layer_scalar", torch.ones(1)), UnexpectedWeights, "layers.2"),
    "a v_proj on a full layer": (
        put("model.decoder.layers.1.self_attn.v_proj.weight", torch.ones(16, 32)),
        UnexpectedWeights,
        "layers.1.self_attn.v_proj",
    ),
    "another program's tensor": (put("optimizer.state", torch.zeros(4)), UnexpectedWeights, "optimizer.state"),
    "a wrong shape": (
        put(QUERY, torch.zeros(32, 31)),
        ShapeMismatch,
        rf"{QUERY} has the shape \[32, 31\], the config asks for \[32, 32\]",
    ),
    "a scalar without an axis": (put(CANVAS_SCALAR, torch.tensor(1.0)), ShapeMismatch, r"\[\], .* \[1\]"),
    "a transposed matrix": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING].T.contiguous()}),
        ShapeMismatch,
        r"\[32, 64\], the config asks for \[64, 32\]",
    ),
    "integers for a weight": (
        lambda t: t.update({QUERY: t[QUERY].to(torch.int32)}),
        ShapeMismatch,
        f"{QUERY} is stored as I32",
    ),
    "truth values for a weight": (lambda t: t.update({QUERY: t[QUERY] > 0}), ShapeMismatch, "stored as BOOL"),
    "eight bits for a weight": (
        lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}),
        CheckpointError,
        f"quantised: the tensor {QUERY} is stored as F8_E4M3",
    ),
    "scales of compressed-tensors": (
        put(QUERY + "_scale", torch.ones(32, 1)),
        CheckpointError,
        "quantised: .*q_proj.weight_scale",
    ),
    "packed weights of compressed-tensors": (
        lambda t: t.update({QUERY + "_packed": t.pop(QUERY).to(torch.uint8)}),
        CheckpointError,
        "quantised: .*weight_packed is stored as U8",
    ),
    "scales of ModelOpt": (
        put("model.decoder.layers.0.experts.3.up_proj.weight_scale_2", torch.ones(())),
        CheckpointError,
        "quantised: .*weight_scale_2",
    ),
    "a head that is not the embedding": (
        lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1e-3}),
        UnexpectedWeights,
        f"lm_head.weight differs from {EMBEDDING}",
    ),
    "a head of another shape": (put("lm_head.weight", torch.zeros(65, 32)), ShapeMismatch, "lm_head.weight"),
    "an encoder of its own": (
        lambda t: t.update({QUERY.replace("decoder", "encoder.language_model"): t[QUERY] * 2}),
        UnexpectedWeights,
        "differs from",
    ),
}


@pytest.mark.parametrize(("change", "kind", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_weights_that_do_not_fit_are_refused(
    change: Change, kind: type[BlockpressError], text: str, copied: Copied
) -> None:
    folder = copied()
    change_tensors(folder, change)
    error = refusal(folder)
    assert type(error) is kind
    with pytest.raises(kind, match=text):
        raise error


def test_a_mismatch_is_refused_before_a_weight_is_read(copied: Copied) -> None:
    folder = copied()
    change_tensors(folder, put("model.decoder.extra", torch.zeros(1)))
    calls: list[tuple[int, int]] = []
    refusal(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == []


def encoder_name(name: str) -> str:
    return name.replace("model.decoder.", "model.encoder.language_model.")


def with_ties(tensors: dict[str, Tensor]) -> None:
    """As a program that knows of no ties writes it: the head and all of the encoder."""
    written = [n for n in tensors if n.startswith("model.decoder.") and not n.endswith("layer_scalar")]
    ties = {encoder_name(name): tensors[name].clone() for name in written if "self_conditioning" not in name}
    tensors |= ties | {"lm_head.weight": tensors[EMBEDDING].clone()}


def first_names_only(tensors: dict[str, Tensor]) -> None:
    """As `safetensors.torch.save_model` writes it: of a tensor's names the first, so the head, not the embedding."""
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)


def with_tables(tensors: dict[str, Tensor]) -> None:
    tensors["model.decoder.rotary_emb.full_attention_inv_freq"] = torch.ones(8)
    tensors["model.encoder.language_model.embed_tokens.embed_scale"] = torch.ones(())
    tensors["model.decoder.rotary_emb.sliding_attention_original_inv_freq"] = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize("change", [with_ties, first_names_only, with_tables])
def test_redundant_tensors_of_other_programs_are_accepted(change: Change, copied: Copied, single: Path) -> None:
    folder = copied()
    change_tensors(folder, change)
    assert same(dict(load_network(folder).state_dict()), dict(load_network(single).state_dict()))


def test_ties_may_be_stored_in_another_type(copied: Copied) -> None:
    folder = copied()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
        tensors["lm_head.weight"] = tensors[EMBEDDING].double()

    wanted = dict(load_network(folder).state_dict())
    wanted["embed_tokens.weight"] = wanted["embed_tokens.weight"].bfloat16().float()
    change_tensors(folder, change)
    assert same(dict(load_network(folder).state_dict()), wanted)


def test_missing_causal_scalars_default_to_the_canvas_scalars(copied: Copied) -> None:
    folder = copied()
    before = load_network(folder)
    assert not torch.equal(before.layers[1].causal_scalar, before.layers[1].layer_scalar)
    change_tensors(folder, lambda tensors: tensors.pop(CAUSAL_SCALAR))
    layer = load_network(folder).layers[1]
    assert torch.equal(layer.causal_scalar, before.layers[1].layer_scalar)
    assert layer.causal_scalar.data_ptr() != layer.layer_scalar.data_ptr(), "they are two tensors, as in training"


def test_vision_tensors_are_never_left_over(copied: Copied) -> None:
    folder = copied()
    wanted = dict(load_network(folder).state_dict())
    change_json(folder / "config.json", lambda data: data.pop("vision_config"))
    assert same(dict(load_network(folder).state_dict()), wanted)
    change_tensors(folder, put("model.encoder.vision_tower.an_unknown_part", torch.zeros(2, dtype=torch.int64)))
    assert same(dict(load_network(folder).state_dict()), wanted)
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision" in name])
    assert same(dict(load_network(folder).state_dict()), wanted)


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", torch.float16, "float16", torch.float32, None])
def test_weights_come_in_the_type_asked_for(given: torch.dtype | str | None, single: Path) -> None:
    wanted = getattr(torch, given) if isinstance(given, str) else given or torch.float32
    network = load_network(single, dtype=given, compute_dtype=given)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {wanted}
    whole = load_network(single).state_dict()
    assert same(dict(network.state_dict()), {name: tensor.to(wanted) for name, tensor in whole.items()})


@pytest.mark.parametrize("given", ["float99", "auto", "", "int8", "float64", torch.int8, torch.float64, torch.bool])
def test_an_unknown_dtype_is_the_caller_s_mistake(given: torch.dtype | str, single: Path) -> None:
    error = refusal(single, dtype=given)
    assert type(error) is RequestError
    assert repr(given) in error.message
    assert "float32, bfloat16, float16" in error.hint


@pytest.mark.parametrize("given", ["float64", "int8", 7, ["float32"]])
def test_an_unknown_dtype_in_the_config_is_the_file_s(given: object, copied: Copied) -> None:
    folder = copied()
    change_json(folder / "config.json", lambda data: data.update(dtype=given))
    assert type(refusal(folder)) is ConfigError


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "cpu:nine"])
def test_an_unknown_device_is_the_caller_s_mistake(device: str, single: Path) -> None:
    error = refusal(single, device=device)
    assert type(error) is RequestError
    assert device in error.message


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nGPU 0 has ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
]


@pytest.mark.parametrize("full", FULL, ids=["CUDA", "CPU", "Python"])
def test_out_of_memory_names_the_size(full: Exception, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise full

    monkeypatch.setattr(load, "put", refuse)
    error = refusal(single)
    assert type(error) is RequestError
    assert re.search(r"device 'cpu' has no room for the weights, which take \d+\.\d GiB", error.message)


def test_our_own_error_is_not_reported_as_out_of_memory(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "put", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        load_network(single)


@pytest.mark.gpu
def test_weights_go_to_the_device(single: Path) -> None:
    whole, there = load_network(single).state_dict(), load_network(single, device="cuda").state_dict()
    assert {tensor.device.type for tensor in there.values()} == {"cuda"}
    assert same(dict(whole), {name: tensor.cpu() for name, tensor in there.items()})


def test_progress_counts_the_bytes_on_disk(single: Path, sharded: Path) -> None:
    size = sum(tensor.nbytes for name, tensor in tensors_of(single).items() if "vision" not in name)
    for folder in (single, sharded):
        calls: list[tuple[int, int]] = []
        load_network(folder, dtype="bfloat16", progress=lambda done, total, calls=calls: calls.append((done, total)))
        done = [call[0] for call in calls]
        assert done[0] == 0
        assert done[-1] == size
        assert done == sorted(set(done)), "it grows with every tensor"
        assert {call[1] for call in calls} == {size}


def test_a_config_may_be_given(single: Path, seeing: ModelConfig) -> None:
    wider = replace(seeing, context_length=512)
    assert load_network(single, config=wider).config is wider
    error = refusal(single, config=replace(seeing, vocab_size=65))
    assert type(error) is ShapeMismatch


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[BlockpressError], str]] = {
    "another family": (lambda d: d.update(model_type="gemma3"), ConfigError, "model_type is 'gemma3'"),
    "no family": (lambda d: d.pop("model_type"), ConfigError, "model_type is None"),
    "no text config": (lambda d: d.pop("text_config"), ConfigError, "text_config"),
    "a size that is text": (lambda d: d["text_config"].update(hidden_size="32"), ConfigError, "hidden_size"),
    "a size without end": (lambda d: d["text_config"].update(vocab_size=10**18), ConfigError, "no network"),
    "layers that are no list": (
        lambda d: d["text_config"].update(layer_types=3),
        ConfigError,
        "layer_types|not understood",
    ),
    "layer differences that are none": (
        lambda d: d["text_config"].update(per_layer_config={"0": 8}),
        ConfigError,
        "per_layer_config|not understood",
    ),
    "ropes that are a list": (
        lambda d: d["text_config"].update(rope_parameters={"full_attention": [1]}),
        ConfigError,
        "rope_parameters|not understood",
    ),
    "a quantisation that nothing reads": (
        lambda d: d.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        ConfigError,
        "quantization_config.quant_method is 'gptq'",
    ),
    "a quantisation that is a word": (lambda d: d.update(quantization_config="nf4"), ConfigError, "'nf4'"),
}


@pytest.mark.parametrize(("change", "kind", "text"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_of_something_else_is_refused(
    change: Callable[[dict[str, Any]], Any], kind: type[BlockpressError], text: str, copied: Copied
) -> None:
    folder = copied()
    change_json(folder / "config.json", change)
    error = refusal(folder)
    assert type(error) is kind
    with pytest.raises(kind, match=text):
        raise error


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model_type": "diffusion_gemma"',
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"<html>404</html>",
    ],
    ids=["empty", "open", "cut short", "a list", "null", "not UTF-8", "too deep", "a web page"],
)
def test_damaged_json_is_named(name: str, content: bytes, copied: Copied, seeing: ModelConfig) -> None:
    folder = copied()
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedFile, match=name) as caught:
        load_config(folder) if name == "config.json" else load_generation(folder, seeing)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"t_min": "cold"}, {"sampler_config": 3}, {"eos_token_id": "end"}])
def test_an_invalid_sampler_is_refused(change: dict[str, Any], copied: Copied, seeing: ModelConfig) -> None:
    folder = copied()
    change_json(folder / "generation_config.json", lambda data: data.update(change))
    with pytest.raises(ConfigError):
        load_generation(folder, seeing)
