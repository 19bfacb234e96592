"""The form: what the model is shown, and the canvases that the answers are read from.

    prompt    {context}                             canvas   1: A
              Answer every question ...                      2: yes
              1. Which team?                                 3: 0<turn|><eos><eos>...
              A: billing - payments and refunds
              B: shipping                           slots       ^ one for each question; all else is pinned
              2. Is it urgent?
              Answer yes or no.

Every option stands in its slot as a label, so an option of many words is read as a whole: yes and no, a letter or two,
the number of a level. A label is one token wherever the vocabulary has enough such labels; else it is a code of several
digits or letters, whose probability is the product over its places.

A caller's own form is the canvas's text around the slots, in which the options stand as they are.

Invariant: the slots of a canvas are distinct positions; in a slot, no token sequence belongs to two options.
Run it:  python -m pytest tests/decide/test_form.py
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import final

from blockpress.config.checks import value_text
from blockpress.decide.questions import Question, QuestionOption, Score, YesNo
from blockpress.errors import RequestError, TextError
from blockpress.text import Tokenizer

WIDTH = 16
"""A canvas is a multiple of so many tokens, as vLLM reads DiffusionGemma; the model's own length bounds it."""

SLOT = -1
"""The id at a slot's positions, where nothing is pinned (`diffusion.pins.UNPINNED`)."""

Ids = tuple[int, ...]
Spellings = tuple[Ids, ...]
"""The token sequences that stand for one option, each as long as the slot."""

_LETTERS = tuple(string.ascii_uppercase)
_PAIRS = tuple(map("".join, product(_LETTERS, repeat=2)))
_HEAD = "Answer every question about the text above. After its number, write its label only."


@final
@dataclass(frozen=True)
class AnswerSlot:
    """Where a question is answered: `width` positions from `start` on, and the spellings of each option."""

    question: int
    start: int
    width: int
    options: tuple[Spellings, ...]


@final
@dataclass(frozen=True)
class FormCanvas:
    """Pinned ids, SLOT where there is none, and the slots."""

    ids: Ids
    slots: tuple[AnswerSlot, ...]


@final
@dataclass(frozen=True)
class DecisionForm:
    """text: what stands after the context in the prompt; None: nothing. canvases: all of one length."""

    text: str | None
    canvases: tuple[FormCanvas, ...]


@final
@dataclass(frozen=True)
class Labels:
    """The labels of a question's options: `texts` in the prompt, their ids after `lead`, which follows the colon."""

    texts: tuple[str, ...]
    lead: str
    spellings: tuple[Spellings, ...]


