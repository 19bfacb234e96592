"""Many requests at once: who takes part in a forward, where their keys and values lie, what comes of it.

    options, request    what an engine may use; one answer under way                      no tensors
    pages               bytes into pages of each kind of layer                            no tensors
    pool                page ids: who holds them, which are free, which reusable          no tensors
    prefixes            what a page holds, as a digest: equal digests, equal contents     no tensors
    tables              a request's pages: taken, let go, shared                          no tensors
    scheduler           which tokens and canvases the next forward runs                   no tensors
    store, slots        keys and values of all pages; canvases between two forwards
    batch, looks        the rows of a forward, and what they look at: pages, in torch or through kernels
    step, captured      a denoising step as tensors alone; the same as a CUDA graph
    runner              one forward
    core, engine        plan, run, take; the same on a thread, for callers who wait

Invariant: a request's tokens are those that `generate` gives for it alone, whoever shares its forwards and pages.
"""

from blockpress.engine.core import Core
from blockpress.engine.engine import Engine
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import Picture, Request

__all__ = ["Core", "Engine", "EngineOptions", "Picture", "Request"]
