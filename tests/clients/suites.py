"""Suites that others wrote, against `blockpress serve` and a random chat checkpoint: what they find.

    make suites        (or: python -m tests.clients.suites [fuzz] [lm-eval] [jevbench] [guidellm])

| suite | what it shows |
|---|---|
| fuzz | schemathesis over /openapi.json: no 5xx, errors as declared, wrong bodies refused; at least 5,000 requests |
| lm-eval | local-completions with log-likelihoods and texts, and local-chat-completions, on puzzles of the shipped model |
| jevbench | its examples by /v1/systemone: no request fails (a random model has no coherence to score) |
| guidellm | a load of streams by chat completions and by completions: none fails, and each is counted to the token |

Environments are made once, under build/clients, from PyPI; guidellm's has our torch. Nothing else is fetched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import blockpress
from blockpress import sudoku
from tests.builders.chats import save_seeing
from tests.builders.server import serving
from tests.clients.run import BUILD, HERE, python_of, shipped

LEAST = 5000
"""Requests of the fuzz."""
COMMON = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{puzzle}}}}"
"""
SCORED = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITTEN = """output_type: generate_until
doc_to_target: "{{solution}}"
generation_kwargs: {until: ["x"], max_gen_toks: 90, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def command(
    name: str, package: str, *arguments: str, where: Path = BUILD, shared: bool = False, **environment: str
) -> str:
    """What a suite's command prints; it runs in an environment of its own, `shared` as in `python_of`."""
    python = python_of(name, package, shared=shared)
    done = subprocess.run(
        [str(python.parent / arguments[0]), *arguments[1:]],
        cwd=where,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
    )
    return done.stdout


def fuzz() -> list[str]:
    """schemathesis: what it finds wrong."""
    file, report = BUILD / "fuzz-counts.json", BUILD / "fuzz.ndjson"
    file.unlink(missing_ok=True)
    checks = "not_a_server_error,response_schema_conformance,negative_data_rejection"
    with shipped() as url:
        said = command(
            "schemathesis",
            "schemathesis",
            *("schemathesis", "run", f"{url}/openapi.json", "--checks", checks, "--continue-on-failure", "--no-shrink"),
            *("--max-examples", "150", "--phases", "coverage,fuzzing", "--request-timeout", "60", "--seed", "1"),
            *("--suppress-health-check", "all", "--report", "ndjson", "--report-ndjson-path", str(report)),
            SCHEMATHESIS_HOOKS="fuzz_hooks",
            PYTHONPATH=str(HERE),
            COUNTS=str(file),
        )
    if not file.exists():
        return [said[-2000:]]
    counts = json.loads(file.read_text())
    statuses = Counter[str]()
    for each, count in counts.items():
        statuses[each.rpartition(" ")[2]] += count
    print(f"fuzz: {sum(counts.values())} requests, by status {dict(sorted(statuses.items()))}")
    faults = Counter[str]()
    for line in report.read_text().splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for checked in recorder.get("checks", {}).values():
            faults.update(f"{recorder['label']}: {each['name']}" for each in checked if each["status"] == "failure")
    wrong = [f"fuzz: {fault}, {count} times" for fault, count in faults.items()]
    return wrong + ([] if sum(counts.values()) >= LEAST else [f"fuzz: fewer than {LEAST} requests"])


