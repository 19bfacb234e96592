"""README.md and the pages under docs/ are true: their Python runs, their commands exist, help texts and tree are today's."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.readme import CURRENT, HELP, README, ROOT, command_names, help_text, render, tree_in, tree_on_disk

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
SETTING = re.compile(r"^(?:\w+=\S* +)+")  # BLOCKPRESS_ISA=avx2 in front of a command


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """The line before each fenced block's first, and its code."""
    found = (match for match in FENCE.finditer(text) if match["language"] in languages)
    return [(text[: match.start("code")].count("\n"), match["code"]) for match in found]


def snippets(page: Path) -> list[tuple[int, str]]:
    return blocks(read(page), "python", "py")


def commands(text: str) -> list[str]:
    """Every command that a page shows, in a block for the shell or in a sentence, without settings and comments."""
    shown = (
        "".join(code for _, code in blocks(text, "sh", "bash", "console", "shell")).replace("\\\n", " ").splitlines()
    )
    shown += [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", text))]
    parts = [part for line in shown for part in line.split("#")[0].removeprefix("$ ").split("&&")]
    return [SETTING.sub("", part.strip()) for part in parts]


def test_commands_are_found_in_blocks_and_sentences() -> None:
    text = "Try `A=1 make test X=2`,\n`blockpress run\n--raw`:\n```sh\n$ blockpress doctor \\\n  --json && make demo  # now\n```\n"
    assert [line.split() for line in commands(text)] == [
        ["blockpress", "doctor", "--json"],
        ["make", "demo"],
        ["make", "test", "X=2"],
        ["blockpress", "run", "--raw"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in CURRENT if snippets(page)], ids=name)
def test_python_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for line, code in snippets(page):  # one namespace a page: a later snippet goes on from an earlier one
        exec(compile("\n" * line + code, str(page), "exec"), names)
        assert bool(capsys.readouterr().out.strip()) == ("print(" in code), f"{page}:{line} prints nothing"


@pytest.mark.parametrize("page", [page for page in CURRENT if HELP.search(read(page))], ids=name)
def test_help_texts_are_current(page: Path) -> None:
    assert render(read(page)) == read(page), "a help text has changed: `make readme` writes it anew"


def test_every_command_has_its_help_text_once() -> None:
    shown = [match["command"] for page in CURRENT for match in HELP.finditer(read(page))]
    assert sorted(shown) == sorted(f"blockpress {command}" for command in command_names())


def test_file_tree_is_the_disk() -> None:
    [tree] = [tree for page in CURRENT if (tree := tree_in(read(page)))]
    assert sorted(tree) == tree_on_disk()


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_commands_and_options_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for line in commands(read(page)):
        words = line.split()
        options = re.findall(r"(?<!\S)--[\w-]+", line)
        if words[:1] == ["make"]:
            given = re.sub(r"\"[^\"]*\"", "", line).split()[1:]
            assert {word for word in given if "=" not in word} <= targets, line
        elif words[:1] == ["blockpress"] and words[1:]:
            offered = help_text(words[1] if not words[1].startswith("-") else "")
            for option in options:
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", offered), f"{line}: no option {option}"
        elif words[:2] == ["python", "-m"]:
            module = find_spec(words[2])
            assert module and module.origin, f"{line}: no module {words[2]}"
            source = read(Path(module.origin))
            if Path(module.origin).is_relative_to(ROOT) and "ArgumentParser" in source:
                assert [option for option in options if f'"{option}"' not in source] == [], line
            missing = [word for word in words[3:] if word.startswith("tests/") and not (ROOT / word).exists()]
            assert not missing, line


def test_readme_shows_what_a_reader_needs_first() -> None:
    assert snippets(README), "README.md shows no Python"
    assert {"make demo", "make test"} <= set(commands(read(README)))
