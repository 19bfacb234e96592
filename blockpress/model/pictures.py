"""Pictures among the tokens of a prompt: their features replace embedding rows.

Invariant: every feature replaces exactly one token that is not padding, and no two pictures share a token.

Run it:  python -m pytest tests/model/test_pictures.py
Source: `DiffusionGemmaEncoderModel.forward` (`masked_scatter`), `get_block_sequence_ids_for_mask`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blockpress.errors import MediaError
from blockpress.shapes import Hidden

Images = Sequence[Mapping[int, Float[Tensor, "_soft _hidden"]]]
"""For each row: the index of a picture's first soft token, and the features of all its soft tokens."""


def insert_images(
    x: Hidden, counts: Int[Tensor, " batch"], images: Images
) -> tuple[Hidden, Int[Tensor, "batch length"]]:
    """x with the pictures' features inserted, and the number of each token's picture, -1 for text.

    Features are not scaled by sqrt(hidden) as embedding rows are; they are rounded to x's type.

    Raises:
        MediaError: a wrong number of rows, features of the wrong size, or a picture that does not fit its row.
    """
    if len(images) != len(x):
        raise MediaError(
            f"images has {len(images)} rows, the batch {len(x)}", hint="give a mapping for each row, {} without images"
        )
    x = x.clone()
    picture_ids = torch.full(x.shape[:2], -1, dtype=torch.long, device=x.device)
    for row, (pictures, count) in enumerate(zip(images, counts.tolist(), strict=True)):
        next_free = 0
        for number, (start, features) in enumerate(sorted(pictures.items())):
            stop = start + len(features)
            fits = features.ndim == 2 and features.shape[1] == x.shape[2]
            if not fits or not next_free <= start < stop <= count:
                raise MediaError(
                    f"the features {list(features.shape)} at token {start} of row {row} do not fit there",
                    hint=f"give [soft tokens, {x.shape[2]}] that end by token {count} and before the next picture",
                )
            x[row, start:stop] = features.to(x)
            picture_ids[row, start:stop], next_free = number, stop
    return x, picture_ids
