"""Random allowed texts, for tests: a walk through an automaton that ends."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from blockpress.constrain.automaton import Automaton


def random_text(automaton: Automaton, rng: random.Random, most: int = 60) -> str:
    """An allowed text; from `most` bytes on it takes the shortest way to an end."""
    return random_bytes(automaton, rng, most).decode()


def random_bytes(automaton: Automaton, rng: random.Random, most: int = 60) -> bytes:
    """The same as bytes, for texts with letters of control tokens in them."""
    distance = distances(automaton)
    state, text = 0, bytearray()
    most = rng.randint(0, most)
    while True:
        following = {byte: to for low, high, to in automaton.moves(state) for byte in range(low, high + 1)}
        if automaton.accepting[state] and (not following or len(text) >= most or rng.random() < 0.1):
            return bytes(text)
        if len(text) >= most:
            following = {byte: to for byte, to in following.items() if distance[to] == distance[state] - 1}
        byte = rng.choice(list(following))
        text.append(byte)
        state = following[byte]


@lru_cache(maxsize=4)
def distances(automaton: Automaton) -> np.ndarray:
    """The fewest bytes from each state to an accepting one."""
    table = automaton.table
    table = table[:, np.append(True, (table[:, 1:] != table[:, :-1]).any(0))]  # of columns that are alike, one
    distance, before = np.where(automaton.accepting, 0, len(automaton)), None
    while before is None or (distance != before).any():
        before = distance
        distance = np.minimum(distance, np.append(distance, len(automaton))[table].min(1) + 1)
    return distance
