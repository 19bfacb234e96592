"""Every example runs, and says what it promises."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockpress.checkpoints import save_checkpoint
from blockpress.config import GenerationConfig, ModelConfig
from tests import chat_tokenizer
from tests.forks import python

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "01_generate.py": "tokens a forward",
    "02_watch_the_canvas.py": "stop: Usage(",
    "03_own_acceptance.py": "SurestShare(share=0.9)",
    "04_train_tiny.py": "answer",
    "05_chat.py": "thought for",
    "06_many_at_once.py": "forwards for all of them",
}


def test_all_examples_are_listed() -> None:
    assert {path.name for path in EXAMPLES} == set(SAYS)


@pytest.fixture
def asked(tmp_path: Path, tiny: ModelConfig, random_network: Any) -> dict[str, list[str]]:
    """What an example is called with: the chat needs a model that talks, if only in random words."""
    network = random_network(replace(tiny, vocab_size=chat_tokenizer.TOKENIZER.vocab_size, context_length=2048), seed=3)
    save_checkpoint(tmp_path / "talker", network, generation=GenerationConfig(), tokenizer=chat_tokenizer.TOKENIZER)
    return {"05_chat.py": [str(tmp_path / "talker"), "What is the time?"]}


SHORTER = {"04_train_tiny.py": ("STEPS = 6, 300\n", "STEPS = 6, 100\n")}
"""What is changed for a test: training takes as long as its steps, and its first report comes after a hundred."""


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path, asked: dict[str, list[str]]) -> None:
    if path.name in SHORTER:
        source = path.read_text(encoding="utf-8")
        assert source.count(SHORTER[path.name][0]) == 1
        path = tmp_path / path.name
        path.write_text(source.replace(*SHORTER[path.name]), encoding="utf-8")
    done = subprocess.run(
        [*python(), str(path), *asked.get(path.name, [])],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.name] in done.stdout
