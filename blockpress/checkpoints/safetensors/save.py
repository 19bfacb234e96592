"""Saves a network as a checkpoint in the published layout, which `transformers` loads as it is.

Invariant: what was saved loads to the same values, and it is written as `atomic.py` says: all at once.

Run it:  python -m pytest tests/checkpoints/test_save.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockpress.checkpoints.atomic import SHARD_BYTES, in_shards, staged, write_index, write_json
from blockpress.checkpoints.build import choose_dtype
from blockpress.checkpoints.checkpoint import Checkpoint, opened_at
from blockpress.checkpoints.files import CONFIG, GENERATION
from blockpress.checkpoints.index import StoredTensor, open_safetensors
from blockpress.checkpoints.names import is_vision, published_name
from blockpress.checkpoints.safetensors.vision import vision_tensors
from blockpress.config import GenerationConfig, ModelConfig
from blockpress.errors import MissingWeights, RequestError, ShapeMismatch, UnexpectedWeights
from blockpress.model import Network
from blockpress.model.layers import packed_weights
from blockpress.ops.packed import HalfFloats

# Settings of the image preprocessing; they are copied together with the tower.
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@runtime_checkable
class Savable(Protocol):
    """Anything that writes its own files, such as `blockpress.text.Tokenizer`."""

    def save(self, directory: str | Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One tensor to be written; `make` returns it when its shard is written."""

    name: str
    bytes: int
    make: Callable[[], Tensor]


def save_checkpoint(
    directory: str | Path,
    network: Network,
    *,
    generation: GenerationConfig,
    tokenizer: Savable | None = None,
    kept_from: str | Path | Checkpoint | None = None,
    kept: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | str | None = None,
    run_dtype: torch.dtype | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    config: ModelConfig | None = None,
) -> None:
    """Write `network` as a checkpoint: safetensors, config.json, generation_config.json and the tokenizer's files.

    Other files in the directory stay. Memory in addition to the network: the copies of one shard, and none where the
    network is on the CPU in the stored dtype.

    Args:
        directory: created if absent; an older checkpoint in it is replaced.
        kept_from: a checkpoint whose vision tensors and image processor are copied, byte for byte.
        kept: vision tensors by published name instead, written as they are.
        dtype: of the stored weights; None: the one they have in memory.
        run_dtype: the one that `config.json` names, to run the checkpoint in; None: the stored one.
        shard_bytes: most bytes of a shard's tensors; one tensor that is larger has a shard of its own.
        config: written to config.json, such as the network's with a vision tower; None: the network's own.

    Raises:
        RequestError: an invalid argument, or packed weights in the network.
        MissingWeights, UnexpectedWeights, ShapeMismatch: vision tensors that are not those of the config's tower.
        CheckpointError: `kept_from` or `directory` cannot be used.
    """
    _refuse_packed(network)
    stored = choose_dtype(network.storage_dtype if dtype is None else dtype, network.config)
    run = stored if run_dtype is None else choose_dtype(run_dtype, network.config)
    source = None if kept_from is None else opened_at(kept_from)
    config = network.config if config is None else config
    shards = in_shards(_text_pieces(network, stored) + _vision_pieces(config, source, kept), shard_bytes)
    need = sum(piece.bytes for shard in shards.values() for piece in shard)
    with staged(Path(directory), need=need) as staging:
        _write_weights(staging, shards)
        if tokenizer is not None:
            tokenizer.save(staging)
        _copy_processors(staging, source)
        write_json(staging / GENERATION, generation.to_dict())
        write_json(staging / CONFIG, _config(config, run))
        for file in staging.glob("*.safetensors"):
            # The library makes its files readable for their owner only.
            shutil.copymode(staging / CONFIG, file)


def _refuse_packed(network: Network) -> None:
    for name, module in network.named_modules():
        for leaf, weight in packed_weights(module).items():
            if not isinstance(weight, HalfFloats):
                raise RequestError(
                    f"{name}.{leaf} of the network is packed, and no floats are left of it to be saved",
                    hint="copy the checkpoint that it was loaded from, or quantise a network of floats",
                )


