"""The stored tensors of one matrix, and what is built from them: plain floats, or a layout of `ops/packed.py`.

    weight                float            plain
    weight                F8_E4M3          weight_scale                        Codes, e4m3 (fp8, mxfp8)
    weight                I8               weight_scale [, weight_zero_point]  Codes, int8; zeros of any integer
    weight                U8               weight_scale, weight_scale_2        Float4, scales multiplied (ModelOpt)
    weight_packed         I32              weight_scale, weight_shape [, weight_zero_point]    Nibbles, or Codes
    weight_packed         U8               weight_scale, weight_global_scale   Float4, divided (compressed-tensors)
    weight_packed         U8               weight_scale U8                     Float4, mxfp4

The stored tensors decide, and `quantization_config` must agree: its scheme for the matrix, or, where its names do not
cover the matrix, one of its schemes. Integers of 2, 3, 5, 6 and 7 bits take a byte each in memory.

Invariant: a matrix with a missing tensor, an extra one, or one that differs from its scheme in type or shape is refused
on the headers alone; a scale that no quantiser writes (NaN, infinite, negative, zero) is refused when it is read.

Run it:  python -m pytest tests/checkpoints/test_packed.py
Source: `compressed_tensors` 0.20, its compressors; NVIDIA ModelOpt's unified Hugging Face export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from blockpress.checkpoints.index import FLOATS, StoredTensor
from blockpress.checkpoints.safetensors import scales
from blockpress.config.quantization import Quantization, Scheme
from blockpress.errors import CheckpointError, MissingWeights, ShapeMismatch, UnexpectedWeights
from blockpress.ops.packed import Codes, Float4, Nibbles
from blockpress.ops.weight import Packed

PARTS = frozenset(
    {
        "weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point",
        "weight_shape",
    }
)  # fmt: skip
"""Last parts of the names of tensors that are read."""

ASIDE = frozenset(
    f"{what}_{part}" for what in ("input", "output", "q", "k", "v") for part in ("scale", "global_scale", "zero_point")
)
"""Scales of activations and of the cache, which stay in the network's type here (`config/quantization.py`)."""

