"""The network: one stack of layers, run causally (prefill, commit) or bidirectionally (denoise)."""

from blockpress.model.cache import Cache
from blockpress.model.network import Network
from blockpress.model.pictures import Images
from blockpress.model.vision import VisionTower

__all__ = ["Cache", "Images", "Network", "VisionTower"]
