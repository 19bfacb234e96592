"""Which stored tensors fill each tensor of a network, decided on the files' headers before any weight is read.

    stored                                                          ours
    layers.N.self_attn.q_proj.{weight, weight_scale, ...}           layers.N.self_attn.q_proj.weight
    layers.N.experts.E.{gate_proj, up_proj}.{weight_packed, ...}    layers.N.experts.gate_up_proj, gate rows first
    layers.N.experts.E.down_proj.{weight_packed, ...}               layers.N.experts.down_proj

A tensor may be stored under several tied names. One of them fills the network, the published one where it exists; the
others must equal it.

Invariant: every tensor of the network has exactly one target that fills it, and every stored tensor belongs to a
target, or is known by name to be unused here (vision, derived tables, scales of activations).

Run it:  python -m pytest tests/checkpoints/test_load.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from blockpress.checkpoints.build import packable
from blockpress.checkpoints.index import StoredTensor
from blockpress.checkpoints.names import is_derived, is_quantised, is_vision, our_name, published_name
from blockpress.checkpoints.safetensors.packed import ASIDE, PARTS, PackedRecipe, read_recipe
from blockpress.config import Family
from blockpress.config.quantization import Quantization
from blockpress.errors import CheckpointError, MissingWeights, ShapeMismatch, UnexpectedWeights
from blockpress.model import Network

_EXPERT = re.compile(r"(layers\.\d+\.experts)\.(\d+)\.(gate|up|down)_proj")
_HALVES = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}
# Floats of 4, 6 and 8 bits, such as F8_E4M3: weights only together with their scales.
_NARROW = re.compile(r"F[468](_|$)")

Slot = tuple[int, int]
"""A matrix in a stack: the expert, and which half of its rows; (0, 0) where there is no stack."""


@dataclass(kw_only=True)
class Target:
    """What is read into one tensor of the network, `ours`, or, where `tie`, compared with it.

    `home` is the prefix of the published names of its parts; `experts` is None where it is stored as one tensor.
    """

    ours: str
    home: str
    experts: int | None = None
    halves: int = 1
    tie: bool = False
    recipes: dict[Slot, PackedRecipe] = field(default_factory=dict)

    @property
    def first(self) -> PackedRecipe:
        return next(iter(self.recipes.values()))

    def memory(self, itemsize: int) -> int:
        """Bytes that it takes in a network whose floats take `itemsize` bytes; for a packed weight, those on disk."""
        if self.tie:
            return 0
        plain = self.first.build is None
        fields = [field for recipe in self.recipes.values() for field in recipe.fields]
        return sum(math.prod(f.stored.shape) * itemsize if plain else f.stored.bytes for f in fields)

    def missing(self) -> Iterator[str]:
        """Published names of the matrices that are missing in a stack."""
        part = self.first.fields[0].stored.name.rpartition(".")[2]
        names = ("gate_proj", "up_proj") if self.halves == 2 else ("down_proj",)
        for expert in range(self.experts or 0):
            for half, name in enumerate(names):
                if (expert, half) not in self.recipes:
                    yield f"{self.home}.{expert}.{name}.{part}"


@dataclass(frozen=True, kw_only=True)
class _Destination:
    """Where a stored tensor belongs: our tensor, its slot in a stack, its name's prefix, and its last part."""

    ours: str
    slot: Slot | None
    base: str
    part: str

    @property
    def module(self) -> str:
        return self.ours.rpartition(".")[0]


def plan_mapping(
    network: Network, tensors: Mapping[str, StoredTensor], quantization: Quantization | None
) -> list[Target]:
    """Targets that fill the network first, then those that are compared with it.

    In a checkpoint without scalars of the causal pass, those of the canvas are used for it.

    Raises:
        MissingWeights, UnexpectedWeights, ShapeMismatch, CheckpointError: tensors that do not fit the network.
    """
    family = network.config.family
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    packed = packable(network)
    matrices, unused = _collect(tensors, wanted, family, quantization)
    targets: dict[str, dict[str, Target]] = {name: {} for name in wanted}
    for destination, parts in matrices.values():
        target, shape = _target(destination, wanted[destination.ours])
        target = targets[destination.ours].setdefault(target.home, target)
        packing = quantization if destination.ours in packed else None
        target.recipes[destination.slot or (0, 0)] = read_recipe(destination.base, parts, shape, packing)
    for name, candidates in targets.items():
        twin = targets.get(name.replace("causal_scalar", "layer_scalar"))
        if not candidates and twin:
            home, source = next(iter(twin.items()))
            candidates[home] = Target(ours=name, home=home, recipes=source.recipes)
    _refuse_missing(targets, family)
    if unused:
        raise UnexpectedWeights(
            _listed("nothing in the model takes", unused), hint=_other_save("config.json asks for less")
        )
    return _ordered(targets, family)


