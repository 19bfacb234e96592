"""The package as others have it: installed somewhere, beside their own code, and seen by their type checker."""

from __future__ import annotations

import ast
import asyncio
import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blockpress.engine import EngineCore, ThreadedEngine
from blockpress.errors import BlockpressError, EngineError
from blockpress.lm import LM, load
from blockpress.ops import compiled

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blockpress"
COMMANDS = {
    "evals/sudoku.py",
    "bench/gpu/__main__.py",
    "bench/gpu/check.py",
    "bench/gpu/compile_check.py",
    "bench/gpu/report.py",
}

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


@pytest.mark.parametrize(
    "file", ["py.typed", *(f"serve/page/{n}" for n in ("index.html", "app.js", "page.css", "icon.svg"))]
)
def test_what_is_no_module_is_shipped(file: str) -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["blockpress"]} and (PACKAGE / file).is_file()
    ignored = subprocess.run(["git", "check-ignore", "-q", PACKAGE / file], cwd=ROOT)
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
    # No other package's type is in the answer: one that were would be Any, and not what is asserted. Reading torch's alone
    # takes most of a minute, the others' two thirds of the rest.
    others = "torch numpy huggingface_hub PIL jinja2 jaxtyping safetensors tokenizers rich typer".replace(" ", ".*,")
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n[mypy-{others}.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(installed), script.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 and '"lod"' in said[0] and "Found 1 error" in said[1], done.stdout + done.stderr


PUZZLE = "530678912\n672195348\n198342567\n859761423\n426853791\n713924856\n961537284\n287419635\n345286170"


@pytest.fixture(scope="module")
def lm() -> LM:
    return load("sudoku-nano")


def answer(lm: LM) -> list[int]:
    return lm.generate(PUZZLE, seed=1, sampling=lm.generation.sampling.with_(steps=6)).tokens


def test_two_models_answer_in_one_process(lm: LM) -> None:
    with load("sudoku-nano", dtype="bfloat16", compute_dtype="float32") as other:
        first, second = answer(lm), answer(other)
        assert answer(lm) == first and answer(other) == second
    assert answer(lm) == first, "the other one was closed"


def test_threads_and_asyncio_share_a_model(lm: LM) -> None:
    wanted = answer(lm)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, [lm] * 4)) == [wanted] * 4

    async def ask() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.to_thread(answer, lm) for _ in range(3)))

    assert asyncio.run(ask()) == [wanted] * 3


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


TYPES = ({"dtype": "bfloat16", "compute_dtype": "float32"}, {"compute_dtype": "int8"})


@pytest.mark.parametrize(("way", "types"), [*((way, {}) for way in COPIES), *(("pickle", types) for types in TYPES)])
def test_a_copy_of_a_model_answers_as_it_does(way: str, types: dict[str, str]) -> None:
    lm = load("sudoku-nano", **types)  # type: ignore[arg-type]
    held = {"seed": 1, "regex": "[1-9]{3}", "sampling": lm.generation.sampling.with_(steps=6)}
    wanted, given = answer(lm), lm.generate(PUZZLE, **held)
    other = COPIES[way](lm)
    assert answer(other) == wanted and other.generate(PUZZLE, **held) == given
    if way != "copy":
        assert other.network is not lm.network and other.engine is not lm.engine
        lm.close()
        assert answer(other) == wanted


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_reply_is_equal(way: str, lm: LM) -> None:
    reply = lm.generate(PUZZLE, seed=1, logprobs=2)
    assert COPIES[way](reply) == reply and COPIES[way](reply).message == reply.message
    assert [repr(COPIES[way](event)) for event in lm.stream(PUZZLE, seed=1)] == [
        repr(event) for event in lm.stream(PUZZLE, seed=1)
    ]
    with pytest.raises(BlockpressError) as caught:
        lm.generate(PUZZLE, max_tokens=0)
    assert str(COPIES[way](caught.value)) == str(caught.value)


@pytest.mark.parametrize("way", COPIES)
def test_an_engine_on_a_thread_is_not_copied(way: str, lm: LM) -> None:
    with (
        ThreadedEngine(EngineCore(lm.network)) as engine,
        pytest.raises(EngineError, match="can be neither copied nor pickled"),
    ):
        COPIES[way](engine)


def test_only_commands_print() -> None:
    """What is not a command leaves standard output to the program that it is part of."""
    talking = set()
    for file in PACKAGE.rglob("*.py"):
        if "print" not in (source := file.read_text()):
            continue
        called = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        if any(isinstance(function, ast.Name) and function.id == "print" for function in called):
            talking.add(file.relative_to(PACKAGE).as_posix())
    assert {name for name in talking if not name.startswith("cli/")} <= COMMANDS


def test_the_logger_is_the_package_s_own_and_silent_until_heard(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("blockpress")
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    assert logger.level == logging.NOTSET and logger.propagate, "what is heard is for the application to say"
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiled, "_obstacles", {})
    assert compiled.library.__wrapped__("one") is None
    assert [(record.name, record.levelname) for record in caplog.records] == [("blockpress", "WARNING")]


EMBEDDED = """
import contextlib, io, json, logging, sys
said = io.StringIO()
logging.basicConfig(stream=said, level=logging.DEBUG, format="%(name)s")
with contextlib.redirect_stdout(io.StringIO()) as printed:
    import blockpress
    from blockpress.checkpoints import save_checkpoint
    lm = blockpress.load("sudoku-nano")
    reply = lm.generate(sys.argv[1], seed=1)
    save_checkpoint("a b/saved", lm.network, generation=lm.generation, tokenizer=lm.tokenizer, kept_from=lm.path)
    again = blockpress.load("a b/saved").generate(sys.argv[1], seed=1)
names = set(said.getvalue().split()) - {"blockpress"}
assert not printed.getvalue() and not names, (printed.getvalue(), names)
print(json.dumps([blockpress.__file__, reply.tokens, again.tokens]))
"""


@pytest.mark.slow
def test_it_works_where_nothing_can_be_written_beside_it(installed: Path, tmp_path: Path, lm: LM) -> None:
    """A path with spaces, another working directory, a package that cannot be written: nothing is written into it."""
    (packages,) = installed.parents[1].glob("lib/python*/site-packages")
    home = packages / "blockpress"
    home.unlink()
    shutil.copytree(PACKAGE, home, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (home, *home.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    (tmp_path / "a b").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [installed, "-B", "-W", "error", "-c", EMBEDDED, PUZZLE],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr and done.returncode == 0, done.stderr
    where, first, again = json.loads(done.stdout)
    assert Path(where).parent == home and first == again == answer(lm)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
