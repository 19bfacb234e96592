"""Fixtures of the operations' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
