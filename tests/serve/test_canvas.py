"""`/v1/canvas` by HTTP: its events in order, what its frames add up to, and how it ends early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from blockpress import sudoku
from blockpress.serve import ServeOptions
from tests.builders.chats import CANVAS, obedient_model
from tests.builders.server import Served
from tests.serve.conftest import Serve

PUZZLE = sudoku.generate_puzzle(1, 45)
SOLVE = {"prompt": sudoku.layout(PUZZLE.puzzle), "seed": 3}
Events = list[tuple[str, dict[str, Any]]]


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "seed": 1, **more}


def lines(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            yield name, json.loads(line.removeprefix("data:"))


def watch(served: Served, body: dict[str, Any]) -> Events:
    with httpx.stream("POST", f"{served.url}/v1/canvas", json=body, timeout=60) as answer:
        if answer.status_code != 200:
            raise AssertionError(answer.read())
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(lines(answer))


def of(events: Events, name: str, index: int = 0) -> list[dict[str, Any]]:
    return [body for kind, body in events if kind == f"canvas.{name}" and body["index"] == index]


def joined(events: Events, index: int = 0) -> dict[int, list[int]]:
    """The tokens of each canvas after its last frame."""
    canvases: dict[int, dict[int, int]] = {}
    for frame in of(events, "frame", index):
        canvas = canvases.setdefault(frame["canvas"], {})
        canvas |= {place: token for place, token, *_ in frame["cells"]}
    return {number: [canvas[place] for place in sorted(canvas)] for number, canvas in canvases.items()}


def test_a_canvas_starts_has_frames_is_committed_and_done(nano: Served) -> None:
    events = watch(nano, SOLVE)
    kinds = [name for name, _ in events]
    frames = of(events, "frame")
    assert kinds == ["canvas.start", *["canvas.frame"] * len(frames), "canvas.commit", "canvas.done"]
    (start,), (done,) = of(events, "start"), of(events, "done")
    assert (start["seed"], start["canvas_length"], start["mode"]) == (3, 90, "diffusion")
    assert done["text"].replace("\n", "") == PUZZLE.solution
    assert done["finish_reason"] == "stop"
    assert done["usage"]["diffusion"]["steps"] == len(frames) == frames[-1]["step"]
    assert frames[-1]["settled"]


def test_the_first_frame_has_every_position_and_each_other_one_only_what_is_new(nano: Served) -> None:
    first, *others = of(watch(nano, SOLVE), "frame")
    assert [cell[0] for cell in first["cells"]] == list(range(90))
    before = {cell[0]: cell for cell in first["cells"]}
    for frame in others:
        assert 0 < len(frame["cells"]) < 90
        for cell in frame["cells"]:
            assert cell != before[cell[0]]
            before[cell[0]] = cell
    assert "".join(before[place][2] for place in range(89)) == sudoku.layout(PUZZLE.solution)


def test_frames_joined_are_the_committed_canvases_and_texts_joined_the_answer(chatty: Served) -> None:
    events = watch(chatty, says("count 20"))
    commits, (done,) = of(events, "commit"), of(events, "done")
    assert len(commits) == len(joined(events)) > 3
    for commit in commits:
        length = len(commit["tokens"])
        assert length == CANVAS or commit is commits[-1]
        assert joined(events)[commit["canvas"]][:length] == commit["tokens"]
    assert "".join(body.get("text", "") for name, body in events if name != "canvas.done") == done["text"]
    assert done["text"] == " ".join(map(str, range(1, 21)))
    assert done["usage"]["completion_tokens"] == sum(len(commit["tokens"]) for commit in commits)


def test_a_verified_canvas_has_its_redone_steps_as_frames(nano: Served) -> None:
    events = watch(nano, {**SOLVE, "mode": "verified", "diffusion": {"max_verifications": 1}})
    (commit,), (done,), frames = of(events, "commit"), of(events, "done"), of(events, "frame")
    assert len(frames) == done["usage"]["diffusion"]["steps"]
    assert max(frame["verifications"] for frame in frames) == done["usage"]["diffusion"]["redos"] > 0
    assert joined(events)[0][: len(commit["tokens"])] == commit["tokens"]


def test_text_comes_with_the_canvas_that_makes_it_final(chatty: Served) -> None:
    commits = of(watch(chatty, says("count 20")), "commit")
    assert all(commit["text"] for commit in commits)


def test_a_thought_is_no_text(chatty: Served) -> None:
    events = watch(chatty, says("say yes", thinking=True))
    (done,) = of(events, "done")
    assert (done["text"], done["reasoning"].strip()) == ("yes", "I think.")
    assert "".join(commit.get("reasoning", "") for commit in of(events, "commit")).strip() == "I think."


def test_each_of_several_answers_has_its_own_events_and_seed(nano: Served) -> None:
    events = watch(nano, {**SOLVE, "n": 2})
    assert [start["seed"] for _, start in events[:2]] == [3, 4]
    alone = watch(nano, {**SOLVE, "seed": 4})
    assert joined(events, 1) == joined(alone)
    assert of(events, "frame", 1) == [{**frame, "index": 1} for frame in of(alone, "frame")]


def test_the_answer_is_the_one_that_completions_give(nano: Served) -> None:
    (done,) = of(watch(nano, SOLVE), "done")
    other = httpx.post(f"{nano.url}/v1/completions", json={**SOLVE, "max_tokens": 90}).json()
    assert done["text"] == other["choices"][0]["text"]


def test_without_frames_there_are_commits_alone(nano: Served) -> None:
    events = watch(nano, {**SOLVE, "diffusion": {"frames": False}})
    assert [name for name, _ in events] == ["canvas.start", "canvas.commit", "canvas.done"]


def test_settings_are_honoured(nano: Served) -> None:
    cut = watch(nano, {**SOLVE, "diffusion": {"steps": 1}, "max_tokens": 7})
    assert len(of(cut, "frame")) == 1
    (commit,), (done,) = of(cut, "commit"), of(cut, "done")
    assert (len(commit["tokens"]), done["finish_reason"]) == (7, "length")
    (chosen,) = of(watch(nano, {**SOLVE, "choice": ["12", "345"]}), "done")
    assert chosen["text"] in ("12", "345")
    (matched,) = of(watch(nano, {**SOLVE, "regex": "9{4}"}), "done")
    assert matched["text"] == "9999"
    (given,) = of(watch(nano, {**SOLVE, "schema": {"type": "integer", "minimum": 3, "maximum": 4}}), "done")
    assert given["text"] in ("3", "4")


def test_pins_stand_at_every_step(nano: Served) -> None:
    nine = 14  # the token of the digit
    events = watch(nano, {**SOLVE, "pins": {"0": nine, "88": nine}})
    canvas: dict[int, int] = {}
    for frame in of(events, "frame"):
        canvas |= {place: token for place, token, *_ in frame["cells"]}
        assert canvas[0] == canvas[88] == nine
    assert of(events, "done")[0]["text"].startswith("9")


def test_a_draft_without_noise_is_where_the_answer_starts(nano: Served) -> None:
    hard = sudoku.generate_puzzle(1, 28)
    solution = sudoku.layout(hard.solution)
    ask = {"prompt": sudoku.layout(hard.puzzle), "seed": 3, "diffusion": {"steps": 1}}

    def wrong(body: dict[str, Any]) -> int:
        (frame,) = of(watch(nano, body), "frame")
        return sum(cell[2] != sign for cell, sign in zip(frame["cells"], solution, strict=False))

    assert wrong({**ask, "draft": solution, "noise": 0.0}) < wrong(ask)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": [{"role": "user", "content": "1"}], "pins": {"0": 5}}, "pins"),
        ({"messages": [{"role": "user", "content": "1"}], "draft": [1]}, "draft"),
        ({"prompt": "1", "pins": {"x": 5}}, "pins"),
        ({"prompt": "1", "draft": "1", "noise": 2.0}, "noise"),
        ({"prompt": "1", "messages": [{"role": "user", "content": "1"}]}, "messages"),
        ({"prompt": "1", "mode": "autoregressive"}, "mode"),
        ({"prompt": "1", "stream": False}, "stream"),
        ({"prompt": "1", "thinking": True}, "thinking"),
        ({"prompt": "1", "thinking_budget": 5}, "thinking_budget"),
        ({"prompt": "1", "top_p": 1.5}, "top_p"),
        ({"prompt": "1", "logit_bias": {"five": 1.0}}, "logit_bias"),
        ({"prompt": "1", "logit_bias": {"99": 1.0}}, "logit_bias"),
        ({"prompt": "1", "logit_bias": {"5": 101.0}}, "logit_bias"),
        ({"prompt": "1", "allowed_token_ids": [99]}, "allowed_token_ids"),
        ({"prompt": "1", "frequency_penalty": -2.5}, "frequency_penalty"),
        ({"prompt": "1", "repetition_penalty": 0.0}, "repetition_penalty"),
        ({"prompt": "1", "tools": []}, "tools"),
        ({"prompt": "1", "response_format": {"type": "text"}}, "response_format"),
        ({"prompt": "1", "seed": "7"}, "seed"),
        ({"prompt": "1", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "1", "diffusion": {"depth": 3}}, "diffusion.depth"),
        ({"prompt": 7}, "prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(nano: Served, body: dict[str, Any], field: str) -> None:
    answer = httpx.post(f"{nano.url}/v1/canvas", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(field)


def test_with_leniency_it_is_a_warning(nano: Served) -> None:
    (start,) = of(watch(nano, {**SOLVE, "bad_words": ["56"], "stream": False, "lenient": True}), "start")
    assert [warning.split()[0] for warning in start["warnings"]] == ["bad_words[0]", "stream"]


def test_what_fails_in_the_middle_is_the_last_event(chatty: Served) -> None:
    events = watch(chatty, says("fail " + "a" * 30))
    assert [name for name, _ in events][-2:] == ["canvas.commit", "canvas.error"]
    assert "the network failed" in events[-1][1]["error"]["message"]
    assert not of(events, "done")


def test_a_client_that_leaves_frees_its_request(nano: Served) -> None:
    endless = {**SOLVE, "diffusion": {"steps": 1_000_000, "confidence": 0, "entropy_bound": 1e-9}}
    with httpx.stream("POST", f"{nano.url}/v1/canvas", json=endless, timeout=30) as answer:
        events = lines(answer)  # held: the connection is closed with it
        assert any(name == "canvas.frame" for name, _ in events)
        assert nano.service.open_requests == 1
    assert nano.idle()


def test_a_key_is_needed_for_a_canvas_and_not_for_the_page(serve: Serve) -> None:
    served = serve(obedient_model(), "chatty", ServeOptions(api_keys=("k",)), reference=True)
    browser = {"Accept": "text/html"}
    for path, status in {"/": 200, "/page/app.js": 200, "/props": 401, "/metrics": 401, "/v1/sudoku": 401}.items():
        assert httpx.get(served.url + path, headers=browser).status_code == status, path
    assert httpx.post(f"{served.url}/v1/canvas", json=says("say a")).status_code == 401
    assert httpx.post(f"{served.url}/v1/canvas", json=says("say a"), headers={"x-api-key": "k"}).status_code == 200


def test_a_puzzle_is_the_same_for_its_seed_and_has_one_solution(nano: Served) -> None:
    ask = {"givens": 41, "seed": 7}
    one, other = (httpx.get(f"{nano.url}/v1/sudoku", params=ask).json() for _ in range(2))
    assert one == other == {"puzzle": sudoku.generate_puzzle(7, 41).puzzle, **ask}
    assert sudoku.count_solutions(one["puzzle"]) == 1
    puzzles = [httpx.get(f"{nano.url}/v1/sudoku").json() for _ in range(2)]
    assert puzzles[0] != puzzles[1]


@pytest.mark.parametrize(
    ("query", "field"), [("givens=22", "givens"), ("givens=81", "givens"), ("givens=a", "givens"), ("seed=-1", "seed")]
)
def test_a_puzzle_that_cannot_be_is_refused_by_name(nano: Served, query: str, field: str) -> None:
    answer = httpx.get(f"{nano.url}/v1/sudoku?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].endswith(field)


def test_the_server_says_which_routes_it_has_and_whether_it_solves_puzzles(nano: Served, chatty: Served) -> None:
    for served, solves in ((nano, True), (chatty, False)):
        props = httpx.get(f"{served.url}/props").json()
        assert props["sudoku"] is solves
        assert {"/v1/canvas", "/v1/chat/completions", "/v1/sudoku"} <= set(props["routes"])
    assert httpx.get(f"{chatty.url}/v1/sudoku").json()["error"]["param"] == "model"


def test_the_page_and_its_files_run_nothing_from_elsewhere(nano: Served) -> None:
    index = httpx.get(nano.url, headers={"Accept": "text/html,*/*"})
    files = [httpx.get(f"{nano.url}/page/{name}") for name in ("app.js", "page.css", "icon.svg")]
    kinds = [answer.headers["content-type"].partition(";")[0] for answer in (index, *files)]
    assert kinds == ["text/html", "text/javascript", "text/css", "image/svg+xml"]
    for answer in (index, *files):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
    assert "://" not in index.text
    assert "style=" not in index.text
    assert httpx.get(f"{nano.url}/page/../app.py").status_code == 404
    assert httpx.get(f"{nano.url}/page/%2e%2e/app.py").status_code == 404


def test_whoever_does_not_ask_for_html_gets_a_line(nano: Served) -> None:
    plain = httpx.get(nano.url)
    assert plain.headers["content-type"].startswith("text/plain")
    assert httpx.head(nano.url).status_code == 200
