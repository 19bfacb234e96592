"""A layer in two calls of C++ against the same layer module by module in torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from blockpress.config import PRESETS, LayerConfig, ModelConfig
from blockpress.model import fused as fusing
from blockpress.model.layers import Experts, Layer, Linear, Rotary, put_packed
from blockpress.model.network import CachedAttention
from blockpress.ops import attention, blocks
from blockpress.ops.cpu import bridge
from blockpress.ops.integers import quantized
from blockpress.ops.packed import HalfFloats
from blockpress.ops.rope import rotary_tables
from tests.conftest import make_random_network
from tests.ops import layouts
from tests.ops.draws import numbers

pytestmark = pytest.mark.skipif(bridge.library() is None, reason="no C++ compiler")
TYPES = [torch.float32, torch.bfloat16]
NONE = {"num_experts": 0, "top_k_experts": 0, "expert_size": 0}


def configs() -> dict[str, tuple[ModelConfig, int]]:
    """A configuration and which of its layers. Sliding layers have values of their own, full ones make them of keys."""
    tiny = PRESETS["tiny"]()
    gemma = replace(tiny, family="gemma4", canvas_length=1)
    odd = LayerConfig(kind="sliding_attention", head_dim=22, kv_heads=1)
    return {
        "canvas, own values": (tiny, 0),
        "canvas, values of keys": (tiny, 1),
        "gemma, own values": (gemma, 0),
        "gemma, values of keys": (gemma, 1),
        "dense, own values": (replace(gemma, **NONE), 0),
        "dense, values of keys": (replace(gemma, **NONE), 1),
        "odd sizes": (
            replace(tiny, hidden_size=37, intermediate_size=71, expert_size=19, num_heads=3, layers=(odd,)),
            0,
        ),
    }


CONFIGS = configs()


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def usable() -> list[torch.dtype]:
    """The types of activations that go to the C++: not bfloat16, where the processor has tiles for it."""
    with torch.no_grad():
        return [dtype for dtype in TYPES if bridge.supports(torch.zeros(1, dtype=dtype))]


def layer_of(name: str, seed: int = 3) -> Layer:
    config, index = CONFIGS[name]
    return make_random_network(config, seed).layers[index]


def tables(layer: Layer, batch: int, length: int, dtype: torch.dtype) -> Rotary:
    """Every batch entry at places of its own."""
    places = torch.arange(length) + 5 * torch.arange(batch)[:, None]
    turns = torch.rand(layer.self_attn.dim // 2, generator=torch.Generator().manual_seed(1))
    return rotary_tables(places, turns, dtype)


def run(layer: Layer, x: Tensor, causal: bool | Tensor = True, skip: int = 0, op: Callable = attention.plain):  # type: ignore[no-untyped-def, type-arg]
    """Output, keys and values."""
    look = CachedAttention(None, None, op)
    out = layer(x, tables(layer, len(x), x.shape[1], x.dtype), look, causal=causal, skip=skip)
    return out, *look.new_kv


def in_torch(layer: Layer, x: Tensor, causal: bool | Tensor = True, skip: int = 0):  # type: ignore[no-untyped-def]
    with mock.patch.object(bridge, "supports", return_value=False):
        return run(layer, x, causal, skip)


def check(layer: Layer, x: Tensor, causal: bool | Tensor = True, skip: int = 0) -> None:
    """Fused, and the same: in float32 within float rounding, in bfloat16 no further from float32 than torch is."""
    if x.dtype not in usable():
        pytest.skip("torch is the faster one here")
    assert fusing.fused_layer(layer, x, skip) is not None, "else both are one"
    got, plain = run(layer, x, causal, skip), in_torch(layer, x, causal, skip)
    exact = in_torch(copy.deepcopy(layer).float(), x.float(), causal, skip)
    for own, other, wanted in zip(got, plain, exact, strict=True):
        assert own.shape == other.shape and own.dtype == other.dtype
        if x.dtype == torch.float32:
            torch.testing.assert_close(own, other, rtol=2e-5, atol=2e-5)
        else:
            most = 1.15 if own.numel() > 500 else 1.6  # the fewer the values, the more it is chance
            assert (own - wanted).norm() <= most * (other - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_fused_layer_equals_the_modules(name: str, dtype: torch.dtype, length: int, batch: int) -> None:
    layer = layer_of(name).to(dtype)
    x = numbers(batch, length, layer.input_layernorm.weight.numel(), dtype=dtype)
    check(layer, x)
    if layer.has_canvas:
        check(layer, x, causal=False)
        scaled = in_torch(layer, x, causal=False)[0]
        assert not torch.equal(scaled, in_torch(layer, x)[0]), "the scalars differ, so that it shows which one is taken"
    check(layer, x, causal=torch.arange(length) % 3 == 0)


@pytest.mark.parametrize("skip", [1, 6, 13])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_kv_only_rows_equal_the_modules(name: str, dtype: torch.dtype, skip: int) -> None:
    layer = layer_of(name).to(dtype)
    x = numbers(1, 14, layer.input_layernorm.weight.numel(), dtype=dtype)
    check(layer, x, skip=skip)
    check(layer, x, causal=torch.arange(14) % 3 == 0, skip=skip)


def of_integers(layer: Layer) -> Layer:
    """Its matrices as integers, the router's apart."""
    for part in [*layer.modules()]:
        if isinstance(part, Linear) and part is not getattr(getattr(layer, "router", None), "proj", None):
            put_packed(part, "weight", quantized(part.weight))
        elif isinstance(part, Experts):
            put_packed(part, "gate_up_proj", quantized(part.gate_up_proj))
            put_packed(part, "down_proj", quantized(part.down_proj))
    return layer


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_fused_int8_layer_equals_the_modules(name: str, length: int) -> None:
    """Floats between the products differ in their last bits, which now and then makes another code: a step of 127."""
    layer = of_integers(layer_of(name))
    x = numbers(1, length, layer.input_layernorm.weight.numel())
    if torch.float32 not in usable():
        pytest.skip("torch is the faster one here")
    assert fusing.fused_layer(layer, x, 0) is not None, "else both are one"
    for skip in (0, length // 2):
        for own, other in zip(run(layer, x, skip=skip), in_torch(layer, x, skip=skip), strict=True):
            assert float((own - other).norm() / other.norm()) < 5e-3
            assert float((own - other).abs().median()) < 2e-6 * float(other.abs().max())
    plain = run(layer_of(name), x)[0]
    off = float((run(layer, x)[0] - plain).norm() / plain.norm())
    assert 1e-4 < off < 0.3, "it is rounded, so that now and then a token goes to another expert"


def test_mixed_int8_and_float_layers_use_the_modules() -> None:
    """What shares its rows is multiplied in one way, or each by itself."""
    for name in ("q_proj", "o_proj"):
        layer = of_integers(layer_of("canvas, own values"))
        x, part = numbers(1, 9, 32), getattr(layer.self_attn, name)
        put_packed(part, "weight", HalfFloats(values=part.weight.unpack(torch.bfloat16)))
        assert (fusing.fused_layer(layer, x, 0) is None) == (name == "q_proj")
        torch.testing.assert_close(run(layer, x)[0], in_torch(layer, x)[0], rtol=2e-2, atol=2e-2)


def test_unsupported_inputs_use_the_modules() -> None:
    layer, x = layer_of("canvas, own values"), numbers(2, 6, 32)
    assert fusing.fused_layer(layer, x, 0) is not None
    assert fusing.fused_layer(layer, x, 2) is None and fusing.fused_layer(layer, x[:1], 6) is None
    assert fusing.fused_layer(layer, x[:, :0], 0) is None and fusing.fused_layer(layer, x.double(), 0) is None
    assert run(layer, x, skip=2)[0].shape == (2, 4, 32)
    assert run(layer, x[:1], skip=6)[0].shape == (1, 0, 32)
    assert fusing.fused_layer(layer, x.bfloat16(), 0) is None, "its vectors are float32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fusing.fused_layer(layer, x, 0) is None, "a product's type is autocast's to choose"


def test_gradients_use_the_modules() -> None:
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    run(layer, x)
    with torch.enable_grad():
        assert fusing.fused_layer(layer, x, 0) is None
        run(layer, x.requires_grad_())[0].sum().backward()
    assert x.grad is not None and all(each.grad is not None for each in layer.mlp.parameters())


@pytest.mark.parametrize("kind", ["strided", "slice of rows", "of a wider tensor"])
def test_strided_activations_give_the_same(kind: str) -> None:
    layer = layer_of("canvas, own values")
    x = {
        "strided": numbers(1, 18, 32)[:, ::2],
        "slice of rows": numbers(2, 18, 32)[:, 3:12],
        "of a wider tensor": numbers(1, 9, 48)[:, :, 8:40],
    }[kind]
    check(layer, x)
    check(layer, x, causal=(torch.arange(18) % 3 == 0)[::2])


def test_strided_attention_output_gives_the_same() -> None:
    """Heads side by side or not, rows some way apart."""
    layer, x = layer_of("canvas, own values"), numbers(1, 9, 32)

    def apart(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mixed = attention.plain(query, key, value, mask).transpose(1, 2)
        return torch.cat((mixed, mixed * 0 + 9), dim=2)[:, :, : mixed.shape[2]].transpose(1, 2)

    torch.testing.assert_close(run(layer, x, op=apart)[0], run(layer, x)[0], rtol=0, atol=0)


def test_rotary_tables_of_another_type_give_the_same() -> None:
    layer, x = layer_of("canvas, own values").bfloat16(), numbers(1, 9, 32, dtype=torch.bfloat16)
    rotary, look = tables(layer, 1, 9, torch.float32), CachedAttention(None, None, attention.plain)
    assert torch.equal(layer(x, rotary, look, causal=True), run(layer, x)[0])


# ---- weights


def matrices(layer: Layer) -> list[tuple[nn.Module, str]]:
    owners = [(each, "weight") for each in layer.modules() if isinstance(each, Linear)]
    stacks = [
        (each, name) for each in layer.modules() if isinstance(each, Experts) for name in ("gate_up_proj", "down_proj")
    ]
    return owners + stacks


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["canvas, own values", "dense, values of keys", "odd sizes"])
def test_weights_narrower_than_activations_give_the_same(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    layer = layer_of(name)
    for owner, weight in matrices(layer):
        put_packed(owner, weight, HalfFloats(values=getattr(owner, weight).to(stored)))
    layer = layer.to(dtype)
    check(layer, numbers(1, 11, layer.input_layernorm.weight.numel(), dtype=dtype))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_packed_codes_give_the_same(layout: str) -> None:
    """Of 8 and of 4 bits, in a matrix, in the MLP and in the experts."""
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    made = layouts.LAYOUTS[layout]
    put_packed(layer.self_attn.q_proj, "weight", made((32, 32), 0))
    put_packed(layer.mlp.up_proj, "weight", made((48, 32), 1))
    put_packed(layer.experts, "gate_up_proj", made((4, 32, 32), 2))
    assert fusing.fused_layer(layer, x, 0) is not None
    torch.testing.assert_close(run(layer, x)[0], in_torch(layer, x)[0], rtol=1e-4, atol=1e-4)


def test_gguf_blocks_use_the_modules() -> None:
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    packed = blocks.Blocks(torch.zeros(32, 34, dtype=torch.uint8), blocks.LAYOUTS["Q8_0"])
    put_packed(layer.self_attn.q_proj, "weight", packed)
    assert fusing.fused_layer(layer, x, 0) is None
    torch.testing.assert_close(run(layer, x)[0], in_torch(layer, x)[0], rtol=1e-4, atol=1e-4)


CHANGES: dict[str, Callable[[Layer], object]] = {
    "a parameter": lambda layer: setattr(layer.mlp.up_proj, "weight", nn.Parameter(numbers(48, 32, seed=5))),
    "its data": lambda layer: setattr(layer.mlp.up_proj.weight, "data", numbers(48, 32, seed=5)),
    "in place": lambda layer: layer.mlp.up_proj.weight.neg_(),
    "a part of wider data": lambda layer: setattr(layer.mlp.up_proj.weight, "data", numbers(48, 64, seed=5)[:, :32]),
    "a module": lambda layer: setattr(layer.mlp, "up_proj", Linear(32, 48)),
    "a module of modules": lambda layer: setattr(layer, "mlp", layer_of("canvas, own values", 8).mlp),
    "a norm's data": lambda layer: setattr(layer.post_feedforward_layernorm_2.weight, "data", numbers(32, seed=5)),
    "a scalar": lambda layer: setattr(layer, "causal_scalar", torch.tensor([3.0])),
    "a stack": lambda layer: setattr(layer.experts.down_proj, "data", numbers(4, 32, 16, seed=5)),
    "a packed weight": lambda layer: put_packed(
        layer.mlp.up_proj, "weight", HalfFloats(values=numbers(48, 32, dtype=torch.bfloat16, seed=5))
    ),
    "codes": lambda layer: put_packed(layer.mlp.up_proj, "weight", layouts.int8((48, 32), 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_is_seen(change: str) -> None:
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    before = run(layer, x)[0]
    CHANGES[change](layer)
    got = run(layer, x)[0]
    torch.testing.assert_close(got, in_torch(layer, x)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, before, atol=1e-2), "it is a change"


def test_an_in_place_change_of_type_is_seen() -> None:
    """The same object at the same address, read another way."""
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    weight = layer.mlp.up_proj.weight
    weight.data = weight.data.bfloat16()
    run(layer, x) if fusing.fused_layer(layer, x, 0) else None
    address = weight.data_ptr()
    weight.data = weight.data.view(torch.float16)
    assert weight.data_ptr() == address
    found = fusing.fused_layer(layer, x, 0)
    assert found is not None and found.after.up.kind == bridge.KINDS[torch.float16]  # type: ignore[attr-defined]


def test_a_change_of_type_is_seen() -> None:
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    first = run(layer, x)[0]
    check(layer.bfloat16(), x.bfloat16())
    rounded = run(layer.float(), x)[0]
    check(layer, x)
    assert not torch.equal(first, rounded)


def test_a_copied_layer_has_its_own_weights() -> None:
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    before = run(layer, x)[0]
    other = copy.deepcopy(layer)
    assert torch.equal(run(other, x)[0], before)
    other.mlp.up_proj.weight.zero_()
    assert torch.equal(run(layer, x)[0], before)
    assert not torch.equal(run(other, x)[0], before)
    again = pickle.loads(pickle.dumps(layer))
    layer.mlp.up_proj.weight.zero_()
    assert torch.equal(run(again, x)[0], before)
    assert torch.equal(run(layer, x)[0], run(other, x)[0])


def test_a_deleted_layer_is_forgotten() -> None:
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    run(layer, x)
    held = len(fusing._LAYERS)
    assert layer in fusing._LAYERS
    del layer
    assert len(fusing._LAYERS) == held - 1


class Adapted(nn.Module):
    """What an adapter does to a product: adds another one."""

    def __init__(self, inner: Linear, named_alike: bool) -> None:
        super().__init__()
        self.inner = inner
        if named_alike:
            self.weight = inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("named_alike", [True, False])
def test_a_module_of_another_kind_is_called(named_alike: bool) -> None:
    layer, x = layer_of("canvas, own values"), numbers(1, 6, 32)
    before = run(layer, x)[0]
    layer.mlp.up_proj = Adapted(layer.mlp.up_proj, named_alike)  # type: ignore[assignment]
    assert fusing.fused_layer(layer, x, 0) is None
    torch.testing.assert_close(run(layer, x)[0], in_torch(layer, x)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(layer, x)[0], before, atol=1e-2)


# ---- routing


@pytest.mark.parametrize(("count", "top_k"), [(2, 1), (5, 2), (16, 3), (16, 16), (70, 1), (130, 2), (130, 3)])
@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_ties_are_broken_as_topk_breaks_them(count: int, top_k: int, kinds: int, dtype: torch.dtype) -> None:
    """Only `kinds` different scores: which of the experts that tie are taken shows, since each has weights of its own."""
    config = replace(PRESETS["tiny"](), num_experts=count, top_k_experts=top_k)
    layer = make_random_network(config, 2).layers[0]
    order = torch.randint(0, kinds, (count,), generator=torch.Generator().manual_seed(count))
    layer.router.proj.weight.data = layer.router.proj.weight[order].contiguous()
    layer = layer.to(dtype)
    x = numbers(1, 9, 32, dtype=dtype)
    check(layer, x)
