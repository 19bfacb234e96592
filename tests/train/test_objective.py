"""The objective: what is drawn, what each part of the loss sees, and where its gradient goes.

The checks are those of the reference's list of pitfalls: no leakage, a null signal of zeros, no gradient through the
first pass, gradient through the context, the same decoder as at generation, every position of a canvas alike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blockpress.config import ModelConfig
from blockpress.errors import ConfigError
from blockpress.model import Network
from blockpress.train import objective
from blockpress.train.initialise import initialise
from blockpress.train.objective import Draw, Objective, TrainingBatch, draw_batch, losses
from blockpress.train.optimizer import OptimizerConfig, build_optimizers, set_rates

EOS = 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean_rows(config: ModelConfig, shapes: list[tuple[int, int]], seed: int = 0) -> TrainingBatch:
    """Random rows of (prompt, canvases), right-padded with zeros."""
    lengths = [prompt + canvases * config.canvas_length for prompt, canvases in shapes]
    tokens = torch.zeros(len(shapes), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(config.vocab_size, (length,), generator=generator(seed * 100 + row))
    prompts, canvases = (torch.tensor(column) for column in zip(*shapes, strict=True))
    return TrainingBatch(tokens, prompts, canvases)


def controlled(
    rows: TrainingBatch, config: ModelConfig, chosen: list[int], conditioned: list[int], seed: int = 5
) -> Draw:
    """A draw with the canvases and the conditioned ones given; tokens half corrupted."""
    starts = rows.prompts + torch.tensor(chosen) * config.canvas_length
    clean = rows.tokens.gather(1, starts[:, None] + torch.arange(config.canvas_length))
    noise = torch.randint(config.vocab_size, clean.shape, generator=generator(seed))
    noisy = torch.where(torch.rand(clean.shape, generator=generator(seed)) < 0.5, noise, clean)
    return Draw(starts, clean, noisy, torch.tensor(conditioned, dtype=torch.long))


@pytest.fixture(scope="module")
def network(small: ModelConfig, random_network) -> Network:  # type: ignore[no-untyped-def]
    """Three layers: what the first one is scaled by reaches the others, since it is added to what the second one says."""
    return random_network(replace(small, layers=(small.layers[0], *small.layers)), seed=8)


SHAPES = [(4, 3), (7, 1), (3, 2), (9, 2)]
CHOSEN = [2, 0, 0, 1]


# ----------------------------------------------------------------------------------- the decoder is that of generation


@torch.no_grad()
def by_generation(network: Network, rows: TrainingBatch, drawn: Draw) -> tuple[float, float]:
    """Both losses, row by row without padding, through the passes that generation uses."""
    canvas, causal, conditioned = [], [], set(drawn.conditioned.tolist())
    for row, start in enumerate(drawn.starts.tolist()):
        tokens = rows.tokens[row : row + 1, : rows.lengths(network.config.canvas_length)[row]]
        _, cache = network.read(tokens[:, :start], network.empty_cache(1))
        noisy = drawn.noisy[row : row + 1]
        logits = network.logits(network.denoise(noisy, cache, None))
        if row in conditioned:
            logits = network.logits(network.denoise(noisy, cache, network.soft_embedding(logits)))
        canvas.append(F.cross_entropy(logits[0], drawn.clean[row]))
        hidden, _ = network.read(tokens, network.empty_cache(1))
        causal.append(F.cross_entropy(network.logits(hidden)[0, :-1], tokens[0, 1:]))
    return float(torch.stack(canvas).mean()), float(torch.stack(causal).mean())


@pytest.mark.parametrize("conditioned", [[], [0, 2], [0, 1, 2, 3]])
def test_the_losses_are_those_of_the_passes_that_generate(network: Network, conditioned: list[int]):
    rows = clean_rows(network.config, SHAPES)
    drawn = controlled(rows, network.config, CHOSEN, conditioned)
    got = losses(network, rows, drawn, Objective())
    canvas, causal = by_generation(network, rows, drawn)
    assert got.canvas.item() == pytest.approx(canvas, rel=1e-5)
    assert got.causal.item() == pytest.approx(causal, rel=1e-5)


def test_several_draws_share_one_causal_pass(network: Network):
    rows = clean_rows(network.config, [(4, 3), (7, 1)])
    twice = TrainingBatch(*(x.repeat_interleave(2, 0) for x in (rows.tokens, rows.prompts, rows.canvases)))
    drawn = controlled(twice, network.config, [2, 0, 0, 0], [1, 2])
    both, apart = losses(network, rows, drawn, Objective(draws=2)), losses(network, twice, drawn, Objective())
    assert both.canvas.item() == pytest.approx(apart.canvas.item(), rel=1e-6)
    assert both.causal.item() == pytest.approx(apart.causal.item(), rel=1e-6)
    assert both.accuracy.item() == apart.accuracy.item()


@torch.no_grad()
def test_accuracy_is_the_share_of_right_argmaxes(network: Network):
    rows = clean_rows(network.config, [(4, 1)])
    drawn = controlled(rows, network.config, [0], [])
    _, cache = network.read(rows.tokens[:, :4], network.empty_cache(1))
    best = network.logits(network.denoise(drawn.noisy, cache, None)).argmax(-1)
    target = torch.where(torch.arange(6) < 4, best, (best + 1) % 16)
    assert losses(network, rows, replace(drawn, clean=target), Objective()).accuracy.item() == pytest.approx(4 / 6)


# ------------------------------------------------------------------------------------------------------------ leakage


@pytest.mark.parametrize("conditioned", [[], [0]])
@pytest.mark.parametrize("chosen", [0, 1, 2])
@torch.no_grad()
def test_a_canvas_sees_neither_its_own_clean_tokens_nor_later_ones(
    network: Network, chosen: int, conditioned: list[int]
):
    rows = clean_rows(network.config, [(4, 3)])
    drawn = controlled(rows, network.config, [chosen], conditioned)
    before = losses(network, rows, drawn, Objective())
    start = int(drawn.starts)
    for place in range(rows.tokens.shape[1]):
        tokens = rows.tokens.clone()
        tokens[0, place] = (tokens[0, place] + 1) % 16
        after = losses(network, replace(rows, tokens=tokens), drawn, Objective())
        # Strictly before: what moves the loss are exactly the tokens in front of the canvas.
        assert torch.equal(after.canvas, before.canvas) == (place >= start)
        assert not torch.equal(after.causal, before.causal)


@torch.no_grad()
def test_padding_counts_for_nothing(network: Network):
    rows = clean_rows(network.config, SHAPES)
    drawn = controlled(rows, network.config, CHOSEN, [0, 1])
    tokens = rows.tokens.clone()
    for row, length in enumerate(rows.lengths(6).tolist()):
        tokens[row, length:] = 9
    one, other = (losses(network, r, drawn, Objective()) for r in (rows, replace(rows, tokens=tokens)))
    assert torch.equal(one.canvas, other.canvas)
    assert torch.equal(one.causal, other.causal)


# ---------------------------------------------------------------------------------------------------------- gradients


def gradients(network: Network, loss: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, [p for _, p in network.named_parameters()], allow_unused=True, materialize_grads=True)
    )


def test_the_canvas_loss_moves_the_causal_pass_through_keys_and_values(network: Network):
    rows = clean_rows(network.config, [(7, 1)])
    drawn = controlled(rows, network.config, [0], [])
    # Only the causal pass uses this scalar, and the canvas only meets that pass in the next layer's keys and values.
    scalar = network.layers[0].causal_scalar.requires_grad_()
    try:
        loss = losses(network, rows, drawn, Objective())
        (grad,) = torch.autograd.grad(loss.canvas, scalar)
    finally:
        scalar.requires_grad_(False)
    assert grad.abs().item() > 1e-4


def test_every_parameter_gets_a_gradient(network: Network):
    rows = clean_rows(network.config, SHAPES)
    loss = losses(network, rows, controlled(rows, network.config, CHOSEN, [0, 1]), Objective())
    for (name, _), grad in zip(network.named_parameters(), gradients(network, loss.canvas), strict=True):
        assert grad.abs().sum() > 0, name


def test_the_first_pass_gives_no_gradient(network: Network, monkeypatch: pytest.MonkeyPatch):
    rows = clean_rows(network.config, SHAPES)
    drawn = controlled(rows, network.config, CHOSEN, [0, 1, 2, 3])
    signals = []

    def watched(*args):  # type: ignore[no-untyped-def]
        signals.append(made(*args))
        return signals[-1]

    made = objective.signals
    monkeypatch.setattr(objective, "signals", watched)
    whole = gradients(network, losses(network, rows, drawn, Objective()).canvas)
    assert not signals[0].requires_grad
    # The same signal as a plain constant.
    monkeypatch.setattr(objective, "signals", lambda *args: signals[0].detach().clone())
    constant = gradients(network, losses(network, rows, drawn, Objective()).canvas)
    assert all(torch.equal(a, b) for a, b in zip(whole, constant, strict=True))


@torch.no_grad()
def test_the_null_signal_is_a_zero_vector(network: Network, monkeypatch: pytest.MonkeyPatch):
    rows = clean_rows(network.config, SHAPES)
    signals, original = [], objective.signals
    monkeypatch.setattr(objective, "signals", lambda *a: signals.append(original(*a)) or signals[-1])
    losses(network, rows, controlled(rows, network.config, CHOSEN, [1, 3]), Objective())
    losses(network, rows, controlled(rows, network.config, CHOSEN, []), Objective())
    assert [bool(row.any()) for row in signals[0]] == [False, True, False, True]
    assert not signals[1].any()


# -------------------------------------------------------------------------------------------------------------- draws

PROMPTS, CANVASES = torch.tensor([3, 5, 2, 9]), torch.tensor([1, 2, 3, 5])


def drawn(length: int = 8, vocab: int = 16, seed: int = 1, **fields) -> Draw:  # type: ignore[no-untyped-def]
    """Draws for four rows of 1, 2, 3 and 5 canvases; each token tells its place."""
    width = int((PROMPTS + CANVASES * length).max())
    tokens = torch.arange(width).repeat(4, 1) + 1000 * torch.arange(1, 5)[:, None]
    return draw_batch(TrainingBatch(tokens, PROMPTS, CANVASES), length, vocab, Objective(**fields), generator(seed))


def deviation(counts: Tensor) -> float:
    """Pearson's chi-square of counts that should be equal, in standard deviations from its mean."""
    expected = counts.sum() / len(counts)
    freedom = max(1, len(counts) - 1)
    return (float(((counts - expected) ** 2 / expected).sum()) - (len(counts) - 1)) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("stratified", [False, True])
