"""Schemas and regular expressions through `generate`: which compile, how long that takes, and whether answers are valid.

A network of random weights and tiny dimensions, and the published tokenizer of 262,144 pieces. The figures are in
docs/log.md.

Run it:  python -m tests.constrain.measure_schemas --count 500        --files 'DIRECTORY/**/*.json' for schemas of yours
         python -m tests.constrain.measure_schemas --regex --count 200
         python -m tests.constrain.measure_schemas --walk --files '...'        random texts of the automata, no network
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
from blockpress.constrain.automaton import _NothingMatches
from blockpress.constrain.schema import schema_automaton
from blockpress.errors import RequestError
from blockpress.hardware import machine
from blockpress.lm import LM
from blockpress.text import Tokenizer
from tests.conftest import GEMMA, make_random_network
from tests.constrain.given_schemas import SCHEMAS, random_schema, validator
from tests.constrain.regex_cases import CASES
from tests.constrain.walks import random_text


def constraints(count: int, files: str | None, regex: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The given schemas, then random ones; or those of some files; or the regular expressions of the tests."""
    if regex:
        yield from ((case, {"regex": case}) for case in CASES[:count])
    elif files is not None:
        for path in sorted(glob(files, recursive=True))[:count]:
            yield path, {"schema": json.loads(Path(path).read_text("utf-8"))}
    else:
        yield from ((f"line {number + 1}", {"schema": schema}) for number, schema in enumerate(SCHEMAS[:count]))
        for seed in range(count - len(SCHEMAS)):
            yield f"seed {seed}", {"schema": random_schema(random.Random(seed))}


def problems(text: str, regex: str | None = None, schema: Any = None) -> list[str]:
    """What is wrong with an answer. Raises RecursionError: jsonschema follows a reference for ever."""
    if regex is not None:
        return [] if re.fullmatch(regex, text) else ["re does not match it"]
    return [error.message for error in validator(schema).iter_errors(json.loads(text))]


def walk(name: str, schema: Any) -> str:
    """What becomes of a schema, judged by six random texts of its automaton."""
    try:
        automaton = schema_automaton(schema)
    except RequestError as error:
        return "refused: a reference to another file" if "not part of" in error.message else "refused"
    except _NothingMatches:
        return "allows nothing"
    for seed in range(6):
        text = random_text(automaton, random.Random(seed), 200)
        try:
            found = problems(text, schema=schema)
        except RecursionError:
            return "not judged: jsonschema follows # for ever"
        if found:
            print(f"INVALID {name}: {text!r:.200} {found[0]:.200}", flush=True)
            return "INVALID"
    return "valid"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--files")
    parser.add_argument("--regex", action="store_true")
    parser.add_argument("--walk", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if options.walk:
        print(Counter(walk(name, each["schema"]) for name, each in constraints(options.count, options.files, False)))
        return
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
    for number, (name, constraint) in enumerate(constraints(options.count, options.files, options.regex)):
        if number and number % 25 == 0:
            print(number, dict(outcomes), flush=True)
        started = time.process_time()
        try:
            lm.build_requests("a", options.tokens, **constraint)
        except RequestError as error:
            keyword = re.search(r"schema #\S*/([^/ ]+) ", error.message)
            outcomes["refused"] += 1
            refused[keyword[1] if keyword else re.sub(r"[0-9{'\"].*", "...", error.message)] += 1
            continue
        finally:
            seconds.append(time.process_time() - started)
        reply = lm.generate("a", options.tokens, sampling=sampling, seed=len(seconds), **constraint)
        if reply.invalid is not None:
            outcomes["cut, and told"] += 1
            continue
        try:
            found = problems(reply.text or "", **constraint)
        except RecursionError:
            outcomes["not judged: jsonschema follows # for ever"] += 1
            continue
        outcomes["INVALID" if found else "valid"] += 1
        if found:
            print(f"INVALID {name}: {reply.text!r:.200} {found[0]:.200}", flush=True)
    print(dict(outcomes), dict(refused))
    tenths = statistics.quantiles(seconds, n=10)
    print(
        f"compiling: {tenths[4]:.2f} s in the middle, {tenths[8]:.2f} s for nine of ten, {max(seconds):.1f} s at most"
    )


if __name__ == "__main__":
    main()
