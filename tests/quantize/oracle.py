"""compressed-tensors as the reader of what the encoders write."""

from __future__ import annotations

from collections.abc import Mapping

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor

from blockpress.quantize.encoders import Format, quantization_config


def scheme_of(form: Format) -> QuantizationScheme:
    """The scheme that compressed-tensors understands from our config; unknown fields of a scheme are refused by it."""
    config = QuantizationConfig.model_validate(quantization_config(form, ["lm_head"]))
    scheme = config.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    return scheme


def restore(form: Format, tensors: Mapping[str, Tensor]) -> Tensor:
    """What compressed-tensors makes of a weight's tensors."""
    compressor = BaseCompressor.get_value_from_registry(form.compression)
    weight: Tensor = compressor.decompress(dict(tensors), scheme_of(form))["weight"]
    return weight
