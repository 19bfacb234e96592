"""What schemathesis does before and after each call: bodies that a model can answer, and counts of what came back.

Run by `tests.clients.fuzz` inside of schemathesis; COUNTS names the file that gets the counts.
"""

from __future__ import annotations

import atexit
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis

MOST = {"n": 2, "max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8, "n_predict": 8, "num_predict": 8}
"""What a client may ask for, but 5,000 requests on one core should not."""
TEXTS = ("prompt", "input_prefix", "input_suffix", "suffix")
counts: Counter[str] = Counter()


def cap(body: Any) -> None:
    """Hold what a body asks for within what is quick, in place; what is not valid stays as it is."""
    if isinstance(body, list):
        for part in body:
            cap(part)
    if not isinstance(body, dict):
        return
    for name, value in body.items():
        if type(value) is int and value > MOST.get(name, value):
            body[name] = MOST[name]
        elif name in ("diffusion", "vllm_xargs", "options"):
            cap(value)
    for name in ("steps", "diffusion_max_steps", "max_denoising_steps"):
        if type(body.get(name)) is int and body[name] > 2:
            body[name] = 2


def answerable(body: dict[str, Any]) -> None:
    """Texts that a model of digits can read, and the model that is here: else each answer is 404 or 400."""
    body.pop("model", None)
    for name in TEXTS:
        if isinstance(body.get(name), str):
            body[name] = "12"
    if "prompt" in body:
        body["prompt"] = "12"
    if "messages" in body:
        body["messages"] = [{"role": "user", "content": "12"}]
    if "input" in body:
        body["input"] = "12"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Cap every body, and make each second valid one answerable: else nearly all are refused for model or text."""
    cap(case.body)
    if isinstance(case.body, dict):
        case.body.setdefault("diffusion", {"steps": 1})
        if case.operation.path == "/infill":
            case.body.setdefault("n_predict", 4)
    valid = case.meta is None or case.meta.generation.mode.value == "positive"
    if valid and isinstance(case.body, dict) and zlib.crc32(repr(case.body).encode()) % 2:
        answerable(case.body)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Count an answer by its route and its status."""
    counts[f"{case.operation.label} {response.status_code}"] += 1


@atexit.register
def written() -> None:
    if "COUNTS" in os.environ and counts:
        Path(os.environ["COUNTS"]).write_text(json.dumps(counts), encoding="utf-8")
