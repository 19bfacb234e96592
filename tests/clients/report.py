"""A line for each feature: it works, or what went wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

CHATTY, NANO, RANDOM = os.environ["CHATTY"], os.environ["NANO"], os.environ["RANDOM"]
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
AB = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def equal(found: Any, wanted: Any) -> None:
    if found != wanted:
        raise AssertionError(f"{found!r:.150} is not {wanted!r:.150}")


def solved(text: str) -> None:
    equal(len("".join(text.split())), 81)


def feature(name: str) -> Callable[[Callable[[], None]], None]:
    """Run what it decorates, and report how it went."""

    def run(check: Callable[[], None]) -> None:
        try:
            check()
            result = "yes"
        except Exception as error:
            result = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        print(json.dumps({"feature": name, "result": result}), flush=True)

    return run