def test_every_canvas_of_a_row_is_equally_likely(stratified: bool):
    got = drawn(draws=2000, stratified=stratified)
    for row, (prompt, canvases) in enumerate(zip(PROMPTS.tolist(), CANVASES.tolist(), strict=True)):
        starts = got.starts[row * 2000 : (row + 1) * 2000]
        assert ((starts - prompt) % 8 == 0).all()
        counts = ((starts - prompt) // 8).bincount(minlength=canvases)
        assert len(counts) == canvases
        assert abs(deviation(counts.double())) < 5


def test_clean_tokens_are_those_of_the_chosen_canvas():
    got = drawn(draws=50)
    row = torch.arange(4).repeat_interleave(50)
    assert torch.equal(got.clean, 1000 * (row[:, None] + 1) + got.starts[:, None] + torch.arange(8))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_the_corrupted_share_is_t_less_unchanged_noise(t: float, stratified: bool):
    rows = TrainingBatch(
        torch.randint(16, (4, 400), generator=generator()), torch.ones(4, dtype=int), torch.ones(4, dtype=int)
    )
    got = draw_batch(rows, 256, 16, Objective(draws=40, time_range=(t, t + 1e-6), stratified=stratified), generator(2))
    share = (got.noisy != got.clean).double().mean().item()
    wanted = t * (1 - 1 / 16)
    assert share == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / got.noisy.numel()))
    assert ((got.noisy >= 0) & (got.noisy < 16)).all()


