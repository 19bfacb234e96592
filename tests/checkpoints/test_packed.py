"""Every quantised format against what its own tools restore: values to the last bit, logits of the whole network."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blockpress.checkpoints import load_network, save_checkpoint
from blockpress.checkpoints.safetensors import load, scales
from blockpress.config import GenerationConfig
from blockpress.errors import CheckpointError, DamagedFile, RequestError
from blockpress.model import Network
from blockpress.model.layers import packed_weights
from blockpress.ops.packed import Codes, Float4, Nibbles
from blockpress.ops.weight import Packed
from tests.builders.files import bits, change_json, change_tensors, check_runs_as, figures, refusal, same, tensors_of
from tests.builders.quantised import FORMS, Written, small_config, write


def all_packed(network: Network) -> dict[str, Packed]:
    """Every packed weight of a network by its name."""
    return {
        f"{name}.{leaf}": weight
        for name, module in network.named_modules()
        for leaf, weight in packed_weights(module).items()
    }


@pytest.fixture(scope="module", params=FORMS.keys())
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("packed"), FORMS[request.param])


@pytest.mark.parity
def test_unpacked_values_equal_those_of_the_format_s_own_tools(written: Written) -> None:
    packed = all_packed(load_network(written.folder))
    assert len(packed) == 2 * 2 + 2 * 3 + 4 + 3 + 3, "experts, MLPs, attention and self-conditioning"
    for name, weight in packed.items():
        value = written.values[name]
        assert weight.shape == value.shape
        for dtype in (torch.float32, torch.bfloat16):
            if value.dtype == torch.float64:
                # By ModelOpt's rule in float64: two roundings of float32 lie between, one of them of the scales.
                torch.testing.assert_close(
                    weight.unpack(dtype).double(), value, rtol=2**-22 + torch.finfo(dtype).eps / 2, atol=0
                )
            # compressed-tensors restores 4-bit floats in bfloat16 only.
            elif value.dtype == torch.float32 or dtype == torch.bfloat16 or not isinstance(weight, Float4):
                assert bits(weight.unpack(dtype)) == bits(value.to(dtype)), name


@pytest.mark.parametrize("kind", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["int8 group asymmetric", "int4 group asymmetric", "int4 channel asymmetric"])
def test_zero_points_are_read_in_any_integer_type(name: str, kind: torch.dtype, tmp_path: Path) -> None:
    """Stored one by one, as int-quantized files have them, and packed ones of older versions."""
    made = write(tmp_path, FORMS[name])
    wanted = all_packed(load_network(made.folder))

    def change(tensors: dict[str, Tensor]) -> None:
        for part in [part for part in tensors if part.endswith("weight_zero_point")]:
            values = tensors[part]
            if values.dtype == torch.int32:
                rows = tensors[part.replace("zero_point", "scale")].shape[0]
                values = scales.zero_points(values, 4, rows)
            tensors[part] = values.to(kind)

    change_tensors(made.folder, change)
    read = all_packed(load_network(made.folder))
    assert {n: bits(w.unpack(torch.float32)) for n, w in read.items()} == {
        n: bits(w.unpack(torch.float32)) for n, w in wanted.items()
    }
    change_tensors(made.folder, lambda t: t.update({n: v * 0 + 300 for n, v in t.items() if "zero_point" in n}))
    error = refusal(made.folder)
    assert isinstance(error, DamagedFile) and "zero point of 300" in error.message


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("bits_each", [2, 3, 4, 8])
def test_zero_points_of_few_rows_are_unpacked(rows: int, bits_each: int) -> None:
    """All of them in one word: a column whose strides torch does not view as bytes."""
    half, groups = 1 << (bits_each - 1), 3
    zeros = torch.arange(rows * groups).view(rows, groups) % (2 * half) - half
    columns = []
    for group in range(groups):
        packed = sum((int(zeros[row, group]) + half) << (row * bits_each) for row in range(rows))
        columns.append(list(packed.to_bytes(-(-rows * bits_each // 32) * 4, "little")))
    words = torch.tensor(columns, dtype=torch.uint8).view(torch.int32).t().contiguous()
    assert torch.equal(scales.zero_points(words, bits_each, rows), zeros.to(torch.int8))


@pytest.mark.slow
def test_a_packed_network_computes_what_its_floats_compute(written: Written) -> None:
    network, reference = load_network(written.folder), written.reference()
    floats = {name: as_multiplied(weight) for name, weight in all_packed(network).items()}
    assert reference.load_state_dict(floats, strict=False).unexpected_keys == []
    check_runs_as(network, reference, two_rows)


def as_multiplied(weight: Packed) -> Tensor:
    """The values; a row's scale of 16 bits multiplies the product, where the tools round each value to 16 bits."""
    assert isinstance(weight, Codes | Nibbles | Float4)
    if isinstance(weight, Float4) or weight.scale.shape[-1] > 1 or weight.scale.itemsize > 2:
        return weight.unpack(torch.float32)
    values = replace(weight, scale=weight.scale.float()).unpack(torch.float32)
    torch.testing.assert_close(values, weight.unpack(torch.float32), rtol=2**-8, atol=0)
    return values


