"""Fixes for Triton's interpreter: bfloat16 is computed as floats, narrow floats are rounded, in half the time.

Why: on the CPU Triton 3.6 keeps a bfloat16 as its 16 bits, and adds, multiplies and compares those bits as integers;
and it truncates to 8-bit floats. Here arithmetic is done in float32 and rounded to nearest, as on the GPU. And where
tiles are small, most of its time goes to what it throws away or has computed already.

Invariant: without TRITON_INTERPRET=1 nothing here is called.
Run it:  TRITON_INTERPRET=1 python -m blockpress.bench.gpu check
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


@cache
def mend() -> None:
    """Replace the interpreter's bfloat16 arithmetic and its casts to narrow floats; the rest computes the same."""
    builder: Any = interpreter.InterpreterBuilder
    for name in ("binary_op", "ternary_op", "unary_op"):
        setattr(builder, name, _in_floats(getattr(builder, name)))
    builder.create_dot = _dot
    builder.create_fma = _fma
    builder.cast_impl = _casting(builder.cast_impl)
    builder.create_fp_to_fp = _casting(builder.create_fp_to_fp)
    interpreter._patch_lang_tensor = _with_bounds(interpreter._patch_lang_tensor)
    _hasten()


def _hasten() -> None:
    """Leave out what the interpreter computes for nothing, and keep what it computes again and again."""
    # It computes whether integers overflow, and looks at the answer only with `debug`.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _shared(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _init_tensor


def _once(patch: Any) -> Any:
    """The language is replaced once for a module, for good: not at each call of a kernel or of a function in it."""
    seen: set[int] = set()

    def patched(function: Any) -> Any:
        if id(function.__globals__) not in seen:
            seen.add(id(function.__globals__))
            patch(function)
        return interpreter._LangPatchScope()

    return patched


def _by_name(dtype_of: Any) -> Any:
    """numpy's type of a Triton type, which is that of its elements."""
    kept: dict[str, Any] = {}

    def found(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in kept:
            kept[name] = dtype_of(dtype)
        return kept[name]

    return found


def _shared(init: Any) -> Any:
    """Blocks of one shape and type share what describes them, and with it the shape that their tensors have."""
    kept: dict[Any, dict[str, Any]] = {}

    def init_shared(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        key = (element_ty.name, getattr(element_ty, "address_space", 0), sizes)
        if key not in kept:
            init(self, element_ty, shape)
            own = {"tensor_shape": tl.tuple([tl.constexpr(size) for size in sizes]), "count": tl.constexpr(self.numel)}
            kept[key] = vars(self) | own
        vars(self).update(kept[key])

    return init_shared


SCALAR = (tl.tuple([]), tl.constexpr(1))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """As `tl.tensor` does it, with what `_shared` has of the type."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = (type.tensor_shape, type.count) if type.is_block() else SCALAR


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32.

    >>> widened(np.array([0x3F80, 0xC040], dtype=np.uint16)).tolist()
    [1.0, -3.0]
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of the nearest bfloat16, ties to even.

    >>> widened(rounded(np.array([1.0, 1.00390625, 1.01171875, -3.0], dtype=np.float32))).tolist()
    [1.0, 1.0, 1.015625, -3.0]
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, up).astype(np.uint16)


def rounded_e4m3(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of the nearest e4m3, ties to even; magnitudes above 448 become 448, as on the GPU.

    >>> rounded_e4m3(np.array([1.0, 1.0625, 500.0, -448.0], dtype=np.float32)).tolist()
    [56, 56, 126, 254]
    """
    held = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448, 448)
    return held.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _as_floats(handle: Any) -> Any:
    return interpreter.TensorHandle(widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _in_floats(method: Any) -> Any:
    """The method, computed in float32 where an operand is bfloat16; the result of a comparison is not rounded."""

    def mended(self: Any, *given: Any) -> Any:
        *handles, op = given
        if not any(_is_bfloat16(handle) for handle in handles) or op is np.where:
            return method(self, *given)
        result = op(*(_as_floats(handle).data for handle in handles))
        if result.dtype == bool:
            return interpreter.TensorHandle(result.astype(np.uint16), tl.bfloat16)
        return interpreter.TensorHandle(rounded(result), tl.bfloat16)

    return mended


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """a @ b + d; 8-bit floats are exact in float32 too."""
    left, right = (_floats(handle) for handle in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _floats(handle: Any) -> np.ndarray:
    if handle.dtype.scalar.primitive_bitwidth == 8 and handle.dtype.scalar.is_floating():
        return interpreter._convert_float(handle.data, handle.dtype.scalar, tl.float16, None).view(np.float16)
    return _as_floats(handle).data


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    result = _as_floats(x).data * _as_floats(y).data + _as_floats(z).data
    if _is_bfloat16(z):
        return interpreter.TensorHandle(rounded(result), tl.bfloat16)
    return interpreter.TensorHandle(result, z.dtype.scalar)


def _casting(method: Any) -> Any:
    """The cast, rounding to narrow floats as the GPU does: the interpreter's own truncates."""

    def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        if _is_bfloat16(src) and dst_type.scalar.is_floating():
            src = _as_floats(src)
        narrow = {tl.bfloat16: rounded, tl.float8e4nv: rounded_e4m3}.get(dst_type.scalar)
        if narrow is not None and src.dtype.scalar in (tl.float32, tl.float64):
            return interpreter.TensorHandle(narrow(src.data), dst_type.scalar)
        return method(self, src, dst_type, *rounding)

    return cast


def _with_bounds(patch: Any) -> Any:
    """Scalars as bounds of a range: the interpreter holds arrays of one value, which numpy no longer converts."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched
