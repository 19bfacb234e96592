"""What every test stands on: one thread's worth of torch, repeatable hypothesis, a tiny network with sane weights."""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from blockpress.config import PRESETS, ModelConfig
from blockpress.model import Network
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer

from .standin import Card, standin
from .time_limit import MARKS, build_native_code, limited_to

# What is imported and collected stays, and each search for garbage would walk through all of it.
gc.disable()

# Tiny tensors lose more to the hand-over between threads than they win, and xdist has taken the cores already.
torch.set_num_threads(1)

# A shared or busy core makes any deadline a coin toss; in CI a failure must be the same one for everybody.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fast", parent=settings.get_profile("local"), max_examples=20)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def num_examples(most: int) -> int:
    """The most examples of a test that does not draw the hundred of the others: `test-fast` draws a fifth of them too."""
    return max(1, most * settings().max_examples // 100)


# The same types on every machine: what is in bfloat16 is computed in it, unless a test says otherwise.
os.environ.setdefault("BLOCKPRESS_COMPUTE_DTYPE", "bfloat16")

GEMMA = Path(__file__).parents[1] / "../shared/data/gemma4-tokenizer"

FileLimit = Callable[[int], AbstractContextManager[None]]
RandomNetwork = Callable[..., Network]


pytest_runtest_call = limited_to(10)


def pytest_sessionstart() -> None:
    if os.environ.get("CI"):
        build_native_code()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What has no test to run is not imported: it may load an oracle, which takes seconds in each process.

    These are the modules here that only serve tests, and files that carry a deselected mark as a whole.
    """
    if collection_path.suffix != ".py":
        return None
    if not collection_path.name.startswith("test_"):
        return True
    whole = re.search(r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", collection_path.read_text("utf-8"), re.MULTILINE)
    return True if whole and whole[1] in MARKS and f"not {whole[1]}" in config.option.markexpr else None


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with what takes long go first: two processes that take file after file then end at about the same time.
    long = Counter(item.path for item in items if any(map(item.get_closest_marker, MARKS)))
    items.sort(key=lambda item: -long[item.path])
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that lives as long as the session, for checkpoints that several tests read."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def gemma() -> Tokenizer:
    """The published tokenizer, where it lies beside the checkout; seconds to read, so once for all."""
    tokenizer = Tokenizer.find(GEMMA)
    if tokenizer is None:
        pytest.skip("the Gemma 4 tokenizer is not at ../shared/data/gemma4-tokenizer")
    return tokenizer


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Our own small tokenizer."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits_tokenizer(folder)
    return Tokenizer.from_directory(folder)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return PRESETS["tiny"]()


@pytest.fixture(scope="session")
def random_network() -> RandomNetwork:
    """`random_network(config, seed=0)`: a float32 network on the CPU, its activations near 1 through all layers."""
    return make_random_network


@pytest.fixture
def file_limit() -> FileLimit:
    """`with file_limit(bytes)`: no file grows beyond that, as on a full disk; what the system says is "File too large"."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def card() -> Iterator[Card]:
    """A stand-in for a GPU."""
    with standin() as there:
        yield there


def make_random_network(config: ModelConfig, seed: int = 0) -> Network:
    """Matrices from N(0, 1/inputs); norms, scales and layer scalars from 0.5 to 1.5, so that none is neutral."""
    network = Network(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim < 2:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)
    return network.eval()