def test_noise_is_uniform_over_the_whole_vocabulary():
    got = drawn(length=64, vocab=11, draws=200, time_range=(0.5, 1.0))
    noise = got.noisy[got.noisy != got.clean]
    assert abs(deviation(noise.bincount(minlength=11)[:11].double() + 0.0)) < 5


@pytest.mark.parametrize("bounds", [(1e-4, 1 - 1e-4), (0.2, 0.6)])
@pytest.mark.parametrize("stratified", [False, True])
def test_t_is_uniform_between_its_bounds(bounds: tuple[float, float], stratified: bool):
    # The rows' tokens are none of the vocabulary, so all that was replaced shows.
    got = drawn(length=512, draws=400, stratified=stratified, time_range=bounds)
    shares = (got.noisy < 16).double().mean(1)
    low, high = bounds
    spread = 5 * 0.5 / math.sqrt(512)
    assert low - spread < shares.min()
    assert shares.max() < high + spread
    scaled = ((shares - low) / (high - low)).clamp(0, 0.999)
    counts = (scaled * 4).long().bincount(minlength=4).double()
    assert abs(deviation(counts)) < 5


def test_stratified_draws_spread_over_the_batch_without_a_pattern():
    def first_and_mean(seed: int, stratified: bool) -> tuple[float, float]:
        got = drawn(length=512, seed=seed, draws=8, stratified=stratified)
        shares = (got.noisy < 16).double().mean(1)
        return float(shares[0]), float(shares.mean())

    apart, together = ([first_and_mean(seed, s) for seed in range(60)] for s in (False, True))
    means = [torch.tensor([mean for _, mean in runs]).std() for runs in (apart, together)]
    assert means[1] < means[0] / 4
    # Each draw keeps the distribution: that of one place over many batches is as wide as U(0, 1).
    assert torch.tensor([first for first, _ in together]).std() == pytest.approx(12**-0.5, rel=0.25)


