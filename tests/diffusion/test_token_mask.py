"""Banned ids: never the argmax, never drawn, and no other logit is touched."""

from __future__ import annotations

import torch

from blockpress.diffusion import TokenMask
from blockpress.ops import vocabulary


def test_banned_ids_are_never_chosen_and_others_are_unchanged():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    edits = TokenMask.of([{0: {0}}, {}, {2: range(99), 6: (1, 4)}], 5)
    assert edits is not None
    rows = torch.tensor([2, 1])  # row 0 has settled
    edited = edits(rows, logits[1:])
    banned = torch.zeros(2, 5, 7, dtype=torch.bool)
    banned[0, :, 2] = banned[0, [1, 4], 6] = True
    assert torch.equal(edited.isneginf(), banned)
    assert torch.equal(edited[~banned], logits[1:][~banned])
    for u in (0.0, 0.3, 0.999999):
        drawn = vocabulary.sample(edited, torch.full((2, 5), u, dtype=torch.float64))
        assert not banned.gather(-1, drawn[..., None]).any()
    assert vocabulary.entropy(edited).isfinite().all()


def test_an_empty_mask_is_none():
    assert TokenMask.of([{}, {}], 4) is None
