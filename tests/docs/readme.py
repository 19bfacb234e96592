"""The parts of README.md and of the pages under docs/ that are made, not written: help texts, and the names in the tree.

    <!-- help:blockpress sudoku -->     a fenced block: what `blockpress sudoku --help` prints at 100 columns
    <!-- tree -->                       a fenced block: one line for every file and room of blockpress/, name first
    <!-- end -->                        closes either

Invariant: `render` of a page that is up to date is that page. The words after a name in the tree are the
author's; a room without words, or words without a room, is a fault that only the author can mend.

Run it:  make readme
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
HISTORY = ("log.md",)  # what was true on its day stays as it was written
CURRENT = [README, ROOT / "CONTRIBUTING.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in HISTORY)]
COLUMNS = 100
HELP = re.compile(
    r"(?P<open><!-- help:(?P<command>blockpress[^>]*?) -->\n)(?P<body>.*?)(?P<close><!-- end -->)", re.DOTALL
)
TREE = re.compile(r"<!-- tree -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
ENTRY = re.compile(r"^ {2,}(?P<name>[\w.]+/?) +\S")


HELP_TEXTS = """
import contextlib, io, json, sys
from blockpress.cli.main import main
sys.argv[0] = "blockpress"

def text(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*arguments, "--help"]) == 0, arguments
    return printed.getvalue()

print(json.dumps({name: text(*([name] if name else [])) for name in sys.argv[1:]}))
"""


@cache
def help_texts(*commands: str) -> dict[str, str]:
    """What `blockpress COMMAND --help` prints for each of these, the same on every terminal; "" is `blockpress --help`.

    One process for all: most of what a help text takes are the imports.
    """
    plain = {"COLUMNS": str(COLUMNS), "TERM": "dumb", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HELP_TEXTS, *commands],
        cwd=ROOT,
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the help of {commands} ended with {done.returncode}: {done.stderr}"
    texts = json.loads(done.stdout).items()
    return {name: "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") for name, text in texts}


def help_text(command: str) -> str:
    """The help of one command, or of all for ""."""
    (listed,) = help_texts("").values()
    return listed if not command else help_texts(*sorted(names_in(listed)))[command]


def render(text: str) -> str:
    """A page with its help texts as the commands print them today."""

    def fresh(match: re.Match[str]) -> str:
        command = match["command"].removeprefix("blockpress").strip()
        return f"{match['open']}```text\n{help_text(command)}\n```\n{match['close']}"

    return HELP.sub(fresh, text)


def command_names() -> set[str]:
    """The commands that `blockpress --help` lists."""
    return names_in(help_text(""))


def names_in(text: str) -> set[str]:
    """The commands that the help of all lists."""
    _, _, listed = text.partition("Commands:\n")
    return set(re.findall(r"^  ([a-z-]+) {2,}", listed.partition("\n\n")[0], re.MULTILINE))


def tree_in(text: str) -> list[str]:
    """The names in a page's file tree, in its order; none where it has no tree."""
    found = TREE.search(text)
    lines = found["body"].splitlines() if found else []
    return [entry["name"] for line in lines if (entry := ENTRY.match(line))]


def tree_on_disk() -> list[str]:
    """What lies in blockpress/: rooms end with a slash."""
    entries = (path for path in (ROOT / "blockpress").iterdir() if path.name not in ("__pycache__", "py.typed"))
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in entries)


if __name__ == "__main__":
    for page in CURRENT:
        old = page.read_text(encoding="utf-8")
        if (new := render(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} has new help texts")
