"""The form: labels, prompts and canvases, with a vocabulary of characters and with the published one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockpress.decide import Choice, Score, YesNo
from blockpress.decide.form import SLOT, AnswerSlot, FormBuilder, FormCanvas
from blockpress.decide.questions import Question
from blockpress.errors import RequestError
from blockpress.text import Tokenizer

from ..chat_tokenizer import TOKENIZER

EOS, TURN = 1, 5
QUESTIONS: list[Question] = [
    Choice("Which team?", options={"billing": "payments and refunds", "shipping": None}),
    YesNo("Is it urgent?", yes="money is moving"),
    Score("How upset?", levels=["calm", "annoyed"]),
]


def builder(tokenizer: Tokenizer = TOKENIZER, canvas: int = 64) -> FormBuilder:
    return FormBuilder(tokenizer, end=[TURN, EOS], canvas=canvas, vocab=tokenizer.vocab_size)


def filled(canvas: FormCanvas, chosen: Sequence[int]) -> list[int]:
    """The canvas with an option in each slot."""
    ids = list(canvas.ids)
    for slot, option in zip(canvas.slots, chosen, strict=True):
        ids[slot.start : slot.start + slot.width] = slot.options[option][0]
    assert SLOT not in ids
    return ids


def test_the_prompt_lists_questions_and_options_and_the_canvas_holds_their_answers() -> None:
    form = builder().listed(QUESTIONS)
    assert form.text == (
        "Answer every question about the text above. After its number, write its label only.\n"
        "1. Which team?\nA: billing - payments and refunds\nB: shipping\n"
        "2. Is it urgent?\nA: yes - money is moving\nB: no\n"
        "3. How upset?\n0: calm\n1: annoyed"
    )
    (canvas,) = form.canvases
    text = TOKENIZER.decode(filled(canvas, [1, 0, 1]), skip_special=False)
    assert text == "1: B\n2: A\n3: 1<turn|><eos>" and len(canvas.ids) == 16
    assert [slot.question for slot in canvas.slots] == [0, 1, 2]


def test_the_published_vocabulary_has_one_token_for_each_of_many_labels(gemma: Tokenizer) -> None:
    asked = [*QUESTIONS, Choice("?", options=[f"{n}" for n in range(679)])]
    form = builder(gemma, canvas=256).listed(asked)
    assert form.text is not None and "2. Is it urgent?\nyes: money is moving\nAnswer yes or no.\n" in form.text
    (canvas,) = form.canvases
    assert [slot.width for slot in canvas.slots] == [1] * 4
    line = gemma.decode(filled(canvas, [1, 0, 1, 678]), skip_special=False)
    *_, last = form.text.splitlines()
    assert line.splitlines()[:3] == ["1: B", "2: yes", "3: 1"]
    assert line.splitlines()[3].startswith(f"4: {last.partition(':')[0]}")
    assert len({ids for option in canvas.slots[3].options for ids in option}) == 679
    yes, no = canvas.slots[1].options
    assert [gemma.decode(list(ids)) for ids in (*yes, *no)] == [" yes", " Yes", " no", " No"]


def test_the_canvas_is_tokenised_as_its_text_is(gemma: Tokenizer) -> None:
    (canvas,) = builder(gemma, canvas=256).listed(QUESTIONS).canvases
    ids = filled(canvas, [0, 1, 0])
    answered = ids[: ids.index(TURN)]
    assert gemma.encode(gemma.decode(answered), add_special=False) == answered


@pytest.mark.parametrize(("count", "width"), [(2, 1), (26, 1), (27, 2), (100, 2), (101, 3), (255, 3)])
def test_where_letters_end_labels_are_codes_of_one_length(count: int, width: int) -> None:
    labels = builder().labels(Choice("?", options=[f"option {n}" for n in range(count)]))
    assert len(set(labels.texts)) == count == len({ids for (ids,) in labels.spellings})
    assert {len(ids) for (ids,) in labels.spellings} == {width}
    assert [TOKENIZER.decode(list(ids)) for (ids,) in labels.spellings] == list(labels.texts)


def test_answers_that_do_not_fit_go_on_in_another_canvas() -> None:
    asked: list[Question] = [YesNo(f"Question {n}?") for n in range(64)]
    form = builder(canvas=32).listed(asked)
    slots = [slot for canvas in form.canvases for slot in canvas.slots]
    assert [slot.question for slot in slots] == list(range(64)) and len(form.canvases) > 8
    assert {len(canvas.ids) for canvas in form.canvases} == {32}
    lines = [TOKENIZER.decode(filled(canvas, [0] * len(canvas.slots))).splitlines() for canvas in form.canvases]
    assert [line for part in lines for line in part] == [f"{n}: A" for n in range(1, 65)]


def test_a_line_longer_than_the_canvas_is_refused() -> None:
    with pytest.raises(RequestError, match="a line of an answer takes 4 tokens, and the model's canvas has 3"):
        builder(canvas=3).listed([YesNo("?")])


def test_a_form_of_the_caller_s_holds_the_options_as_they_are() -> None:
    asked: list[Question] = [Choice("?", options=["cat", "dog"]), YesNo("?", name="no name is shown")]
    with pytest.raises(RequestError, match=r"questions\[1\] has options of 2, 3 tokens"):
        builder().given(asked, ["", "", ""])
    form = builder().given(asked[:1], ["the ", " sleeps"])
    assert form.text is None
    (canvas,) = form.canvases
    assert canvas.slots == (AnswerSlot(0, 4, 3, canvas.slots[0].options),)
    assert TOKENIZER.decode(filled(canvas, [1])) == "the dog sleeps" and len(canvas.ids) == 16


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("12", "form is '12'"),
        (["1", 2], "form is ['1', 2]"),
        ([], "form has 0 texts for 1 questions"),
        (["1"], "form has 1 texts for 1 questions"),
        (["1" * 40, "2" * 40], "form takes 81 tokens, and the model's canvas has 64"),
    ],
)
def test_a_form_that_is_none_is_refused(form: object, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        builder().given([Choice("?", options=["1", "2"])], form)
    assert said in refused.value.message


def test_options_that_read_alike_in_a_form_are_refused() -> None:
    with pytest.raises(RequestError, match=r"questions\[0\] has two options that read 'true'"):
        builder().given([Choice("?", options=[True, "true"])], ["", ""])


def test_a_vocabulary_without_letters_and_digits_has_no_labels(digits: Tokenizer) -> None:
    assert builder(digits).labels(Choice("?", options=["a", "b"])).texts == ("0", "1")
    bare = Tokenizer(digits.backend)
    with pytest.raises(RequestError, match="the vocabulary has no labels for 2 options"):
        FormBuilder(bare, end=[1], canvas=64, vocab=4).labels(Choice("?", options=["a", "b"]))
