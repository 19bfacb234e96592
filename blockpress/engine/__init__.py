"""Many requests at once: who takes part in a forward, where their keys and values lie, what comes of it.

    options, request          what an engine may use; one answer under way                      no tensors
    sizing                    bytes into pages of each kind of layer                            no tensors
    block_pool                page ids: who holds them, which are free, which reusable          no tensors
    prefix_cache              what a page holds, as a digest: equal digests, equal contents     no tensors
    block_tables              a request's pages: taken, let go, shared                          no tensors
    scheduler                 which tokens and canvases the next forward runs                   no tensors
    kv_cache, canvas_state    keys and values of all pages; canvases between two forwards
    batch, attention          the rows of a forward, and what they look at: pages, in torch or through kernels
    denoising, cuda_graphs    a denoising step as tensors alone; the same as a CUDA graph
    runner, modes             one forward; how each way to decode goes on after it
    core, threaded            plan, run, advance, book; the same on a thread, for callers who wait

Invariant: a request's tokens are those that `generate` gives for it alone, whoever shares its forwards and pages.
"""

from blockpress.engine.core import EngineCore
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request
from blockpress.engine.threaded import ThreadedEngine
from blockpress.errors import renamed

__all__ = ["EngineCore", "EngineOptions", "HashedImageSpan", "Request", "ThreadedEngine"]

__getattr__ = renamed(__name__, {"Core": EngineCore, "Engine": ThreadedEngine}, __all__)  # until version 0.3
