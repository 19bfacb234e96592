"""`--record`: every frame of a recording is the run's, the last one is the answer, and the file plays by itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest
import tokenizers
import torch

import blockpress
from blockpress import LM, sudoku
from blockpress.checkpoints import save_checkpoint
from blockpress.cli import animate
from blockpress.cli.animate import Frame, animation
from blockpress.cli.doctor import PUZZLE
from blockpress.cli.grid import State
from blockpress.cli.page import COLUMNS, Page, final_pieces
from blockpress.cli.record import MARGIN, SIZE, TOP, WIDTH
from blockpress.config import PRESETS, GenerationConfig
from blockpress.decoding import Committed, Denoised, Done, Event, Reply, Usage
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer

from .conftest import Call, Screen

ROOT = Path(__file__).parents[2]
PROMPT = sudoku.layout(PUZZLE)
NOISE = "▒"
RULE = re.compile(r"@keyframes (?P<name>\w+)\{(?P<body>.*)\}$", re.MULTILINE)
STOP = re.compile(r"(?P<at>[\d.%,]+)\{opacity:(?P<opacity>[01])\}")
PLAY = re.compile(r"\.(?P<group>\w+)\{animation:(?P<name>\w+) [\d.]+s linear infinite\}")


@pytest.fixture(scope="session")
def endless(workspace: Path, random_network: Callable[..., Any]) -> Path:
    """A checkpoint of the shipped model's kind, with random weights, no stop and room for several canvases."""
    path, config = workspace / "cli-endless", replace(PRESETS["sudoku-nano"](), context_length=512)
    save_checkpoint(path, random_network(config), generation=GenerationConfig(stop_ids=()))
    write_digits_tokenizer(path)
    return path


class Player:
    """A recording as a browser has it: `frames`, the elements of each; `still`, what is seen where nothing moves."""

    def __init__(self, text: str) -> None:
        root = ElementTree.fromstring(text)
        self.tags = [element.tag.rpartition("}")[2] for element in root.iter()]
        self.attributes = {name for element in root.iter() for name in element.attrib}
        self.style = "".join(element.text or "" for element in root.iter() if element.tag.endswith("style"))
        groups = [element for element in root if element.tag.endswith("}g")]
        self.still = [mark for group in groups if group.get("opacity") != "0" for mark in group]
        stops = {rule["name"]: self._stops(rule["body"]) for rule in RULE.finditer(self.style)}
        plays = {play["group"]: stops[play["name"]] for play in PLAY.finditer(self.style)}
        assert {group.get("class") for group in groups[1:]} == set(plays)
        self.frames: list[list[ElementTree.Element]] = []
        times = sorted({time for rule in stops.values() for time, _ in rule})
        for time in ((left + right) / 2 for left, right in pairwise(times)):
            seen = [
                (1 if not group.get("class") else self._opacity(plays[group.get("class", "")], time), group)
                for group in groups
            ]
            marks = [mark for opacity, group in seen if opacity == 1 for mark in group]
            if all(opacity in (0, 1) for opacity, _ in seen) and marks not in self.frames[-1:]:
                self.frames.append(marks)

    @staticmethod
    def _stops(body: str) -> list[tuple[float, int]]:
        found = [(stop["at"].split(","), int(stop["opacity"])) for stop in STOP.finditer(body)]
        return [(float(at.rstrip("%")), opacity) for times, opacity in found for at in times]

    @staticmethod
    def _opacity(stops: Sequence[tuple[float, int]], time: float) -> float:
        for (left, before), (right, after) in pairwise(stops):
            if left <= time <= right:
                return before + (after - before) * (time - left) / (right - left)
        raise AssertionError(f"no keyframes at {time} %")


def place(mark: ElementTree.Element) -> tuple[float, float]:
    return float(mark.get("x", 0)), float(mark.get("y", 0))


def caption(frame: Sequence[ElementTree.Element]) -> list[str]:
    (parts,) = [[span.text or "" for span in mark] for mark in frame if len(mark)]
    return parts


