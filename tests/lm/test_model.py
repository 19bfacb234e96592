"""The loaded model on random weights: the same tokens however it is asked, logits to look at, and every bad argument."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blockpress.config import PRESETS, AutoregressiveSampling, GenerationConfig, ModelConfig, Sampling
from blockpress.decoding import Committed, Denoised, Done, Event, Reply, Text
from blockpress.errors import BlockpressError, CheckpointError, PromptTooLong, RequestError, TextError
from blockpress.lm import LM
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer

CONFIG: ModelConfig = replace(PRESETS["tiny"](), vocab_size=16, canvas_length=8, context_length=40)
CANVAS = CONFIG.canvas_length
CONTEXT = CONFIG.context_length
# Random weights are never sure of anything: with these bounds they accept most tokens, and most canvases settle early.
LOOSE = Sampling(steps=8, entropy_bound=1.0, confidence=0.4)
PROMPTS = ["12", "3456789\n0", "5", "0000000000000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    write_digits_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def lm(folder: Path, random_network) -> LM:  # type: ignore[no-untyped-def]
    """Weights that are sure at times, and whose signal is faint.

    At full strength the signal carries a rounding error of one step on to the next, four times as large, until rows
    differ in the third digit: that happens to random weights alone, and would make equal tokens a matter of luck.
    """
    network = random_network(CONFIG, seed=3)
    with torch.no_grad():
        network.norm.weight *= 3
        network.self_conditioning.down_proj.weight *= 0.1
    generation = GenerationConfig(sampling=LOOSE, stop_ids=(1,))
    return LM(path=folder, network=network, generation=generation, tokenizer=Tokenizer.from_directory(folder))


@pytest.fixture(scope="module")
def bare(lm: LM) -> LM:
    """The same model without a tokenizer."""
    return LM(path=Path("nowhere"), network=lm.network, generation=lm.generation, tokenizer=None)


@pytest.fixture(scope="module")
def replies(lm: LM) -> list[Reply]:
    """Every prompt alone."""
    return [lm.generate(prompt, seed=7, max_tokens=20) for prompt in PROMPTS]


# ------------------------------------------------------------------------------------------------------ same tokens


def test_the_test_weights_accept_settle_and_stop(lm: LM, replies: list[Reply]):
    events = [event for prompt in PROMPTS for event in lm.stream(prompt, seed=7, max_tokens=20)]
    steps = [event for event in events if isinstance(event, Denoised)]
    canvases = [event for event in events if isinstance(event, Committed)]
    assert 2 < sum(int(step.accepted.sum()) for step in steps) / len(steps) < CANVAS
    assert sum(event.steps < 8 for event in canvases) >= len(canvases) / 3
    assert len({reply.usage.steps for reply in replies}) > 1
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}


def test_the_same_seed_gives_the_same_reply_and_another_one_another(lm: LM, replies: list[Reply]):
    assert lm.generate(PROMPTS[0], seed=7, max_tokens=20) == replies[0]
    assert lm.generate(PROMPTS[0], seed=8, max_tokens=20) != replies[0]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], [2, 0, 0, 1]])
def test_a_row_of_a_batch_equals_the_row_alone(lm: LM, replies: list[Reply], order: list[int]):
    batch = lm.generate([PROMPTS[place] for place in order], seed=7, max_tokens=20)
    assert batch == [replies[place] for place in order]


def test_a_batch_gives_the_events_of_its_rows(lm: LM):
    together = list(lm.stream(PROMPTS, seed=[5, 6, 7, 8], max_tokens=20))
    for row, prompt in enumerate(PROMPTS):
        alone = list(lm.stream(prompt, seed=5 + row, max_tokens=20))
        own = [event for event in together if event.row == row]
        assert [plain(event) for event in own] == [plain(event) for event in alone]
        entropies = [torch.stack([e.entropy for e in x if isinstance(e, Denoised)]) for x in (own, alone)]
        torch.testing.assert_close(*entropies, rtol=0, atol=1e-4)


def plain(event: Event) -> tuple[str, dict[str, Any]]:
    """All that an event says but its row and its entropies, which come from products of another size."""
    told = {name: value for name, value in vars(event).items() if name not in ("row", "entropy")}
    return type(event).__name__, {k: v.tolist() if isinstance(v, Tensor) else v for k, v in told.items()}


def test_streamed_and_joined_equals_the_whole(lm: LM, replies: list[Reply]):
    events = list(lm.stream(PROMPTS[1], seed=7, max_tokens=20))
    (done,) = (event for event in events if isinstance(event, Done))
    assert done.reply == replies[1]
    assert "".join(event.text for event in events if isinstance(event, Text)) == replies[1].text
    assert replies[1].text == lm.decode(replies[1].tokens)


def test_several_seeds_for_one_prompt(lm: LM):
    seeds = [0, 1, 2**70, -3]
    assert lm.generate(PROMPTS[0], seed=seeds, max_tokens=8) == [
        lm.generate(PROMPTS[0], seed=seed, max_tokens=8) for seed in seeds
    ]


def test_one_seed_for_each_prompt(lm: LM):
    assert lm.generate(PROMPTS[:2], seed=[4, 9], max_tokens=8) == [
        lm.generate(PROMPTS[0], seed=4, max_tokens=8),
        lm.generate(PROMPTS[1], seed=9, max_tokens=8),
    ]


def test_a_list_of_one_gives_a_list_of_one(lm: LM, replies: list[Reply]):
    assert lm.generate(PROMPTS[:1], seed=7, max_tokens=20) == replies[:1]
    assert lm.generate(PROMPTS[0], seed=[7], max_tokens=20) == replies[:1]


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: [np.int64(token) for token in ids],
        lambda ids: list(torch.tensor(ids)),
    ],
    ids=["list", "tuple", "tensor", "int32", "numpy ints", "scalar tensors"],
)
def test_token_ids_in_any_form(lm: LM, replies: list[Reply], form: Any):
    ids = form(lm.encode(PROMPTS[0]))
    assert lm.generate(ids, seed=7, max_tokens=20) == replies[0]


def test_many_rows_of_ids_in_one_tensor(lm: LM, replies: list[Reply]):
    rows = torch.tensor([lm.encode(PROMPTS[0])] * 2)
    assert lm.generate(rows, seed=7, max_tokens=20) == [replies[0]] * 2


def test_texts_and_ids_may_be_mixed(lm: LM, replies: list[Reply]):
    mixed = [PROMPTS[0], lm.encode(PROMPTS[1]), torch.tensor(lm.encode(PROMPTS[2]))]
    assert lm.generate(mixed, seed=7, max_tokens=20) == replies[:3]


@pytest.mark.parametrize("limit", [1, CANVAS - 1, CANVAS, CANVAS + 1, 5 * CANVAS // 2 - 1])
def test_max_tokens_gives_a_prefix_of_the_longer_answer(lm: LM, replies: list[Reply], limit: int):
    for reply, longer in zip(lm.generate(PROMPTS, seed=7, max_tokens=limit), replies, strict=True):
        assert reply.tokens == longer.tokens[:limit]
        assert reply.usage.completion_tokens == len(reply.tokens)


def test_without_a_limit_it_writes_until_a_stop_or_the_contexts_end(lm: LM):
    for reply in lm.generate(PROMPTS[0], seed=list(range(5))):
        if reply.finish_reason == "stop":
            assert reply.tokens[-1] == 1
        else:
            assert len(reply.tokens) == (CONTEXT - 3) // CANVAS * CANVAS


def test_the_checkpoints_sampling_is_used_unless_another_is_given(lm: LM, replies: list[Reply]):
    assert lm.generate(PROMPTS[0], seed=7, max_tokens=20, sampling=LOOSE) == replies[0]
    strict = lm.generate(PROMPTS[0], seed=7, max_tokens=CANVAS, sampling=LOOSE.with_(steps=3, confidence=0.0))
    assert strict.usage.steps == 3


def test_a_stop_text_cuts_the_same_answer(lm: LM, replies: list[Reply]):
    place, text = max(enumerate(reply.text or "" for reply in replies), key=lambda pair: len(pair[1]))
    stop = text[len(text) // 2 :][:3]
    reply = lm.generate(PROMPTS[place], seed=7, max_tokens=20, sampling=LOOSE.with_(stop=stop))
    assert len(stop) == 3
    assert reply.text == text[: text.index(stop)]
    assert reply.finish_reason == "stop"


# --------------------------------------------------------------------------------------- checks and log-probabilities


@pytest.mark.slow
def test_verified_is_diffusion_with_checks(lm: LM, replies: list[Reply]):
    checked = lm.generate(PROMPTS[1], seed=7, max_tokens=20, mode="verified")
    assert checked == lm.generate(PROMPTS[1], seed=7, max_tokens=20, sampling=LOOSE.with_(max_verifications=4))
    assert 0 < checked.usage.verifications <= 4 * checked.usage.canvases and checked.usage.redos
    assert checked != replies[1] and replies[1].usage.verifications == 0
    twice = lm.generate(PROMPTS[1], seed=7, max_tokens=20, sampling=LOOSE.with_(max_verifications=2), mode="verified")
    assert twice == lm.generate(
        PROMPTS[1], seed=7, max_tokens=20, sampling=LOOSE.with_(max_verifications=2), mode="diffusion"
    )


@pytest.mark.slow
def test_verified_to_the_end_is_the_greedy_answer(lm: LM):
    checked = lm.generate(PROMPTS, max_tokens=20, sampling=LOOSE.with_(max_verifications=CANVAS))
    greedy = lm.generate(PROMPTS, max_tokens=20, mode="autoregressive")
    assert [(r.text, r.finish_reason) for r in checked] == [(r.text, r.finish_reason) for r in greedy]


@pytest.mark.parametrize("mode", ["diffusion", "verified", "autoregressive"])
def test_log_probabilities_are_those_of_the_next_token_logits(lm: LM, mode: Any):
    reply = lm.generate(PROMPTS[1], 20, seed=7, mode=mode, logprobs=1)
    events = list(lm.stream(PROMPTS[1], 20, seed=7, mode=mode, logprobs=1))
    assert reply.logprobs == [said for e in events if isinstance(e, Committed) for said in e.logprobs or []]
    assert [said.token for said in reply.logprobs or []] == reply.tokens
    prompt = lm.encode(PROMPTS[1])
    log_p = lm.next_token_logits([*prompt, *reply.tokens]).log_softmax(-1)[len(prompt) - 1 : -1]
    wanted = [float(log_p[place, token]) for place, token in enumerate(reply.tokens)]
    assert [said.logprob for said in reply.logprobs or []] == pytest.approx(wanted, abs=1e-4)
    assert [said.top[0][1] for said in reply.logprobs or []] == pytest.approx(log_p.amax(-1).tolist(), abs=1e-4)
    assert lm.generate(PROMPTS[1], 20, seed=7, mode=mode).logprobs is None


@pytest.mark.parametrize("value", [-1, True, 1.5, "3", 17])
def test_log_probabilities_must_be_a_count(lm: LM, value: Any):
    for mode in ("diffusion", "autoregressive"):
        refused(lambda mode=mode: lm.stream("12", mode=mode, logprobs=value), RequestError, "logprobs", repr(value))


def test_a_mode_must_be_one(lm: LM):
    refused(lambda: lm.stream("1", mode="fast"), RequestError, "'fast'", "'verified'")  # type: ignore[arg-type]
    greedy = AutoregressiveSampling()
    refused(lambda: lm.stream("1", sampling=greedy, mode="verified"), RequestError, "blockpress.Sampling", "verified")


# ----------------------------------------------------------------------------------------------- without a tokenizer


def test_without_a_tokenizer_ids_work_and_the_reply_has_no_text(lm: LM, bare: LM, replies: list[Reply]):
    reply = bare.generate(lm.encode(PROMPTS[0]), seed=7, max_tokens=20)
    assert reply.text is None
    assert reply == replace(replies[0], text=None)
    kinds = {type(event) for event in bare.stream(lm.encode(PROMPTS[0]), seed=7, max_tokens=20)}
    assert kinds == {Denoised, Committed, Done}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda lm: lm.generate("12"), "encode"),
        (lambda lm: lm.generate([[5, 6], "12"]), "encode"),
        (lambda lm: lm.stream("12"), "encode"),
        (lambda lm: lm.encode("12"), "encode"),
        (lambda lm: lm.decode([5]), "decode"),
    ],
)
def test_without_a_tokenizer_text_is_refused_by_name(bare: LM, call: Any, name: str):
    with pytest.raises(CheckpointError, match=name) as caught:
        call(bare)
    assert "tokenizer.json" in caught.value.message
    assert "ids" in caught.value.hint


def test_without_a_tokenizer_stop_texts_are_refused(bare: LM):
    with pytest.raises(RequestError, match=r"stop.*\('x',\)"):
        bare.generate([5], sampling=LOOSE.with_(stop="x"))


# ------------------------------------------------------------------------------------------------------------ logits


def test_no_previous_logits_differ_from_zero_logits(lm: LM):
    prompt, canvas = [5, 6, 7], list(range(CANVAS))
    null = lm.denoise_logits(prompt, canvas)
    zeros = lm.denoise_logits(prompt, canvas, torch.zeros(CANVAS, 16))
    assert null.dtype == torch.float32
    assert null.shape == (CANVAS, 16)
    assert (null - zeros).norm() > 0.01 * null.norm()


def test_denoise_logits_are_what_generate_samples_from(lm: LM):
    """Two steps by hand, from the noise and the samples that the draws give."""
    from blockpress.diffusion import KeyedDraws

    prompt = lm.encode("12")
    first, second, *_ = (event for event in lm.stream("12", seed=7) if isinstance(event, Denoised))
    row, draws = torch.tensor([0]), KeyedDraws([7], [0], length=CANVAS, vocab=16)
    canvas = draws.noise(row, 0)
    scaled = lm.denoise_logits(prompt, canvas[0]) / 0.8
    assert torch.equal(scaled.argmax(-1), first.argmax)
    entropy = -(scaled.softmax(-1) * scaled.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy, first.entropy, rtol=1e-5, atol=1e-5)
    canvas = torch.where(first.accepted, draws.sample(row, 1, scaled[None]), draws.noise(row, 1))
    scaled = lm.denoise_logits(prompt, canvas[0], scaled) / (0.4 + 0.4 * 7 / 8)
    assert torch.equal(scaled.argmax(-1), second.argmax)
    entropy = -(scaled.softmax(-1) * scaled.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy, second.entropy, rtol=1e-4, atol=1e-4)


def test_denoise_logits_take_canvases_of_any_length(lm: LM):
    assert lm.denoise_logits([5], [6]).shape == (1, 16)
    assert lm.denoise_logits((5,), torch.arange(11)).shape == (11, 16)


def test_next_token_logits_are_causal(lm: LM):
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    logits = lm.next_token_logits(ids)
    assert logits.dtype == torch.float32
    assert logits.shape == (10, 16)
    changed = lm.next_token_logits([*ids[:6], 4, *ids[7:]])
    assert torch.equal(logits[:6], changed[:6])
    assert (logits[6:] != changed[6:]).any(-1).all()
    torch.testing.assert_close(lm.next_token_logits(ids[:4]), logits[:4], rtol=1e-4, atol=1e-4)
    assert logits.abs().max() <= CONFIG.softcap


def test_logits_carry_no_gradient(lm: LM):
    assert not lm.next_token_logits([5]).requires_grad
    assert not lm.denoise_logits([5], [6]).requires_grad


def test_encode_and_decode_are_each_others_inverse(lm: LM):
    assert lm.encode("53\n") == [2, 10, 8, 4]
    assert lm.decode([2, 10, 8, 4, 1]) == lm.decode(torch.tensor([2, 10, 8, 4, 1])) == "53\n"


# --------------------------------------------------------------------------------------------------------- bad input


def refused(call: Any, kind: type[BlockpressError], *told: str) -> None:
    """The error is of that kind, says the words, and has a hint; all on one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [word for word in told if word not in message] == []
    assert caught.value.hint
    assert "\n" not in message


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3", math.nan])
def test_max_tokens_must_be_a_count(lm: LM, method: str, value: Any):
    refused(lambda: getattr(lm, method)("12", max_tokens=value), RequestError, "max_tokens", repr(value))