def two_rows(network: Network) -> Tensor:
    """Logits of both passes over two rows of different lengths, the second step of a canvas among them."""
    draw = torch.Generator().manual_seed(7)
    prompt = torch.randint(0, network.config.vocab_size, (2, 11), generator=draw)
    canvas = torch.randint(0, network.config.vocab_size, (2, network.config.canvas_length), generator=draw)
    with torch.no_grad():
        hidden, cache = network.read(prompt, network.empty_cache(2), torch.tensor([11, 6]))
        first = network.logits(network.denoise(canvas, cache, None))
        again = network.logits(network.denoise(canvas, cache, network.soft_embedding(first)))
        return torch.cat((network.logits(hidden)[:, :6], first, again), dim=1)


@pytest.mark.parametrize("name", ["fp8 channel", "int8 channel", "int4 group float16", "nvfp4", "modelopt nvfp4"])
def test_embedding_and_head_may_be_packed(name: str, tmp_path: Path) -> None:
    made = write(tmp_path, FORMS[name], packs=lambda base: "router" not in base)
    network, reference = load_network(made.folder), made.reference()
    packed = all_packed(network)
    assert "embed_tokens.weight" in packed
    reference.load_state_dict({n: w.unpack(torch.float32) for n, w in packed.items()}, strict=False)
    check_runs_as(network, reference, two_rows)
    ids = torch.tensor([[3, 0, 63], [3, 3, 1]])
    rows = network.embed_tokens(ids, torch.float32)
    assert bits(rows) == bits(packed["embed_tokens.weight"].unpack(torch.float32)[ids])


def test_experts_alone_may_be_packed_in_modelopt_s_layout(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["modelopt nvfp4"], packs=lambda base: ".experts." in base)
    packed = all_packed(load_network(made.folder))
    assert set(packed) == {f"layers.{n}.experts.{which}" for n in (0, 1) for which in ("gate_up_proj", "down_proj")}
    outer = packed["layers.0.experts.gate_up_proj"].global_scale
    assert all(len(row.unique()) == 2 for row in outer), "gate and up have outer scales of their own"


def test_plain_experts_may_be_stored_one_by_one(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["nvfp4"], packs=lambda base: False)
    network = load_network(made.folder)
    assert all_packed(network) == {}
    assert same(dict(network.state_dict()), made.values)


