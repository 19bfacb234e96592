"""The network: one stack of layers, run causally (prefill, commit) or bidirectionally (denoise)."""

from blockpress.model.cache import Cache
from blockpress.model.network import Network

__all__ = ["Cache", "Network"]
