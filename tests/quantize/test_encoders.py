"""Encoders against compressed-tensors as the reader: the same values, bit for bit; less error with more bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization.utils import generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.errors import RequestError
from blockpress.quantize.encoders import FORMATS, ErrorSum, Format, Fp8, Int4Groups, Int8Rows, Nvfp4, format_named
from blockpress.quantize.encoders.fp4 import to_e2m1
from blockpress.quantize.encoders.layout import TILE
from tests.quantize.oracle import restore, scheme_of

pytestmark = pytest.mark.parity

PLAIN: dict[str, Format] = {
    "fp8": Fp8(),
    "int8": Int8Rows(search=False),
    "nvfp4": Nvfp4(search=False),
    "int4": Int4Groups(search=False),
}
EVERY = [*(make() for make in FORMATS.values()), Int8Rows(search=False), Nvfp4(search=False), Int4Groups(group=128)]
names = pytest.mark.parametrize("form", EVERY, ids=lambda form: f"{form.name}-{getattr(form, 'search', '')}")


def weight(seed: int, rows: int = 24, columns: int = 256, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values, rows of very different sizes, an outlier, a row and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 1, rows)[:, None]
    drawn[1] = 0
    drawn[2, :32] = 0
    drawn[3, 5] = 40 * drawn[3].abs().max()
    return drawn.to(dtype)


def relative(form: Format, original: Tensor) -> float:
    errors = ErrorSum()
    errors.add(original, form.encode(original).values)
    return errors.result().relative


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_compressed_tensors_reads_the_encoded_values(form: Format, dtype: torch.dtype) -> None:
    encoded = form.encode(weight(1, dtype=dtype))
    read = restore(form, encoded.tensors)
    assert read.dtype == encoded.values.dtype
    assert torch.equal(read, encoded.values)


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layout_is_that_of_compressed_tensors(form: Format, dtype: torch.dtype) -> None:
    """Names, types and shapes are those that its own compressor writes, and those that we announce beforehand."""
    original, scheme = weight(2, dtype=dtype), scheme_of(form)
    tensors = form.encode(original).tensors
    compressor = BaseCompressor.get_value_from_registry(form.compression)
    scale = tensors["weight_scale"].to(dtype)
    state = {"weight": original, "weight_scale": scale}
    if "weight_global_scale" in tensors:
        state["weight_global_scale"] = tensors["weight_global_scale"]
    theirs = compressor.compress(state, scheme)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in theirs.items()} == form.layout(24, 256, dtype)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == form.layout(24, 256, dtype)
    assert infer_module_format(torch.nn.Linear, scheme).value == form.compression


@pytest.mark.parametrize("form", [Fp8(), Int8Rows(), Int4Groups(), Nvfp4()], ids=lambda form: form.name)
def test_codes_are_those_of_compressed_tensors_under_the_same_scales(form: Format) -> None:
    """Rounding included (half to even): its compressor, given our scales, writes our codes, but for the sign of zero."""
    original = weight(3, dtype=torch.float32)
    tensors = form.encode(original).tensors
    state = {"weight": original, "weight_scale": tensors["weight_scale"].float()}
    if "weight_global_scale" in tensors:
        state["weight_global_scale"] = tensors["weight_global_scale"]
    theirs = BaseCompressor.get_value_from_registry(form.compression).compress(state, scheme_of(form))
    assert torch.equal(restore(form, theirs), restore(form, tensors))
    if form.name.startswith("int"):
        code = "weight" if form.name == "int8" else "weight_packed"
        assert torch.equal(theirs[code], tensors[code])


def test_e2m1_rounds_ties_to_even_as_compressed_tensors_does() -> None:
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    y = torch.arange(-640, 641).float() / 64
    index, value = to_e2m1(y[None])
    assert torch.equal(value[0], FP4_E2M1_DATA.cast_to_fp4(y.clamp(-6, 6)))
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(levels[index[0].abs().long()] * y.sign(), value[0])


@names
def test_results_do_not_depend_on_tiles(form: Format) -> None:
    rows = 2 * TILE // 256 + 3
    original = weight(4, rows=rows)
    # nvfp4's global scale is that of the whole, whatever the part.
    amax = float(original.abs().max())
    whole, part = form.encode(original, amax), form.encode(original[-5:].clone(), amax)
    assert torch.equal(whole.values[-5:], part.values)
    for name, tensor in part.tensors.items():
        if tensor.shape[0] == 5:
            assert torch.equal(whole.tensors[name][-5:].view(torch.uint8), tensor.view(torch.uint8)), name


@given(seed=st.integers(0, 2**31), tail=st.sampled_from([0.0, 0.5, 1.0]))
def test_more_bits_have_less_error(seed: int, tail: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(16, 256, generator=generator)
    original *= torch.exp(tail * torch.randn(16, 256, generator=generator))
    error = {name: relative(make(), original) for name, make in FORMATS.items()}
    assert error["int8"] < error["int4"] and error["fp8"] < error["nvfp4"]
    assert 0.001 < error["int8"] < 0.08 and error["fp8"] < 0.035 and max(error.values()) < 0.15
    assert relative(Int4Groups(group=32), original) < relative(Int4Groups(group=128), original)


@given(seed=st.integers(0, 2**31))
def test_the_scale_search_never_increases_the_error(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(8, 64, generator=generator) ** 3
    for form, group in ((Nvfp4(), 16), (Int4Groups(), 32), (Int8Rows(), 64)):
        searched, plain = (
            (f.encode(original).values.float() - original).view(-1, group).norm(dim=1) for f in (form, PLAIN[form.name])
        )
        # nvfp4 is restored in bfloat16, whose own rounding (2^-9 of a value, on either side) the search does not see.
        unseen = original.view(-1, group).norm(dim=1) * (2**-8 if form.name == "nvfp4" else 1e-6)
        assert bool((searched <= plain + unseen).all()), form.name


def test_the_scale_search_reduces_the_error() -> None:
    original = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    assert relative(Nvfp4(), original) < 0.88 * relative(PLAIN["nvfp4"], original)
    assert relative(Int4Groups(), original) < 0.92 * relative(PLAIN["int4"], original)
    assert relative(Int8Rows(), original) <= relative(PLAIN["int8"], original)


def test_the_global_scale_of_nvfp4_is_that_of_compressed_tensors() -> None:
    original = weight(6, dtype=torch.float32)
    theirs = generate_gparam(original.min(), original.max())
    assert torch.equal(Nvfp4().encode(original).tensors["weight_global_scale"], theirs)
    shared = Nvfp4().encode(original, amax=2 * float(original.abs().max()))
    assert torch.equal(shared.tensors["weight_global_scale"], theirs / 2)
    assert torch.equal(restore(Nvfp4(), shared.tensors), shared.values)


@names
def test_zeros_and_tiny_values_have_usable_scales(form: Format) -> None:
    for original in (torch.zeros(4, 128), torch.full((4, 128), 1e-44), torch.full((4, 128), 5.3e-38).bfloat16()):
        encoded = form.encode(original)
        for name, tensor in encoded.tensors.items():
            if "scale" in name:
                assert bool((tensor.float() > 0).all()) and bool(tensor.float().isfinite().all()), name
        assert torch.equal(restore(form, encoded.tensors), encoded.values) and not encoded.values.isnan().any()


@names
def test_random_codes_have_the_given_standard_deviation(form: Format) -> None:
    rng = np.random.default_rng(7)
    tensors = form.draw(256, 1024, 0.03, rng)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == form.layout(256, 1024, torch.bfloat16)
    values = restore(form, tensors).float()
    assert values.isfinite().all()
    assert float(values.std()) == pytest.approx(0.03, rel=0.02) and abs(float(values.mean())) < 0.0003
    assert float((values / 0.03).pow(4).mean()) == pytest.approx(2.7, abs=0.5), (
        "nearly as heavy in the tails as normal values, 3"
    )
    assert not torch.equal(restore(form, form.draw(256, 1024, 0.03, rng)).float(), values)


def test_formats_are_found_by_name_and_refused_by_name() -> None:
    assert [format_named(name).name for name in FORMATS] == ["fp8", "int8", "nvfp4", "int4"]
    assert format_named("int4", 64) == Int4Groups(group=64)
    for arguments in (("q4",), ("int4", 48), ("fp8", 32)):
        with pytest.raises(RequestError) as caught:
            format_named(*arguments)
        assert str(arguments[-1]) in caught.value.message
    assert (
        not Nvfp4().supports(24)
        and Nvfp4().supports(704)
        and Int4Groups().supports(704)
        and not Int4Groups(group=128).supports(704)
    )