@pytest.mark.parametrize(
    ("prompt", "seed", "told"),
    [
        (["1", "2"], [1], "1 entries"),
        (["1", "2"], [1, 2, 3], "3 entries"),
        ("1", 1.5, "1.5"),
        ("1", None, "None"),
        ("1", "7", "'7'"),
        ("1", True, "True"),
        ("1", [1, 2.5], "2.5"),
        ("1", ["a"], "'a'"),
        ("1", torch.tensor([0.5]), "float32"),
    ],
)
def test_seeds_must_be_whole_and_one_a_prompt(lm: LM, prompt: Any, seed: Any, told: str):
    refused(lambda: lm.generate(prompt, seed=seed), RequestError, "seed", told)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([1.5, 2.5], "1.5"),
        ([5, 1.5], "5"),
        ([], "empty"),
        ([[5, 6], []], "empty"),
        (torch.tensor([], dtype=torch.long), "empty"),
        (torch.tensor([0.5, 1.0]), "float32"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "(1, 1, 1)"),
        (torch.tensor(5), "()"),
        ([5, 16], "16 at position 1"),
        ([5, -1], "-1 at position 1"),
        ([[5], [99]], "99 at position 0"),
        (None, "None"),
        (5, "5"),
        (b"12", "b'12'"),
        ({5, 6}, "{5, 6}"),
    ],
)
def test_prompts_must_be_text_or_ids(lm: LM, prompt: Any, told: str):
    refused(lambda: lm.generate(prompt), RequestError, "prompt", told)


