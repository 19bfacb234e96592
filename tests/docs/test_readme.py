"""README.md is true: its Python runs, its commands exist, its help texts and its file tree are today's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.readme import README, ROOT, render, run_command, tree_in, tree_on_disk

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """The line before each fenced block's first, and its code."""
    found = (match for match in FENCE.finditer(text) if match["language"] in languages)
    return [(text[: match.start("code")].count("\n"), match["code"]) for match in found]


def test_python_snippets_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = blocks(text, "python", "py")
    assert snippets, "README.md shows no Python"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for line, code in snippets:  # one namespace: a later snippet goes on from an earlier one
        exec(compile("\n" * line + code, str(README), "exec"), names)


def test_help_texts_are_current(text: str) -> None:
    assert "<!-- help:blockpress" in text, "README.md shows no help text"
    assert render(text) == text, "a help text has changed: `make readme` writes it anew"


def test_file_tree_is_the_disk(text: str) -> None:
    assert sorted(tree_in(text)) == tree_on_disk()


def test_commands_and_options_exist(text: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = [line for _, code in blocks(text, "sh", "bash", "console", "shell") for line in code.splitlines()]
    for line in shown:
        words = line.split("#")[0].removeprefix("$ ").split()
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[:1] == ["blockpress"]:
            arguments = [words[1]] if len(words) > 1 and not words[1].startswith("-") else []
            offered = run_command(*arguments, "--help")
            for option in re.findall(r"(?<!\S)--[\w-]+", line):
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", offered), f"{line}: no option {option}"
