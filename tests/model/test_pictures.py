"""Features in the places of embedding rows, and what is refused there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blockpress.config import ModelConfig
from blockpress.errors import MediaError, RequestError
from blockpress.model.pictures import insert_images
from tests.conftest import RandomNetwork

X = torch.zeros(2, 6, 3)
COUNTS = torch.tensor([6, 4])


def test_every_feature_is_placed() -> None:
    first, second = torch.arange(1.0, 7).view(2, 3), torch.full((1, 3), 9.0)
    x, runs = insert_images(X, COUNTS, [{4: second, 1: first}, {}])
    assert x[0, :, 0].tolist() == [0, 1, 4, 0, 9, 0]
    assert runs.tolist() == [[-1, 0, 0, -1, 1, -1], [-1] * 6]
    assert not x[1].any() and not X.any()


def test_features_are_rounded_to_the_network_s_type() -> None:
    x, _ = insert_images(X.bfloat16(), COUNTS, [{0: torch.full((1, 3), 1.001)}, {}])
    assert x.dtype == torch.bfloat16
    assert x[0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "images",
    [
        [{}],
        [{0: torch.ones(2, 4)}, {}],
        [{}, {3: torch.ones(2, 3)}],
        [{-1: torch.ones(2, 3)}, {}],
        [{0: torch.ones(0, 3)}, {}],
        [{0: torch.ones(3, 3), 2: torch.ones(1, 3)}, {}],
    ],
    ids=["rows", "features", "padding", "before", "none", "overlap"],
)
def test_features_that_do_not_fit_are_refused(images: list[dict[int, torch.Tensor]]) -> None:
    with pytest.raises(MediaError, match=r"rows|do not fit"):
        insert_images(X, COUNTS, images)


def test_pictures_change_nothing_before_them(random_network: RandomNetwork, tiny: ModelConfig) -> None:
    """No pictures, and a mapping without any, are the same; a picture changes all that sees it and nothing before."""
    network = random_network(tiny)
    tokens = torch.arange(10)[None] % tiny.vocab_size
    with torch.no_grad():
        plain, _ = network.read(tokens, network.empty_cache(1))
        same, _ = network.read(tokens, network.empty_cache(1), None, [{}])
        features = torch.ones(3, tiny.hidden_size)
        seen, _ = network.read(tokens, network.empty_cache(1), None, [{4: features}])
    assert torch.equal(plain, same)
    assert torch.equal(plain[:, :4], seen[:, :4])
    assert all(not torch.equal(plain[0, at], seen[0, at]) for at in range(4, 10))


def test_another_family_reads_no_pictures(random_network: RandomNetwork, tiny: ModelConfig) -> None:
    """Gemma 4 masks them otherwise: not at all on its full layers."""
    network = random_network(replace(tiny, family="gemma4", canvas_length=1))
    with pytest.raises(RequestError, match="family gemma4"):
        network.read(torch.ones(1, 5, dtype=torch.long), network.empty_cache(1), None, [{}])
