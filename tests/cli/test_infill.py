"""`blockpress infill` and `edit`: files keep every byte outside of their holes, their rights and their links."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import blockpress
from blockpress import sudoku

from .conftest import Call

PUZZLE = sudoku.layout("530070000600195000098000060800060003400803001700020006060000280000419005000080079")
SOLVED = sudoku.layout("534678912672195348198342567859761423426853791713924856961537284287419635345286179")
HOLED = SOLVED[:30] + "<fill>" + SOLVED[37:]
ASK = ("--instruction", PUZZLE, "--max-tokens", 10, "--steps", 16)


def test_the_holes_of_standard_input_are_filled(call: Call) -> None:
    done = call("infill", "-", *ASK, stdin=HOLED)
    assert (done.code, done.out) == (0, SOLVED)
    assert done.err.startswith("stopped after 7 tokens")
    marked = call("infill", "-", *ASK, "--marker", "@@", stdin=HOLED.replace("<fill>", "@@"))
    assert marked.out == SOLVED


def test_json_has_the_holes_and_the_whole_text(call: Call) -> None:
    reply = json.loads(call("infill", "-", *ASK, "--json", stdin=HOLED).out)
    assert reply["holes"] == [SOLVED[30:37]] and reply["whole"] == SOLVED


def test_a_hole_is_held_to_a_grammar_in_a_file_or_to_a_choice(call: Call, tmp_path: Path) -> None:
    grammar = tmp_path / "row.lark"
    grammar.write_text("start: /[1-9]/~7", encoding="utf-8")
    for shape in (("--grammar", grammar), ("--choice", SOLVED[30:37]), ("--choice", "1", "--choice", SOLVED[30:37])):
        assert call("infill", "-", *ASK, *shape, stdin=HOLED).out == SOLVED


@pytest.mark.parametrize(("mark", "newline"), [("", "\n"), ("\ufeff", "\r\n")], ids=["plain", "marked, two characters"])
def test_a_file_is_filled_in_place_and_keeps_its_bytes(call: Call, tmp_path: Path, mark: str, newline: str) -> None:
    wanted = (mark + SOLVED.replace("\n", newline)).encode()
    file, link = tmp_path / "grid.txt", tmp_path / "link.txt"
    file.write_bytes((mark + (SOLVED[:30] + SOLVED[37:]).replace("\n", newline)).encode())
    file.chmod(0o640)
    link.symlink_to(file)
    done = call("infill", link, "--at", "4:1", *ASK, "--in-place", "--yes")
    assert done.code == 0 and "+" + SOLVED[30:39] in done.out
    assert link.is_symlink() and file.read_bytes() == wanted and file.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["grid.txt", "link.txt"]
    again = call("infill", file, "--at", "4:1-4:8", *ASK, "--in-place", "--yes")
    assert again.out == "" and "nothing has changed" in again.err and file.read_bytes() == wanted


def test_spans_are_places_in_front_of_characters(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "grid.txt"
    file.write_text(SOLVED[:10] + "111" + SOLVED[13:40] + "99999" + SOLVED[45:])
    done = call("infill", file, "--at", "5:1-5:6", "--at", "2:1-2:4", "--instruction", PUZZLE, "--max-tokens", 8)
    assert done.out == SOLVED and file.read_text() != SOLVED


def test_a_span_is_edited(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "grid.txt"
    file.write_text(SOLVED[:30] + "1" + SOLVED[31:])
    done = call("edit", file, PUZZLE, "--at", "4:1-4:9", "--noise", 0.6)
    assert (done.code, done.out) == (0, SOLVED)


@pytest.mark.parametrize("command", ["infill", "edit"])
def test_holes_and_spans_are_drawn_by_the_edits_of_their_options(call: Call, tmp_path: Path, command: str) -> None:
    file, lm = tmp_path / "grid.txt", blockpress.load("sudoku-nano")
    assert lm.tokenizer is not None
    file.write_text(SOLVED)
    five, six = lm.tokenizer.encode("56", add_special=False)
    options = ("--top-k", 3, "--top-p", 0.9, "--edit", f'logit_bias={{"{five}": 100}}', "--edit", "repeat_last_n=2")
    edited = lm.generation.sampling.with_(top_k=3, top_p=0.9, logit_bias={five: 100}, repeat_last_n=2)
    where = ("--at", "4:1-4:8", "--max-tokens", 7, "--steps", 4)
    if command == "edit":
        said = call("edit", file, *where, "--noise", 1, *options).out
        wanted = lm.edit(SOLVED, (30, 37), None, 1.0, max_tokens=7, sampling=edited.with_(steps=4))
    else:
        said = call("infill", file, *where, *options).out
        wanted = lm.infill([SOLVED[:30], SOLVED[37:]], None, 7, sampling=edited.with_(steps=4))
    assert said == wanted.whole and set(wanted.text or "") == {"5"}
    banned = ("--edit", f"suppress_tokens=[{six}]")
    assert "6" not in call(command, file, *where, *banned).out[30:-52]
    refused = call(command, file, *where, "--edit", "minp=0.1")
    assert (refused.code, refused.out) == (2, "") and "--edit is 'minp=0.1'" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("infill", "FILE"), "has no '<fill>'"),
        (("infill", "missing"), "cannot be read"),
        (("infill", "BINARY"), "cannot be read as UTF-8"),
        (("infill", "FILE", "--at", "x"), "--at is 'x'"),
        (("infill", "FILE", "--at", "4:1"), "the text has 2 lines"),
        (("infill", "FILE", "--at", "1:5"), "line 1 has 3 characters"),
        (("infill", "FILE", "--at", "0:1"), "the text has 2 lines"),
        (("infill", "FILE", "--at", "1:3-1:2"), "ends before it starts"),
        (("infill", "FILE", "--at", "1:1-1:3", "--at", "1:2"), "overlap"),
        (("infill", "FILE", "--at", "1:1", "--in-place"), "there is no terminal"),
        (("infill", "-", "--in-place"), "FILE is standard input"),
        (("infill", "FILE", "--at", "1:1", "--in-place", "--yes", "--json"), "--json is given with --in-place"),
        (("infill", "FILE", "--at", "1:1", "--max-tokens", "0"), "--max-tokens is 0"),
        (("edit", "FILE"), "--at is not given"),
        (("edit", "FILE", "--at", "1:1-1:2", "--noise", "2"), "noise is 2"),
    ],
)
def test_what_cannot_be_filled_is_refused(call: Call, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "text").write_text("123\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe1")
    names = {"FILE": tmp_path / "text", "BINARY": tmp_path / "binary", "missing": tmp_path / "missing"}
    done = call(*(names.get(each, each) for each in arguments))
    assert done.code == 2 and words in done.err and done.out == ""
    assert (tmp_path / "text").read_text() == "123\n"