def grid(frame: Sequence[ElementTree.Element], left: int) -> dict[int, tuple[str, str]]:
    """The cells of the sudoku that begins at `left`: what each looks like, and its sign."""
    cells: dict[int, tuple[str, str]] = {}
    for mark in frame:
        x, y = place(mark)
        column, row = int(x - left) // SIZE, int(y - TOP) // SIZE
        look, kind = (mark.get("class") or "").removesuffix(" m"), mark.tag.rpartition("}")[2]
        if (
            kind == "path"
            or left > x
            or column > 8
            or not 0 <= row <= 8
            or (kind, look) in (("rect", "c"), ("rect", "x"))
        ):
            continue
        assert row * 9 + column not in cells
        cells[row * 9 + column] = (look, mark.text or "")
    return cells


RIGHT = WIDTH - MARGIN - 9 * SIZE


def expected_grid(event: Denoised, pieces: Sequence[str]) -> dict[int, tuple[str, str]]:
    cells = {}
    for cell, given in enumerate(PUZZLE):
        at = cell + cell // 9
        if not event.settled and not event.accepted[at]:
            cells[cell] = ("n", "")
        elif event.changed[at] and event.step > 1 and not event.settled:
            cells[cell] = ("c", pieces[at])
        else:
            cells[cell] = ("g" if given == pieces[at] else "s" if event.settled else "a", pieces[at])
    return cells


def written(frame: Sequence[ElementTree.Element]) -> str:
    """The running text of a frame in the order of reading, noise and line ends as signs."""
    foot = max(place(mark)[1] for mark in frame if mark.get("height") == "3")
    marks = [(place(mark), NOISE) for mark in frame if mark.get("height") == "14"]
    marks += [((x, y - 11), mark.text or "") for mark in frame if mark.get("textLength") for x, y in [place(mark)]]
    return "".join(sign for (x, y), sign in sorted(marks, key=lambda mark: mark[0][::-1]) if y < foot)


def events_of(lm: LM, prompt: str, seed: int = 0, max_tokens: int = 90, **changes: Any) -> list[Event]:
    return list(lm.stream(prompt, max_tokens, seed, lm.generation.sampling.with_(**changes)))


def piece(lm: LM, token: int) -> str:
    assert lm.tokenizer is not None
    return lm.tokenizer.decode([token], skip_special=False).replace("\n", "↵")


def test_every_frame_of_a_sudoku_is_a_step_of_its_run(call: Call, tmp_path: Path) -> None:
    lm, file = blockpress.load("sudoku-nano"), tmp_path / "grid.svg"
    done = call("sudoku", PUZZLE, "--noise-seed", 3, "--record", file)
    steps = [event for event in events_of(lm, PROMPT, 3) if isinstance(event, Denoised)]
    first, *middle, last = Player(file.read_text("utf-8")).frames
    assert done.code == 0 and len(middle) == len(steps) > 2 and file.stat().st_size < 150_000
    assert grid(first, RIGHT) == dict.fromkeys(range(81), ("n", ""))
    assert caption(first) == ["step 0 of at most 48", "0 of 90 tokens accepted", "sudoku-nano"]
    for frame, event in zip(middle, steps, strict=True):
        pieces = [lm.decode([token]) for token in event.argmax.tolist()]
        assert grid(frame, RIGHT) == expected_grid(event, pieces)
        kept = "90 of 90 tokens settled" if event.settled else f"{int(event.accepted.sum())} of 90 tokens accepted"
        assert caption(frame) == [f"step {event.step} of at most 48", kept, "sudoku-nano"]
        assert grid(frame, MARGIN) == {cell: ("g", given) for cell, given in enumerate(PUZZLE) if given != "0"}
    assert "".join(grid(last, RIGHT)[cell][1] for cell in range(81)) == done.out.replace("\n", "")
    assert caption(last) == [f"solved in {len(steps)} steps", "90 of 90 tokens settled", "sudoku-nano"]


def test_wrong_digits_stand_out_at_the_end(call: Call, tmp_path: Path, untrained: Path) -> None:
    file = tmp_path / "wrong.SVG"
    done = call("sudoku", PUZZLE, "--steps", 2, "--model", untrained, "--record", file, "--json")
    last = Player(file.read_text("utf-8")).frames[-1]
    assert done.code == 0 and '"solved": false' in done.out
    assert {look for look, _ in grid(last, RIGHT).values()} >= {"x"} and caption(last)[0] == "NOT solved in 2 steps"
    assert "in conflict" in [mark.text for mark in last]