_ANOTHER = "fetch the checkpoint again, or take one in another format"
_AGREE = "quantization_config and weights must come from the same save"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A stored tensor and its use: `convert` returns the layout's tensor `name`; where that is "", it only checks."""

    name: str
    stored: StoredTensor
    convert: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PackedRecipe:
    """How one matrix is read. Matrices of the same `form` may be stacked; `build` is None for plain floats."""

    name: str
    form: str
    fields: tuple[Field, ...]
    build: Callable[..., Packed] | None = None


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """The parts of one matrix [rows, columns]."""

    name: str
    rows: int
    columns: int
    parts: Mapping[str, StoredTensor]
    quantization: Quantization

    def part(self, name: str, codes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """The part of that name, which must have one of the types and, where given, one of the shapes."""
        if name not in self.parts:
            raise MissingWeights(
                f"the checkpoint lacks 1 tensor: {self.name}.{name}", hint=f"a packed weight needs it: {_ANOTHER}"
            )
        stored = self.parts[name]
        if stored.dtype not in codes:
            raise ShapeMismatch(
                f"the tensor {stored.name} is stored as {stored.dtype}",
                hint=f"it must be {' or '.join(codes)}: {_AGREE}",
            )
        if shapes and stored.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ShapeMismatch(
                f"the tensor {stored.name} has the shape {list(stored.shape)}, the config asks for {wanted}",
                hint=f"its weight is [{self.rows}, {self.columns}]: {_AGREE}",
            )
        return stored

    def only(self, *names: str) -> None:
        """Refuse parts of other names."""
        for name in self.parts:
            if name not in names:
                raise UnexpectedWeights(
                    f"nothing in the model takes {self.name}.{name}",
                    hint=f"stored next to it: {', '.join(n for n in self.parts if n != name)}; {_ANOTHER}",
                )

    def scheme(self, fits: Callable[[Scheme], bool], what: str) -> Scheme:
        """The config's scheme for this matrix, which must match what the files hold."""
        listed = self.quantization.scheme_of(self.name)
        known = self.quantization.schemes if listed is None else (listed,)
        match = next((scheme for scheme in known if fits(scheme)), None)
        if match is None:
            raise CheckpointError(
                f"{self.name} is stored as {what}, quantization_config says {' or '.join(map(str, known))}", hint=_AGREE
            )
        return match

    def divided(self, group: int) -> int:
        """The number of groups in a row. Raises ShapeMismatch: the columns are no multiple of `group`."""
        if self.columns % group:
            raise ShapeMismatch(
                f"{self.name} has rows of {self.columns} columns, which groups of {group} do not divide", hint=_AGREE
            )
        return self.columns // group


def read_recipe(
    name: str, parts: Mapping[str, StoredTensor], shape: tuple[int, ...], quantization: Quantization | None
) -> PackedRecipe:
    """How the tensors of one weight are read.

    Args:
        name: the published name, without the last part.
        parts: the stored tensors by the last part of their names.
        shape: of the weight, unpacked.
        quantization: None where the config has none, or where a weight of this kind is never packed, such as a stack
            stored as one tensor.

    Raises:
        MissingWeights, UnexpectedWeights, ShapeMismatch: parts that do not form one format, or of another shape.
        CheckpointError: the config names another format.
    """
    if len(shape) != 2:
        quantization = None
    weight = parts.get("weight")
    if weight is not None and (len(parts) == 1 or "weight_packed" in parts):
        if len(parts) > 1:
            raise UnexpectedWeights(
                f"the checkpoint holds both {weight.name} and {parts['weight_packed'].name}",
                hint=f"one weight is stored once: {_ANOTHER}",
            )
        if quantization is None or ("weight", weight.dtype) not in _READERS:
            return _plain(weight, name, shape)
    if quantization is None:
        extra = next(stored for part, stored in parts.items() if part != "weight")
        raise UnexpectedWeights(
            f"nothing in the model takes {extra.name}", hint=f"only matrices are packed: {_ANOTHER}"
        )
    matrix = _Matrix(name=name, rows=shape[0], columns=shape[1], parts=parts, quantization=quantization)
    main = parts.get("weight_packed") or weight
    if main is None:
        raise MissingWeights(f"the checkpoint lacks 1 tensor: {name}.weight", hint=f"its scales are there: {_ANOTHER}")
    reader = _READERS.get(("weight_packed" if "weight_packed" in parts else "weight", main.dtype))
    if reader is None:
        companion = next(part for part in parts if part != "weight")
        raise ShapeMismatch(
            f"the tensor {main.name} is stored as {main.dtype}, and {companion} next to it",
            hint=f"no format packs weights so: {_ANOTHER}",
        )
    return reader(matrix)


def _plain(stored: StoredTensor, name: str, shape: tuple[int, ...]) -> PackedRecipe:
    if stored.dtype not in FLOATS:
        raise ShapeMismatch(
            f"the tensor {stored.name} is stored as {stored.dtype}", hint=f"weights are stored as {', '.join(FLOATS)}"
        )
    if stored.shape != shape:
        raise ShapeMismatch(
            f"the tensor {stored.name} has the shape {list(stored.shape)}, the config asks for {list(shape)}",
            hint="the sizes differ: do config and weights come from the same save?",
        )
    return PackedRecipe(name=name, form="plain", fields=(Field(name="weight", stored=stored, convert=_same),))


def _fp8(m: _Matrix) -> PackedRecipe:
    codes = m.part("weight", ("F8_E4M3",), (m.rows, m.columns))
    m.only("weight", "weight_scale")
    if m.part("weight_scale", ("F8_E8M0", "U8", *scales.TYPES)).dtype in ("F8_E8M0", "U8"):
        scheme = m.scheme(lambda s: (s.kind, s.bits, s.group) == ("float", 8, 32), "e4m3 with scales of a byte")
        scale = m.part("weight_scale", ("F8_E8M0", "U8"), (m.rows, m.divided(32)))
        fields = [Field(name="codes", stored=codes, convert=_same)]
        fields += [Field(name="scale", stored=scale, convert=partial(scales.from_e8m0, scale.name))]
        return PackedRecipe(name=m.name, form="mxfp8", fields=tuple(fields), build=partial(Codes, group=32))
    scheme = m.scheme(lambda s: (s.kind, s.bits) == ("float", 8), "e4m3")
    return _codes(m, Field(name="codes", stored=codes, convert=_same), scheme, "fp8")


def _int8(m: _Matrix) -> PackedRecipe:
    codes = m.part("weight", ("I8",), (m.rows, m.columns))
    m.only("weight", "weight_scale", "weight_zero_point")
    # The format naive-quantized stores fewer bits in a byte each.
    scheme = m.scheme(lambda s: s.kind == "int", "int8")
    return _codes(m, Field(name="codes", stored=codes, convert=_same), scheme, "int8")


def _packed_integers(m: _Matrix) -> PackedRecipe:
    words = m.part("weight_packed", ("I32",))
    m.only("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    scheme = m.scheme(lambda s: s.kind == "int" and words.shape == (m.rows, _words(m.columns, s.bits)), _shaped(words))
    fits_nibbles = scheme.bits == 4 and m.columns % 2 == 0 and scheme.strategy != "block"
    convert: Callable[[Tensor], Tensor] = partial(scales.integers, bits=scheme.bits, count=m.columns)
    main = Field(name="codes", stored=words, convert=convert)
    if fits_nibbles:
        main = Field(name="packed", stored=words, convert=partial(scales.nibbles, count=m.columns))
    recipe = _codes(m, main, scheme, f"int{scheme.bits}", packed_zero=True)
    if "weight_shape" not in m.parts:
        return recipe
    shape = m.part("weight_shape", ("I64", "I32"), (2,))
    check = Field(name="", stored=shape, convert=partial(scales.check_shape, shape.name, (m.rows, m.columns)))
    return PackedRecipe(name=m.name, form=recipe.form, fields=(*recipe.fields, check), build=recipe.build)


def _codes(m: _Matrix, main: Field, scheme: Scheme, what: str, packed_zero: bool = False) -> PackedRecipe:
    """Codes with scales on the scheme's grid, and zero points where it is not symmetric."""
    shapes, height, group = _grid(m, scheme)
    scale = m.part("weight_scale", scales.TYPES, *shapes)
    expand = partial(scales.expand_scales, rows=m.rows, height=height)
    fields = [main, Field(name="scale", stored=scale, convert=lambda t: expand(scales.checked(scale.name, t)))]
    has_zero = "weight_zero_point" in m.parts
    if has_zero or not scheme.symmetric:
        in_words = [(_words(m.rows, scheme.bits), m.columns // group)]
        packs = packed_zero and scheme.strategy in ("group", "channel")
        in_words = in_words if packs and m.part("weight_zero_point", scales.INTEGERS).dtype == "I32" else []
        zero_point = m.part("weight_zero_point", scales.INTEGERS, *in_words, *shapes)
        convert: Callable[[Tensor], Tensor] = partial(scales.zero_points, bits=scheme.bits, count=m.rows)
        if zero_point.shape not in in_words:
            convert = lambda t: expand(scales.as_int8(zero_point.name, t))  # noqa: E731
        fields += [Field(name="zero_point", stored=zero_point, convert=convert)]
    form = f"{what}, {group} columns under a scale of {scale.dtype}{', with zero points' * (len(fields) > 2)}"
    layout: Any = Nibbles if main.name == "packed" else Codes
    return PackedRecipe(name=m.name, form=form, fields=tuple(fields), build=partial(layout, group=group))


def _grid(m: _Matrix, scheme: Scheme) -> tuple[list[tuple[int, ...]], int, int]:
    """The shapes that scales may have, and the rows (0: all) and columns that one scale covers."""
    per_tensor: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    per_row: list[tuple[int, ...]] = [(m.rows, 1), (m.rows,)]
    match scheme.strategy:
        case "tensor":
            return per_tensor, 0, m.columns
        case "channel":
            return per_row, 1, m.columns
        case "block" if scheme.block is not None:
            height, width = scheme.block
            return [(-(-m.rows // height), -(-m.columns // width))], height, min(width, m.columns)
        case "group" | "tensor_group" if scheme.group is not None:
            return [(m.rows, m.divided(scheme.group))], 1, scheme.group
    # ModelOpt names only the algorithm; the scales' shape gives the grid.
    stored = m.parts.get("weight_scale")
    by_row = stored is not None and stored.shape in per_row and stored.shape not in per_tensor
    return (per_row, 1, m.columns) if by_row else (per_tensor, 0, m.columns)


def _float4(m: _Matrix) -> PackedRecipe:
    """NVFP4 of compressed-tensors, or MXFP4: the scales' type tells which."""
    if m.part("weight_scale", ("F8_E4M3", "F8_E8M0", "U8")).dtype == "F8_E4M3":
        m.only("weight_packed", "weight_scale", "weight_global_scale")
        return _nvfp4(m, "weight_packed", "weight_global_scale", divides=True)
    m.only("weight_packed", "weight_scale")
    m.scheme(lambda s: (s.kind, s.bits, s.group) == ("float", 4, 32), "e2m1 with scales of a byte")
    scale = m.part("weight_scale", ("F8_E8M0", "U8"), (m.rows, m.divided(32)))
    packed = m.part("weight_packed", ("U8",), (m.rows, m.columns // 2))
    fields = [Field(name="packed", stored=packed, convert=_same)]
    fields += [Field(name="scale", stored=scale, convert=partial(scales.e8m0_codes, scale.name))]
    return PackedRecipe(name=m.name, form="mxfp4", fields=tuple(fields), build=partial(Float4, kind="e8m0", group=32))


def _modelopt(m: _Matrix) -> PackedRecipe:
    m.only("weight", "weight_scale", "weight_scale_2")
    return _nvfp4(m, "weight", "weight_scale_2", divides=False)


def _nvfp4(m: _Matrix, main: str, global_name: str, divides: bool) -> PackedRecipe:
    m.scheme(lambda s: (s.kind, s.bits, s.group) == ("float", 4, 16), "nvfp4")
    groups = m.divided(16)
    packed = m.part(main, ("U8",), (m.rows, m.columns // 2))
    scale = m.part("weight_scale", ("F8_E4M3",), (m.rows, groups))
    global_scale = m.part(global_name, ("F32",), (), (1,))
    fields = (
        Field(name="packed", stored=packed, convert=_same),
        Field(name="scale", stored=scale, convert=partial(scales.e4m3_codes, scale.name)),
        Field(
            name="global_scale",
            stored=global_scale,
            convert=lambda t: scales.checked(global_scale.name, t).reshape(1).expand(m.rows),
        ),
    )
    build = partial(Float4, kind="e4m3", group=16, divides=divides)
    return PackedRecipe(name=m.name, form=f"nvfp4, global scale in {global_name}", fields=fields, build=build)


_READERS: Mapping[tuple[str, str], Callable[[_Matrix], PackedRecipe]] = {
    ("weight", "F8_E4M3"): _fp8,
    ("weight", "I8"): _int8,
    ("weight", "U8"): _modelopt,
    ("weight_packed", "I32"): _packed_integers,
    ("weight_packed", "U8"): _float4,
}


def _words(count: int, bits: int) -> int:
    """The number of int32 words for `count` integers of `bits` bits, packed without gaps."""
    return -(-count * bits // 32)


def _shaped(stored: StoredTensor) -> str:
    return f"integers packed to the shape {list(stored.shape)}"


def _same(tensor: Tensor) -> Tensor:
    return tensor
