"""Operations in Triton, for GPUs: each gives the values of its plain version in `ops`.

    routing.py       top-k of the router's scores; tokens sorted by expert and cut into tiles for the products
    products.py      the two products of the experts, in bfloat16 and in fp8
    four_bits.py     the same for 4-bit weights: int4 and e2m1
    experts.py       `ops.experts.moe_forward`: routing, products, the sum over a token's experts
    vocabulary.py    `ops.vocabulary.sample_from_hidden`; head.py computes the logits and their statistics,
                     probabilities.py the self-conditioning embedding
    attention.py     attention of a flat batch over paged keys and values
    jit.py           how a kernel is declared; interpreter.py    how it runs where there is no GPU

Invariant: importing this package imports no Triton, and nothing outside it needs Triton.

Run it:  make check-gpu      on a machine without a GPU: TRITON_INTERPRET=1 python -m blockpress.bench.gpu check
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_LOG = logging.getLogger("blockpress")


@cache
def available() -> bool:
    """Whether Triton is installed and can compile here: it needs a C compiler, or has what it compiled earlier, and a
    directory to keep it in. The logger `blockpress` is told what is missing.
    """
    if find_spec("triton") is None:
        return False
    folder = _cache_folder()
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if folder is not None and (compiler or any(folder.iterdir())):
        return True
    reason = "there is no directory that can be written" if folder is None else "there is no C compiler: install gcc"
    _LOG.warning("operations on GPUs run without Triton, and slower: %s", reason)
    return False


def _cache_folder() -> Path | None:
    """Where Triton keeps what it compiles: a temporary directory of this process where its own cannot be written."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    try:
        if home == "~" and "TRITON_CACHE_DIR" not in os.environ:
            raise FileNotFoundError("this user has no home directory")  # Triton would make one that is called ~
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        _LOG.warning("Triton's kernels are compiled anew in every process, which its cache would spare: %s", error)
    try:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="blockpress-triton-")
    except OSError:
        return None
    atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
    return Path(os.environ["TRITON_CACHE_DIR"])
