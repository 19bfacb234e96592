"""The marks of a canvas, the numbers beside it, and running text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from rich.text import Text

import blockpress
from blockpress.cli.canvas import TextView, cropped, fit, one_token_a_cell, states
from blockpress.cli.grid import Cell, State, answer_cells, draw_grid, final_states, puzzle_cells
from blockpress.cli.meter import Meter
from blockpress.cli.terminal import without_controls
from blockpress.config import Sampling
from blockpress.decoding import Committed, Denoised, Done, Reply, Usage
from blockpress.decoding import Text as FinalText

SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def denoised(step: int, tokens: list[int], accepted: str, changed: str, *, settled: bool = False) -> Denoised:
    return Denoised(
        row=0,
        canvas=0,
        step=step,
        argmax=torch.tensor(tokens),
        accepted=torch.tensor([sign == "a" for sign in accepted]),
        entropy=torch.full((len(tokens),), 1 / step),
        changed=torch.tensor([sign == "c" for sign in changed]),
        settled=settled,
    )


def test_cells_have_states() -> None:
    noise, accepted, changed, settled = State.NOISE, State.ACCEPTED, State.CHANGED, State.SETTLED
    assert states(denoised(1, [5, 6, 7], "a-a", "ccc")) == [accepted, noise, accepted]
    assert states(denoised(2, [5, 6, 7], "a-a", "cc-")) == [changed, noise, accepted]
    assert states(denoised(3, [5, 6, 7], "a--", "---", settled=True)) == [settled] * 3


def test_states_differ_without_colour() -> None:
    colours = ("green", "red")
    looks = {(s.mark, " ".join(word for word in s.style.split() if word not in colours)) for s in State}
    assert len(looks) == len(State)
    assert all(len(state.mark) == 3 for state in State)


def test_a_grid_has_thirteen_lines_or_nine() -> None:
    boxed = [line.plain for line in draw_grid(puzzle_cells("53" + "0" * 79))]
    assert boxed[0] == "┌─────────┬─────────┬─────────┐" and boxed[1] == "│ 5  3    │         │         │"
    assert len(boxed) == 13 and {len(line) for line in boxed} == {31}
    compact = draw_grid(puzzle_cells(SOLUTION), compact=True)
    assert len(compact) == 9 and compact[0].plain == "5 3 4 6 7 8 9 1 2"


def test_kept_givens_are_underlined_and_noise_is_hidden() -> None:
    cells = answer_cells("50", ["5", "7"], [State.ACCEPTED, State.NOISE])
    assert [cell.text for cell in cells] == [" 5 ", " · "] and "underline" in cells[0].style
    assert answer_cells("5", ["6"], [State.CHANGED]) == [Cell("[6]", State.CHANGED.style)]


def test_a_finished_canvas_shows_what_is_wrong() -> None:
    puzzle, accepted = "5" + "0" * 80, [State.ACCEPTED] * 81
    assert final_states(puzzle, SOLUTION, accepted) == [State.SETTLED] * 81
    assert final_states("6" + puzzle[1:], SOLUTION, accepted)[0] is State.CONFLICT
    twice = final_states(puzzle, SOLUTION[:80] + "1", [*accepted[:79], State.NOISE, State.ACCEPTED])
    assert twice[80] is State.CONFLICT and twice[79] is State.UNSURE and twice[0] is State.ACCEPTED
    assert final_states(puzzle, "?" + SOLUTION[1:], accepted)[0] is State.CONFLICT


def test_parts_are_wrapped_and_cropped() -> None:
    parts = [Text("one"), Text("two"), Text("three")]
    assert [line.plain for line in fit(parts, 9)] == ["one   two", "three"]
    assert [line.plain for line in fit([Text("a long part")], 6)] == ["a long", "part"]
    assert [line.plain for line in cropped(parts, 3, 2)] == ["one", "two"]


def test_the_meter_leaves_out_the_time_of_drawing() -> None:
    meter = Meter(Sampling(), stop_ids=(1,), canvas_length=3)
    assert meter.now()[0] == "step 0 of at most 48" and meter.milliseconds is None
    meter.see(denoised(1, [5, 6, 1], "a-a", "ccc"))
    assert meter.tokens_per_forward == 3 and meter.now()[1:3] == ["temperature 0.80", "accepted 2 of 3"]
    time.sleep(0.05)
    meter.go_on()
    meter.see(denoised(2, [5, 1, 1], "aaa", "-c-"))
    assert meter.tokens_per_forward == 1 and meter.milliseconds is not None and meter.milliseconds < 40
    assert meter.entropy() == "mean entropy 0.5000 nats █▅"
    usage = Usage(1, 2, 1, 2, 2, 1.0)
    meter.see(Done(0, Reply("5", [5, 1], "stop", usage)))
    assert [part.split(" ", 1)[1] for part in meter.result()[:2]] == ["ms per forward", "tokens per forward"]


def test_a_second_canvas_costs_its_commit() -> None:
    meter = Meter(Sampling(), stop_ids=(1,), canvas_length=2)
    meter.see(denoised(1, [5, 6], "aa", "cc"))
    meter.see(Committed(0, 0, [5, 6], 1))
    second = denoised(1, [5, 1], "aa", "cc")
    meter.see(Denoised(**(vars(second) | {"canvas": 1})))
    assert meter.forwards == 3 and meter.tokens_per_forward == pytest.approx(4 / 3)


def test_a_retried_canvas_is_committed_once() -> None:
    meter = Meter(Sampling(), stop_ids=(1,), canvas_length=2)
    for canvas, attempt, step in ((0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 1, 1), (1, 1, 2), (1, 2, 1)):
        event = denoised(step, [5, 6], "aa", "cc")
        meter.see(Denoised(**(vars(event) | {"canvas": canvas, "retry": attempt})))
    assert meter.forwards == 6 + 1


def test_finished_lines_scroll_up(untrained: Path) -> None:
    lm = blockpress.load(untrained)
    view = TextView(lm, lm.generation.sampling)
    view.see(denoised(1, [6, 4, 7, 8, 1, 9], "aa-aaa", "cccccc"))
    drawn = [line.plain for line in view.draw(60, 20)]
    assert drawn[:2] == ["1", "·3"]  # a line end, noise, and nothing behind the accepted stop id
    view.see(Committed(0, 0, [6, 4, 7, 8], 1))
    view.see(FinalText(0, "1\n2\x1b[31m"))
    assert [line.plain for line in view.release()] == ["1"] and view.release() == []
    view.see(denoised(1, [9, 9], "aa", "cc"))
    assert view.draw(60, 20)[0].plain == r"2\x1b[31m44"
    assert all(len(view.draw(10, height)) <= height for height in range(1, 12))
    view.see(Done(0, Reply("", [], "stop", Usage(1, 0, 1, 1, 1, 0.0))))
    view.finish("stopped")
    assert [line.plain for line in view.release()] == [r"2\x1b[31m"]
    assert view.draw(60, 20)[0].plain.startswith("stopped")


def test_the_shipped_model_s_cells_are_a_grid(untrained: Path) -> None:
    assert one_token_a_cell(blockpress.load(untrained))


def test_control_characters_are_escaped() -> None:
    assert without_controls("a\tb\nc\x07\x1b]0;x\x9b") == "a\tb\nc\\x07\\x1b]0;x\\x9b"