def lm_eval() -> list[str]:
    """lm-eval with a stock configuration: the shipped model must score and write its puzzles without a fault."""
    folder = BUILD / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(6):
        made = sudoku.generate_puzzle(seed=seed, givens=45)
        puzzle, solution = sudoku.layout(made.puzzle), sudoku.layout(made.solution)
        choices = [solution[:9], solution[1:9] + solution[0]]
        lines.append(json.dumps({"puzzle": puzzle, "solution": solution, "choices": choices, "answer": 0}))
    (folder / "puzzles.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, rest in (("scored", SCORED), ("written", WRITTEN)):
        text = COMMON.format(name=f"puzzles_{name}", file=folder / "puzzles.jsonl") + rest
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    wrong = []
    with shipped() as url:
        api = f"model=sudoku-nano,base_url={url}/v1"
        for kind, given, task in (
            ("local-completions", f"{api}/completions,tokenizer_backend=remote,max_length=256", "scored"),
            # As text: lm-eval's token ids have no <bos>, without which the model was never trained.
            ("local-completions", f"{api}/completions,tokenizer_backend=None,tokenized_requests=False", "written"),
            ("local-chat-completions", f"{api}/chat/completions", "written"),
        ):
            chat = ["--apply_chat_template"] if "chat" in kind else []
            asked = ["lm_eval", "run", "--model", kind, "--model_args", given, "--include_path", str(folder)]
            said = command("lm-eval", "lm-eval[api]", *asked, "--tasks", f"puzzles_{task}", *chat, **OFFLINE)
            rows = [line.replace(" ", "") for line in said.splitlines() if line.startswith("|puzzles")]
            print(*(f"lm-eval {kind}: {row}" for row in rows), sep="\n")
            if len(rows) != 1 or "|1|±|" not in rows[0]:
                wrong.append(f"lm-eval {kind}: {said[-2000:]}")
    return wrong


def jevbench() -> list[str]:
    """jevbench's examples: every request must be answered."""
    report, model = BUILD / "jevbench.json", BUILD / "random"
    report.unlink(missing_ok=True)
    save_seeing(model, context_length=16384)
    with serving(blockpress.load(model), "random") as served:
        asked = ["jevbench", "eval", "--url", f"{served.url}/v1/systemone", "--model", "random", "--suite", "examples"]
        said = command("jevbench", "jevbench", *asked, "--no-cache", "--out", str(report))
    print(*(f"jevbench: {line}" for line in said.splitlines()[:6]), sep="\n")
    if not report.exists():
        return [f"jevbench: {said[-2000:]}"]
    result = json.loads(report.read_text())["result"]
    print(f"jevbench: {result['requests']} requests, {len(result['errors'])} errors")
    return [f"jevbench: {error}" for error in result["errors"] if "has no token" not in str(error)]  # it spells ASCII


def guidellm() -> list[str]:
    """guidellm: every stream of two APIs must end, with the tokens that its server has counted."""
    puzzles, report, wrong = BUILD / "prompts.jsonl", BUILD / "guidellm.json", list[str]()
    grids = [sudoku.layout(sudoku.generate_puzzle(seed=seed, givens=45).puzzle) for seed in range(24)]
    puzzles.write_text("\n".join(json.dumps({"prompt": grid}) for grid in grids), encoding="utf-8")
    with shipped() as url:
        for path, length in (("/v1/chat/completions", 90), ("/v1/completions", 16)):  # without max_tokens
            report.unlink(missing_ok=True)
            said = command(
                "guidellm",
                "guidellm",
                *("guidellm", "run", "--profile", "kind=concurrent,streams=4"),
                *("--backend", f"kind=openai_http,target={url},model=sudoku-nano,request_format={path}"),
                *(
                    "--constraint",
                    f"kind=max_requests,count={len(grids)}",
                    "--data",
                    f"kind=json_file,path={puzzles}",
                ),
                *("--output", f"kind=json,path={report}", "--disable-console-interactive"),
                shared=True,
                **OFFLINE,
            )
            if not report.exists():
                return [f"guidellm: {said[-2000:]}"]
            [benchmark] = json.loads(report.read_text())["benchmarks"]
            totals, done = benchmark["metrics"]["request_totals"], benchmark["requests"]["successful"]
            print(f"guidellm {path}: {totals}")
            tokens = Counter((each["prompt_tokens"], each["output_tokens"]) for each in done)
            if tokens != {(90, length): len(grids)}:
                wrong.append(f"guidellm {path}: {totals}, tokens of prompts and answers {tokens}")
    return wrong


SUITES: dict[str, Callable[[], list[str]]] = {
    "fuzz": fuzz,
    "lm-eval": lm_eval,
    "jevbench": jevbench,
    "guidellm": guidellm,
}


def main() -> int:
    """Run the suites that are named, or all; the status is 1 if one finds something wrong."""
    torch.set_num_threads(1)
    BUILD.mkdir(parents=True, exist_ok=True)
    wrong = [line for name in sys.argv[1:] or SUITES for line in SUITES[name]()]
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
