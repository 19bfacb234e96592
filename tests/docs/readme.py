"""The parts of README.md and of the pages under docs/ that are made, not written: help texts, and the names in the tree.

    <!-- help:blockpress sudoku -->     a fenced block: what `blockpress sudoku --help` prints at 100 columns
    <!-- tree -->                       a fenced block: one line for every file and room of blockpress/, name first
    <!-- end -->                        closes either

Invariant: `render` of a page that is up to date is that page. The words after a name in the tree are the
author's; a room without words, or words without a room, is a fault that only the author can mend.

Run it:  make readme
"""

from __future__ import annotations

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


@cache
def run_command(*arguments: str) -> str:
    """What a `blockpress` command prints, the same on every terminal."""
    plain = {"COLUMNS": str(COLUMNS), "TERM": "dumb", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    code = "import sys; from blockpress.cli.main import main; sys.argv[0] = 'blockpress'; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"blockpress {' '.join(arguments)} ended with {done.returncode}: {done.stderr}"
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")


def render(text: str) -> str:
    """A page with its help texts as the commands print them today."""

    def fresh(match: re.Match[str]) -> str:
        _, *arguments = match["command"].split()
        return f"{match['open']}```text\n{run_command(*arguments, '--help')}\n```\n{match['close']}"

    return HELP.sub(fresh, text)


def command_names() -> set[str]:
    """The commands that `blockpress --help` lists."""
    _, _, listed = run_command("--help").partition("Commands:\n")
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
