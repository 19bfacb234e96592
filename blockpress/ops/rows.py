"""Row-wise operations in one pass (`native/rows.cpp`): RMSNorm, GeGLU, rotary embedding, softmax under a mask.

In torch each is several passes over memory, with a tensor between any two. The plain versions are in norm.py, geglu.py,
rope.py and attention.py, which call `supports` first.

Invariant: float32 inside, rounded to bfloat16 where the plain version rounds, so the two differ by float rounding
alone. Without gradients only, but for `softmax`.
Run it:  python -m pytest tests/ops/test_rows.py
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_long, c_void_p
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.library import Library

from blockpress.ops import compiled
from blockpress.shapes import Heads

_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ARGUMENTS = {
    "rms_norm": [c_void_p] * 3 + [c_long] * 2 + [c_float, c_int],
    "geglu": [c_void_p] * 3 + [c_long] * 4 + [c_int],
    "rotate": [c_void_p] * 4 + [c_long] * 9 + [c_int],
    "softmax": [c_void_p] * 2 + [c_long] * 7 + [c_int],
    "softmax_gradient": [c_void_p] * 4 + [c_long] * 7 + [c_int],
    "weigh": [c_void_p] * 4 + [c_long] * 3 + [c_int],
}


def supports(x: Tensor, *others: Tensor | None) -> bool:
    """Whether C++ takes these tensors: plain ones of one type on a CPU, dense in the last axis, no gradients.

    Their number does not matter: the same row is computed in the same way in any batch.
    """
    if torch.is_grad_enabled() or not x.numel() or torch.compiler.is_compiling():
        return False
    if x.dtype not in _SUFFIXES and x.dtype != torch.float16:
        return False
    for tensor in (x, *others):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.dtype != x.dtype:
            return False
        if tensor.stride(-1) != 1:
            return False
    return _library() is not None


def rms_norm(x: Float[Tensor, "*rows size"], weight: Float[Tensor, " size"] | None, eps: float) -> Tensor:
    """`norm.plain`; the result has x's memory layout."""
    if x.dtype == torch.float16:
        return rms_norm(x.float(), None if weight is None else weight.float(), eps).half()
    x = x if _dense(x) else x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    scale = None if weight is None else weight.data_ptr()
    _call("rms_norm", x.dtype, x.data_ptr(), scale, out.data_ptr(), x.numel() // size, size, eps)
    return out


def geglu(gate: Float[Tensor, "*rows size"], up: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
    """`geglu.plain`; gate and up may be halves of one matrix."""
    if gate.dtype == torch.float16:
        return geglu(gate.float(), up.float()).half()
    out = torch.empty(gate.shape, dtype=gate.dtype)
    size = gate.shape[-1]
    gates, ups = gate.reshape(-1, size), up.reshape(-1, size)  # views if the rows have one stride
    steps = gates.stride(0), ups.stride(0)
    _call("geglu", gate.dtype, gates.data_ptr(), ups.data_ptr(), out.data_ptr(), len(gates), size, *steps)
    return out


def rotate(x: Heads, cos: Float[Tensor, "batch 1 length dim"], sin: Float[Tensor, "batch 1 length dim"]) -> Heads:
    """`rope.plain`; the result is dense as [batch, heads, length, dim] whatever x's strides."""
    if x.dtype == torch.float16:
        return rotate(x.float(), cos.float(), sin.float()).half()
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    sizes, strides = (*x.shape[:3], x.shape[3] // 2), (*x.stride()[:3], cos.stride(0), cos.stride(2))
    _call("rotate", x.dtype, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *sizes, *strides)
    return out


def softmax_(scores: Heads, mask: Bool[Tensor, "#masks #queries keys"] | None) -> Heads:
    """Softmax over the last axis, in place; where the mask is False the score is the type's smallest.

    Args:
        scores: dense. mask: batch entry b uses mask b % masks.
    """
    assert scores.is_contiguous(), "the scores are overwritten in place"
    if scores.dtype == torch.float16:
        return scores.copy_(softmax_(scores.float(), mask))
    mask, start, steps = _laid_out(mask, len(scores))
    _call("softmax", scores.dtype, scores.data_ptr(), start, *scores.shape, *steps)
    return scores


def differentiates(scores: Tensor) -> bool:
    """Whether `softmax` takes these scores. In a function that torch compiles: if `load_library` was called before."""
    known = _loaded if torch.compiler.is_compiling() else load_library()
    return known and scores.device.type == "cpu" and scores.dtype in _SUFFIXES and scores.numel() > 0


def softmax(scores: Heads, mask: Bool[Tensor, "#masks #queries keys"] | None) -> Heads:
    """`softmax_` of a copy, as an operator of torch: with a gradient, for which the result alone is kept."""
    out: Tensor = torch.ops.blockpress.softmax.default(scores, mask)
    return out


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    return softmax_(scores.clone(memory_format=torch.contiguous_format), mask)


def _softmax_gradient(shares: Tensor, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of the scores, from the result and the result's gradient."""
    gradient, out = gradient.contiguous(), torch.empty_like(shares)
    mask, start, steps = _laid_out(mask, len(shares))
    pointers = shares.data_ptr(), gradient.data_ptr(), start, out.data_ptr()
    _call("softmax_gradient", shares.dtype, *pointers, *shares.shape, *steps)
    return out


def _like_first(first: Tensor, *others: Tensor | None) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    shares, mask = ctx.saved_tensors
    return torch.ops.blockpress.softmax_gradient.default(shares, gradient, mask), None


def _register() -> Library:
    """Make both known to torch; `torch.library.custom_op` imports its compiler at the first call, a second's work."""
    library = Library("blockpress", "FRAGMENT")
    for name, function in (("softmax", _softmax), ("softmax_gradient", _softmax_gradient)):
        others = "Tensor gradient, " if function is _softmax_gradient else ""
        library.define(f"{name}(Tensor scores, {others}Tensor? mask) -> Tensor")
        library.impl(name, function, "CPU")
        torch.library.register_fake(f"blockpress::{name}", _like_first, lib=library)
    torch.library.register_autograd("blockpress::softmax", _differentiate, setup_context=_keep, lib=library)
    return library


_OPERATORS = _register()
_loaded = False  # what a function that torch compiles may ask


def weighted_sum(
    y: Float[Tensor, "slots size"], slots: Int64[Tensor, "tokens k"], weights: Float32[Tensor, "tokens k"]
) -> Float[Tensor, "tokens size"]:
    """The sum of each token's rows of y, each times its weight: the last step of `experts.ordered`."""
    if y.dtype == torch.float16:
        return weighted_sum(y.float(), slots, weights).half()
    out, (tokens, k) = y.new_empty(len(slots), y.shape[1]), slots.shape
    y, slots, weights = y.contiguous(), slots.contiguous(), weights.contiguous()
    _call("weigh", y.dtype, y.data_ptr(), slots.data_ptr(), weights.data_ptr(), out.data_ptr(), tokens, k, y.shape[1])
    return out


def _dense(x: Tensor) -> bool:
    """Whether x's rows fill memory without gaps, in any order."""
    return x.is_contiguous() or (x.ndim > 2 and x.transpose(-2, -3).is_contiguous())


def _laid_out(mask: Tensor | None, batch: int) -> tuple[Tensor | None, int | None, tuple[int, int, int]]:
    """The mask with its last axis dense, where it starts, and its number, stride and stride of queries."""
    if mask is None:
        return None, None, (1, 0, 0)
    assert batch % len(mask) == 0, "the batch is a multiple of the number of masks"
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask, mask.data_ptr(), (len(mask), mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)


def _call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    getattr(_library(), f"{name}_{_SUFFIXES[dtype]}")(*arguments, torch.get_num_threads())


def load_library() -> bool:
    """Load the C++, built where it is not yet; whether there is any."""
    return _library() is not None


@cache
def _library() -> CDLL | None:
    global _loaded
    library = compiled.library("rows")
    _loaded = library is not None
    if library is not None:
        for name, types in _ARGUMENTS.items():
            for suffix in _SUFFIXES.values():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = types, None
    return library
