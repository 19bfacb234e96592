"""How commands end: help without torch, one line for what is wrong, silence for a reader that has gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blockpress import __version__, errors
from blockpress.checkpoints import resolve
from blockpress.cli import main as cli
from blockpress.cli import show
from blockpress.errors import BlockpressError
from tests.forks import python

from .conftest import Call

EASY = "530678912672190348198302567850761423426853791713904856061537284287419635345286079"


def start(*arguments: str, code: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [*python(), "-m", "blockpress", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def test_help_imports_no_torch() -> None:
    """Nothing of it does: one process calls all of these."""
    code = (
        "import sys; from blockpress.cli.main import main\n"
        "for arguments in ([], ['--help'], ['sudoku', '-h'], ['train', '--help'], ['--version']):\n"
        "    code = main(arguments); print('imported:', 'torch' in sys.modules, 'numpy' in sys.modules, code)"
    )
    done = start(code=code)
    told = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert told == ["imported: False False 0"] * 5 and not done.stderr


HEAVY = (
    "torch",
    "numpy",
    "huggingface_hub",
    "tokenizers",
    "jinja2",
    "PIL",
    "torch._dynamo",
    "sympy",
    "transformers",
    "triton",
)
STARTS: dict[str, tuple[list[str], tuple[str, ...]]] = {  # a command, and what of that it needs
    "--version": (["--version"], ()),
    "show": (["show", "sudoku-nano"], ("numpy", "huggingface_hub")),
    "ls": (["ls"], ("numpy", "huggingface_hub")),
    "run": (["run", "sudoku-nano", "1", "--max-tokens", "2", "--steps", "1"], ("torch", "numpy", "tokenizers", "huggingface_hub", "jinja2", "PIL")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_a_command_imports_no_more_than_it_needs(name: str) -> None:
    """Importing torch is most of the time that `run` takes, and `show` and `ls` do without; its compiler would take as
    long again."""
    arguments, needed = STARTS[name]
    code = f"import sys; from blockpress.cli.main import main; assert main({arguments}) == 0; "
    done = start(code=code + f"print(*(name for name in {HEAVY} if name in sys.modules))")
    assert done.returncode == 0 and set(done.stdout.splitlines()[-1].split()) <= set(needed), done.stderr


def test_help_names_every_command_and_shows_examples(call: Call) -> None:
    text = call("--help").out
    for command in ("sudoku", "run", "show", "train", "doctor"):
        assert f"\n  {command} " in text
        own = call(command, "--help")
        assert own.code == 0 and "Examples:" in own.out and f"  blockpress {command}" in own.out
    assert call().out == text


def test_version_is_printed(call: Call) -> None:
    assert call("--version").out == f"blockpress {__version__}\n"


BAD = {
    "a puzzle of 80 characters": (["sudoku", EASY[:-1]], "81 cells, this one has 80"),
    "letters in a puzzle": (["sudoku", "x" + EASY[1:]], "'x' at row 1, column 1"),
    "contradictory givens": (["sudoku", "55" + EASY[2:]], "twice"),
    "an empty puzzle": (["sudoku", ""], "81 cells, this one has 0"),
    "a file as a puzzle": (["sudoku", "{folder}/puzzles"], "--file"),
    "no puzzle": (["sudoku"], "no puzzle"),
    "two sources": (["sudoku", EASY, "--random", "1"], "PUZZLE and --random"),
    "no such model": (["sudoku", EASY, "--model", "sudoku-nono"], "sudoku-nono"),
    "an empty model name": (["run", "", "1"], "''"),
    "a directory that is no checkpoint": (["run", "{folder}", "1"], "config.json"),
    "a checkpoint without weights": (["show", "{folder}/empty"], "weights"),
    "another family": (["show", "{folder}/family"], "model_type"),
    "max_tokens of 0": (["run", "sudoku-nano", "1", "--max-tokens", "0"], "--max-tokens is 0"),
    "max_tokens below 0": (["run", "sudoku-nano", "1", "--max-tokens", "-3"], "--max-tokens is -3"),
    "a temperature of NaN": (["run", "sudoku-nano", "1", "--t-min", "nan"], "t_min is nan"),
    "a temperature below 0": (["run", "sudoku-nano", "1", "--t-min", "-1"], "t_min is -1.0"),
    "no steps": (["sudoku", EASY, "--steps", "0"], "steps is 0"),
    "a bound that is infinite": (["run", "sudoku-nano", "1", "--entropy-bound", "inf"], "entropy_bound is inf"),
    "an empty stop": (["run", "sudoku-nano", "1", "--stop", ""], "stop is"),
    "a prompt beyond the context": (["run", "sudoku-nano", "1" * 2000], "context"),
    "a prompt that the vocabulary lacks": (["run", "sudoku-nano", "5z"], "'z'"),
    "no prompt": (["run", "sudoku-nano"], "prompt is empty"),
    "--random 0": (["sudoku", "--random", "0"], "--random is 0"),
    "--random below 0": (["sudoku", "--random", "-2"], "--random is -2"),
    "--random of a word": (["sudoku", "--random", "many"], "valid integer"),
    "--givens 16": (["sudoku", "--random", "1", "--givens", "16"], "--givens is 16"),
    "--givens 81": (["sudoku", "--random", "1", "--givens", "81"], "--givens is 81"),
    "--givens without --random": (["sudoku", EASY, "--givens", "40"], "--givens is given with PUZZLE"),
    "--batch 0": (["sudoku", EASY, "--batch", "0"], "--batch is 0"),
    "--file that is a folder": (["sudoku", "--file", "{folder}"], "is a folder"),
    "--file that is absent": (["sudoku", "--file", "{folder}/absent"], "does not exist"),
    "--file that is binary": (["sudoku", "--file", "{folder}/binary"], "not a text file"),
    "--file without puzzles": (["sudoku", "--file", "{folder}/comments"], "no puzzle in"),
    "a bad line of a file": (["sudoku", "--file", "{folder}/puzzles"], "puzzles, line 4: a puzzle has 81 cells"),
    "--steps beside --puzzle-only": (["sudoku", EASY, "--puzzle-only", "--steps", "3"], "--steps is given with"),
    "an unknown type": (["run", "sudoku-nano", "1", "--dtype", "int3"], "int3"),
    "an unknown device": (["run", "sudoku-nano", "1", "--device", "abacus"], "abacus"),
    "an unknown device of doctor": (["doctor", "--device", "abacus"], "abacus"),
    "--json beside --events": (["run", "sudoku-nano", "1", "--json", "--events"], "--json is given with --events"),
    "an unknown recipe": (["train", "sodoku"], "'sodoku'"),
    "no recipe": (["train"], "no recipe"),
    "--minutes of NaN": (["train", "sudoku", "--minutes", "nan"], "--minutes is nan"),
    "--threads 0": (["train", "sudoku", "--threads", "0"], "--threads is 0"),
    "nothing to resume": (["train", "sudoku", "--resume", "--out", "{folder}/absent"], "no run to go on from"),
    "nothing to export": (["train", "sudoku", "--export", "{folder}/x", "--out", "{folder}/absent"], "no run"),
    "--resume beside --export": (["train", "sudoku", "--export", "x", "--resume"], "--resume is given with --export"),
    "--out that is a file": (["train", "sudoku", "--out", "{folder}/binary"], "is a file"),
    "an unknown command": (["sodoku"], "No such command 'sodoku'. Did you mean 'sudoku'?"),
    "an unknown option": (["sudoku", "--sed", "3"], "--sed"),
    "an option without its value": (["sudoku", "--random"], "--random"),
    "too much": (["show", "sudoku-nano", "again"], "again"),
    "an escape code in a name": (["show", "\x1b[31mred"], "x1b[31mred"),
}


@pytest.fixture(scope="module")
def folder(workspace: Path) -> Path:
    path = workspace / "cli-bad-input"
    for name in ("empty", "family"):
        (path / name).mkdir(parents=True)
    (path / "family" / "config.json").write_text('{"model_type": "llama"}')
    (path / "binary").write_bytes(bytes(range(256)))
    (path / "comments").write_text("# nothing\n\n")
    (path / "puzzles").write_text(f"# two good ones\n{EASY}\n\n{EASY[:-1]}\n")
    config = resolve("sudoku-nano") / "config.json"
    (path / "empty" / "config.json").write_text(config.read_text())
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_a_hint_and_code_2(name: str, call: Call, folder: Path) -> None:
    arguments, expected = BAD[name]
    done = call(*(argument.replace("{folder}", str(folder)) for argument in arguments))
    lines = done.err.splitlines()
    assert done.code == 2, done
    assert lines and expected in lines[-1] and lines[-1].startswith("blockpress: ") and "(hint: " in lines[-1]
    assert [line for line in lines[:-1] if not line.startswith("seed ")] == []
    assert not done.out and "Traceback" not in done.err and "\x1b" not in done.err


@pytest.mark.parametrize("arguments", [["sudoku", "123"], ["sodoku"], ["run", "sudoku-nano", "1", "--t-max", "nan"]])
def test_bad_input_ends_the_process_with_status_2(arguments: list[str]) -> None:
    done = start(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("blockpress: ") and "(hint: " in done.stderr


PUBLIC = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, BlockpressError)]


@pytest.mark.parametrize("error", PUBLIC, ids=lambda error: error.__name__)
def test_every_error_of_the_tree_is_one_line(
    error: type[BlockpressError], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: str) -> None:
        raise error("the thing is\nwrong", hint="mend\nit")

    monkeypatch.setattr(show, "describe", fail)
    done = call("show")
    assert (done.code, done.out, done.err) == (2, "", "blockpress: the thing is wrong (hint: mend it)\n")


def test_an_internal_error_is_reported_as_a_bug(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(show, "describe", fail)
    done = call("show")
    assert done.code == 1 and len(done.err.splitlines()) == 1 and "our own mistake, ZeroDivisionError" in done.err
    monkeypatch.setenv("BLOCKPRESS_TRACEBACK", "1")
    assert "Traceback" in call("show").err


def test_a_full_disk_is_not_reported_as_a_bug(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr(show, "describe", fail)
    done = call("show")
    assert done.code == 2 and "No space left" in done.err and "(hint: " in done.err


def test_ctrl_c_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "describe", interrupt)
    done = call("show")
    assert (done.code, done.err) == (130, "\nblockpress: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m blockpress sudoku --random 3000 --givens 60 --seed 1 --puzzle-only | head -1"
    done = subprocess.run(
        ["bash", "-c", command + "; echo ${PIPESTATUS[0]}"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr.splitlines() == ["seed 1 (the same again: --random 3000 --givens 60 --seed 1)"]


def test_python_m_blockpress_is_the_command() -> None:
    assert cli.main.__module__ == "blockpress.cli.main"
    assert start("--version").stdout == f"blockpress {__version__}\n"
