"""`blockpress show`: a model's shape, the format of its weights, the memory that it needs, and its sampling.

Invariant: no weights are read. Parameters come from the config, sizes on disk from the headers of the files, memory
from `plan/memory.py`.

Run it:  blockpress show sudoku-nano
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress import costs
from blockpress.cli import options
from blockpress.cli.hub import opened_or_pulled
from blockpress.cli.units import format_bytes, format_count
from blockpress.errors import ModelNotFound, RequestError

if TYPE_CHECKING:
    from blockpress.config import ModelConfig
    from blockpress.plan.memory import Files

CONTEXT = 4096

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A shipped or pulled model, a checkpoint's directory, or a preset such as diffusiongemma-26B-A4B.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="Tokens of context to count memory for. Default: 4096, or the most."),
]


def show(
    model: Model = options.SHIPPED, context: Context = None, json: options.Json = False, yes: options.Yes = False
) -> None:
    """Show what a model is made of and what it takes, without loading its weights.

    A preset is a published shape without files: its parameters and memory follow from its config.

    \b
    Examples:
      blockpress show sudoku-nano
      blockpress show ./my-checkpoint --context 32768 --json
      blockpress show diffusiongemma-26B-A4B
    """
    limit = () if context is None else (context,)
    described = opened_or_pulled(lambda: describe(model, *limit), model, yes)
    if json:
        options.print_json(described)
    else:
        print("\n".join(show_lines(described)))


def describe(model: str, context: int | None = None) -> dict[str, Any]:
    """Everything that `show` prints, as plain values; memory and file sizes in bytes.

    Args:
        context: tokens to count memory for; None: 4096, or the model's own limit where that is less.

    Raises:
        CheckpointError, ConfigError: no such model, or files that cannot be read.
        RequestError: more context than the model has.
    """
    from blockpress.checkpoints import Checkpoint, find_checkpoint
    from blockpress.config import PRESETS, GenerationConfig
    from blockpress.hardware import compute_name
    from blockpress.plan.memory import survey

    options.positive(context, "--context")
    try:
        checkpoint: Checkpoint | None = find_checkpoint(model)
    except ModelNotFound as error:
        if model not in PRESETS:
            presets = ", ".join(sorted(PRESETS))
            raise ModelNotFound(error.message, hint=f"{error.hint}; presets: {presets}") from error
        checkpoint = None
    config = PRESETS[model]() if checkpoint is None else checkpoint.config
    generation = GenerationConfig(stop_ids=config.eos_ids) if checkpoint is None else checkpoint.generation
    kind, files = (None, None) if checkpoint is None else (checkpoint.kind, survey(checkpoint))
    return {
        "model": model,
        "path": None if checkpoint is None else str(checkpoint.path),
        "format": None if kind is None else kind.format,
        "packed_by": None if kind is None else kind.method,
        "tokenizer": None if checkpoint is None else checkpoint.has_tokenizer,
        **_network(config, 0 if files is None else files.vision_parameters),
        "files": None if files is None else asdict(files),
        "stored_in": config.dtype,
        "compute_dtype": compute_name(config.dtype, "cpu"),
        "memory": _memory(config, context, files),
        "sampling": vars(generation.sampling if config.has_canvas else generation.autoregressive),
        "stop_ids": list(generation.stop_ids),
    }


def show_lines(described: dict[str, Any]) -> list[str]:
    """The description as text, a line for each property."""
    rows = [("model", f"{described['model']}   {described['path'] or 'a preset: its config alone'}")]
    rows += [("family", described["family"])]
    files = described["files"]
    if files:
        by = f", packed by {described['packed_by']}" if described["packed_by"] else ""
        packed = f": {', '.join(files['quantised'])}" if files["quantised"] else ""
        rows += [("format", f"{described['format']}{by}{packed}")]
    rows += _shape_rows(described)
    if files:
        types = ", ".join(f"{count} in {name}" for name, count in files["dtypes"].items()) or "no tensors"
        of = "GGUF" if described["packed_by"] == "gguf" else "safetensors"
        rows += [("files", f"{files['count']} of {of}, {format_bytes(files['bytes'])}; tensors: {types}")]
        rows += [("tokenizer", "yes" if described["tokenizer"] else "none: the model takes token ids only")]
    if described["compute_dtype"] != described["stored_in"]:
        computed, stored = described["compute_dtype"], described["stored_in"]
        slower = f"{computed} on this processor, where products in {stored} are slower"
        asked = "int8: layers' products are made of integers, as BLOCKPRESS_COMPUTE_DTYPE asks"
        rows += [("computed in", asked if computed == "int8" else slower)]
    rows += _memory_rows(described["memory"])
    rows += [("sampling", _sampling(described["sampling"]))]
    rows += [("stop ids", ", ".join(map(str, described["stop_ids"])) or "none")]
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:{width}}{value}" for name, value in rows]


def _shape_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    parts, layers = described["parameters"], described["layers"]
    rows = [
        (
            "parameters",
            f"{format_count(described['total'])}, {format_count(described['active'])} of them active a token",
        )
    ]
    rows += [("  " + part, f"{count:14,}  {count / described['total']:6.1%}") for part, count in parts.items()]
    if described["vision_parameters"]:
        rows += [("  vision", f"{described['vision_parameters']:14,}  beside them")]
    rows += [("hidden size", f"{described['hidden_size']:,}; dense MLP {described['intermediate_size']:,}")]
    for kind, layer in layers["kinds"].items():
        window = f", window {layers['window']:,}" if kind == "sliding" else ""
        heads = f"{described['heads']} heads, {' or '.join(layer['heads'])}"
        rows += [(f"{kind} layers", f"{layer['count']} of {layers['count']}; {heads}{window}")]
    experts = described["experts"]
    if experts["count"]:
        rows += [("experts", f"{experts['count']} a layer, {experts['active']} a token, {experts['size']:,} wide each")]
    rows += [("vocabulary", f"{described['vocabulary']:,} tokens")]
    rows += [("canvas", f"{described['canvas']:,} tokens" if described["canvas"] else "none: it writes token by token")]
    rows += [("context", f"{described['context']:,} tokens")]
    return rows


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for dtype, need in memory["in"].items():
        a_token = " + ".join(f"{format_bytes(count)} {kind}" for kind, count in need["context_token"].items())
        computed = "" if need["compute_dtype"] == dtype else f", computed in {need['compute_dtype']}"
        rows += [(f"in {dtype}", f"weights {format_bytes(need['weights'])}{computed}; a token of context {a_token}")]
        total, state, step, read = (format_bytes(need[part]) for part in ("total", "context", "canvas", "reading"))
        rows += [
            (
                f"  {memory['tokens']:,} tokens",
                f"{total} in all: weights, {state} of context, and at most {step} for a step or {read} for reading a "
                "prompt of that length",
            )
        ]
    if memory["vision"]:
        rows += [("  vision tower", f"{format_bytes(memory['vision'])} on disk, beside all of that")]
    for device, free in memory["free"].items():
        fits = [dtype for dtype, need in memory["in"].items() if need["total"] <= free]
        rows += [
            (
                f"on {device}",
                f"{format_bytes(free)} free: {'fits in ' + ' and '.join(fits) if fits else 'does not fit'}",
            )
        ]
    return rows


def _network(config: ModelConfig, vision: int) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for layer in config.layers:
        kind = kinds.setdefault(_short(layer.kind), {"count": 0, "heads": []})
        kind["count"] += 1
        heads = f"{layer.head_dim} wide, {layer.kv_heads} of keys and values"
        if heads not in kind["heads"]:
            kind["heads"].append(heads)
    parts = costs.parameters(config)
    return {
        "family": config.family,
        "total": sum(parts.values()),
        "active": costs.active_parameters(config),
        "parameters": parts,
        "vision_parameters": vision,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "layers": {"count": len(config.layers), "window": config.sliding_window, "kinds": kinds},
        "experts": {"count": config.num_experts, "active": config.top_k_experts, "size": config.expert_size},
        "vocabulary": config.vocab_size,
        "canvas": config.canvas_length if config.has_canvas else None,
        "context": config.context_length,
    }


def _memory(config: ModelConfig, context: int | None, files: Files | None) -> dict[str, Any]:
    """Bytes of each part by the dtype of the weights; packed weights have one. Context and working memory count in the
    compute dtype of the processor."""
    from blockpress.hardware import compute_name, free_memory
    from blockpress.plan.memory import needed

    limit = config.context_length
    if context is not None and context > limit:
        raise RequestError(f"--context is {context}", hint=f"the model's context is {limit} tokens")
    tokens = min(CONTEXT, limit) if context is None else context
    by_dtype = {}
    for dtype in (config.dtype,) if files is not None and files.quantised else ("float32", "bfloat16"):
        compute = compute_name(dtype, "cpu")
        need = needed(config, tokens, dtype=dtype, compute_dtype=compute, files=files)
        bytes_a_token = costs.context_bytes(config, costs.activation_dtype(compute))
        by_kind = {_short(kind): count for kind, count in bytes_a_token.items()}
        by_dtype[dtype] = {**asdict(need), "total": need.total, "context_token": by_kind, "compute_dtype": compute}
    return {"tokens": tokens, "in": by_dtype, "vision": files.vision if files else 0, "free": free_memory()}


def _short(kind: str) -> str:
    return kind.removesuffix("_attention")


def _sampling(sampling: dict[str, Any]) -> str:
    if "temperature" in sampling:
        drawn = f"temperature {sampling['temperature']}, top-k {sampling['top_k']}, top-p {sampling['top_p']}"
        return drawn if sampling["temperature"] else "the likeliest token"
    return (
        f"at most {sampling['steps']} steps, entropy bound {sampling['entropy_bound']} nats, temperature "
        f"{sampling['t_max']} to {sampling['t_min']}, stability {sampling['stability']}, confidence "
        f"{sampling['confidence']} nats"
    )
