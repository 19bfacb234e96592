"""Typed decisions through `LM`: known probabilities come back exactly, and mistakes are refused before any forward."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blockpress
from blockpress import Choice, ChoiceAnswer, Score, ScoreAnswer, YesNo, YesNoAnswer, sudoku
from blockpress.config import PRESETS, AutoregressiveSampling, GenerationConfig, ModelConfig, Sampling
from blockpress.decide.form import SLOT, DecisionForm, FormBuilder
from blockpress.decoding import slots
from blockpress.decoding.denoisers import output_from_logits
from blockpress.diffusion import KeyedDraws, Pins, Schedule, denoise, step_rules
from blockpress.errors import BlockpressError, CheckpointError, PromptTooLong, RequestError, TextError
from blockpress.lm import LM
from blockpress.model import Network
from blockpress.text import Tokenizer

from ..chat_tokenizer import TOKENIZER
from ..conftest import make_random_network
from ..standin import Card

RandomNetwork = Callable[..., Network]
CONTEXT = "My card was charged twice."
QUESTIONS = [
    Choice("Which team?", options={"billing": "payments", "shipping": None}, name="team"),
    YesNo("Is it urgent?"),
    Score("How upset?", levels=["calm", "annoyed", "furious"]),
    Choice("Which order?", options=[f"order {n}" for n in range(30)]),
]
CONFIG = replace(PRESETS["tiny"](), vocab_size=TOKENIZER.vocab_size, canvas_length=64, context_length=8192)
PLAIN = Tokenizer(TOKENIZER.backend, config={"bos_token": "<bos>", "eos_token": "<eos>"})
"""The same vocabulary without a chat template."""


def model(network: Network, tokenizer: Tokenizer = TOKENIZER) -> LM:
    return LM(path=Path(), network=network, generation=GenerationConfig(stop_ids=(1,)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def lm() -> LM:
    return model(make_random_network(CONFIG))


@pytest.fixture(scope="module")
def nano() -> LM:
    return blockpress.load("sudoku-nano")


def laid_out(questions: Any, canvas: int = CONFIG.canvas_length) -> DecisionForm:
    turn = TOKENIZER.backend.token_to_id("<turn|>")
    return FormBuilder(TOKENIZER, end=[turn, 1], canvas=canvas, vocab=CONFIG.vocab_size).listed(questions)


def prompt_of(questions: Any, context: str = CONTEXT) -> list[int]:
    """The ids of the chat: context and questions in the user's turn, an empty thought in the model's."""
    asked = f"<bos><|turn>user\n{context}\n\n{laid_out(questions).text}<turn|>\n<|turn>model\n"
    return TOKENIZER.encode(f"{asked}<|channel>thought\n<channel|>", add_special=False)


def shares(answer: Any) -> list[float]:
    return list(answer.probabilities.values())


# A constructed model: what it says at each position of the canvas is known.


def knowing(table: Tensor) -> LM:
    """A model that gives token v at position i of any canvas the probability table[v, i]."""
    vocab, positions = table.shape
    network = make_random_network(replace(CONFIG, vocab_size=vocab, hidden_size=positions, canvas_length=positions))
    cap = network.config.softcap
    assert cap is not None
    with torch.no_grad():
        network.embed_tokens.weight.copy_(torch.atanh(table.log() / cap) * cap)
    hidden = torch.eye(positions)
    network.denoise = lambda canvas, cache, signal: hidden[: canvas.shape[1]].expand(len(canvas), -1, -1)  # type: ignore[method-assign]
    return model(network)


def known_table(seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(CONFIG.vocab_size, 64, generator=drawn, dtype=torch.float64).add(1e-3).log().mul(2).softmax(0)


@pytest.mark.parametrize(("steps", "draws"), [(1, 1), (3, 2)])
def test_a_model_whose_probabilities_are_known_gives_exactly_these(steps: int, draws: int) -> None:
    table = known_table()
    decision = knowing(table.float()).decide(CONTEXT, QUESTIONS, steps=steps, draws=draws)
    (canvas,) = laid_out(QUESTIONS).canvases
    for slot, answer in zip(canvas.slots, decision, strict=True):
        raw = [
            sum(math.prod(float(table[token, slot.start + place]) for place, token in enumerate(ids)) for ids in option)
            for option in slot.options
        ]
        assert answer.label_mass == pytest.approx(sum(raw), rel=1e-5)
        assert answer.confidence == pytest.approx(max(raw), rel=1e-5)
        assert shares(answer) == pytest.approx([each / sum(raw) for each in raw], rel=1e-5)
    score = decision[2]
    assert isinstance(score, ScoreAnswer)
    assert score.value == pytest.approx(sum(level * share for level, share in enumerate(shares(score))))


EDITS: list[dict[str, Any]] = [
    {"top_k": 1, "top_p": 0.1, "min_p": 0.9},
    {"logit_bias": dict.fromkeys(range(0, 40, 2), -100)},
    {"suppress_tokens": range(40)},
    {"allowed_token_ids": [40], "repetition_penalty": 9, "presence_penalty": 2},
]


@pytest.mark.parametrize("edits", EDITS, ids=lambda edits: " ".join(edits))
def test_a_decision_is_of_the_models_own_probabilities_whatever_edits_answers(lm: LM, edits: dict[str, Any]) -> None:
    """Also those that a file has for single tokens; an option that may not be written has its probability."""
    edited, warm = model(lm.network), AutoregressiveSampling(temperature=2.0)
    edited.generation = replace(lm.generation, sampling=Sampling(**edits), autoregressive=warm.with_(**edits))
    for steps in (1, 2):
        asked = CONTEXT, QUESTIONS[:2]
        assert edited.decide(*asked, steps=steps) == lm.decide(*asked, steps=steps)
    plain = lm.generate("a", 9, sampling=warm, mode="autoregressive")
    assert edited.generate("a", 9, mode="autoregressive").tokens != plain.tokens


def test_labels_of_several_tokens_are_scored_whole() -> None:
    """Against all texts of two digits: those that are labels share their mass, the others are no label's."""
    table = known_table(1)
    answer = knowing(table.float()).decide(CONTEXT, [QUESTIONS[3]])[0]
    (slot,) = laid_out([QUESTIONS[3]]).canvases[0].slots
    digit = [TOKENIZER.encode(each, add_special=False)[0] for each in "0123456789"]
    every = {
        f"{a}{b}": float(table[digit[a], slot.start] * table[digit[b], slot.start + 1])
        for a, b in product(range(10), repeat=2)
    }
    labelled = [every[f"{n:02}"] for n in range(30)]
    assert answer.label_mass == pytest.approx(sum(labelled), rel=1e-5)
    assert shares(answer) == pytest.approx([each / sum(labelled) for each in labelled], rel=1e-5)


