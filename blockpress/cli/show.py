"""`blockpress show`: what a model is made of, what it takes, and how it is sampled by default.

Invariant: no weights are read. Parameters come from the config, sizes on disk from the headers of the files.

Run it:  blockpress show sudoku-nano
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress import costs
from blockpress.cli import options
from blockpress.errors import ModelNotFound

if TYPE_CHECKING:
    from blockpress.config import ModelConfig

VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A shipped model, a checkpoint's directory, or a preset such as diffusiongemma-26B-A4B."
    ),
]


def show(model: Model = options.SHIPPED, json: options.Json = False) -> None:
    """Show what a model is made of, without loading its weights.

    A preset is a published shape without files: its parameters and memory follow from its config.

    \b
    Examples:
      blockpress show sudoku-nano
      blockpress show ./my-checkpoint --json
      blockpress show diffusiongemma-26B-A4B
    """
    described = describe(model)
    if json:
        options.print_json(described)
    else:
        print("\n".join(lines(described)))


def describe(model: str) -> dict[str, Any]:
    """Everything that `show` prints, as plain values; memory and file sizes in bytes.

    Raises:
        CheckpointError, ConfigError: no such model, or files that cannot be read.
    """
    from blockpress.config import PRESETS, GenerationConfig
    from blockpress.weights import load_config, load_generation, resolve

    try:
        path: Path | None = resolve(model)
    except ModelNotFound as error:
        if model not in PRESETS:
            presets = ", ".join(sorted(PRESETS))
            raise ModelNotFound(error.message, hint=f"{error.hint}; presets: {presets}") from error
        path = None
    if path is None:
        config, generation = PRESETS[model](), GenerationConfig()
    else:
        config = load_config(path)
        generation = load_generation(path, config)
    files = None if path is None else read_files(path)
    return {
        "model": model,
        "path": None if path is None else str(path),
        "tokenizer": None if path is None else (path / "tokenizer.json").is_file(),
        **_network(config, 0 if files is None else files["vision_parameters"]),
        "files": files,
        "memory": _memory(config),
        "sampling": vars(generation.sampling),
        "stop_ids": list(generation.stop_ids if path is not None else config.eos_ids),
    }


def read_files(path: Path) -> dict[str, Any]:
    """Count, bytes, types (tensors of each) and vision parameters of a checkpoint's files, from their headers.

    Raises:
        CheckpointError: a file that is missing, cut short or unreadable.
    """
    from blockpress.weights.shards import catalogue

    tensors = catalogue(path)
    files = {tensor.file for tensor in tensors.values()}
    return {
        "count": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors.values())),
        "vision_parameters": sum(math.prod(t.shape) for name, t in tensors.items() if name.startswith(VISION)),
    }


def lines(described: dict[str, Any]) -> list[str]:
    """The description for people, a line each."""
    parts, layers, memory = described["parameters"], described["layers"], described["memory"]
    rows = [("model", f"{described['model']}   {described['path'] or 'a preset: its config alone'}")]
    rows += [("family", described["family"])]
    rows += [("parameters", f"{_many(described['total'])}, {_many(described['active'])} of them active a token")]
    rows += [("  " + part, f"{count:14,}  {count / described['total']:6.1%}") for part, count in parts.items()]
    if described["vision_parameters"]:
        rows += [("  vision", f"{described['vision_parameters']:14,}  beside them: kept on disk, not loaded yet")]
    rows += [("hidden size", f"{described['hidden_size']:,}; dense MLP {described['intermediate_size']:,}")]
    for kind, layer in layers["kinds"].items():
        window = f", window {layers['window']:,}" if kind == "sliding" else ""
        heads = f"{described['heads']} heads, {' or '.join(layer['heads'])}"
        rows += [(f"{kind} layers", f"{layer['count']} of {layers['count']}; {heads}{window}")]
    experts = described["experts"]
    rows += [("experts", f"{experts['count']} a layer, {experts['active']} a token, {experts['size']:,} wide each")]
    rows += [("vocabulary", f"{described['vocabulary']:,} tokens")]
    rows += [("canvas", f"{described['canvas']:,} tokens"), ("context", f"{described['context']:,} tokens")]
    if described["files"]:
        files = described["files"]
        types = ", ".join(f"{count} in {name}" for name, count in files["dtypes"].items()) or "no tensors"
        rows += [("files", f"{files['count']} of safetensors, {_bytes(files['bytes'])}; tensors: {types}")]
        rows += [("tokenizer", "yes" if described["tokenizer"] else "none: the model takes token ids only")]
    for dtype, need in memory.items():
        each = " + ".join(f"{_bytes(size)} {kind}" for kind, size in need["context_token"].items())
        rows += [(f"in {dtype}", f"weights {_bytes(need['weights'])}; a token of context {each}")]
    rows += [("sampling", _sampling(described["sampling"]))]
    rows += [("stop ids", ", ".join(map(str, described["stop_ids"])) or "none")]
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:{width}}{value}" for name, value in rows]


def _network(config: ModelConfig, vision: int) -> dict[str, Any]:
    from blockpress.config import FAMILY

    kinds: dict[str, Any] = {}
    for layer in config.layers:
        kind = kinds.setdefault(_short(layer.kind), {"count": 0, "heads": []})
        kind["count"] += 1
        heads = f"{layer.head_dim} wide, {layer.kv_heads} of keys and values"
        if heads not in kind["heads"]:
            kind["heads"].append(heads)
    parts = costs.parameters(config)
    return {
        "family": FAMILY,
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
        "canvas": config.canvas_length,
        "context": config.context_length,
    }


def _memory(config: ModelConfig) -> dict[str, Any]:
    total = sum(costs.parameters(config).values())
    return {
        dtype: {
            "weights": total * costs.DTYPE_BYTES[dtype],
            "context_token": {_short(kind): size for kind, size in costs.context_bytes(config, dtype).items()},
        }
        for dtype in ("float32", "bfloat16")
    }


def _short(kind: str) -> str:
    return kind.removesuffix("_attention")


def _sampling(sampling: dict[str, Any]) -> str:
    return (
        f"at most {sampling['steps']} steps, entropy bound {sampling['entropy_bound']} nats, temperature "
        f"{sampling['t_max']} to {sampling['t_min']}, stability {sampling['stability']}, confidence "
        f"{sampling['confidence']} nats"
    )


def _many(count: int) -> str:
    """A large count in words.

    >>> _many(987), _many(2_400_000), _many(25_250_000_000)
    ('987', '2.40 M', '25.25 B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def _bytes(count: int) -> str:
    """
    >>> _bytes(600), _bytes(200 * 1024), _bytes(50 << 30)
    ('600 bytes', '200.0 KiB', '50.0 GiB')
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