@pytest.mark.parametrize(("share", "stratified"), [(0.0, False), (0.0, True), (1.0, False), (1.0, True), (0.5, True)])
def test_the_conditioned_share_is_exact_where_it_can_be(share: float, stratified: bool):
    got = drawn(draws=25, self_conditioning=share, stratified=stratified)
    assert len(got.conditioned) == share * 100
    assert len(got.conditioned.unique()) == len(got.conditioned)
    assert ((got.conditioned >= 0) & (got.conditioned < 100)).all()


def test_the_conditioned_share_is_right_on_average():
    got = drawn(draws=1000, self_conditioning=0.3)
    assert len(got.conditioned) / 4000 == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 4000))


def test_a_draw_is_a_function_of_its_generator():
    one, same, other = drawn(seed=1, draws=5), drawn(seed=1, draws=5), drawn(seed=2, draws=5)
    names = [name for name, value in vars(one).items() if value is not None]
    assert len(names) == 4
    assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in names)
    assert not torch.equal(one.noisy, other.noisy)


# ---------------------------------------------------------------------------------------------------------------- rows


@torch.no_grad()
def test_eos_fill_is_trained_by_both_losses(network: Network):
    rows = TrainingBatch(torch.tensor([[7, 8, 9, 5, 6, EOS, EOS, EOS, EOS]]), torch.tensor([3]), torch.tensor([1]))
    drawn = controlled(rows, network.config, [0], [])
    assert drawn.clean[0].tolist() == [5, 6, EOS, EOS, EOS, EOS]
    logits = F.log_softmax(network.logits(network.denoise(drawn.noisy, prefix(network, rows, 3), None)), -1)
    each = -logits[0].gather(1, drawn.clean[0][:, None])
    got = losses(network, rows, drawn, Objective())
    assert got.canvas.item() == pytest.approx(each.mean().item(), rel=1e-5)
    # One more eos as the target of the last position: a sixth of the difference, as for any other position.
    other = drawn.clean.clone()
    other[0, 5] = 4
    moved = losses(network, rows, replace(drawn, clean=other), Objective())
    assert (moved.canvas - got.canvas).item() == pytest.approx(float(logits[0, 5, EOS] - logits[0, 5, 4]) / 6, rel=1e-3)


def prefix(network: Network, rows: TrainingBatch, length: int):  # type: ignore[no-untyped-def]
    return network.read(rows.tokens[:, :length], network.empty_cache(1))[1]


# ------------------------------------------------------------------------------------------------------------ learning

STEPS = 220


@pytest.mark.parametrize("conditioned", [0.0, 1.0])
@torch.no_grad()
def test_an_untrained_network_has_the_loss_of_guessing(small: ModelConfig, conditioned: float):
    network = Network(small)
    initialise(network, 0)
    network.norm.weight.fill_(1e-3)
    rows = clean_rows(small, SHAPES)
    options = Objective(draws=4, time_range=(0.99, 1.0), self_conditioning=conditioned)
    loss = losses(network, rows, draw_batch(rows, 6, 16, options, generator()), options)
    assert loss.canvas.item() == pytest.approx(math.log(16), abs=1e-3)
    assert loss.causal.item() == pytest.approx(math.log(16), abs=1e-3)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_four_rows_are_memorised(small: ModelConfig):
    """Both parts fall to almost nothing: the first token tells the row, so all that follows can be known."""
    network = Network(small)
    initialise(network, 1)
    rows = clean_rows(small, [(3, 1)] * 4, seed=5)
    rows.tokens[:, 0] = torch.arange(4)
    config = OptimizerConfig(rate=2e-2, warmup=10, decay=0.5)
    optimizers, options = build_optimizers(network, config), Objective(stratified=True)
    for step in range(STEPS):
        set_rates(optimizers, config.factor(step, STEPS))
        loss = losses(network, rows, draw_batch(rows, 6, 16, options, generator(step)), options)
        (loss.canvas + loss.causal).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    many = Objective(draws=20, stratified=True)
    with torch.no_grad():
        learnt = losses(network, rows, draw_batch(rows, 6, 16, many, generator(99)), many)
    assert learnt.canvas.item() < 0.1
    assert learnt.causal.item() < 0.02
    assert learnt.accuracy.item() > 0.97


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("draws", 0),
        ("time_range", (0.5, 0.5)),
        ("time_range", (-0.1, 0.5)),
        ("time_range", (0.1, 1.1)),
        ("self_conditioning", 1.5),
        ("self_conditioning", math.nan),
        ("causal_weight", -1.0),
    ],
)
def test_a_bad_objective_is_refused_by_name(field: str, value: object):
    with pytest.raises(ConfigError, match=field) as caught:
        Objective(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in caught.value.message


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5))
def test_lengths_are_prompt_and_whole_canvases(prompt: int, canvases: int):
    rows = TrainingBatch(torch.zeros(1, 40, dtype=torch.long), torch.tensor([prompt]), torch.tensor([canvases]))
    assert rows.lengths(6).tolist() == [prompt + 6 * canvases]
