"""Storage and arithmetic: weights lie in memory as they are stored, and are computed in a wider type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

import blockpress
from blockpress.bench.subject import randomised, shape_named, weight_bytes
from blockpress.checkpoints import load_network, load_vision, minimal_vision, save_checkpoint
from blockpress.checkpoints.build import DTYPES, choose_types, packable
from blockpress.checkpoints.gguf.load import load_gguf_network
from blockpress.config import PRESETS, GenerationConfig, ModelConfig
from blockpress.errors import ConfigError, RequestError
from blockpress.hardware import Rates
from blockpress.model import Network
from blockpress.model.layers import packed_weights
from blockpress.ops.packed import Codes, HalfFloats
from blockpress.ops.weight import Packed
from blockpress.sudoku import layout
from tests.builders.files import bits, figures, same, tensors_of
from tests.builders.gguf_files import narrow, write_gguf
from tests.builders.quantised import FORMS, write

CPU = torch.device("cpu")
BOTH = {"dtype": "bfloat16", "compute_dtype": "float32"}

VARIABLE = "BLOCKPRESS_COMPUTE_DTYPE"


def held(network: torch.nn.Module) -> dict[str, Packed]:
    """All packed weights by name."""
    return {f"{n}.{leaf}": w for n, m in network.named_modules() for leaf, w in packed_weights(m).items()}


def floats(network: Network) -> Network:
    """The same values as a plain network in float32."""
    plain = Network(network.config).eval().requires_grad_(False)
    plain.load_state_dict({name: tensor.float() for name, tensor in network.state_dict().items()})
    return plain


def near(got: Tensor, wanted: Tensor) -> bool:
    """The order of sums may differ, nothing else."""
    return float((got - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_matrices_keep_the_storage_type_and_the_rest_is_widened(storage: str, single: Path) -> None:
    exact = load_network(single, dtype=storage, compute_dtype=storage)
    network = load_network(single, dtype=storage, compute_dtype="float32")
    kind = DTYPES[storage]
    assert (network.dtype, network.storage_dtype) == (torch.float32, kind)
    assert (exact.dtype, exact.storage_dtype, held(exact)) == (kind, kind, {})
    matrices = held(network)
    assert matrices.keys() == packable(exact) == packable(network)
    assert all(isinstance(weight, HalfFloats) for weight in matrices.values())
    rest = [*network.parameters(), *network.buffers()]
    assert {tensor.dtype for tensor in rest} == {torch.float32}
    # No float of a matrix is there twice, nor in another type.
    assert sum(weight.nbytes for weight in matrices.values()) + sum(t.nbytes for t in rest) == sum(
        tensor.nbytes * (1 if name in matrices else 4 // kind.itemsize) for name, tensor in exact.state_dict().items()
    )
    assert weight_bytes(network)["experts"] == weight_bytes(exact)["experts"]
    assert weight_bytes(network)["embedding"] == weight_bytes(exact)["embedding"]


def test_results_equal_those_of_the_same_values_in_float32(single: Path) -> None:
    network = load_network(single, **BOTH)
    assert near(figures(network), figures(floats(network)))


def test_state_dict_has_matrices_as_stored(single: Path) -> None:
    exact = load_network(single, dtype="bfloat16", compute_dtype="bfloat16").state_dict()
    state = load_network(single, **BOTH).state_dict()
    assert state.keys() == exact.keys()
    assert same({n: t.bfloat16() for n, t in state.items()}, dict(exact))


def test_saving_keeps_the_stored_bits(tmp_path: Path, single: Path) -> None:
    network, kept = load_network(single, **BOTH), minimal_vision(0, 32)[1]
    save_checkpoint(tmp_path / "again", network, generation=GenerationConfig(), kept=kept)
    exact = load_network(single, dtype="bfloat16", compute_dtype="bfloat16")
    save_checkpoint(tmp_path / "exact", exact, generation=GenerationConfig(), kept=kept)
    assert same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "exact"))
    assert load_network(tmp_path / "again").config.dtype == "bfloat16"


def test_matrices_move_with_the_network(single: Path) -> None:
    network = load_network(single, **BOTH).to("meta")
    assert {weight.device.type for weight in held(network).values()} == {"meta"}


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32", "Q8_0"])
def test_gguf_files_keep_their_storage_type(kind: str, tiny: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", narrow(tiny), gguf.GGMLQuantizationType[kind])
    network = load_gguf_network(tmp_path / "x.gguf", **BOTH)
    matrices = held(network)
    assert matrices.keys() == packable(network)
    assert {type(w) is HalfFloats for n, w in matrices.items() if "router" not in n} == {kind != "Q8_0"}
    if kind != "Q8_0":
        assert near(figures(network), figures(floats(network)))


def test_packed_checkpoints_keep_their_codes(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["fp8 channel"])
    network, whole = load_network(made.folder, **BOTH), load_network(made.folder, dtype="float32")
    kinds = {type(weight) for weight in held(network).values()}
    assert kinds == {Codes, HalfFloats}
    assert (network.dtype, network.storage_dtype) == (torch.float32, torch.bfloat16)
    assert sum(w.nbytes for w in held(network).values() if isinstance(w, Codes)) == sum(
        w.nbytes for w in held(whole).values()
    )
    with pytest.raises(RequestError, match="is packed, and no floats are left"):
        save_checkpoint(tmp_path / "no", network, generation=GenerationConfig())


def test_the_vision_tower_keeps_its_storage_type(single: Path) -> None:
    exact = load_vision(single, dtype="bfloat16", compute_dtype="bfloat16")
    tower = load_vision(single, **BOTH)
    assert held(tower).keys() == packable(tower) == packable(exact)
    assert bits(tower.embed_vision.embedding_projection.weight.values) == bits(
        exact.embed_vision.embedding_projection.weight
    )
    assert tower.vision_tower.patch_embedder.position_embedding_table.dtype == torch.float32


def test_random_weights_do_not_depend_on_the_compute_type() -> None:
    exact = randomised("tiny", shape_named("tiny"), dtype="bfloat16", compute_dtype="bfloat16").network
    subject = randomised("tiny", shape_named("tiny"), **BOTH)
    assert subject.in_types == "bfloat16, computed in float32"
    state = subject.network.state_dict()
    assert same({n: t.bfloat16() for n, t in state.items()}, dict(exact.state_dict()))


def test_a_canvas_equals_that_of_the_same_values_in_float32() -> None:
    """The shipped model is stored in bfloat16 on disk, so that both types in memory hold the same values."""
    prompt = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79".replace(".", "0")
    prompt = layout(prompt)
    whole, narrow_ = blockpress.load("sudoku-nano"), blockpress.load("sudoku-nano", **BOTH)
    assert narrow_.config.dtype == whole.config.dtype == "float32"
    assert narrow_.generate(prompt).tokens == whole.generate(prompt).tokens


TINY = PRESETS["tiny"]()


@pytest.mark.parametrize(
    ("dtype", "compute", "wanted"),
    [
        ("bfloat16", "float32", ("bfloat16", "float32")),
        ("bfloat16", torch.float32, ("bfloat16", "float32")),
        ("float16", "float16", ("float16", "float16")),
        ("float32", None, ("float32", "float32")),
        ("float16", "auto", ("float16", "float32")),
        (None, None, ("float32", "float32")),
    ],
)
def test_types_follow_from_arguments_config_and_machine(
    dtype: str | None, compute: str | torch.dtype | None, wanted: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLOCKPRESS_COMPUTE_DTYPE", raising=False)
    rates = Rates(products={"mkl": {"": 2.0}, "onednn": {"": 2.0}, "float16": {"": 2.0}}, reading=1.0)
    monkeypatch.setattr("blockpress.hardware.speed._rates_of_any_threads", lambda: rates)
    types = choose_types(dtype, compute, replace(TINY, dtype="float32"), CPU)
    assert (types.storage, types.compute) == tuple(DTYPES[name] for name in wanted)


@pytest.mark.parametrize(
    ("dtype", "compute", "message", "hint"),
    [
        (
            "float32",
            "bfloat16",
            "compute_dtype is bfloat16, which does not hold the weights in float32",
            "give dtype bfloat16",
        ),
        ("float32", torch.float16, "compute_dtype is float16", "give dtype float16"),
        (
            "bfloat16",
            "float16",
            "compute_dtype is float16, which does not hold the weights in bfloat16",
            "give dtype float16",
        ),
        ("bfloat16", "int4", "compute_dtype is 'int4'", "float32, bfloat16, float16, int8, or auto"),
        ("bfloat16", torch.float64, "compute_dtype is torch.float64", "float32, bfloat16, float16, int8, or auto"),
        ("int8", None, "dtype is 'int8'", "float32, bfloat16, float16, or None"),
    ],
)
def test_invalid_types_are_refused_by_name(
    dtype: str, compute: str | torch.dtype, message: str, hint: str, single: Path
) -> None:
    for load in (load_network, blockpress.load):
        with pytest.raises(RequestError) as caught:
            load(single, dtype=dtype, compute_dtype=compute)
        assert message in caught.value.message
        assert hint in caught.value.hint


def test_the_compute_type_follows_the_machine(monkeypatch: pytest.MonkeyPatch, single: Path) -> None:
    monkeypatch.setenv(VARIABLE, "float32")
    assert load_network(single, dtype="bfloat16").dtype == torch.float32
    assert load_network(single, dtype="bfloat16", compute_dtype="bfloat16").dtype == torch.bfloat16
    monkeypatch.setenv(VARIABLE, "bfloat16")
    assert load_network(single, dtype="bfloat16").dtype == torch.bfloat16
    assert load_network(single, dtype="float32").dtype == torch.float32, "it cannot hold what is stored"
    monkeypatch.setenv(VARIABLE, "int4")
    with pytest.raises(ConfigError, match=f"{VARIABLE} is 'int4'"):
        load_network(single)


@torch.inference_mode()
def test_an_embedding_lookup_widens_only_its_rows(monkeypatch: pytest.MonkeyPatch, single: Path) -> None:
    network, sizes = load_network(single, **BOTH), []
    unpack = HalfFloats.unpack
    monkeypatch.setattr(HalfFloats, "unpack", lambda self, dtype: sizes.append(self.shape) or unpack(self, dtype))
    rows: Tensor = network.embed_tokens(torch.tensor([[3, 0, 3]]), torch.float32)
    assert sizes == [(3, network.config.hidden_size)]
    assert rows.dtype == torch.float32