def test_options_of_several_tokens_in_a_form_are_scored_whole() -> None:
    table = known_table(2)
    answer = knowing(table.float()).decide("", [Choice("?", options=["cat", "dog"])], form=["a ", "."])[0]
    raw = [
        math.prod(float(table[token, 2 + place]) for place, token in enumerate(TOKENIZER.encode(text, False)))
        for text in ("cat", "dog")
    ]
    assert answer.label_mass == pytest.approx(sum(raw), rel=1e-5)
    assert shares(answer) == pytest.approx([each / sum(raw) for each in raw], rel=1e-5)


# The network itself: what is read is what its full logits say.


def canvases_of(form: DecisionForm, seed: int, draw: int) -> list[Tensor]:
    """The canvases of a form with the noise of one draw in their slots."""
    filled = []
    for number, canvas in enumerate(form.canvases):
        key = draw * slots.MOST_CANVASES + number
        noise = KeyedDraws([seed], [key], length=len(canvas.ids), vocab=CONFIG.vocab_size).noise(torch.tensor([0]), 0)
        ids = torch.tensor(canvas.ids)
        filled.append(torch.where(ids == SLOT, noise[0], ids))
    return filled


@pytest.mark.parametrize(("count", "draws"), [(4, 1), (4, 3), (40, 2)])
def test_one_step_reads_what_the_full_logits_say(lm: LM, count: int, draws: int) -> None:
    questions = QUESTIONS if count == 4 else [YesNo("?") for _ in range(count)]
    decision = lm.decide(CONTEXT, questions, draws=draws, seed=5)
    form, prompt = laid_out(questions), prompt_of(questions)
    assert (len(form.canvases) > 1) == (count > 4)
    want: dict[int, list[Tensor]] = {}
    for draw in range(draws):
        for canvas, ids in zip(form.canvases, canvases_of(form, 5, draw), strict=True):
            p = lm.denoise_logits(prompt, ids).double().softmax(-1)
            for slot in canvas.slots:
                places = torch.arange(slot.start, slot.start + slot.width)
                raw = [torch.stack([p[places, torch.tensor(one)].prod() for one in o]).sum() for o in slot.options]
                want.setdefault(slot.question, []).append(torch.stack(raw))
    for number, answer in enumerate(decision):
        raw = torch.stack(want[number]).mean(0)
        assert answer.label_mass == pytest.approx(float(raw.sum()), rel=1e-4)
        assert shares(answer) == pytest.approx((raw / raw.sum()).tolist(), rel=1e-4)
    assert decision.usage.input_tokens == len(prompt)
    assert decision.usage.canvases == draws * len(form.canvases)
    assert decision.usage.forwards == -(-len(prompt) // slots.CHUNK) + 1


def test_several_steps_are_those_of_any_canvas(lm: LM) -> None:
    """The reference loop over full logits, with the form pinned; its last step is read."""
    asked, network, steps = QUESTIONS[:3], lm.network, 4
    form, prompt = laid_out(asked), prompt_of(asked)
    (canvas,) = form.canvases
    sampling = lm.generation.sampling
    _, cache = network.read(torch.tensor([prompt]), network.empty_cache(1))
    read: list[Tensor] = []

    def denoiser(rows: Tensor, step: int, ids: Tensor, signal: Any, temperature: Tensor, draws: Any, mask: Any) -> Any:
        read.append(network.logits(network.denoise(ids, cache, signal)))
        return output_from_logits(network, read[-1] / temperature, lambda scaled: draws.sample(rows, step, scaled))

    with torch.inference_mode():
        list(
            denoise(
                denoiser,
                KeyedDraws([3], [0], length=len(canvas.ids), vocab=CONFIG.vocab_size),
                1,
                Schedule(steps=steps, t_min=sampling.t_min, t_max=sampling.t_max),
                step_rules(sampling)[0],
                lambda unchanged, entropy: torch.zeros_like(unchanged, dtype=torch.bool),
                pins=Pins.of([{i: t for i, t in enumerate(canvas.ids) if t != SLOT}], len(canvas.ids), network.embed),
            )
        )
    assert len(read) == steps
    p = read[-1][0].double().softmax(-1)
    for slot, answer in zip(canvas.slots, lm.decide(CONTEXT, asked, steps=steps, seed=3), strict=True):
        raw = [sum(float(p[slot.start, token]) for (token,) in option) for option in slot.options]
        assert shares(answer) == pytest.approx([each / sum(raw) for each in raw], rel=1e-4)


# The door.


def test_a_list_of_contexts_gives_what_each_gives_alone(lm: LM) -> None:
    contexts: list[Any] = [
        CONTEXT,
        "x" * 300,
        [{"role": "user", "content": CONTEXT}],
        [{"role": "user", "content": "?"}],
    ]
    together = lm.decide(contexts, QUESTIONS, draws=2)
    assert together == [lm.decide(each, QUESTIONS, draws=2) for each in contexts]
    assert together[0] == together[2] and together[0] != together[1]
    assert lm.decide([CONTEXT], QUESTIONS, draws=2) == together[:1]


def test_threads_and_copies_of_a_model_get_the_same_answers(lm: LM) -> None:
    want = lm.decide(CONTEXT, QUESTIONS)
    with ThreadPoolExecutor(4) as threads:
        assert all(got == want for got in threads.map(lambda _: lm.decide(CONTEXT, QUESTIONS), range(8)))
    assert pickle.loads(pickle.dumps(want)) == want
    lm.chat([{"role": "user", "content": "Hi"}], max_tokens=1)  # which renders a template, that cannot be pickled
    assert pickle.loads(pickle.dumps(lm)).decide(CONTEXT, QUESTIONS) == want


@pytest.mark.parametrize(("steps", "draws"), [(1, 1), (3, 2)])
def test_a_card_gives_the_same_answers(lm: LM, card: Card, steps: int, draws: int) -> None:
    want = lm.decide(CONTEXT, QUESTIONS, steps=steps, draws=draws)
    there = model(make_random_network(CONFIG).to("cuda"))
    for got, answer in zip(there.decide(CONTEXT, QUESTIONS, steps=steps, draws=draws), want, strict=True):
        assert shares(got) == pytest.approx(shares(answer), rel=1e-4)


def test_a_seed_draws_the_noise_and_more_draws_are_a_mean(lm: LM) -> None:
    one, other = (lm.decide(CONTEXT, QUESTIONS, seed=seed) for seed in (0, 1))
    assert one == lm.decide(CONTEXT, QUESTIONS, seed=2**64) != other
    mean = lm.decide(CONTEXT, QUESTIONS, draws=2)
    assert mean != one and mean[0].label_mass > 0


def test_canvases_that_are_too_many_for_one_forward_take_several(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    want = lm.decide(CONTEXT, QUESTIONS, draws=5)
    monkeypatch.setattr(slots, "MOST_POSITIONS", 2 * (len(prompt_of(QUESTIONS)) + 64))
    monkeypatch.setattr(slots, "CHUNK", 100)
    got = lm.decide(CONTEXT, QUESTIONS, draws=5)
    assert got.usage.forwards > want.usage.forwards
    for one, other in zip(got, want, strict=True):
        assert shares(one) == pytest.approx(shares(other), rel=1e-4)


def test_the_questions_stand_at_the_end_of_the_user_s_last_message(lm: LM) -> None:
    asked = QUESTIONS[:2]
    text = laid_out(asked).text
    said: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    parts = [{"type": "text", "text": CONTEXT}]
    spelled = [
        ([*said, {"role": "user", "content": CONTEXT}], [*said, {"role": "user", "content": f"{CONTEXT}\n\n{text}"}]),
        ([*said, {"role": "user", "content": parts}], [*said, {"role": "user", "content": f"{CONTEXT}\n\n{text}"}]),
        (said, [*said, {"role": "user", "content": text}]),
    ]
    for given_, whole in spelled:
        ids = lm.build_chat_requests(whole)[0].row.prompt
        assert lm.decide(given_, asked).usage.input_tokens == len(ids)


def test_the_empty_thought_before_an_answer_is_no_part_of_the_canvas(lm: LM) -> None:
    """Templates write it, or leave it to the model (the published one of July): what is read is the same."""
    source, thought = TOKENIZER.chat_template, "<|channel>thought\\n<channel|>"
    assert source is not None and thought in source
    config = {"bos_token": "<bos>", "eos_token": "<eos>"}
    bare = Tokenizer(TOKENIZER.backend, config=config, chat_template=source.replace(thought, ""))
    assert model(lm.network, bare).decide(CONTEXT, QUESTIONS) == lm.decide(CONTEXT, QUESTIONS)


def test_a_model_without_a_chat_template_is_asked_in_plain_text(lm: LM) -> None:
    plain = model(lm.network, PLAIN)
    asked = QUESTIONS[:2]
    decision = plain.decide(CONTEXT, asked)
    assert decision.usage.input_tokens == len(PLAIN.encode(f"{CONTEXT}\n\n{laid_out(asked).text}\n"))
    with pytest.raises(RequestError, match="and the model has no chat template"):
        plain.decide([{"role": "user", "content": "?"}], asked)


def test_sixty_four_questions_are_answered(lm: LM) -> None:
    decision = lm.decide("a", [YesNo("?", name=f"{n}") for n in range(64)])
    assert [answer.name for answer in decision] == [f"{n}" for n in range(64)]
    assert all(isinstance(answer, YesNoAnswer) for answer in decision)


@settings(deadline=None, max_examples=6)
@given(count=st.integers(1, 200), seed=st.integers(0, 99))
def test_choices_of_any_number_have_probabilities_that_sum_to_one(lm: LM, count: int, seed: int) -> None:
    (answer,) = lm.decide("a", [Choice("?", options=[f"{n}" for n in range(count)])], seed=seed)
    assert isinstance(answer, ChoiceAnswer)
    assert len(answer.probabilities) == count and sum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.probabilities[answer.value] == max(answer.probabilities.values())


# Mistakes.


def no_forward(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a forward was run")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"questions": []}, "questions holds 0 questions"),
        ({"questions": [YesNo("?")] * 65}, "questions holds 65 questions"),
        ({"questions": YesNo("?")}, "questions is YesNo"),
        ({"questions": [YesNo("?", name="a"), YesNo("!", name="a")]}, "questions[1].name is 'a'"),
        ({"context": None}, "context is None"),
        ({"context": []}, "context is []"),
        ({"context": {"role": "user", "content": "?"}}, "context is {"),
        ({"context": [CONTEXT, 5]}, "context 1: context is 5"),
        ({"context": [CONTEXT, {"role": "user"}]}, "context 1: context is {"),
        ({"context": [[]]}, "context 0: messages is []"),
        ({"context": [{"role": "user"}]}, "messages[0].content is None"),
        ({"context": [CONTEXT, "x" * 8000]}, "context 1: the prompt has 8"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"steps": 1025}, "steps is 1025"),
        ({"draws": 0}, "draws is 0"),
        ({"draws": 2.0}, "draws is 2.0"),
        ({"seed": None}, "seed is None"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"form": "a"}, "form is 'a'"),
        ({"form": ["a"]}, "form has 1 texts for 4 questions"),
        ({"form": ["", "", "", "", ""]}, "questions[0] has options of 7, 8 tokens"),
        ({"context": "\u00e9"}, "the vocabulary has no token for '\u00e9'"),
    ],
)
def test_a_mistake_is_refused_by_name_before_any_forward(
    lm: LM, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(Network, "run", no_forward)
    with pytest.raises(BlockpressError) as refused:
        lm.decide(**{"context": CONTEXT, "questions": QUESTIONS, **arguments})
    assert said in refused.value.message and refused.value.hint


def test_a_context_that_is_too_long_is_refused_as_a_prompt_is(lm: LM) -> None:
    with pytest.raises(PromptTooLong, match="shorten the prompt"):
        lm.decide("x" * 8000, QUESTIONS)


def test_a_misspelt_option_is_no_option(lm: LM) -> None:
    with pytest.raises(TypeError, match="'draw'"):
        lm.decide(CONTEXT, QUESTIONS, draw=2)  # type: ignore[call-overload]


def test_a_model_that_cannot_decide_says_so(tiny: ModelConfig, random_network: RandomNetwork) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, which decide needs"):
        LM(path=Path(), network=random_network(tiny), generation=GenerationConfig(), tokenizer=None).decide(
            CONTEXT, QUESTIONS
        )
    sibling = random_network(replace(CONFIG, family="gemma4", canvas_length=1))
    with pytest.raises(RequestError, match="family gemma4, which has no canvas"):
        model(sibling).decide(CONTEXT, QUESTIONS)


# The shipped model.


def cells(puzzle: sudoku.Puzzle) -> tuple[str, list[Choice], list[str], list[str]]:
    """A puzzle as a context, a question for each empty cell, the grid's form around them, and the solution there."""
    grid, solution = sudoku.layout(puzzle.puzzle), sudoku.layout(puzzle.solution)
    asked = [
        Choice(f"cell {n}", options=["1", "2", "3", "4", "5", "6", "7", "8", "9"])
        for n, cell in enumerate(grid)
        if cell == "0"
    ]
    return grid, asked, grid.split("0"), [right for right, cell in zip(solution, grid, strict=True) if cell == "0"]


def test_the_shipped_model_reads_the_digits_of_a_grid_whose_form_is_pinned(nano: LM) -> None:
    right = total = 0
    for seed in range(8):
        grid, asked, form, want = cells(sudoku.generate_puzzle(seed=seed, givens=45))
        decision = nano.decide(grid, asked, form=form)
        right += sum(answer.value == digit for answer, digit in zip(decision, want, strict=True))
        total += len(want)
        assert min(answer.label_mass for answer in decision) > 0.99
    assert right / total > 0.85


def test_words_that_the_vocabulary_lacks_are_refused(nano: LM) -> None:
    with pytest.raises(TextError, match="the vocabulary has no token for"):
        nano.decide("12", [YesNo("Is it solved?")])
