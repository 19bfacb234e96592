"""Gemma 4 against `transformers`: checkpoints that it saved, read by us, and what both write token by token.

A figure is the norm of the difference over the norm of `transformers`' tensor; the limit is 1e-5, or 4 times the
distance between the oracle's own eager and SDPA runs, if larger. Rows of ours run together in one ragged batch and are
read in two parts, the oracle's alone and whole.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma4Config, Gemma4TextConfig

from blockpress import costs
from blockpress.checkpoints import load_config, load_network
from blockpress.checkpoints.names import our_name, published_name
from blockpress.config import LayerConfig, ModelConfig
from blockpress.decoding import Done, SequenceState
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import pad
from blockpress.errors import ConfigError, RequestError
from blockpress.model import Network

from . import siblings
from .conftest import Report
from .oracle import distance
from .siblings import CASES, TINY, Theirs, checkpoint, prompts

pytestmark = pytest.mark.parity

LIMIT, TOKENS = 1e-5, 8
cases = pytest.mark.parametrize("name", CASES)


def their_logits(theirs: Theirs, rows: list[list[int]], attention: str) -> list[Tensor]:
    theirs.set_attn_implementation(attention)
    return [theirs(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]


def our_logits(network: Network, rows: list[list[int]]) -> list[Tensor]:
    """In one ragged batch, each row in two parts."""
    halves = [[row[: (len(row) + 1) // 2] for row in rows], [row[(len(row) + 1) // 2 :] for row in rows]]
    cache, parts = network.empty_cache(len(rows)), []
    for half in halves:
        padded, counts = pad(network, half)
        hidden, cache = network.read(padded, cache, counts)
        logits = network.logits(hidden)
        parts.append([logits[i, :count] for i, count in enumerate(counts.tolist())])
    return [torch.cat(pair) for pair in zip(*parts, strict=True)]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(distance(a[None], b[None]) for a, b in zip(ours, theirs, strict=True))


@cases
def test_logits_of_a_checkpoint_that_transformers_saved(name: str, workspace: Path, report: Report) -> None:
    theirs, directory = checkpoint(name, workspace)
    rows = prompts(CASES[name])
    eager, sdpa = their_logits(theirs, rows, "eager"), their_logits(theirs, rows, "sdpa")
    limit = max(LIMIT, 4 * worst(sdpa, eager))
    measured = worst(our_logits(load_network(directory), rows), eager)
    report("gemma4, logits", measured, limit)
    assert measured <= limit
    assert max(len(row) for row in rows) > CASES[name].config.sliding_window


def test_placeholders_are_embedded_as_the_reference_embeds_them(report: Report) -> None:
    """As the pad token where the reference has towers, as themselves where it is the text part alone."""
    row = [9, 15, 15, 7, 11, 12, 15, 3, 0]
    for family in ("gemma4", "gemma4_text"):
        config = replace(TINY, family=family, image_id=15 if family == "gemma4" else None)
        config = replace(config, source={"video_token_id": 11, "audio_token_id": 12})
        theirs = siblings.build(config)
        network = Network(config).eval().requires_grad_(False)
        state = {our_name(name, config.family): tensor for name, tensor in theirs.state_dict().items()}
        network.load_state_dict({name: state[name] for name in network.state_dict()})
        measured = worst(our_logits(network, [row]), their_logits(theirs, [row], "eager"))
        report("gemma4, logits", measured, LIMIT)
        assert measured <= LIMIT
        plain = our_logits(network, [[0 if token in (15, 11, 12) else token for token in row]])
        assert torch.equal(plain[0], our_logits(network, [row])[0]) == (family == "gemma4")


@cases
def test_greedy_tokens_are_those_of_generate(name: str, workspace: Path) -> None:
    theirs, directory = checkpoint(name, workspace)
    theirs.set_attn_implementation("eager")
    rows = prompts(CASES[name], seed=1)
    free = [their_answer(theirs, row, None) for row in rows]
    assert our_answers(directory, rows, ()) == free
    stop = free[1][3]
    stopped = [their_answer(theirs, row, stop) for row in rows]
    assert our_answers(directory, rows, (stop,)) == stopped
    assert len(stopped[1]) <= 4 and all(len(answer) == TOKENS for answer in free)


def their_answer(theirs: Theirs, prompt: list[int], stop: int | None) -> list[int]:
    tokens = torch.tensor([prompt])
    config = theirs.generation_config
    config.eos_token_id, config.pad_token_id = stop, 0
    mask = torch.ones_like(tokens)
    return theirs.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS)[
        0, len(prompt) :
    ].tolist()


def our_answers(directory: Path, rows: list[list[int]], stop_ids: tuple[int, ...]) -> list[list[int]]:
    limits = {"canvas_length": 1, "room": 64, "max_tokens": TOKENS}
    made = [SequenceState(index, row, 0, stop_ids=stop_ids, **limits) for index, row in enumerate(rows)]
    done = {
        e.row: e.reply.tokens for e in generate_autoregressive(load_network(directory), made) if isinstance(e, Done)
    }
    return [done[index] for index in range(len(rows))]


@cases
def test_configurations_are_read_alike(name: str, workspace: Path) -> None:
    config = CASES[name].config
    _, directory = checkpoint(name, workspace)
    read = load_config(directory)
    assert replace(read, vision=None) == config
    assert (read.vision is not None) == CASES[name].vision
    written = json.loads(json.dumps(read.to_dict()))
    assert ModelConfig.from_dict(written) == read
    again = (Gemma4TextConfig if config.family == "gemma4_text" else Gemma4Config).from_dict(written)
    text = again.get_text_config()
    assert (text.attention_k_eq_v, text.enable_moe_block) == (config.keys_are_values, config.num_experts > 0)
    sizes = [
        LayerConfig(
            kind=k, head_dim=text.per_layer_config[i].head_dim, kv_heads=text.per_layer_config[i].num_key_value_heads
        )
        for i, k in enumerate(text.layer_types)
    ]
    assert tuple(sizes) == config.layers


@cases
def test_every_tensor_name_round_trips(name: str, workspace: Path) -> None:
    """The names that we would write are those that `transformers` wrote, and each is read back as what it is."""
    config = CASES[name].config
    stored = {n for n in load_file(checkpoint(name, workspace)[1] / "model.safetensors") if "vision" not in n}
    with torch.device("meta"):
        network = Network(config)
    assert sum(costs.parameters(config).values()) == sum(tensor.numel() for tensor in network.parameters())
    ours = list(network.state_dict())
    assert {published_name(n, config.family) for n in ours} == stored
    assert [our_name(published_name(n, config.family), config.family) for n in ours] == ours
    assert [our_name(published_name(n, config.family)) for n in ours] == ours


def test_a_head_that_is_stored_as_well_must_be_the_embedding(workspace: Path, tmp_path: Path) -> None:
    _, directory = checkpoint("dense, keys are values", workspace)
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    head = tensors["model.language_model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    assert torch.equal(load_network(tmp_path).embed_tokens.weight, head)
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="differs from") as caught:
        load_network(tmp_path)
    assert type(caught.value).__name__ == "UnexpectedWeights"


MUTANTS: dict[str, dict[str, Any]] = {
    "the window one token longer": {"sliding_window": 9},
    "the window one token shorter": {"sliding_window": 7},
    "one expert fewer": {"top_k_experts": 1},
    "another softcap": {"softcap": 31.0},
    "no softcap": {"softcap": None},
    "another RoPE theta": {"full_rope": replace(TINY.full_rope, theta=9e5)},
    "another eps": {"rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_network_is_found(mutant: str, workspace: Path, report: Report) -> None:
    theirs, directory = checkpoint("experts, keys are values", workspace)
    rows = prompts(CASES["experts, keys are values"])
    config = replace(load_config(directory), **MUTANTS[mutant])
    measured = worst(our_logits(load_network(directory, config=config), rows), their_logits(theirs, rows, "eager"))
    report("gemma4, a wrong network: 100 limits over its distance", 100 * LIMIT / measured, 1.0)
    assert measured >= 100 * LIMIT


def test_the_softcap_of_bfloat16_is_rounded_as_theirs(workspace: Path) -> None:
    """Gemma 4 caps in the weight's dtype; in float32 every second logit would differ."""
    theirs, directory = checkpoint("experts, keys are values", workspace)
    network = load_network(directory, dtype="bfloat16")
    hidden = (4 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    product = torch.nn.functional.linear(hidden, theirs.lm_head.weight.bfloat16())
    cap = theirs.config.get_text_config().final_logit_softcapping
    assert torch.equal(network.logits(hidden), (torch.tanh(product / cap) * cap).float())
    assert not torch.equal(network.logits(hidden), torch.tanh(product.float() / cap) * cap)


def test_gemma4_has_no_canvas(workspace: Path) -> None:
    network = load_network(checkpoint("experts, keys are values", workspace)[1])
    with pytest.raises(RequestError, match="gemma4 has no canvas") as caught:
        network.denoise(torch.zeros(1, 4, dtype=torch.long), network.empty_cache(1), None)
    assert "autoregressive" in caught.value.hint


# ------------------------------------------------------------------------------------------------------ small sizes

REFUSED = {
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "use_bidirectional_attention": "all",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("family", ["gemma4", "gemma4_text"])
def test_unsupported_features_are_refused_by_name(family: Any, key: str) -> None:
    data = replace(TINY, family=family).to_dict()
    (data if family == "gemma4_text" else data["text_config"])[key] = REFUSED[key]
    with pytest.raises(ConfigError, match=key) as caught:
        ModelConfig.from_dict(data)
    assert "must be" in caught.value.hint and "(" in caught.value.hint


@pytest.mark.parametrize("cls", [Gemma4Config, Gemma4TextConfig])
def test_the_references_own_defaults_are_refused_for_their_per_layer_inputs(cls: Any) -> None:
    """A field that is left out has the reference's value: 256 here, not 0."""
    data = (cls(text_config={}) if cls is Gemma4Config else cls()).to_dict()
    text = data["text_config"] if cls is Gemma4Config else data
    with pytest.raises(ConfigError, match="hidden_size_per_layer_input is 256"):
        ModelConfig.from_dict(data)
    del text["hidden_size_per_layer_input"]
    with pytest.raises(ConfigError, match="hidden_size_per_layer_input is 256"):
        ModelConfig.from_dict(data)
    text["hidden_size_per_layer_input"] = 0
    dense = ModelConfig.from_dict(data)
    assert (dense.num_experts, dense.keys_are_values, dense.softcap) == (0, False, None)
