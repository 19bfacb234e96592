"""The page, driven by a headless Chromium: what a stranger sees, by mouse, by keyboard alone, and on a phone.

It runs where Debian's package chromium, Playwright for Python and, for what axe finds, axe-core's axe.min.js are
installed (its path in AXE), and is skipped elsewhere. The policy of the page forbids `wait_for_function`, so `until`
asks again and again.

Run it:  AXE=node_modules/axe-core/axe.min.js python -m pytest tests/serve/test_page.py
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockpress import sudoku
from blockpress.serve import ServeOptions
from tests.builders.chats import obedient_model, save_seeing
from tests.builders.server import Served, fronting
from tests.serve.conftest import Serve

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
AXE = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]
PHONE, DESKTOP = (390, 844), (1280, 800)
Open = Callable[..., Any]
PUZZLE = sudoku.generate_puzzle(1, 45)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """`visit(served, path="/", size=DESKTOP, **context)`: a page that must log no error."""
    faults: list[str] = []
    contexts = []

    def visit(served: Served, path: str = "/", size: tuple[int, int] = DESKTOP, **more: Any) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(served.url + path)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [fault for fault in faults if "status of 401" not in fault] == []


def until(page: Any, expression: str, seconds: float = 20) -> Any:
    ends = time.monotonic() + seconds
    while not (value := page.evaluate(expression)):
        assert time.monotonic() < ends, f"{expression} did not come: {page.inner_text('main')}"
        page.wait_for_timeout(30)
    return value


def status(page: Any, view: str) -> str:
    return f"document.querySelector('#{view}-status').textContent"


def digits(page: Any) -> str:
    return str(page.evaluate("[...document.querySelectorAll('.board input')].map(i => i.value || '0').join('')"))


def paste(page: Any, grid: str) -> None:
    page.evaluate(
        """grid => { const clipboardData = new DataTransfer(); clipboardData.setData('text', grid);
        document.querySelector('.board input').dispatchEvent(
        new ClipboardEvent('paste', {clipboardData, bubbles: true})); }""",
        grid,
    )


def test_a_stranger_watches_a_puzzle_being_solved_within_ten_seconds(nano: Served, visit: Open) -> None:
    started = time.monotonic()
    page = visit(nano)
    until(page, "document.querySelectorAll('.cell[data-state=noise]').length > 0", 10)
    assert page.get_attribute("nav a[aria-current]", "href") == "#sudoku"
    until(page, f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})")
    assert time.monotonic() - started < 10
    if page.evaluate(status(page, "sudoku")).startswith("Solved"):
        assert sudoku.is_solved(digits(page))
    assert re.fullmatch(r"\d+\.\d %", page.inner_text("#sudoku-sure"))


def test_a_puzzle_is_filled_in_and_solved_by_keyboard_alone(nano: Served, visit: Open) -> None:
    page = visit(nano, reduced_motion="reduce")
    until(page, f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})")
    page.focus("#sudoku-clear")
    page.keyboard.press("Enter")
    assert digits(page) == "0" * 81
    page.focus(".board input")
    for row in range(9):
        for column in range(9):
            digit = PUZZLE.puzzle[9 * row + column]
            page.keyboard.press(digit if digit != "0" else "Delete")
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
    assert digits(page) == PUZZLE.puzzle
    assert page.inner_text("#sudoku-givens") == "45 givens"
    page.keyboard.press("Enter")
    until(page, f"/^Solved in/.test({status(page, 'sudoku')})")
    assert digits(page) == PUZZLE.solution
    page.keyboard.press("Delete")
    assert digits(page) == "0" + PUZZLE.puzzle[1:]  # what the model wrote is gone, and so is the given
    assert page.evaluate("document.querySelectorAll('.board input[tabindex=\"0\"]').length") == 1


def test_a_contradiction_is_marked_and_not_sent(nano: Served, visit: Open) -> None:
    page = visit(nano, reduced_motion="reduce")
    until(page, f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})")
    paste(page, "55" + "0" * 79)
    assert page.evaluate(status(page, "sudoku")) == "Row 1 has the digit 5 twice."
    assert page.evaluate("document.querySelectorAll('[aria-invalid=true]').length") == 2
    page.click("#sudoku-solve")
    assert page.evaluate(status(page, "sudoku")) == "Row 1 has the digit 5 twice."
    assert nano.service.open_requests == 0


def test_the_slider_goes_back_to_each_step(nano: Served, visit: Open) -> None:
    page = visit(nano, reduced_motion="reduce")
    until(page, f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})")
    paste(page, PUZZLE.puzzle)
    page.click("#sudoku-solve")
    until(page, f"/^Solved in/.test({status(page, 'sudoku')})")
    page.focus("bp-sudoku input[type=range]")
    page.keyboard.press("Home")
    assert page.evaluate(status(page, "sudoku")) == "Step 1"
    first = digits(page)
    page.keyboard.press("End")
    assert first != digits(page) == PUZZLE.solution


def test_with_reduced_motion_only_the_end_is_shown(nano: Served, visit: Open) -> None:
    label = "document.querySelector('bp-sudoku .step')"
    page = visit(nano, "/#figures", reduced_motion="reduce")
    until(page, "!document.querySelector('#view-figures').hidden")
    watch = f"new MutationObserver(() => window.shown.add({label}.textContent)).observe({label}, {{childList: true}})"
    page.evaluate(f"window.shown = new Set(); {watch}; location.hash = '#sudoku'")
    until(page, f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})")
    steps = re.findall(r"in (\d+) step", page.evaluate(status(page, "sudoku")))[0]
    shown = page.evaluate("[...shown].filter(text => text.startsWith('step'))")
    assert shown == [f"step {steps}"]


def test_a_recording_is_exported_as_one_file_that_plays(
    nano: Served, visit: Open, browser: Any, tmp_path: Path
) -> None:
    page = visit(nano, reduced_motion="reduce")
    until(page, f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})")
    paste(page, PUZZLE.puzzle)
    page.click("#sudoku-solve")
    until(page, f"/^Solved in/.test({status(page, 'sudoku')})")
    with page.expect_download() as download:
        page.click("bp-sudoku .foot button")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "sudoku-nano-0.html"
    other = browser.new_context(offline=True, reduced_motion="reduce").new_page()
    asked: list[str] = []
    other.on("request", lambda request: asked.append(request.url))
    other.goto(file.as_uri())
    assert asked == [file.as_uri()]
    assert digits(other) == PUZZLE.solution
    other.focus("input[type=range]")
    other.keyboard.press("Home")
    assert digits(other) != PUZZLE.solution
    other.context.close()


def say(page: Any, text: str) -> None:
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")


def answers(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".turn:not(.user) > .words").all_inner_texts()]


def test_a_conversation_has_several_turns_and_each_its_canvas(chatty: Served, visit: Open) -> None:
    page = visit(chatty)
    assert page.get_attribute("nav a[aria-current]", "href") == "#chat"
    assert not page.is_visible("nav a[href='#sudoku']")
    say(page, "count 12")
    until(page, "document.querySelector('#chat-send').textContent === 'Send'")
    say(page, "recall")
    until(
        page,
        "document.querySelectorAll('.turn:not(.user)').length === 2 && document.querySelector('#chat-send').textContent === 'Send'",
    )
    count = " ".join(map(str, range(1, 13)))
    assert answers(page) == [count, f"[user] count 12 [model] {count} [user] recall"]
    assert "canvases" in page.locator(".turn .meta").first.inner_text()
    page.locator("text=Show canvas").first.click()
    assert page.locator("[aria-pressed=true]").count() == 1
    page.locator("bp-chat input[type=range]").focus()
    page.keyboard.press("Home")
    assert page.inner_text("bp-chat .step") == "canvas 1, step 1"
    written = page.evaluate("[...document.querySelectorAll('.token')].map(t => t.textContent).join('')")
    assert written == "1␣2␣3␣4␣5␣6␣"
    assert page.get_attribute("bp-chat .screen", "aria-label").endswith("tokens accepted")
    blocks = page.locator(".turn .words[aria-live=polite] span")
    assert blocks.count() >= 3  # a block is spoken as a whole


def test_on_a_phone_the_newest_answer_is_in_sight_above_the_composer(chatty: Served, visit: Open) -> None:
    page = visit(chatty, "/#chat", PHONE)
    for number, text in enumerate(("count 30", "say hello", "count 60"), 1):
        say(page, text)
        until(page, f"document.querySelectorAll('.turn:not(.user) .meta').length === {number} && document.querySelector('#chat-send').textContent === 'Send'")  # fmt: skip
    turn, composer = (page.locator(each).last.bounding_box() for each in (".turn", ".composer"))
    assert 0 < turn["y"] < turn["y"] + turn["height"] <= composer["y"]


def test_an_answer_is_stopped_and_frees_the_server(chatty: Served, visit: Open) -> None:
    page = visit(chatty)
    say(page, "count 900")
    until(
        page,
        "document.querySelector('.turn .words').textContent.length > 0 && document.querySelectorAll('.token').length > 0",
    )
    assert page.inner_text("#chat-send") == "Stop"
    page.click("#chat-send")
    until(page, f"{status(page, 'chat')} === 'Stopped.'")
    assert chatty.idle(2)
    say(page, "say more")
    until(page, "[...document.querySelectorAll('.turn:not(.user) > .words')].at(-1).textContent === 'more'")


def test_thoughts_are_folded_and_errors_are_said(chatty: Served, visit: Open) -> None:
    page = visit(chatty)
    page.click("bp-chat summary")
    page.check("#chat-think")
    say(page, "say yes")
    until(page, "document.querySelector('#chat-send').textContent === 'Send'")
    assert not page.is_visible(".thought")
    page.click("text=Thoughts")
    assert page.inner_text(".thought").strip() == "I think."
    page.uncheck("#chat-think")
    say(page, "fail at once and for all")
    until(page, f"{status(page, 'chat')}.includes('the network failed')")


def test_what_is_typed_is_text_and_nothing_else(chatty: Served, visit: Open) -> None:
    page = visit(chatty)
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    say(page, f"say {evil}")
    until(page, "document.querySelector('#chat-send').textContent === 'Send'")
    assert answers(page) == [evil]
    assert page.locator(".turn img, .turn script").count() == 0


def test_a_hole_is_filled_in_place_and_undone(seeing: Served, visit: Open) -> None:
    value = "document.querySelector('#infill-text').value"
    page = visit(seeing, "/#infill")
    page.fill("#infill-most", "4")
    page.fill("#infill-seed", "1")
    page.fill("#infill-text", "The sky is <hole> today.")
    page.click("#infill-fill")
    until(page, f"{status(page, 'infill')}.startsWith('Filled')")
    written = page.evaluate("document.querySelector('#infill-preview ins').textContent")
    assert page.evaluate(value) == f"The sky is {written} today."
    selected = page.evaluate(
        f"(t => {value}.slice(t.selectionStart, t.selectionEnd))(document.querySelector('#infill-text'))"
    )
    assert selected == written != ""
    page.evaluate("document.querySelector('#infill-text').setSelectionRange(4, 7)")
    page.press("#infill-text", "Control+Enter")
    until(page, "document.querySelector('#infill-preview del')")
    assert page.inner_text("#infill-preview del") == "sky"
    other = page.evaluate("document.querySelector('#infill-preview ins').textContent")
    assert page.evaluate(value) == f"The {other} is {written} today."
    page.click("#infill-undo")
    assert page.evaluate(value) == f"The sky is {written} today."
    page.fill("#infill-text", "nothing is missing")
    page.click("#infill-fill")
    assert "<hole>" in page.inner_text("#infill-status")


def test_questions_are_answered_with_bars(seeing: Served, visit: Open) -> None:
    page = visit(seeing, "/#decisions")
    page.click("#decisions-decide")
    until(page, "document.querySelectorAll('.answer').length === 3")
    assert page.locator(".answer h3").first.inner_text() == "Is the customer content with the product?"
    for answer, names in enumerate((["yes", "no"], ["delivery", "product", "billing"], ["calm", "annoyed", "angry"])):
        box = page.locator(".answer").nth(answer)
        shares = [float(text.removesuffix(" %")) for text in box.locator("dd:last-child").all_inner_texts()]
        assert box.locator("dt").all_inner_texts() == names
        assert abs(sum(shares) - 100) < 0.2
        assert box.locator(".best dd:last-child").first.inner_text() == f"{max(shares):.1f} %"
        widths = [bar.bounding_box()["width"] for bar in box.locator(".track span").all()]
        assert widths.index(max(widths)) == shares.index(max(shares))
    page.click("#decisions-add")
    page.click("#decisions-decide")
    assert "Question 4" in page.inner_text("#decisions-status")
    page.click("[aria-label='Remove question 4']")
    assert page.locator(".question").count() == 3


def test_all_views_work_in_front_of_two_replicas(visit: Open, tmp_path: Path) -> None:
    """Sudoku, chat, a hole, decisions and figures: what a page asks one after another is answered by either replica."""
    with fronting("sudoku-nano") as url:
        served: Any = SimpleNamespace(url=url)
        test_the_slider_goes_back_to_each_step(served, visit)
        page = visit(served, "/#figures")
        until(page, "Number(document.querySelector('#figures-cards dd')?.textContent) >= 2")
        assert "64" in page.inner_text("#figures-facts")  # requests at once, of both
        page.context.close()  # it asks every two seconds
    save_seeing(tmp_path / "seeing")
    with fronting(str(tmp_path / "seeing")) as url:
        served = SimpleNamespace(url=url)
        test_a_hole_is_filled_in_place_and_undone(served, visit)
        test_questions_are_answered_with_bars(served, visit)
        page = visit(served, "/#chat")
        page.click("bp-chat summary")
        page.fill("#chat-most", "8")
        for turn in (1, 2):
            say(page, "What is it?")
            until(page, f"document.querySelectorAll('.turn:not(.user) .meta').length === {turn}", 60)
            until(page, "document.querySelector('#chat-send').textContent === 'Send'")
        assert page.locator("text=Show canvas").count() == 2 and page.evaluate(status(page, "chat")) == ""


def test_views_that_the_server_does_not_have_are_not_shown(nano: Served, visit: Open) -> None:
    page = visit(nano, "/#decisions")
    until(page, "document.querySelector('#view-wait').hidden")
    assert page.locator("nav a:visible").all_inner_texts() == ["Sudoku", "Chat", "Figures"]
    assert page.is_visible("#view-sudoku")


def test_figures_are_those_of_the_server_and_refresh(chatty: Served, visit: Open) -> None:
    page = visit(chatty, "/#figures")
    finished = "Number(document.querySelector('#figures-cards dd')?.textContent.replace(',', ''))"
    until(page, f"{finished} >= 1")
    before = page.evaluate(finished)
    page.evaluate("location.hash = '#chat'")
    say(page, "say a")
    until(page, "document.querySelector('#chat-send').textContent === 'Send'")
    page.evaluate("location.hash = '#figures'")
    until(page, f"{finished} === {before + 1}")


def test_a_key_is_asked_for_once_and_kept_in_the_tab(serve: Serve, visit: Open) -> None:
    served = serve(obedient_model(), "chatty", ServeOptions(api_keys=("secret",)), reference=True)
    page = visit(served)
    for key in ("wrong", "secret"):
        until(page, "document.querySelector('#key').open")
        page.fill("#key-value", key)
        page.press("#key-value", "Enter")
        until(
            page,
            f"!document.querySelector('#key').open || {key == 'wrong'!r}".replace("True", "true").replace(
                "False", "false"
            ),
        )
        page.wait_for_timeout(200)
    say(page, "say in")
    until(page, "document.querySelector('.turn:not(.user) > .words')?.textContent === 'in'")
    assert page.evaluate("sessionStorage.getItem('blockpress.key')") == "secret"
    page.reload()
    until(page, "!document.querySelector('#view-chat').hidden")
    assert not page.evaluate("document.querySelector('#key').open")


def test_the_theme_is_the_systems_until_it_is_chosen(chatty: Served, visit: Open) -> None:
    page = visit(chatty, color_scheme="dark")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(paper)
    page.click("#theme")
    light = page.evaluate(paper)
    assert light != dark
    page.reload()
    assert page.evaluate(paper) == light
    assert page.get_attribute("#theme", "aria-label") == "Theme: Light"
    page.click("#theme")
    assert page.evaluate(paper) == dark


@pytest.mark.parametrize("view", ["sudoku", "chat", "infill", "decisions", "figures"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(
    nano: Served, chatty: Served, visit: Open, view: str, size: tuple[int, int], scheme: str
) -> None:
    served = nano if view == "sudoku" else chatty
    page = visit(served, f"/#{view}", size, color_scheme=scheme, reduced_motion="reduce")
    until(page, f"!document.querySelector('#view-{view}').hidden")
    if view == "sudoku":
        until(page, f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})")
    if view == "chat":
        say(page, "count 12")
        until(page, "document.querySelector('#chat-send').textContent === 'Send'")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    small = "[...document.querySelectorAll('button, select, input:not([type=checkbox])')].filter(b => b.offsetParent && b.getBoundingClientRect().height < 24).map(b => b.outerHTML)"
    assert page.evaluate(small) == []
    if not AXE.exists():
        pytest.skip(f"there is no {AXE}")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run().then(all => all.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
    assert found == []


def test_nothing_moves_while_a_puzzle_is_solved(nano: Served, visit: Open) -> None:
    places = "JSON.stringify([...document.querySelectorAll('.board, bp-sudoku button, bp-sudoku .cell, bp-sudoku .figure')].map(e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }))"
    page = visit(nano)
    until(page, "document.querySelectorAll('.cell').length === 81")
    page.evaluate("document.fonts.ready.then(() => true)")
    before = page.evaluate(places)
    ends = time.monotonic() + 30
    while not page.evaluate(f"/^(Solved|Not solved) in/.test({status(page, 'sudoku')})"):
        assert page.evaluate(places) == before
        assert time.monotonic() < ends
    assert page.evaluate(places) == before
