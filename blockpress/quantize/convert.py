"""Quantises a checkpoint: tensor by tensor, expert by expert, whatever its size.

    headers -> recipe -> slots of the new files -> for each stored tensor: read a piece, encode it, write it

Invariant: memory holds one matrix (of an expert, or of a dense layer) and its encoded form, never more; the new
checkpoint appears in the target only when it is whole, and an older one there is unchanged until then.

Run it:  blockpress quantize sudoku-nano ./smaller --format int4
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockpress.checkpoints.atomic import REPORT, SHARD_BYTES, staged, write_json
from blockpress.checkpoints.checkpoint import Checkpoint, load_config, opened_at
from blockpress.checkpoints.files import CONFIG, read_object
from blockpress.checkpoints.index import FLOATS, StoredTensor
from blockpress.checkpoints.names import is_quantised, our_name, published_name
from blockpress.checkpoints.safetensors.stream import StreamReader, StreamWriter, streamed
from blockpress.config import Family
from blockpress.errors import CheckpointError, DamagedFile, RequestError, UnexpectedWeights
from blockpress.hardware import whole_file
from blockpress.quantize.encoders import ErrorSum, Format, WeightError, quantization_config
from blockpress.quantize.recipe import Entry, Module, QuantizationRecipe, make_recipe

COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "LICENSE",
)  # fmt: skip
"""Files that are copied unchanged; a model card is not, since its figures are the original's."""

# Values per read of a tensor that is copied.
_COPIED = 1 << 25


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """The quantisation error of one stored tensor, with its name and kind (attention, experts ...)."""

    name: str
    kind: str
    error: WeightError


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The report of a finished conversion. Sizes are bytes of tensors, without the files' headers."""

    format: str
    bytes_before: int
    bytes_after: int
    tensors: tuple[TensorError, ...]
    kinds: Mapping[str, WeightError]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]

    def worst(self, count: int = 10) -> list[TensorError]:
        """The `count` tensors of the largest relative error, the worst first."""
        return sorted(self.tensors, key=lambda tensor: -tensor.error.relative)[:count]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, every tensor listed."""
        return asdict(self)


def convert_checkpoint(
    source: str | Path | Checkpoint,
    target: str | Path,
    form: Format,
    *,
    keep: Sequence[str] = (),
    experts_only: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write the checkpoint `source`, a path or an open checkpoint, to `target` with its linear layers quantised.

    `target` gets the weights, config.json with a `quantization_config`, the files that go with the model (tokenizer,
    template, processor, generation config), and `quantization.json`, the report.

    Args:
        keep: patterns of names of linear layers that are not quantised, such as `*.self_attn.*`.
        experts_only: quantise the experts and nothing else.
        progress: called with (bytes read, bytes to read).

    Raises:
        RequestError: `target` is `source`, or nothing would be quantised.
        CheckpointError: a checkpoint that is quantised already, values that are not finite, a full disk, and anything
            else that is wrong with the files.
        ConfigError: as `load_config`.
    """
    checkpoint = _plain_source(opened_at(source))
    if Path(target).resolve() == checkpoint.directory.resolve():
        raise RequestError(f"the target {str(target)!r} is the checkpoint itself", hint="give another directory")
    stored = _single_names(checkpoint.tensors, load_config(checkpoint).family)
    recipe = make_recipe({name: (t.dtype, t.shape) for name, t in stored.items()}, form, keep, experts_only)
    if not any(entry.smaller for entry in recipe.entries):
        raise RequestError(
            f"nothing of {str(checkpoint.path)!r} would become smaller in {form.name}",
            hint="; ".join(recipe.notes[:2])
            or ("no experts: leave out experts_only" if experts_only else "keep fewer"),
        )
    conversion = _Conversion(recipe, stored, progress or (lambda done, total: None))
    need = sum(slot.bytes for slot in recipe.slots())
    with staged(Path(target), need=need, replaces=COPIED_FILES) as staging:
        with streamed(staging, recipe.slots(), shard_bytes) as writer:
            conversion.convert(writer)
        _copy_files(checkpoint.directory, staging)
        result = conversion.result()
        write_json(staging / REPORT, result.to_dict())
        packed = {"quantization_config": quantization_config(form, recipe.ignore)}
        write_json(staging / CONFIG, {**checkpoint.document, **packed})
    return result


