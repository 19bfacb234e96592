"""Loads a GGUF file into a network: header, mapping of names, then tensor by tensor into a network without memory.

Matrices stay packed as they are in the file and are unpacked in tiles where they are used (`ops.blocks`); floats, and
everything that is not a matrix, become tensors of the network's dtype. The file is read, not mapped: peak memory is the
weights and one tensor.

Invariant: every tensor of the network comes from the file, and every tensor of the file is in the network, equal to one
that is (`output.weight`), or part of its configuration (`rope_freqs.weight`).

Run it:  python -c "from blockpress.checkpoints.gguf.load import load_gguf_network as load; print(load('m.gguf').dtype)"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from blockpress.checkpoints.build import (
    Progress,
    Types,
    choose_device,
    choose_types,
    converting,
    multiplied,
    packable,
    put,
    room_for,
    without_memory,
)
from blockpress.checkpoints.gguf import metadata
from blockpress.checkpoints.gguf import tokenizer as vocabulary
from blockpress.checkpoints.gguf.header import Header, StoredBlocks, read_bytes, read_header
from blockpress.checkpoints.gguf.names import EMBEDDING, FREQUENCIES, HEAD, stored_halves, stored_names
from blockpress.config import GenerationConfig, ModelConfig
from blockpress.errors import (
    CheckpointError,
    ConfigError,
    DamagedFile,
    MissingWeights,
    ShapeMismatch,
    UnexpectedWeights,
)
from blockpress.model import Network
from blockpress.ops.blocks import Blocks
from blockpress.ops.weight import Weight
from blockpress.text import Tokenizer

Sources = dict[str, tuple[StoredBlocks, ...]]
"""The stored tensors of each tensor of a network, by our names."""


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """An opened GGUF file: its configurations, and its weights one at a time by our names.

    The tokenizer is built on demand: a vocabulary of 262,144 pieces takes seconds.
    """

    header: Header
    config: ModelConfig
    generation: GenerationConfig

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer inside, or None. Errors as `vocabulary.read_tokenizer`."""
        return vocabulary.read_tokenizer(self.header)

    def sources(self, ours: str) -> tuple[StoredBlocks, ...]:
        """The stored tensors of one tensor of our network: one, or gate and up separately.

        In a file without scalars of the causal pass, those of the canvas are used for it.

        Raises:
            MissingWeights: the file does not hold it.
        """
        tensors = self.header.tensors
        names = stored_names(ours)
        if ours.endswith("causal_scalar") and not any(name in tensors for name in names):
            names = stored_names(ours.replace("causal_scalar", "layer_scalar"))
        for name in names:
            if name in tensors:
                return (tensors[name],)
        halves = stored_halves(ours)
        if halves is not None and all(name in tensors for name in halves):
            return tuple(tensors[name] for name in halves)
        raise MissingWeights(
            f"{str(self.header.file)!r} lacks the tensor {names[0]}", hint="fetch or convert the file again"
        )

    def weight(self, ours: str, stream: BinaryIO, dtype: torch.dtype, packs: bool) -> Weight:
        """A tensor of our network: packed where the file packs it and `packs` allows, else of `dtype`."""
        parts = [self._part(stored, stream, dtype, packs) for stored in self.sources(ours)]
        if len(parts) == 1:
            return parts[0]
        gate, up = parts
        if isinstance(gate, Blocks) and isinstance(up, Blocks) and gate.layout.name == up.layout.name:
            return Blocks(torch.cat((gate.data, up.data), dim=1), gate.layout)
        return torch.cat([part if isinstance(part, Tensor) else part.unpack(dtype) for part in (gate, up)], dim=1)

    def _part(self, stored: StoredBlocks, stream: BinaryIO, dtype: torch.dtype, packs: bool) -> Weight:
        data = read_bytes(stream, stored, self.header.file)
        if stored.kind.layout is None:
            assert stored.kind.dtype is not None, "a kind is plain or a layout"
            return data.view(stored.kind.dtype).view(stored.shape).to(dtype)
        blocks = Blocks(data.view(*stored.shape[:-1], -1), stored.kind.layout)
        return blocks if packs else blocks.unpack(dtype)


def open_gguf(path: str | Path) -> Gguf:
    """Read the header of a GGUF file and what follows from it.

    Raises:
        DamagedFile, CheckpointError: no GGUF file, truncated, of types that nothing unpacks, or not readable.
        ConfigError: another architecture, or an invalid configuration.
    """
    return understand(read_header(Path(path)))


def understand(header: Header) -> Gguf:
    """The configurations of a header that has been read.

    Raises:
        CheckpointError: one part of a split model. ConfigError: as `open_gguf`.
    """
    file = header.file
    try:
        metadata.check_architecture(header)
        parts = header.metadata.get("split.count", 1)
        if parts != 1:
            raise CheckpointError(
                f"{str(file)!r} is one of {parts} parts of a model",
                hint="join them first: llama-gguf-split --merge FIRST_PART OUTPUT.gguf",
            )
        config = metadata.read_config(header, _frequencies(header))
        return Gguf(header=header, config=config, generation=metadata.read_generation(header, config))
    # Any exception from parsing a value is the file's fault.
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"the metadata of {str(file)!r} is not understood: {error}", hint="fetch or convert the file again"
        ) from error