@pytest.mark.parametrize("shard_bytes", [500, 4_000, 20_000])
def test_parts_of_a_matrix_may_lie_in_different_shards(shard_bytes: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", FORMS["nvfp4"])
    parted = write(tmp_path / "parted", FORMS["nvfp4"], shard_bytes=shard_bytes)
    assert len(list(parted.folder.glob("*.safetensors"))) > 3
    assert bits(figures(load_network(parted.folder))) == bits(figures(load_network(whole.folder)))


def test_one_checkpoint_may_have_several_formats(tmp_path: Path) -> None:
    others = {"down_proj": FORMS["int4 group"], "q_proj": FORMS["fp8 channel"]}
    made = write(tmp_path, FORMS["nvfp4"], others=others)
    groups = {
        "a": FORMS["nvfp4"].config()["config_groups"]["group_0"],
        "b": FORMS["int4 group"].config()["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]},
        "c": FORMS["fp8 channel"].config()["config_groups"]["group_0"]
        | {"targets": [f"model.decoder.layers.{n}.self_attn.q_proj" for n in (0, 1)]},
    }
    change_json(
        made.folder / "config.json",
        lambda d: d["quantization_config"].update(config_groups=groups, format="mixed-precision"),
    )
    packed = all_packed(load_network(made.folder))
    assert {type(w) for n, w in packed.items() if "down_proj" in n} == {Nibbles}
    assert {type(w) for n, w in packed.items() if "q_proj" in n} == {Codes}
    for name, weight in packed.items():
        assert bits(weight.unpack(torch.bfloat16)) == bits(made.values[name].bfloat16())
    # A group that does not agree with what is there is not taken for another one that does.
    change_json(made.folder / "config.json", lambda d: d["quantization_config"]["config_groups"].pop("c"))
    assert "q_proj is stored as e4m3, quantization_config says 4-bit float" in refusal(made.folder).message


def test_hf_quant_config_counts_where_config_json_says_nothing(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["modelopt nvfp4"])
    before = figures(load_network(made.folder))
    change_json(made.folder / "config.json", lambda d: d.pop("quantization_config"))
    assert "config.json has no quantization_config" in refusal(made.folder).message
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (made.folder / "hf_quant_config.json").write_text(json.dumps(said))
    assert bits(figures(load_network(made.folder))) == bits(before)


def test_scales_of_activations_and_of_the_cache_change_nothing(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["nvfp4"])
    before = figures(load_network(made.folder))
    home = "model.decoder.layers.0.self_attn"
    extra = {f"{home}.q_proj.input_global_scale": torch.ones(1), f"{home}.k_scale": torch.ones(1)}
    extra |= {f"{home}.k_proj.k_scale": torch.ones(()), f"{home}.v_proj.v_scale": torch.ones(())}
    change_tensors(made.folder, lambda tensors: tensors.update(extra))
    assert bits(figures(load_network(made.folder))) == bits(before)
    change_tensors(made.folder, lambda t: t.update({"model.decoder.layers.9.self_attn.k_scale": torch.ones(1)}))
    assert isinstance(refusal(made.folder), CheckpointError)


def test_packed_weights_move_with_the_network(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["int8 channel"])
    network = load_network(made.folder)
    before = {name: weight.nbytes for name, weight in all_packed(network).items()}
    assert {weight.device.type for weight in all_packed(network.to("meta")).values()} == {"meta"}
    assert {name: weight.nbytes for name, weight in all_packed(network).items()} == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4 group", "fp8 channel"])
def test_packed_weights_run_in_narrow_types(name: str, dtype: str, tmp_path: Path) -> None:
    # Every token goes through all experts: rounding must not choose others.
    made = write(tmp_path, FORMS[name], config=replace(small_config(), top_k_experts=3))
    network = load_network(made.folder, dtype=dtype, compute_dtype=dtype)
    assert network.dtype == getattr(torch, dtype)
    got, wanted = two_rows(network), two_rows(made.reference())
    assert (got - wanted).abs().max() < (0.2 if dtype == "bfloat16" else 0.05) * wanted.abs().max()


@pytest.mark.parametrize(
    ("dtype", "compute"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_memory_is_checked_for_what_is_allocated(
    dtype: str, compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = write(tmp_path, FORMS["fp8 channel"]), []
    monkeypatch.setattr(load, "room_for", lambda size, device: asked.append(size) or nullcontext())
    network = load_network(made.folder, dtype=dtype, compute_dtype=compute)
    floats = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    assert asked == [floats + sum(weight.nbytes for weight in all_packed(network).values())]


def test_progress_counts_what_is_read(tmp_path: Path) -> None:
    made = write(tmp_path, FORMS["int4 group asymmetric"])
    calls: list[tuple[int, int]] = []
    load_network(made.folder, progress=lambda done, total: calls.append((done, total)))
    size = sum(tensor.nbytes for tensor in tensors_of(made.folder).values())
    assert calls[0] == (0, size)
    assert calls[-1] == (size, size)


def test_a_network_with_packed_weights_is_not_saved(tmp_path: Path) -> None:
    made = write(tmp_path / "packed", FORMS["fp8 channel"])
    with pytest.raises(RequestError, match="packed"):
        save_checkpoint(tmp_path / "saved", load_network(made.folder), generation=GenerationConfig())
    assert not (tmp_path / "saved").exists()
