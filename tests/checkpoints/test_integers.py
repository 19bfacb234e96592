"""`compute_dtype="int8"`: the layers' matrices become integers, whatever they are stored in, and all else is float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

import blockpress
from blockpress import costs
from blockpress.bench.ceilings import measure_device
from blockpress.bench.subject import randomised, shape_named, stored_formats, weight_bytes
from blockpress.checkpoints import load_network, load_vision, save_checkpoint
from blockpress.checkpoints.build import choose_types, multiplied, packable
from blockpress.checkpoints.gguf.load import load_gguf_network
from blockpress.config import PRESETS, GenerationConfig, ModelConfig
from blockpress.errors import ConfigError, RequestError
from blockpress.model import Network
from blockpress.ops.integers import MOST_COLUMNS, IntegerWeight, quantized
from blockpress.ops.packed import Codes, HalfFloats
from blockpress.plan.memory import needed, survey
from blockpress.sudoku import layout
from tests.builders.files import figures
from tests.builders.gguf_files import narrow, write_gguf
from tests.builders.quantised import FORMS, write

from .test_types import held

TINY = PRESETS["tiny"]()
PUZZLE = layout("530070000600195000098000060800060003400803001700020006060000280000419005000080079")


def check(network: Network, storage: torch.dtype) -> None:
    """Every matrix of a layer is integers; embedding and router are floats as they are stored, the rest is float32."""
    own, products = packable(network), multiplied(network)
    assert own - products == {name for name in own if "embed_tokens" in name or "router" in name}
    matrices = held(network)
    assert {name for name, weight in matrices.items() if isinstance(weight, IntegerWeight)} == products
    assert (network.dtype, network.product_dtype, network.storage_dtype) == (torch.float32, torch.int8, storage)
    assert {tensor.dtype for tensor in [*network.parameters(), *network.buffers()]} == {torch.float32}


def values(network: Network) -> Network:
    """A plain network with the values of the stored weights."""
    state = {name: tensor.float() for name, tensor in network.state_dict().items()}
    state |= {name: w.unpack(torch.float32) for name, w in held(network).items()}
    plain = Network(network.config).eval().requires_grad_(False)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_float_checkpoints_are_rounded_to_int8(storage: torch.dtype, single: Path) -> None:
    exact = load_network(single, dtype=storage, compute_dtype=storage)
    network = load_network(single, dtype=storage, compute_dtype="int8")
    check(network, storage)
    for name, weight in held(network).items():
        floats = exact.get_parameter(name)
        if isinstance(weight, IntegerWeight):
            assert torch.equal(weight.codes, quantized(floats).codes)
        else:
            assert isinstance(weight, HalfFloats) and torch.equal(weight.values, floats)
    off = (figures(network) - figures(exact)).norm() / figures(exact).norm()
    assert 0 < float(off) < 0.5, "rounded, and not another network"


@pytest.mark.parametrize("form", ["int8 channel", "int8 group asymmetric", "fp8 channel", "int4 group", "nvfp4"])
def test_packed_checkpoints_run_in_int8(form: str, tmp_path: Path) -> None:
    made = write(tmp_path, FORMS[form])
    packed, network = load_network(made.folder), load_network(made.folder, compute_dtype="int8")
    check(network, torch.bfloat16 if made.config.dtype == "bfloat16" else torch.float32)
    before = held(packed)
    for name, weight in held(network).items():
        if not isinstance(weight, IntegerWeight) or name not in before:
            continue
        stored = before[name]
        assert torch.equal(weight.codes, quantized(stored).codes)
        if form == "int8 channel":
            assert isinstance(stored, Codes) and torch.equal(weight.codes, stored.codes), "as they are"


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_gguf_files_run_in_int8(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", narrow(TINY), gguf.GGMLQuantizationType[kind])
    network = load_gguf_network(tmp_path / "x.gguf", dtype="bfloat16", compute_dtype="int8")
    products = {name for name, weight in held(network).items() if isinstance(weight, IntegerWeight)}
    assert products == multiplied(network) and network.product_dtype == torch.int8


def test_int8_generates_the_canvas_of_floats() -> None:
    """Rounding shows in the logits, and hardly ever in what a trained model writes of a puzzle that is no riddle."""
    whole, integers = blockpress.load("sudoku-nano"), blockpress.load("sudoku-nano", compute_dtype="int8")
    assert integers.network.product_dtype == torch.int8
    assert integers.generate(PUZZLE).tokens == whole.generate(PUZZLE).tokens
    canvas = [7] * whole.config.canvas_length
    exact, own = (lm.denoise_logits(whole.encode(PUZZLE), canvas).double() for lm in (whole, integers))
    assert 1e-4 < float((own - exact).norm() / exact.norm()) < 0.05


def test_an_int8_network_is_neither_saved_nor_moved(single: Path, tmp_path: Path) -> None:
    network = load_network(single, compute_dtype="int8")
    with pytest.raises(RequestError, match="is packed, and no floats are left"):
        save_checkpoint(tmp_path / "no", network, generation=GenerationConfig())
    assert {weight.device.type for weight in held(network.to("meta")).values()} == {"meta"}


@pytest.mark.parametrize("name", ["tiny", pytest.param("bench-4k", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_equals_the_formula(name: str, dtype: str) -> None:
    config = shape_named(name)
    network = randomised(name, config, dtype=dtype, compute_dtype="int8").network
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    assert sum(weight_bytes(network).values()) + buffers == costs.integer_weights(config, dtype)
    need, plain = (needed(config, 100, dtype=dtype, compute_dtype=kind) for kind in ("int8", "float32"))
    assert need.weights == costs.integer_weights(config, dtype) < plain.weights
    assert (need.context, need.canvas, need.reading) == (plain.context, plain.canvas, plain.reading)


@pytest.mark.parametrize("family", ["gemma4", "dense"])
def test_memory_of_the_sibling_equals_the_formula(family: str) -> None:
    config = replace(TINY, family="gemma4", canvas_length=1)
    if family == "dense":
        config = replace(config, num_experts=0, top_k_experts=0, expert_size=0)
    network = randomised(family, config, compute_dtype="int8").network
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    # Without a canvas a layer has one scalar, and the formula counts two, as that of plain weights does.
    assert sum(weight_bytes(network).values()) + 2 * buffers == costs.integer_weights(config, config.dtype)


def test_the_formula_counts_packed_files(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["int4 group"])
    need = needed(made.config, 10, compute_dtype="int8", files=survey(made.folder))
    assert need.weights == costs.integer_weights(made.config, made.config.dtype)


def test_a_benchmark_reports_int8() -> None:
    subject = randomised("tiny", TINY, dtype="bfloat16", compute_dtype="int8")
    assert subject.types == {"dtype": "bfloat16", "compute_dtype": "int8"}
    assert subject.in_types == "bfloat16, computed in int8"
    stored = stored_formats(subject.network)
    assert [part.math for part in (stored.experts, stored.dense, stored.embedding, stored.rest)] == [
        "int8", "int8", "float32", "float32",
    ]  # fmt: skip
    assert 1 < stored.experts.size < 1.5
    assert measure_device(subject.network, seconds=0.01).rates.keys() == {"int8", "float32"}


@pytest.mark.parametrize(
    ("config", "device", "message", "hint"),
    [
        (TINY, "meta", "compute_dtype is int8, and device is 'meta'", "give device 'cpu'"),
        (TINY, "cuda", "compute_dtype is int8, and device is 'cuda'", "leave compute_dtype to auto"),
        (
            replace(TINY, intermediate_size=MOST_COLUMNS + 1),
            "cpu",
            f"the model's intermediate_size is {MOST_COLUMNS + 1}",
            "give compute_dtype float32",
        ),
        (replace(TINY, expert_size=1 << 20), "cpu", "the model's expert_size is 1048576", "leave 32 bits"),
    ],
)
def test_unsupported_int8_is_refused_by_name(config: ModelConfig, device: str, message: str, hint: str) -> None:
    for asked in ("int8", torch.int8):
        with pytest.raises(RequestError) as caught:
            choose_types("bfloat16", asked, config, torch.device(device))
        assert message in caught.value.message and hint in caught.value.hint


def test_the_vision_tower_stays_float(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"compute_dtype is int8, and the vision tower.*give compute_dtype float32"):
        load_vision(single, dtype="bfloat16", compute_dtype="int8")
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "int8")
    tower = load_vision(single, dtype="bfloat16")
    assert not any(isinstance(weight, IntegerWeight) for weight in held(tower).values())
    assert load_network(single, dtype="bfloat16").product_dtype == torch.int8, "the variable is for the network"


def test_int8_is_refused_on_a_gpu_even_by_variable(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "int8")
    with pytest.raises(ConfigError, match=r"BLOCKPRESS_COMPUTE_DTYPE is 'int8', and the device is 'meta'"):
        load_network(single, device="meta")