def test_text_without_tokens_is_refused_by_position(lm: LM):
    refused(lambda: lm.generate("12\n3x"), TextError, "'x'", "line 2, column 2")


@pytest.mark.parametrize("length", [CONTEXT - CANVAS + 1, CONTEXT, 1000])
def test_a_prompt_beyond_the_context_is_refused(lm: LM, length: int):
    refused(lambda: lm.generate([5] * length), PromptTooLong, str(length), str(CONTEXT), str(CONTEXT - CANVAS))
    refused(lambda: lm.generate("1" * (length - 1)), PromptTooLong, str(length), str(CONTEXT), str(CONTEXT - CANVAS))


def test_a_prompt_that_just_fits_gets_one_canvas(lm: LM):
    reply = lm.generate([5] * (CONTEXT - CANVAS), sampling=LOOSE.with_(steps=2))
    assert reply.usage.canvases == 1


def test_one_bad_prompt_of_a_batch_is_refused_before_any_work(lm: LM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(lm.network), "read", lambda *a, **k: pytest.fail("the network ran"))
    refused(lambda: lm.stream(["1", [5, 77]]), RequestError, "prompt", "77")


@pytest.mark.parametrize("value", [{"steps": 3}, 48, "greedy"])
def test_sampling_must_be_a_sampling(lm: LM, value: Any):
    refused(lambda: lm.generate("1", sampling=value), RequestError, "sampling", repr(value))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda lm: lm.denoise_logits([], [5]), ["prompt_ids", "empty"]),
        (lambda lm: lm.denoise_logits([5], []), ["canvas_ids", "empty"]),
        (lambda lm: lm.denoise_logits([16], [5]), ["prompt_ids", "16"]),
        (lambda lm: lm.denoise_logits([5], [-2]), ["canvas_ids", "-2"]),
        (lambda lm: lm.denoise_logits("12", [5]), ["prompt_ids", "'12'"]),
        (lambda lm: lm.denoise_logits([5], [5], torch.zeros(2, 16)), ["previous_logits", "(2, 16)", "(1, 16)"]),
        (lambda lm: lm.denoise_logits([5], [5], torch.zeros(1, 1, 16)), ["previous_logits", "(1, 1, 16)"]),
        (lambda lm: lm.denoise_logits([5] * 36, [5] * 5), ["36", "40"]),
        (lambda lm: lm.next_token_logits([]), ["ids", "empty"]),
        (lambda lm: lm.next_token_logits([5, 1.5]), ["ids", "1.5"]),
        (lambda lm: lm.next_token_logits([5] * 41), ["41", "40"]),
    ],
)
def test_ids_for_logits_are_checked(lm: LM, call: Any, told: Sequence[str]):
    refused(lambda: call(lm), RequestError, *told)


@pytest.mark.parametrize("method", ["decode", "next_token_logits"])
def test_every_id_argument_is_checked(lm: LM, method: str):
    refused(lambda: getattr(lm, method)(torch.zeros(2, 2, dtype=torch.long)), RequestError, "ids", "(2, 2)")


def test_arguments_are_checked_when_stream_is_called_and_not_at_its_first_event(lm: LM):
    assert not inspect.isgeneratorfunction(LM.stream)
    with pytest.raises(RequestError):
        lm.stream("1", max_tokens=0)


def test_a_tokenizer_larger_than_the_model_is_refused(lm: LM, random_network):  # type: ignore[no-untyped-def]
    small = LM(
        path=lm.path,
        network=random_network(replace(CONFIG, vocab_size=8)),
        generation=lm.generation,
        tokenizer=lm.tokenizer,
    )
    refused(lambda: small.generate("9"), RequestError, "prompt", "14")