def _text_pieces(network: Network, dtype: torch.dtype) -> list[_Piece]:
    family = network.config.family
    return [
        _Piece(
            name=published_name(name, family),
            bytes=tensor.numel() * dtype.itemsize,
            make=partial(_on_cpu, tensor, dtype),
        )
        for name, tensor in network.state_dict().items()
    ]


def _on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # The format refuses tensors that share memory, and both passes may share one scalar.
    return tensor.detach().to("cpu", dtype, copy=tensor.ndim < 2).contiguous()


def _vision_pieces(
    config: ModelConfig, kept_from: Checkpoint | None, kept: Mapping[str, Tensor] | None
) -> list[_Piece]:
    """The vision tensors to be written, or none for a config without a tower."""
    if kept_from is not None and kept is not None:
        raise RequestError("kept_from and kept are both given", hint="vision tensors come from one of the two")
    if kept_from is None and kept is None and config.vision is not None:
        raise MissingWeights(
            "config.json will name a vision tower, and there are no tensors for it",
            hint="give kept_from=DIRECTORY that the network was loaded from, or kept=TENSORS",
        )
    if kept_from is not None:
        pieces = [
            _Piece(name=name, bytes=tensor.bytes, make=partial(_read, tensor))
            for name, tensor in kept_from.tensors.items()
            if is_vision(name)
        ]
    else:
        _check_kept(config, kept or {})
        pieces = [
            _Piece(name=name, bytes=tensor.nbytes, make=partial(_on_cpu, tensor, tensor.dtype))
            for name, tensor in (kept or {}).items()
        ]
    if pieces and config.vision is None:
        raise UnexpectedWeights(
            f"there are {len(pieces)} vision tensors, and the network's config has no vision tower",
            hint="put their vision_config into the config: dataclasses.replace(config, vision=...)",
        )
    return pieces


def _check_kept(config: ModelConfig, kept: Mapping[str, Tensor]) -> None:
    shapes = vision_tensors(config.vision, config.hidden_size) if config.vision is not None else {}
    for name, tensor in kept.items():
        if not is_vision(name) or (shapes and name not in shapes):
            raise UnexpectedWeights(
                f"kept holds {name}", hint="kept takes the tensors of the config's vision tower only"
            )
        if shapes and tuple(tensor.shape) != shapes[name]:
            raise ShapeMismatch(
                f"kept holds {name} of the shape {list(tensor.shape)}, the config asks for {list(shapes[name])}",
                hint="kept and the config's vision must describe the same tower",
            )
    missing = sorted(shapes.keys() - kept.keys())
    if missing:
        raise MissingWeights(f"kept lacks {missing[0]}", hint="kept must hold all of the tower: see vision_tensors")


def _read(tensor: StoredTensor) -> Tensor:
    with open_safetensors(tensor.file) as shard:
        values: Tensor = shard.get_tensor(tensor.name)
        return values


def _write_weights(folder: Path, shards: Mapping[str, list[_Piece]]) -> None:
    for name, shard in shards.items():
        # `transformers` refuses files without this metadata.
        save_file({piece.name: piece.make() for piece in shard}, folder / name, metadata={"format": "pt"})
    write_index(folder, shards)


def _config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    out = config.to_dict() | {"dtype": name}
    if "text_config" not in out:  # gemma4_text is saved flat
        return {key: value for key, value in out.items() if key != "torch_dtype"}
    text = {key: value for key, value in out["text_config"].items() if key != "torch_dtype"}
    return out | {"text_config": text | ({"dtype": name} if "dtype" in text else {})}


def _copy_processors(folder: Path, kept_from: Checkpoint | None) -> None:
    if kept_from is None:
        return
    for name in _PROCESSORS:
        file = kept_from.directory / name
        if file.is_file():
            shutil.copyfile(file, folder / name)
