"""The pages of the repository: links lead somewhere, paths exist, versions agree, decisions have their four parts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import blockpress

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "blockpress").rglob("*.md")])
SOURCES = [*(ROOT / "blockpress").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
DECISIONS = sorted((ROOT / "docs" / "adr").glob("*.md"))
LINK = re.compile(r"\]\((?P<link>[^)\s]+)(?: \"[^\"]*\")?\)|(?:src|href)=\"(?P<html>[^\"]+)\"")
OUTSIDE = re.compile(r"^[a-z][a-z0-9+.-]*:")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NAMED_PAGE = re.compile(r"(?<![\w/])docs/[\w./-]+\.md")  # in a docstring; not in the address of another project
NAMED_PATH = re.compile(r"`((?:blockpress|tests|docs|examples)/[\w./-]*)`")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        link = match["link"] or match["html"]
        if OUTSIDE.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name(page)} links to {link}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name(page)} links to {link}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_paths_exist(page: Path) -> None:
    missing = [path for path in NAMED_PATH.findall(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()]
    assert not missing


def test_pages_that_the_code_names_exist() -> None:
    named = {page for source in SOURCES for page in NAMED_PAGE.findall(source.read_text(encoding="utf-8"))}
    assert "docs/adr/0014-verified-decoding.md" in named
    assert [page for page in named if not (ROOT / page).exists()] == []


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    heads = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert project["version"] == blockpress.__version__ == heads[0]


@pytest.mark.parametrize("page", DECISIONS, ids=name)
def test_decisions_have_their_four_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.match(rf"# {page.name[:4]}: ", text)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Status", "Context", "Decision", "Consequences"]


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [page.name[:4] for page in DECISIONS] == [f"{number:04d}" for number in range(1, len(DECISIONS) + 1)]
