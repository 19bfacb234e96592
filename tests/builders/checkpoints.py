"""Checkpoints to read and to break, made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockpress.checkpoints import minimal_vision, save_checkpoint
from blockpress.config import GenerationConfig, ModelConfig
from tests.conftest import RandomNetwork

Copied = Callable[..., Path]


@pytest.fixture(scope="session")
def seeing(tiny: ModelConfig) -> ModelConfig:
    """The tiny preset with the minimal vision tower, which `transformers` needs."""
    return replace(tiny, vision=minimal_vision(0, tiny.hidden_size)[0], image_id=63)


@pytest.fixture(scope="session")
def single(seeing: ModelConfig, random_network: RandomNetwork, workspace: Path) -> Path:
    """A checkpoint in one file. Tests read it; who breaks it takes `copied`."""
    kept = minimal_vision(0, seeing.hidden_size)[1]
    save_checkpoint(workspace / "single", random_network(seeing, 1), generation=GenerationConfig(), kept=kept)
    return workspace / "single"


@pytest.fixture(scope="session")
def sharded(seeing: ModelConfig, random_network: RandomNetwork, workspace: Path) -> Path:
    """The same checkpoint in shards."""
    kept = minimal_vision(0, seeing.hidden_size)[1]
    network = random_network(seeing, 1)
    save_checkpoint(workspace / "sharded", network, generation=GenerationConfig(), kept=kept, shard_bytes=40_000)
    return workspace / "sharded"


@pytest.fixture
def copied(single: Path, sharded: Path, tmp_path: Path) -> Copied:
    """`copied(in_shards=False)`: a copy of one of the two that may be broken."""

    def copy(in_shards: bool = False) -> Path:
        return Path(shutil.copytree(sharded if in_shards else single, tmp_path / "copy", dirs_exist_ok=True))

    return copy
