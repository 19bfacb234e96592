"""The context of some rows: keys and values of every layer, right-padded to the longest row.

    row 0   k k k k k . .      lengths[0] = 5
    row 1   k k k k k k k      lengths[1] = 7        width = 7

Invariant: `append` returns a new cache and never writes into an old one, so a context can be shared, and a denoising
step, which is only ever given a cache to read, cannot change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

KeyValue = tuple[Float[Tensor, "batch _kv_heads _keys _dim"], Float[Tensor, "batch _kv_heads _keys _dim"]]


@dataclass(frozen=True)
class Cache:
    """Keys and values a layer, [batch, kv_heads, width, dim], and how many of them are real in each row."""

    layers: tuple[KeyValue, ...]
    lengths: Int[Tensor, " batch"]

    @property
    def width(self) -> int:
        return self.layers[0][0].shape[2]

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest row; on a GPU the first who asks waits for it."""
        return int(self.lengths.min())

    def append(self, fresh: list[KeyValue], counts: Int[Tensor, " batch"]) -> Cache:
        """The cache with `counts[b]` of row b's fresh keys and values put behind its own."""
        places = torch.stack((self.lengths, counts), dim=1).tolist()
        layers = []
        for (old_key, old_value), (key, value) in zip(self.layers, fresh, strict=True):
            layers.append((self._join(old_key, key, places), self._join(old_value, value, places)))
        return Cache(tuple(layers), self.lengths + counts)

    @staticmethod
    def _join(old: Tensor, new: Tensor, places: list[list[int]]) -> Tensor:
        """`places`: of each row, how many tokens it has, and how many come to them."""
        width = max(start + count for start, count in places)
        joined = old.new_zeros(old.shape[0], old.shape[1], width, old.shape[3])
        kept = min(width, old.shape[2])
        joined[:, :, :kept] = old[:, :, :kept]
        for row, (start, count) in enumerate(places):
            joined[row, :, start : start + count] = new[row, :, :count]
        return joined

    def select(self, rows: Int[Tensor, " chosen"]) -> Cache:
        """The cache of some of the rows, in that order; a row may be taken more than once."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Cache(tuple((k[rows][:, :, :width], v[rows][:, :, :width]) for k, v in self.layers), lengths)

    def until(self, lengths: Int[Tensor, " batch"]) -> Cache:
        """The cache with the first `lengths[b]` tokens of row b alone, none of them longer than it is."""
        width = int(lengths.max())
        return Cache(tuple((key[:, :, :width], value[:, :, :width]) for key, value in self.layers), lengths)

    def recent(self, layer: int, window: int | None) -> tuple[KeyValue, int]:
        """What a canvas can see of one layer, and the position of its first key.

        On a sliding layer keys that lie outside the window of every row are left out.
        """
        key, value = self.layers[layer]
        start = 0 if window is None else max(0, self.shortest - (window - 1))
        return (key[:, :, start:], value[:, :, start:]), start

    @classmethod
    def empty(cls, shapes: list[tuple[int, int]], batch: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """No context yet; `shapes` gives (kv_heads, dim) of each layer."""
        layers = []
        for heads, dim in shapes:
            none = torch.zeros(batch, heads, 0, dim, dtype=dtype, device=device)
            layers.append((none, none))
        return cls(tuple(layers), torch.zeros(batch, dtype=torch.long, device=device))