def test_the_same_seed_gives_the_same_file(call: Call, tmp_path: Path, screen: Screen) -> None:
    files = [tmp_path / f"{number}.svg" for number in range(4)]
    puzzles = ("sudoku", "--random", 2, "--givens", 34, "--seed", 4)
    call(*puzzles, "--record", files[0])
    call(*puzzles, "--record", files[1], "--batch", 1, "--json")
    call(*puzzles, "--record", files[2], "--fast", screen=screen)
    call(*puzzles, "--record", files[3], "--noise-seed", 1)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes() != files[3].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name for file in files]


def test_several_puzzles_follow_one_another(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "two.svg"
    answers = call("sudoku", "-n", 2, "--givens", 55, "--seed", 4, "--record", file).out.strip().split("\n\n")
    frames = Player(file.read_text("utf-8")).frames
    ends = [frame for frame in frames if "solved in" in caption(frame)[0]]
    grids = ["".join(grid(end, RIGHT)[cell][1] for cell in range(81)) for end in ends]
    assert grids == [answer.replace("\n", "") for answer in answers] and ends[-1] == frames[-1]
    for number, end in enumerate(ends):
        assert f"puzzle: 55 givens, --seed {4 + number}" in [mark.text for mark in end]


@pytest.mark.parametrize(
    "options", [("--max-tokens", 100), ("--max-tokens", 95, "--mode", "verified", "--max-verifications", 1)]
)
def test_every_frame_of_a_text_is_a_step_of_its_run(
    call: Call, tmp_path: Path, endless: Path, options: tuple[object, ...]
) -> None:
    lm, file = blockpress.load(endless), tmp_path / "text.svg"
    done = call("run", endless, PROMPT, "--record", file, "--steps", 3, "--seed", 2, *options)
    checks = 1 if "--max-verifications" in options else 0
    events = events_of(lm, PROMPT, 2, int(str(options[1])), steps=3, max_verifications=checks)
    wanted: list[str] = []
    committed: list[int] = []
    final = [len(piece(lm, token)) for token in cast("Done", events[-1]).reply.tokens]
    for event in events:
        if isinstance(event, Committed):
            committed += event.tokens
        if isinstance(event, Denoised):
            before = "".join(piece(lm, token) for token in committed)
            if event.step == 1 and not event.verifications:
                wanted.append(before + NOISE * 90)
            for at, (token, accepted) in enumerate(zip(event.argmax.tolist(), event.accepted.tolist(), strict=True)):
                if (accepted or event.settled) and token in lm.generation.stop_ids:
                    break
                width, text = (*final, *[1] * 90)[len(committed) + at], piece(lm, token)
                cut = text if len(text) <= width else f"{text[: width - 1]}…"
                before += cut if accepted or event.settled else NOISE
            wanted.append(before)
    frames = Player(file.read_text("utf-8")).frames
    assert [written(frame) for frame in frames[:-1]] == wanted and len(wanted) > 6
    printed = done.out.removesuffix("\n").replace("\n", "↵")
    assert (
        re.sub(r"<[^<>]+>", "", written(frames[-1])) == printed and len(printed) > 50
    )  # control tokens are spelled out
    assert "canvas 2, step 3" in [caption(frame)[0] for frame in frames]


def test_a_chat_is_recorded_with_its_control_tokens_and_in_every_form(call: Call, tmp_path: Path, seeing: Path) -> None:
    files = [tmp_path / name for name in ("json.svg", "events.svg", "piped.svg")]
    options = ("--max-tokens", 30, "--seed", 3, "--thinking")
    call("run", seeing, "Say <b> & go", *options, "--record", files[0], "--json")
    call("run", seeing, "Say <b> & go", *options, "--record", files[1], "--events")
    call("run", seeing, *options, "--record", files[2], stdin="Say <b> & go\n")
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    lm = blockpress.load(seeing)
    reply = lm.chat([{"role": "user", "content": "Say <b> & go"}], thinking=True, max_tokens=30, seed=3)
    tokens = [token for token in reply.tokens if token not in lm.generation.stop_ids]
    assert lm.tokenizer is not None
    last = Player(files[0].read_text("utf-8")).frames[-1]
    assert written(last).replace("↵", "") == re.sub(r"\s", "", lm.tokenizer.decode(tokens, skip_special=False))
    assert "prompt: Say <b> & go" in [mark.text for mark in last]


def test_a_stop_text_ends_the_recording_too(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "stop.svg"
    done = call("run", "sudoku-nano", PROMPT, "--stop", "\n198", "--record", file)
    frames = Player(file.read_text("utf-8")).frames
    assert written(frames[-1]).replace("↵", "\n") == done.out.removesuffix("\n") == "534678912\n672195348"
    assert len(written(frames[-2])) == 89


def stand_in(*words: str) -> LM:
    """As much of a model as a page needs, whose tokens are the end and these words, a line for a space."""
    vocabulary = {word: number for number, word in enumerate(("<eos>", "<unk>", *words))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    return cast("LM", SimpleNamespace(tokenizer=Tokenizer(backend), generation=SimpleNamespace(stop_ids=(0,))))


def reply_of(text: str, tokens: list[int]) -> Reply:
    return Reply(text, tokens, "stop", Usage(1, len(tokens), 1, 1, 1, 1.0))


def test_a_token_stands_where_the_finished_text_has_it() -> None:
    lm = stand_in("The", "▁wonderful", "▁s", "!", "\n")
    settled, wrong = [2, 4, 5, 0], [3, 3, 6, 5]
    reply = reply_of("The s!", settled)
    event = Denoised(0, 0, 1, torch.tensor(wrong), torch.ones(4) > 0, torch.zeros(4), torch.ones(4) > 0, False)
    page = Page(lm, reply, [event, Committed(0, 0, settled, 1)])
    assert [cell[:4] for cell in page.finished()] == [(0, 0, 3, "The"), (3, 0, 2, " s"), (5, 0, 1, "!")]
    cells = page.canvas(event, [State.ACCEPTED, State.CHANGED, State.ACCEPTED, State.NOISE])
    assert [cell[:4] for cell in cells] == [(0, 0, 3, " w…"), (3, 0, 2, " …"), (5, 0, 1, "↵"), (6, 0, 1, "")]
    noise = page.canvas(event, [State.NOISE] * 4)
    assert [cell[:4] for cell in noise] == [(0, 0, 3, ""), (4, 0, 1, ""), (5, 0, 1, ""), (6, 0, 1, "")]


def test_lines_break_between_words() -> None:
    lm = stand_in("a" * (COLUMNS - 2), "▁bc", "d", "\n\n", "▁" * 3)
    tokens = [2, 3, 4, 5, 3, 6]
    page = Page(lm, reply_of("", tokens), [Committed(0, 0, tokens, 1)])
    assert [cell[:2] for cell in page.finished()] == [(0, 0), (-1, 1), (2, 1), (3, 1), (0, 3), (3, 3)]


def test_the_pieces_of_an_answer_are_its_text() -> None:
    lm = stand_in("ab", "<0xE2>", "<0x82>", "<0xAC>", "cEND")
    assert final_pieces(lm, reply_of("ab€", [2, 3, 4, 5, 0])) == ["ab", "", "", "€"]
    assert final_pieces(lm, reply_of("abc", [2, 6])) == ["ab", "c"]  # it stopped before the text END


def test_a_frame_is_visible_only_in_its_time() -> None:
    shown = ["ab", "a", "ac", "abc"]
    frames = [Frame(tuple(f'<rect class="{mark}"/>' for mark in marks), 0.5) for marks in shown]
    player = Player(animation(frames, (9, 9), "", "a < b", "\x00"))
    assert [sorted(str(mark.get("class")) for mark in frame) for frame in player.frames] == [
        [*marks] for marks in shown
    ]
    assert sorted(str(mark.get("class")) for mark in player.still) == ["a", "b", "c"]


def check_that_it_plays_by_itself(text: str) -> Player:
    player = Player(text)
    assert set(player.tags) == {"svg", "title", "desc", "style", "g", "rect", "path", "text", "tspan"}
    assert not [name for name in player.attributes if name.startswith("on") or "href" in name or name == "style"]
    assert not re.search(r"url\(|@import|@font-face", player.style)
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"') == 1
    moving = player.style.partition("@media (prefers-reduced-motion:no-preference){")[2].partition("\n}")[0]
    assert player.style.count("animation:") == moving.count("animation:") > 0
    assert "@media (prefers-color-scheme:dark){" in player.style
    key = lambda mark: ElementTree.tostring(mark)  # noqa: E731
    assert sorted(player.still, key=key) == sorted(player.frames[-1], key=key)
    return player


def test_a_recording_needs_nothing_and_is_still_where_nothing_may_move(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "one.svg"
    assert call("sudoku", PUZZLE, "--record", file).code == 0
    check_that_it_plays_by_itself(file.read_text("utf-8"))


def test_the_picture_of_the_readme_is_what_its_command_says() -> None:
    text, readme = (ROOT / "docs" / "sudoku.svg").read_text("utf-8"), (ROOT / "README.md").read_text("utf-8")
    command = re.search(r"blockpress sudoku --random 1 --givens (\d+) --seed (\d+) --record docs/sudoku\.svg", readme)
    frames = check_that_it_plays_by_itself(text).frames
    assert command and 'src="docs/sudoku.svg"' in readme and len(text) < 150_000
    assert f"puzzle: {command[1]} givens, --seed {command[2]}" in [mark.text for mark in frames[0]]
    puzzle = sudoku.generate_puzzle(int(command[2]), int(command[1])).puzzle
    assert all(len(grid(frame, RIGHT)) == 81 for frame in frames)
    answer = "".join(grid(frames[-1], RIGHT)[cell][1] for cell in range(81))
    assert sudoku.is_solved(answer) and sudoku.agrees(puzzle, answer)


def test_invalid_recordings_are_refused_before_weights_are_read(
    call: Call, tmp_path: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> LM:
        raise AssertionError("weights were read")

    monkeypatch.setattr("blockpress.lm.load", load)
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    for name, words in (
        ("grid.gif", "a recording is an SVG (hint: give a name that ends in .svg)"),
        ("grid", "a recording is an SVG"),
        ("folder.svg", "a folder (hint: give a file"),
        ("none/grid.svg", f"its folder is not there (hint: make the folder {tmp_path / 'none'} first)"),
        (f"{'n' * 300}.svg", "which cannot be written: File name too long (hint: check the path"),
    ):
        for command in (("sudoku", PUZZLE), ("run", untrained, "1")):
            done = call(*command, "--record", tmp_path / name)
            assert done.code == 2 and f"--record is '{tmp_path / name}'" in done.err and words in done.err, done.err
    file = tmp_path / "grid.svg"
    for arguments, words in (
        (("sudoku", "-n", 10), "--record is given with 10 puzzles (hint: it takes up to 9 of them)"),
        (("sudoku", PUZZLE, "--puzzle-only"), "--record is given with --puzzle-only"),
        (("run", untrained, "1", "--mode", "autoregressive"), f"--record is '{file}', and the mode autoregressive"),
    ):
        done = call(*arguments, "--record", file)
        assert done.code == 2 and not done.out and words in done.err, done.err
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "grid.svg"
    file.write_text("older")

    def refuse(*names: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(animate.os, "replace", refuse)
    done = call("sudoku", PUZZLE, "--record", file)
    assert done.code == 2 and f"{file} cannot be written: Permission denied" in done.err
    assert file.read_text() == "older" and os.listdir(tmp_path) == ["grid.svg"]
    assert sudoku.is_solved(done.out.replace("\n", ""))  # the answer is told all the same


def test_a_recording_of_piped_input_is_one_answer(
    call: Call, tmp_path: Path, seeing: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockpress.cli.run.is_terminal", lambda stream: True)
    file = tmp_path / "one.svg"
    done = call("run", seeing, "--max-tokens", 8, "--fast", "--record", file, stdin="Hi\n", screen=screen)
    assert done.code == 0 and "Type a message" not in done.err and file.is_file()
