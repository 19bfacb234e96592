"""Row-wise operations in one pass (`native/rows.cpp`): RMSNorm, GeGLU, rotary embedding, softmax under a mask.

In torch each is several passes over memory, with a tensor between any two. The plain versions are in norm.py, geglu.py,
rope.py and attention.py, which call `supports` first.

Invariant: float32 inside, rounded to bfloat16 where the plain version rounds, so the two differ by float rounding
alone. Without gradients only.
Run it:  python -m pytest tests/ops/test_rows.py
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_long, c_void_p
from functools import cache

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from blockpress.ops import compiled
from blockpress.shapes import Heads

_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ARGUMENTS = {
    "rms_norm": [c_void_p] * 3 + [c_long] * 2 + [c_float, c_int],
    "geglu": [c_void_p] * 3 + [c_long] * 4 + [c_int],
    "rotate": [c_void_p] * 4 + [c_long] * 9 + [c_int],
    "softmax": [c_void_p] * 2 + [c_long] * 7 + [c_int],
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
    start, steps = None, (1, 0, 0)
    if mask is not None:
        assert len(scores) % len(mask) == 0, "the batch is a multiple of the number of masks"
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        start, steps = mask.data_ptr(), (len(mask), mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)
    _call("softmax", scores.dtype, scores.data_ptr(), start, *scores.shape, *steps)
    return scores


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


def _call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    getattr(_library(), f"{name}_{_SUFFIXES[dtype]}")(*arguments, torch.get_num_threads())


@cache
def _library() -> CDLL | None:
    library = compiled.library("rows")
    if library is not None:
        for name, types in _ARGUMENTS.items():
            for suffix in _SUFFIXES.values():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = types, None
    return library
