"""Encoders that quantise a weight [out, in], and the error of that.

Invariant: an encoder is a pure function of the weight; compressed-tensors decodes what it writes to the same values.

Run it:  python -m pytest tests/quantize
"""

from __future__ import annotations

from collections.abc import Callable

from blockpress.errors import RequestError
from blockpress.quantize.encoders.error import ErrorSum, WeightError
from blockpress.quantize.encoders.fp4 import Nvfp4
from blockpress.quantize.encoders.fp8 import Fp8
from blockpress.quantize.encoders.integers import Int4Groups, Int8Rows
from blockpress.quantize.encoders.layout import Encoded, Format, quantization_config, scale_dtype

__all__ = [
    "FORMATS",
    "Encoded",
    "ErrorSum",
    "Format",
    "Fp8",
    "Int4Groups",
    "Int8Rows",
    "Nvfp4",
    "WeightError",
    "format_named",
    "quantization_config",
    "scale_dtype",
]

FORMATS: dict[str, Callable[..., Format]] = {"fp8": Fp8, "int8": Int8Rows, "nvfp4": Nvfp4, "int4": Int4Groups}
"""Formats by name, from 8 bits to 4."""


def format_named(name: str, group: int | None = None) -> Format:
    """The format of that name; `group` is the number of columns per scale, for int4 only.

    Raises:
        RequestError: no such format, or a group that it does not take.
    """
    if name not in FORMATS:
        raise RequestError(f"format is {name!r}", hint=f"format must be one of {', '.join(FORMATS)}")
    if group is None:
        return FORMATS[name]()
    if name != "int4":
        raise RequestError(f"group is {group} for {name}", hint="only int4 takes a group: 16, 32, 64 or 128")
    return Int4Groups(group=group)
