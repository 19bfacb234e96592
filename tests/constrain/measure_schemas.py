"""Schemas through `generate`: which compile, how long that takes, and whether every answer is valid.

A network of random weights and tiny dimensions, and the published tokenizer of 262,144 pieces. The figures are in
docs/log.md.

Run it:  python -m tests.constrain.measure_schemas --count 500        --files 'DIRECTORY/**/*.json' for schemas of yours
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import torch

from blockpress.config import PRESETS, GenerationConfig, Sampling
from blockpress.errors import RequestError
from blockpress.hardware import machine
from blockpress.lm import LM
from blockpress.text import Tokenizer
from tests.conftest import GEMMA, make_random_network
from tests.constrain.given_schemas import SCHEMAS, random_schema, validator


def schemas(count: int, files: str | None) -> Iterator[tuple[str, Any]]:
    """The given schemas, then random ones; or those of some files."""
    if files is not None:
        for path in sorted(glob(files, recursive=True))[:count]:
            yield path, json.loads(Path(path).read_text("utf-8"))
        return
    yield from ((f"line {number + 1}", schema) for number, schema in enumerate(SCHEMAS[:count]))
    yield from ((f"seed {seed}", random_schema(random.Random(seed))) for seed in range(count - len(SCHEMAS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    config = replace(PRESETS["tiny"](), vocab_size=262_144, canvas_length=32, context_length=1024)
    lm = LM(
        path=Path(),
        network=make_random_network(config),
        generation=GenerationConfig(stop_ids=(1, 106)),
        tokenizer=Tokenizer.from_directory(GEMMA),
    )
    sampling = replace(Sampling(), steps=2)
    outcomes: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    seconds: list[float] = []
    for number, (name, schema) in enumerate(schemas(options.count, options.files)):
        if number and number % 25 == 0:
            print(number, dict(outcomes), flush=True)
        started = time.process_time()
        try:
            lm.build_requests("a", options.tokens, schema=schema)
        except RequestError as error:
            keyword = re.search(r"schema #\S*/([^/ ]+) ", error.message)
            outcomes["refused"] += 1
            refused[keyword[1] if keyword else re.sub(r"[0-9{'\"].*", "...", error.message)] += 1
            continue
        finally:
            seconds.append(time.process_time() - started)
        reply = lm.generate("a", options.tokens, schema=schema, sampling=sampling, seed=len(seconds))
        if reply.invalid is not None:
            outcomes["cut, and told"] += 1
            continue
        try:
            problems = [error.message for error in validator(schema).iter_errors(json.loads(reply.text or ""))]
        except RecursionError:
            outcomes["not judged: jsonschema follows # for ever"] += 1
            continue
        outcomes["INVALID" if problems else "valid"] += 1
        if problems:
            print(f"INVALID {name}: {reply.text!r:.200} {problems[0]:.200}", flush=True)
    print(dict(outcomes), dict(refused))
    tenths = statistics.quantiles(seconds, n=10)
    print(
        f"compiling: {tenths[4]:.2f} s in the middle, {tenths[8]:.2f} s for nine of ten, {max(seconds):.1f} s at most"
    )


if __name__ == "__main__":
    main()
