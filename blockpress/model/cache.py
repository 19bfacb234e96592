"""The KV cache of a batch: keys and values of every layer, right-padded to the longest row.

    row 0   k k k k k . .      lengths[0] = 5
    row 1   k k k k k k k      lengths[1] = 7        width = 7

Invariant: `append` returns a new cache and never writes to an old one, so a context can be shared, and a denoising
step, which only reads its cache, cannot change it.
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
    """Keys and values of each layer, [batch, kv_heads, width, dim], and the number of tokens in each row."""

    layers: tuple[KeyValue, ...]
    lengths: Int[Tensor, " batch"]

    @property
    def width(self) -> int:
        return self.layers[0][0].shape[2]

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest row; on a GPU the first call waits for the device."""
        return int(self.lengths.min())

    def append(self, new: list[KeyValue], counts: Int[Tensor, " batch"]) -> Cache:
        """The cache with the first `counts[b]` of row b's new keys and values after its own."""
        spans = torch.stack((self.lengths, counts), dim=1).tolist()
        layers = []
        for (old_key, old_value), (key, value) in zip(self.layers, new, strict=True):
            layers.append((self._join(old_key, key, spans), self._join(old_value, value, spans)))
        return Cache(tuple(layers), self.lengths + counts)

    @staticmethod
    def _join(old: Tensor, new: Tensor, spans: list[list[int]]) -> Tensor:
        """`spans`: for each row, how many tokens it has, and how many are added."""
        width = max(start + count for start, count in spans)
        joined = old.new_zeros(old.shape[0], old.shape[1], width, old.shape[3])
        copied = min(width, old.shape[2])
        joined[:, :, :copied] = old[:, :, :copied]
        for row, (start, count) in enumerate(spans):
            joined[row, :, start : start + count] = new[row, :, :count]
        return joined

    def select(self, rows: Int[Tensor, " chosen"]) -> Cache:
        """The cache of the given rows, in that order; rows may repeat."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Cache(tuple((k[rows][:, :, :width], v[rows][:, :, :width]) for k, v in self.layers), lengths)

    def until(self, lengths: Int[Tensor, " batch"]) -> Cache:
        """The cache of the first `lengths[b]` tokens of each row b, at most as many as it has."""
        width = int(lengths.max())
        return Cache(tuple((key[:, :, :width], value[:, :, :width]) for key, value in self.layers), lengths)

    def recent(self, layer: int, window: int | None) -> tuple[KeyValue, int]:
        """The keys and values of one layer that a canvas can see, and the position of the first.

        On a sliding layer keys outside the window of every row are left out.
        """
        key, value = self.layers[layer]
        start = 0 if window is None else max(0, self.shortest - (window - 1))
        return (key[:, :, start:], value[:, :, start:]), start

    @classmethod
    def empty(cls, shapes: list[tuple[int, int]], batch: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """A cache without tokens; `shapes` gives (kv_heads, dim) of each layer."""
        layers = []
        for heads, dim in shapes:
            none = torch.zeros(batch, heads, 0, dim, dtype=dtype, device=device)
            layers.append((none, none))
        return cls(tuple(layers), torch.zeros(batch, dtype=torch.long, device=device))