def _collect(
    tensors: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    family: Family,
    quantization: Quantization | None,
) -> tuple[dict[str, tuple[_Destination, dict[str, StoredTensor]]], list[str]]:
    """The parts of every matrix by the published name that they share, and the tensors that belong nowhere."""
    modules = {name[: dot.start()] for name in wanted for dot in re.finditer(r"\.", name)}
    matrices: dict[str, tuple[_Destination, dict[str, StoredTensor]]] = {}
    unused = []
    for name, stored in tensors.items():
        if is_vision(name) or is_derived(name):
            continue
        if quantization is None and (is_quantised(name) or _NARROW.match(stored.dtype)):
            raise CheckpointError(
                f"the checkpoint is quantised: the tensor {name} is stored as {stored.dtype}, and config.json has no "
                "quantization_config",
                hint="fetch config.json again: without it the bytes have no meaning",
            )
        destination = _destination(name, our_name(name, family))
        if (
            destination is not None
            and destination.part in ASIDE
            and _has_expert(destination, wanted)
            and destination.module in modules
        ):
            continue
        if destination is not None and destination.ours in wanted and _has_expert(destination, wanted):
            matrices.setdefault(destination.base, (destination, {}))[1][destination.part] = stored
        elif is_quantised(name):
            raise CheckpointError(
                f"nothing here reads the tensor {name} of a quantised checkpoint",
                hint="take a checkpoint in compressed-tensors' layout or of ModelOpt, or a GGUF file",
            )
        else:
            unused.append(name)
    return matrices, unused


def _destination(published: str, ours: str | None) -> _Destination | None:
    """Where a tensor belongs by its name alone; `ours` does not yet regard experts and parts."""
    if ours is None:
        return None
    module, _, part = ours.rpartition(".")
    if part not in PARTS and part not in ASIDE:
        return _Destination(ours=ours, slot=None, base=published, part="weight")
    base = published.removesuffix("." + part)
    if match := _EXPERT.fullmatch(module):
        name, half = _HALVES[match[3]]
        return _Destination(ours=f"{match[1]}.{name}", slot=(int(match[2]), half), base=base, part=part)
    return _Destination(ours=f"{module}.weight", slot=None, base=base, part=part)


def _has_expert(destination: _Destination, wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an expert of that number exists, where the destination is an expert's."""
    return destination.slot is None or (
        destination.ours in wanted and destination.slot[0] < wanted[destination.ours][0]
    )


def _target(destination: _Destination, shape: tuple[int, ...]) -> tuple[Target, tuple[int, ...]]:
    """An empty target for a matrix, and the matrix's shape."""
    if destination.slot is None:
        return Target(ours=destination.ours, home=destination.base), shape
    experts, rows, columns = shape
    halves = 2 if destination.ours.endswith("gate_up_proj") else 1
    home = destination.base.rsplit(".", 2)[0]
    return Target(ours=destination.ours, home=home, experts=experts, halves=halves), (rows // halves, columns)


def _refuse_missing(targets: Mapping[str, Mapping[str, Target]], family: Family) -> None:
    missing = []
    for name, candidates in targets.items():
        missing += [] if candidates else [published_name(name, family)]
        for target in candidates.values():
            missing += target.missing()
    if missing:
        raise MissingWeights(_listed("the checkpoint lacks", missing), hint=_other_save("config.json asks for more"))
    for target in (target for candidates in targets.values() for target in candidates.values()):
        first = target.first
        for recipe in target.recipes.values():
            if recipe.form != first.form:
                raise ShapeMismatch(
                    f"{first.name} is stored as {first.form}, {recipe.name} as {recipe.form}",
                    hint="all experts of a layer are stored alike: quantise them alike",
                )


def _ordered(targets: Mapping[str, Mapping[str, Target]], family: Family) -> list[Target]:
    first, ties = [], []
    for name, candidates in targets.items():
        published = published_name(name, family)
        primary = next((target for target in candidates.values() if published.startswith(target.home)), None)
        primary = primary or next(iter(candidates.values()))
        first.append(primary)
        for target in candidates.values():
            if target is not primary:
                target.tie = True
                ties.append(target)
                if target.first.form != primary.first.form:
                    raise UnexpectedWeights(
                        f"{target.first.name} is stored as {target.first.form}, {primary.first.name}, to which it is "
                        f"tied, as {primary.first.form}",
                        hint="the model has one stack and one embedding: a checkpoint that unties them cannot be run",
                    )
    return first + ties


def _other_save(how: str) -> str:
    return f"{how}: do config and weights come from the same save?"


def _listed(what: str, names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:3])}{rest}"