def load_gguf_network(
    path: str | Path | Gguf,
    *,
    dtype: torch.dtype | str | None = None,
    compute_dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Network:
    """Read a GGUF file into a network, in eval mode and without gradients; matrices stay packed.

    Args:
        path: the file, or the result of `open_gguf`.
        dtype: of the weights that are not packed: float32, bfloat16, float16 or their names; None: float32 for
            a file of float32, else bfloat16.
        compute_dtype: of activations and products: `dtype`, or float32; None or "auto": the fast one of this machine.
            Where it is wider than `dtype`, matrices stay in memory as they are stored and are widened where they are
            used. int8: layers multiply integers, all else is float32 (ADR 0022).
        device: where each weight is put as soon as it is read.
        progress: called with bytes on disk.

    Raises:
        DamagedFile, CheckpointError, ConfigError: as `open_gguf`.
        MissingWeights, UnexpectedWeights, ShapeMismatch: tensors that do not fit the metadata.
        RequestError: unknown types or device, or a device without room.
    """
    file = path if isinstance(path, Gguf) else open_gguf(path)
    target_device = choose_device(device)
    types = choose_types(dtype, compute_dtype, file.config, target_device)
    network = without_memory(lambda: Network(file.config))
    sources = _check(file, network)
    matrices, products = packable(network), multiplied(network)
    sizes = {ours: types.size(matrix=ours in matrices, product=ours in products) for ours in sources}
    size = sum(s.memory(sizes[ours]) for ours, parts in sources.items() for s in parts)
    with room_for(size, target_device):
        _fill(file, network, sources, types, target_device, progress or (lambda done, total: None))
    return network.eval().requires_grad_(False)


def _check(file: Gguf, network: Network) -> Sources:
    """The stored tensors of every tensor of the network; names and shapes are checked before any weight is read."""
    sources, taken = {}, {FREQUENCIES, HEAD}
    for ours, tensor in network.state_dict().items():
        parts = sources[ours] = file.sources(ours)
        taken |= {stored.name for stored in parts}
        wanted = tuple(tensor.shape)
        if len(parts) == 2:
            wanted = (wanted[0], wanted[1] // 2, wanted[2])
        for stored in parts:
            if stored.shape != wanted:
                raise ShapeMismatch(
                    f"the tensor {stored.name} has the shape {list(stored.shape)}, the metadata asks for "
                    f"{list(wanted)} (outermost axis first)",
                    hint="fetch or convert the file again",
                )
    unused = [name for name in file.header.tensors if name not in taken]
    if unused:
        raise UnexpectedWeights(
            f"nothing in the model takes {len(unused)} tensors: {', '.join(unused[:3])}{' ...' * (len(unused) > 3)}",
            hint="the file is of another model, or its metadata and its tensors come from different ones",
        )
    return sources


def _fill(
    file: Gguf, network: Network, sources: Sources, types: Types, device: torch.device, progress: Progress
) -> None:
    matrices, products = packable(network), multiplied(network)
    total, done = sum(stored.bytes for parts in sources.values() for stored in parts), 0
    progress(done, total)
    with _opened(file.header.file) as stream:
        for ours in sorted(sources, key=lambda name: sources[name][0].start):
            # No variable keeps the weight, or two of them would be in memory while the next one is read.
            with converting(sources[ours][0].name):
                weight = file.weight(ours, stream, types.storage, ours in matrices)
            weight = types.held(weight, matrix=ours in matrices, product=ours in products)
            put(network, ours, weight.to(device))
            del weight
            done += sum(stored.bytes for stored in sources[ours])
            progress(done, total)
        _compare_head(file, stream)


def _compare_head(file: Gguf, stream: BinaryIO) -> None:
    """Input embedding and head are one matrix. A file that stores both is loaded only where they are equal."""
    head, embedding = file.header.tensors.get(HEAD), file.header.tensors[EMBEDDING]
    if head is None:
        return
    pairs = zip(head.pieces(), embedding.pieces(), strict=False)
    alike = (head.shape, head.kind.name) == (embedding.shape, embedding.kind.name)
    path = file.header.file
    if not alike or not all(torch.equal(*(read_bytes(stream, piece, path) for piece in pair)) for pair in pairs):
        raise UnexpectedWeights(
            f"the tensor {HEAD} differs from {EMBEDDING}, to which it is tied",
            hint="the model has one embedding: take a file without output.weight",
        )


def _frequencies(header: Header) -> Tensor | None:
    stored = header.tensors.get(FREQUENCIES)
    if stored is None:
        return None
    if stored.kind.dtype is None or len(stored.shape) != 1:
        raise DamagedFile(
            f"the tensor {FREQUENCIES} is {stored.kind.name} of shape {list(stored.shape)}",
            hint="fetch or convert the file again",
        )
    with _opened(header.file) as stream:
        return read_bytes(stream, stored, header.file).view(stored.kind.dtype).float()


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}", hint="check the file and its rights") from error
