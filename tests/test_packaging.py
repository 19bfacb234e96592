"""The package as others have it: installed somewhere, beside their own code, and seen by their type checker."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blockpress"

TYPED = """
from collections.abc import Iterator
from typing import assert_type

import blockpress
from blockpress import LM, Done, Event, Reply, Sampling, Text, ToolCall, Usage
from blockpress.config import ModelConfig
from blockpress.engine import EngineCore, EngineOptions, Request, ThreadedEngine

lm = blockpress.load("sudoku-nano")
assert_type(lm, LM)
reply = lm.generate("1", max_tokens=3, seed=1, sampling=Sampling(steps=4))
assert_type(reply, Reply)
assert_type(reply.text, str | None)
assert_type(reply.usage, Usage)
assert_type(reply.usage.steps, int)
assert_type(reply.tool_calls, tuple[ToolCall, ...])
assert_type(lm.generate([1, 2]), Reply)
assert_type(lm.chat([{"role": "user", "content": "Hello"}]), Reply)
assert_type(lm.stream("1"), Iterator[Event])
assert_type(lm.chat_stream([{"role": "user", "content": "Hello"}]), Iterator[Event])
for event in lm.stream("1"):
    if isinstance(event, Text):
        assert_type(event.text, str)
    elif isinstance(event, Done):
        assert_type(event.reply, Reply)
with blockpress.load("sudoku-nano") as other:
    assert_type(other.config, ModelConfig)
(request,) = lm.build_requests("1")
assert_type(request, Request)
with ThreadedEngine(EngineCore(lm.network, EngineOptions(max_running=2))) as engine:
    assert_type(engine, ThreadedEngine)
    assert_type(engine.events(request), Iterator[Event])


async def last(engine: ThreadedEngine, request: Request) -> Event | None:
    event = None
    async for event in engine.stream(request):
        pass
    return event


try:
    blockpress.load("none")
except blockpress.BlockpressError as error:
    assert_type(error.hint, str)
blockpress.lod("sudoku-nano")  # the one mistake
"""


def test_the_mark_that_the_package_is_typed_is_shipped() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["blockpress"]} and (PACKAGE / "py.typed").is_file()
    ignored = subprocess.run(["git", "check-ignore", "-q", PACKAGE / "py.typed"], cwd=ROOT)
    assert ignored.returncode != 0, "what git ignores, the wheel lacks"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment that has the package, at a path with a space, and what it depends on."""
    home = tmp_path_factory.mktemp("another machine") / "of somebody"
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "blockpress").symlink_to(PACKAGE)
    (packages / "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "python"


@pytest.mark.slow
def test_a_user_s_type_checker_sees_useful_types(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TYPED)
    # None of torch's types is in the answer, and reading them takes most of a minute.
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(installed), script.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 and '"lod"' in said[0] and "Found 1 error" in said[1], done.stdout + done.stderr