def _copy_files(source: Path, target: Path) -> None:
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class _Conversion:
    """One run over the stored tensors, in the recipe's order; it collects their errors."""

    def __init__(
        self, recipe: QuantizationRecipe, stored: Mapping[str, StoredTensor], progress: Callable[[int, int], None]
    ) -> None:
        self.recipe, self.stored, self.progress = recipe, stored, progress
        self.tensors: list[TensorError] = []
        self.kinds: dict[str, ErrorSum] = {}
        self.amaxes: dict[str, float] = {}
        self.done, self.total = 0, sum(tensor.bytes for tensor in stored.values())

    def convert(self, writer: StreamWriter) -> None:
        self.progress(0, self.total)
        with ExitStack() as files:
            # All files stay open: a layer's tensors, and fused layers under one global scale, may be in several.
            names = {tensor.file for tensor in self.stored.values()}
            self.shards = {file: files.enter_context(StreamReader(file)) for file in names}
            for entry in self.recipe.entries:
                if entry.smaller:
                    self._encode(entry, writer)
                else:
                    self._copy(entry, writer)

    def result(self) -> Converted:
        return Converted(
            format=self.recipe.form.name,
            bytes_before=self.total,
            bytes_after=sum(slot.bytes for slot in self.recipe.slots()),
            tensors=tuple(self.tensors),
            kinds={kind: errors.result() for kind, errors in self.kinds.items()},
            ignore=self.recipe.ignore,
            notes=self.recipe.notes,
        )

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.shards[self.stored[name].file].read(name, start, stop)

    def _encode(self, entry: Entry, writer: StreamWriter) -> None:
        errors = ErrorSum()
        for matrix, modules, amax in self._matrices(entry):
            for module in modules:
                weight = matrix[module.start : module.start + module.rows]
                encoded = self.recipe.form.encode(weight, amax)
                for part, tensor in encoded.tensors.items():
                    writer.write(f"{module.name}.{part}", tensor)
                errors.add(weight, encoded.values)
            self._advance(matrix)
        self.tensors.append(TensorError(name=entry.name, kind=entry.kind, error=errors.result()))
        self.kinds.setdefault(entry.kind, ErrorSum()).join(errors)

    def _matrices(self, entry: Entry) -> Iterator[tuple[Tensor, Sequence[Module], float]]:
        """A tensor's matrices, one in memory at a time, with their modules and the amax over their fused layers."""
        if len(entry.shape) == 2:
            amax = max(self._amax(name) for name in self.recipe.fused_with(entry))
            yield self._read(entry.name), entry.modules, amax
            return
        for expert in range(entry.shape[0]):
            matrix = self._read(entry.name, expert, expert + 1)[0]
            yield matrix, _expert_modules(entry, expert), amax_of(matrix, f"{entry.name}[{expert}]")

    def _amax(self, name: str) -> float:
        if name not in self.amaxes:
            self.amaxes[name] = amax_of(self._read(name), name)
        return self.amaxes[name]

    def _copy(self, entry: Entry, writer: StreamWriter) -> None:
        if len(entry.shape) == 3 and entry.modules:
            for expert in range(entry.shape[0]):
                matrix = self._read(entry.name, expert, expert + 1)[0]
                for module in _expert_modules(entry, expert):
                    writer.write(module.name + ".weight", matrix[module.start : module.start + module.rows])
                self._advance(matrix)
        elif not entry.shape:
            scalar = self._read(entry.name)
            writer.write(entry.name, scalar)
            self._advance(scalar)
        else:
            step = max(1, _COPIED // math.prod(entry.shape[1:]))
            for start in range(0, entry.shape[0], step):
                piece = self._read(entry.name, start, start + step)
                writer.write(entry.name, piece)
                self._advance(piece)

    def _advance(self, piece: Tensor) -> None:
        self.done += piece.nbytes
        self.progress(self.done, self.total)


def amax_of(weight: Tensor, name: str) -> float:
    """The largest magnitude of the weight.

    Raises:
        CheckpointError: a value that is not finite.
    """
    amax = float(weight.abs().amax()) if weight.numel() else 0.0
    if not math.isfinite(amax):
        raise CheckpointError(
            f"the tensor {name} holds values that are not finite", hint="no format has a code for them: save it again"
        )
    return amax


def add_to_report(folder: str | Path, key: str, value: Mapping[str, Any]) -> None:
    """Add measurements on a finished checkpoint to the report of its weights' errors, under `key`."""
    file = Path(folder) / REPORT
    held = read_object(file)
    with whole_file(file) as part:
        write_json(part, held | {key: value})


def _expert_modules(entry: Entry, expert: int) -> Sequence[Module]:
    """The modules of one expert: they are in order, the same number for each expert."""
    count = len(entry.modules) // entry.shape[0]
    return entry.modules[expert * count : (expert + 1) * count]


def _plain_source(source: Checkpoint) -> Checkpoint:
    """`source` itself. Raises CheckpointError: it is a GGUF file, or quantised already."""
    if source.is_gguf:
        raise _quantised(f"{str(source.path)!r} is a GGUF file, and only safetensors are made smaller")
    kind = source.kind
    if kind.method is not None:
        raise _quantised(f"{str(source.directory)!r} is quantised already, to {kind.format} by {kind.method!r}")
    return source


def _quantised(what: str) -> CheckpointError:
    return CheckpointError(what, hint="quantise the original checkpoint, in bfloat16 or float32")


def _single_names(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """The stored tensors without ties: a second name of a quantised weight would keep its original values.

    Raises:
        CheckpointError: a weight that is not stored as floats, so quantised already.
        UnexpectedWeights: a tie that differs from its twin. DamagedFile: a tensor without values.
    """
    for name, tensor in stored.items():
        if is_quantised(name) or tensor.dtype not in FLOATS:
            raise _quantised(f"the tensor {name} is stored as {tensor.dtype}")
        if not all(tensor.shape):
            raise DamagedFile(f"the tensor {name} has the shape {list(tensor.shape)}", hint="fetch the file again")
    our_names = {name: our_name(name, family) for name in stored}
    first = {ours: stored[name] for name, ours in our_names.items() if ours and published_name(ours, family) == name}
    ties = {name: first[ours] for name, ours in our_names.items() if ours in first and first[ours].name != name}
    for name, tied in ties.items():
        if not _same(stored[name], tied):
            raise UnexpectedWeights(
                f"the tensor {name} differs from {tied.name}, to which it is tied",
                hint="the model has one stack and one embedding: a checkpoint that unties them cannot be run",
            )
    return {name: tensor for name, tensor in stored.items() if name not in ties}


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    with StreamReader(one.file) as here, StreamReader(other.file) as there:
        starts = range(0, one.shape[0] if one.shape else 1, 64)
        return all(
            torch.equal(here.read(one.name, row, row + 64), there.read(other.name, row, row + 64)) for row in starts
        )