@final
class FormBuilder:
    """Makes the form of a decision for one model.

    Args:
        end: the ids after the answers: each in its place, and the last one for as long as the canvas goes on.
        canvas: the longest canvas. vocab: the network's ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, end: Sequence[int], canvas: int, vocab: int) -> None:
        self._tokenizer, self._end, self._canvas, self._vocab = tokenizer, tuple(end), canvas, vocab
        self._found: dict[tuple[tuple[str, ...], str], dict[str, int]] = {}
        """What `_single` has found before."""

    def listed(self, questions: Sequence[Question]) -> DecisionForm:
        """Questions and options in the prompt, a line for each answer on as many canvases as it takes.

        Raises:
            RequestError: the vocabulary has no labels, or the canvas is shorter than a line. TextError: it has no token
                for some of the form.
        """
        labels = [self.labels(question) for question in questions]
        text = [_HEAD]
        for number, (question, label) in enumerate(zip(questions, labels, strict=True), 1):
            text += [f"{number}. {question.question or _nothing_asked(question)}", *_option_lines(question, label)]
        between = self._ids("\n")
        lines = [(self._ids(f"{number}:{label.lead}"), label.spellings) for number, label in enumerate(labels, 1)]
        sizes = [len(before) + len(spellings[0][0]) + len(between) for before, spellings in lines]
        longest = max(sizes) - len(between)
        if longest > self._canvas:
            raise RequestError(
                f"a line of an answer takes {longest} tokens, and the model's canvas has {self._canvas}",
                hint="give a form of your own that fits",
            )
        canvases = []
        for numbers in _evenly(sizes, self._canvas + len(between)):
            ids, slots = list[int](), list[AnswerSlot]()
            for number in numbers:
                before, spellings = lines[number]
                width = len(spellings[0][0])
                ids += [*(between if ids else ()), *before, *[SLOT] * width]
                slots.append(AnswerSlot(number, len(ids) - width, width, spellings))
            canvases.append(self._ended(ids, slots))
        length = min(self._canvas, -(-max(len(canvas.ids) for canvas in canvases) // WIDTH) * WIDTH)
        return DecisionForm("\n".join(text), tuple(self._filled(canvas, length) for canvas in canvases))

    def given(self, questions: Sequence[Question], form: object) -> DecisionForm:
        """The caller's canvas: its text around the slots, in which the options stand as they are.

        Raises:
            RequestError: it is no list of one text more than there are questions; options of one question that differ
                in their number of tokens, or do not differ at all; it does not fit into the canvas.
        """
        if isinstance(form, str) or not isinstance(form, Sequence) or not all(isinstance(each, str) for each in form):
            raise RequestError(f"form is {value_text(form)}", hint="give the texts around the answers as a list")
        if len(form) != len(questions) + 1:
            raise RequestError(
                f"form has {len(form)} texts for {len(questions)} questions",
                hint=f"give {len(questions) + 1}: the texts before, between and after the answers",
            )
        ids, slots = list(self._ids(form[0])), []
        for number, (question, text) in enumerate(zip(questions, form[1:], strict=True)):
            spellings = self._own_texts(number, question.listed)
            width = len(spellings[0][0])
            slots.append(AnswerSlot(number, len(ids), width, spellings))
            ids += [*[SLOT] * width, *self._ids(text)]
        whole = self._ended(ids, slots)
        if len(ids) > self._canvas:
            raise RequestError(
                f"form takes {len(ids)} tokens, and the model's canvas has {self._canvas}",
                hint="shorten it, or ask in several calls",
            )
        length = min(self._canvas, -(-len(whole.ids) // WIDTH) * WIDTH)
        return DecisionForm(None, (self._filled(whole, length),))

    def labels(self, question: Question) -> Labels:
        """The labels of a question's options. RequestError: the vocabulary has none."""
        count = len(question.listed)
        sets: list[tuple[str, ...]] = [_LETTERS, (*_LETTERS, *_PAIRS)]
        if isinstance(question, YesNo):
            sets.insert(0, ("yes", "no"))
        elif isinstance(question, Score):
            sets.insert(0, tuple(string.digits))
        for texts in sets:
            for inside, lead in ((" ", ""), ("", " ")):  # the blank after the colon is part of the label, or a token
                found = self._single(texts, inside)
                if len(found) >= count:
                    chosen = list(islice(found, count))
                    also = self._single(("Yes", "No"), inside) if texts == ("yes", "no") else {}
                    capital = [[(also[text.title()],)] if text.title() in also else [] for text in chosen]
                    spelled = [((found[text],), *more) for text, more in zip(chosen, capital, strict=True)]
                    return Labels(tuple(chosen), lead, tuple(spelled))
        for alphabet in (tuple(string.digits), _LETTERS):
            found = self._single(alphabet, "")
            if len(found) > 1 and (alphabet is _LETTERS or len(found) == len(alphabet)):
                return _codes(found, count)
        raise RequestError(
            f"the vocabulary has no labels for {count} options: no letters, no digits",
            hint="give a form, in which the options stand as they are",
        )

    def _own_texts(self, number: int, options: Sequence[QuestionOption]) -> tuple[Spellings, ...]:
        spelled = [self._ids(option.text) for option in options]
        lengths = {len(each) for each in spelled}
        if len(lengths) > 1 or 0 in lengths:
            raise RequestError(
                f"questions[{number}] has options of {', '.join(map(str, sorted(lengths)))} tokens",
                hint="in a form of yours all options of a question have as many tokens; without one they have labels",
            )
        for place, each in enumerate(spelled):
            if each in spelled[:place]:
                raise RequestError(
                    f"questions[{number}] has two options that read {options[place].text!r:.80}",
                    hint="in a form of yours options stand as they are, so they must differ",
                )
        return tuple((each,) for each in spelled)

    def _single(self, texts: tuple[str, ...], inside: str) -> dict[str, int]:
        """The texts that are one token each after `inside`, which is part of it, and a token of their own."""
        if (texts, inside) in self._found:
            return self._found[texts, inside]
        found: dict[str, int] = {}
        for text in texts:
            try:
                ids = self._tokenizer.encode(inside + text, add_special=False)
            except TextError:
                continue
            if len(ids) == 1 and ids[0] < self._vocab and ids[0] not in found.values():
                found[text] = ids[0]
        self._found[texts, inside] = found  # only now: other threads read it, too
        return found

    def _ids(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special=False)) if text else ()

    def _ended(self, ids: Sequence[int], slots: Sequence[AnswerSlot]) -> FormCanvas:
        room = max(0, self._canvas - len(ids))
        return FormCanvas((*ids, *self._end[:room]), tuple(slots))

    def _filled(self, canvas: FormCanvas, length: int) -> FormCanvas:
        return FormCanvas((*canvas.ids, *[self._end[-1]] * (length - len(canvas.ids))), canvas.slots)


def _evenly(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices in order, parted into as few groups of at most `most` as it takes, the largest as small as can be.

    >>> _evenly([4, 4, 4, 4, 4, 4], 16)
    [[0, 1, 2], [3, 4, 5]]
    """

    def parted(limit: int) -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for index, size in enumerate(sizes):
            if groups[-1] and sum(sizes[each] for each in groups[-1]) + size > limit:
                groups.append([])
            groups[-1].append(index)
        return groups

    fewest = len(parted(most))
    return next(parted(limit) for limit in range(max(sizes), most + 1) if len(parted(limit)) == fewest)


def _nothing_asked(question: Question) -> str:
    return {YesNo: "Which of these holds?", Score: "Which level?"}.get(type(question), "Which of these?")


def _option_lines(question: Question, labels: Labels) -> list[str]:
    """The options of a question in the prompt, a line each; of yes and no those of which something is said."""
    options = question.listed
    if isinstance(question, YesNo) and labels.texts == ("yes", "no"):
        said = [f"{option.text}: {option.description}" for option in options if option.description]
        return [*said, "Answer yes or no."]
    lines = []
    for label, option in zip(labels.texts, options, strict=True):
        lines.append(f"{label}: {option.text}" + (f" - {option.description}" if option.description else ""))
    return lines


def _codes(alphabet: dict[str, int], count: int) -> Labels:
    """Labels of several tokens, all of one length: numbers in digits, or words in letters.

    >>> _codes({"A": 7, "B": 8}, 3).texts
    ('AA', 'AB', 'BA')
    """
    width = next(width for width in range(1, count + 1) if len(alphabet) ** width >= count)
    words = list(islice(product(alphabet, repeat=width), count))
    spelled = tuple((tuple(alphabet[letter] for letter in word),) for word in words)
    return Labels(tuple(map("".join, words)), " ", spelled)
