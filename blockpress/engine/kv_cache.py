"""The KV cache: keys and values of all requests, in pages.

    one layer, keys     [kv_heads, pages, page, dim]           values alike
    a request's table   [7, 8, 3]        positions 0..255 are in page 7, 256..511 in page 8, 512..767 in page 3

Pages of a request that are consecutive in memory are read as a view; others are gathered.

Invariant: a view holds the request's tokens in order, and nothing is ever read that was not written for these tokens.
Run it:  python -m pytest tests/engine/test_batch.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blockpress.config import LayerKind, ModelConfig
from blockpress.ops.transfer import to_device

Pair = tuple[Float[Tensor, "_kv_heads _keys _dim"], Float[Tensor, "_kv_heads _keys _dim"]]


class KVCache:
    """Holds `counts[kind]` pages of `page` tokens in every layer of that kind. Memory is taken as pages are used."""

    def __init__(
        self,
        config: ModelConfig,
        counts: Mapping[LayerKind, int],
        page: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page = page
        self.kinds = [layer.kind for layer in config.layers]
        self._layers: list[Pair] = []
        for layer in config.layers:
            shape = (layer.kv_heads, counts[layer.kind] * page, layer.head_dim)
            self._layers.append(tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self._layers[0][0].device

    @property
    def dims(self) -> set[int]:
        """The sizes of the layers' heads."""
        return {key.shape[-1] for key, _ in self._layers}

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer by page, [kv_heads, pages, page, dim], as views."""
        key, value = self._layers[layer]
        return key.unflatten(1, (-1, self.page)), value.unflatten(1, (-1, self.page))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages once they have been used."""
        return sum(part.nbytes for pair in self._layers for part in pair)

    def write(self, layer: int, slot_mapping: Int[Tensor, " rows"], key: Tensor, value: Tensor) -> None:
        """Write rows of keys and values, [kv_heads, rows, dim], to the slots in `slot_mapping`."""
        for whole, part in zip(self._layers[layer], (key, value), strict=True):
            whole.index_copy_(1, slot_mapping, part)

    def slot_mapping(self, table: Sequence[int], start: int, stop: int) -> list[int]:
        """The slots of a request's positions [start, stop), for `write`: page id * page length + offset."""
        page = self.page
        return [table[i // page] * page + i % page for i in range(start, stop)]

    def view(self, layer: int, table: Sequence[int], start: int, stop: int) -> Pair:
        """Keys and values of a request's positions [start, stop)."""
        first, last = start // self.page, -(-stop // self.page)
        ids = table[first:last]
        if any(page != ids[0] + i for i, page in enumerate(ids)):
            return self._gathered(layer, ids, start - first * self.page, stop - first * self.page)
        begin = (ids[0] * self.page if ids else 0) + start - first * self.page
        key, value = self._layers[layer]
        return key[:, begin : begin + stop - start], value[:, begin : begin + stop - start]

    def _gathered(self, layer: int, ids: Sequence[int], start: int, stop: int) -> Pair:
        index = to_device(torch.tensor(ids), self.device)

        def gather(whole: Tensor) -> Tensor:
            return whole.unflatten(1, (-1, self.page)).index_select(1, index).flatten(1, 2)[:, start:stop]

        key, value = self._layers[layer]
        return gather(key), gather(value)
