"""Many requests at once: which take part in a forward, where their keys and values are stored, what follows from it.

    options, request          limits of an engine; one request and its progress                 no tensors
    sizing                    bytes into pages of each kind of layer                            no tensors
    block_pool                page ids: held, free or reusable                                  no tensors
    prefix_cache              a digest of a page's contents: equal digests, equal contents      no tensors
    block_tables              a request's pages: allocated, dropped, shared                     no tensors
    scheduler                 which tokens and canvases the next forward runs                   no tensors
    kv_cache, canvas_state    keys and values of all pages; canvases between two forwards
    batch, attention          the rows of a forward; their paged attention, in torch or by kernels
    denoising, cuda_graphs    a denoising step in tensor operations only; the same as a CUDA graph
    runner, modes             one forward; how each decoding mode continues after it
    core, threaded            schedule, run, advance, update; the same on a thread, for blocking and async callers

Invariant: a request's tokens are those that `generate` gives for it alone, whatever shares its forwards and pages.
"""

from typing import TYPE_CHECKING

from blockpress.engine.core import EngineCore
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request
from blockpress.engine.threaded import ThreadedEngine
from blockpress.errors import renamed

__all__ = ["EngineCore", "EngineOptions", "HashedImageSpan", "Request", "ThreadedEngine"]

if TYPE_CHECKING:
    Core = EngineCore
    Engine = ThreadedEngine
else:
    __getattr__ = renamed(__name__, {"Core": EngineCore, "Engine": ThreadedEngine}, __all__)  # until version 0.3
