"""Reads the slots of pinned canvases: the log-probability of each option, by one denoising step or a few.

    context --read--> cache        canvas: form pinned, noise in the slots --denoise--> hidden states of the slots
                                   --head--> logprobs of the options' tokens --sum over a slot, mean over draws-->

Only the slots meet the vocabulary. With several steps, the slots go on as in any canvas (temperature, acceptance, new
noise, self-conditioning), and the last step is read. What is read is at temperature 1, over the whole vocabulary.

Invariant: a canvas is a function of (form, seed, draw), and never settles early.
Run it:  python -m pytest tests/lm/test_decide.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from blockpress.decide.answers import log_sum
from blockpress.decide.form import AnswerSlot, FormCanvas
from blockpress.diffusion import Accept, DenoiserOutput, KeyedDraws, Pins, Schedule, update
from blockpress.diffusion.pins import UNPINNED
from blockpress.model import Cache, Network
from blockpress.model.pictures import Images
from blockpress.ops import vocabulary
from blockpress.ops.computing import computing
from blockpress.ops.transfer import to_device, to_host

MOST_POSITIONS = 1 << 14
"""Positions of context and canvas that the canvases of one forward hold together, if there are several."""
CHUNK = 1024
"""Tokens of a context that are read at once: attention holds a score for each of them and each token before it."""
MOST_CANVASES = 64
"""Most canvases of a form, and the distance between the numbers that key the noise of two draws."""


@dataclass(frozen=True, kw_only=True)
class SlotScores:
    """options: of each slot, in the order of the canvases, the log-probability of each option. forwards: run for it."""

    options: list[list[float]]
    forwards: int


@computing()
@torch.inference_mode()
def read_slots(
    network: Network,
    prompt: Sequence[int],
    canvases: Sequence[FormCanvas],
    *,
    schedule: Schedule,
    accept: Accept,
    draws: int,
    seed: int,
    images: Images | None = None,
) -> SlotScores:
    """The options' log-probabilities after a prompt, the mean probability over the draws of noise.

    Args:
        canvases: at most MOST_CANVASES, all of one length.
        schedule: its steps are all taken; the last one is read.
        images: the features of the prompt's pictures, one mapping (`Network.read`).
    """
    assert len(canvases) <= MOST_CANVASES
    cache, forwards = _read(network, prompt, images)
    jobs = [(number, draw) for draw in range(draws) for number in range(len(canvases))]
    at_once = max(1, MOST_POSITIONS // (len(prompt) + len(canvases[0].ids)))
    scores: dict[int, list[list[float]]] = {}
    for start in range(0, len(jobs), at_once):
        some = jobs[start : start + at_once]
        chosen = [canvases[number] for number, _ in some]
        keys = [draw * MOST_CANVASES + number for number, draw in some]
        forwards += schedule.steps
        for slot, logs in _denoise(network, cache, chosen, keys, schedule, accept, seed):
            scores.setdefault(slot.question, []).append(logs)
    less = math.log(draws)
    slots = [slot for canvas in canvases for slot in canvas.slots]
    read = [[log_sum(each) - less for each in zip(*scores[slot.question], strict=True)] for slot in slots]
    return SlotScores(options=read, forwards=forwards)


def _read(network: Network, prompt: Sequence[int], images: Images | None) -> tuple[Cache, int]:
    """The context's cache, read in chunks, and the number of forwards; with pictures in one, since none may be cut."""
    tokens = to_device(torch.tensor([list(prompt)], dtype=torch.long), network.device)
    cache, step = network.empty_cache(1), CHUNK if images is None else tokens.shape[1]
    starts = range(0, tokens.shape[1], step)
    for start in starts:
        _, cache = network.read(tokens[:, start : start + step], cache, images=images)
    return cache, len(starts)


def _denoise(
    network: Network,
    cache: Cache,
    canvases: Sequence[FormCanvas],
    keys: list[int],
    schedule: Schedule,
    accept: Accept,
    seed: int,
) -> list[tuple[AnswerSlot, list[float]]]:
    """Each slot of the canvases, whose noise the `keys` draw, with its options' log-probabilities."""
    count, length, device = len(canvases), len(canvases[0].ids), network.device
    rows = torch.arange(count, device=device)
    held = to_device(torch.tensor([canvas.ids for canvas in canvases], dtype=torch.long), device)
    pins = Pins(held, network.embed(held.clamp(min=0)))
    noise = KeyedDraws([seed] * count, keys, length=length, vocab=network.config.vocab_size, device=device)
    cache = cache.select(torch.zeros_like(rows))
    free = held == UNPINNED
    canvas, signal = pins.hold(rows, noise.noise(rows, 0)), None
    for number in range(1, schedule.steps + 1):
        hidden = network.denoise(canvas, cache, signal)
        if number < schedule.steps:
            temperature = schedule.temperature(number).to(device)
            output = pins(rows, _step(network, hidden, free, temperature, noise.uniform(rows, number)))
            unchanged = torch.zeros_like(rows)
            again = pins.hold(rows, noise.noise(rows, number))
            canvas = update(output, again, torch.full_like(canvas, -1), unchanged, accept, _never).canvas
            signal = output.signal
    slots = [slot for each in canvases for slot in each.slots]
    ids = [_distinct(slot, place) for slot in slots for place in range(slot.width)]
    most = max(map(len, ids))
    padded = to_device(torch.tensor([[*some, *some[:1] * (most - len(some))] for some in ids]), device)
    head, cap = network.embed_tokens.weight, network.config.softcap
    table = to_host(vocabulary.score_ids(hidden[free], head, padded, cap=cap)).tolist()
    lines = iter([dict(zip(some, line, strict=False)) for some, line in zip(ids, table, strict=True)])
    return [(slot, _options(slot, [next(lines) for _ in range(slot.width)])) for slot in slots]


def _step(
    network: Network,
    hidden: Float[Tensor, "batch canvas hidden"],
    free: Bool[Tensor, "batch canvas"],
    temperature: Float32[Tensor, ""],
    uniform: Float[Tensor, "batch canvas"],
) -> DenoiserOutput:
    """What the step rule needs, computed at the slots alone; elsewhere zeros, which pins replace."""
    states = hidden[free]
    stats = vocabulary.sample_from_hidden(
        states,
        network.embed_tokens.weight,
        cap=network.config.softcap,
        temperature=temperature.expand(len(states)),
        uniform=uniform[free],
        scale=network.embed_scale(),
    )
    assert stats.signal is not None
    argmax, sample = torch.zeros_like(free, dtype=torch.long), torch.zeros_like(free, dtype=torch.long)
    entropy, signal = torch.zeros_like(free, dtype=torch.float32), torch.zeros_like(hidden)
    argmax[free], sample[free], entropy[free], signal[free] = stats.argmax, stats.sample, stats.entropy, stats.signal
    return DenoiserOutput(argmax=argmax, sample=sample, entropy=entropy, signal=signal)


def _never(unchanged: Int[Tensor, " batch"], entropy: Float32[Tensor, "batch canvas"]) -> Tensor:
    return torch.zeros_like(unchanged, dtype=torch.bool)


def _distinct(slot: AnswerSlot, place: int) -> list[int]:
    """The tokens that some option has at a place of its slot."""
    return list(dict.fromkeys(ids[place] for spellings in slot.options for ids in spellings))


def _options(slot: AnswerSlot, places: Sequence[dict[int, float]]) -> list[float]:
    """The log-probability of each option: the product over its tokens, summed over its spellings."""
    return [
        log_sum([math.fsum(place[token] for place, token in zip(places, ids, strict=True)) for ids in spellings])
        for spellings in slot.options
    ]
