"""What is read for every tensor of a network, decided on the files' headers before a weight is touched.

    stored                                                          ours
    layers.N.self_attn.q_proj.{weight, weight_scale, ...}           layers.N.self_attn.q_proj.weight
    layers.N.experts.E.{gate_proj, up_proj}.{weight_packed, ...}    layers.N.experts.gate_up_proj, gate rows first
    layers.N.experts.E.down_proj.{weight_packed, ...}               layers.N.experts.down_proj

A tensor may be stored under several names that are tied. One of them fills the network, the published one where it is
there, the others must equal it.

Invariant: every tensor of the network has exactly one target that fills it, and every stored tensor has a place in a
target, or is known by name to be of no use here (vision, derived tables, scales of activations).

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
"""A matrix in a stack: the expert, and the half of its rows; (0, 0) where there is no stack."""


@dataclass(kw_only=True)
class Target:
    """What is read into one tensor of the network, `ours`, or, where `tie`, compared with it.

    `home` is what the published names of its parts begin with; `experts` is None where it is stored whole.
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
        """Bytes that it takes in a network whose floats have `itemsize`; of a packed weight, those on disk."""
        if self.tie:
            return 0
        plain = self.first.build is None
        fields = [field for recipe in self.recipes.values() for field in recipe.fields]
        return sum(math.prod(f.stored.shape) * itemsize if plain else f.stored.bytes for f in fields)

    def missing(self) -> Iterator[str]:
        """Published names of the matrices that a stack lacks."""
        part = self.first.fields[0].stored.name.rpartition(".")[2]
        names = ("gate_proj", "up_proj") if self.halves == 2 else ("down_proj",)
        for expert in range(self.experts or 0):
            for half, name in enumerate(names):
                if (expert, half) not in self.recipes:
                    yield f"{self.home}.{expert}.{name}.{part}"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a stored tensor belongs: our tensor, its slot in a stack, what its name begins with, and its last part."""

    ours: str
    slot: Slot | None
    base: str
    part: str

    @property
    def module(self) -> str:
        return self.ours.rpartition(".")[0]


def map_tensors(
    network: Network, tensors: Mapping[str, StoredTensor], quantization: Quantization | None
) -> list[Target]:
    """Targets that fill the network first, then those that are compared.

    A checkpoint without the causal pass's own scalars is one where they are the canvas's.

    Raises:
        MissingWeights, UnexpectedWeights, ShapeMismatch, CheckpointError: tensors that are not the network's.
    """
    family = network.config.family
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    packed = packable(network)
    matrices, left = _collect(tensors, wanted, family, quantization)
    targets: dict[str, dict[str, Target]] = {name: {} for name in wanted}
    for place, parts in matrices.values():
        target, shape = _target(place, wanted[place.ours])
        target = targets[place.ours].setdefault(target.home, target)
        how = quantization if place.ours in packed else None
        target.recipes[place.slot or (0, 0)] = read_recipe(place.base, parts, shape, how)
    for name, found in targets.items():
        twin = targets.get(name.replace("causal_scalar", "layer_scalar"))
        if not found and twin:
            home, other = next(iter(twin.items()))
            found[home] = Target(ours=name, home=home, recipes=other.recipes)
    _refuse_missing(targets, family)
    if left:
        raise UnexpectedWeights(
            _listed("nothing in the model takes", left), hint=_other_save("config.json asks for less")
        )
    return _ordered(targets, family)


def _collect(
    tensors: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    family: Family,
    quantization: Quantization | None,
) -> tuple[dict[str, tuple[_Place, dict[str, StoredTensor]]], list[str]]:
    """The parts of every matrix by the published name that they share, and the tensors that have no place."""
    modules = {name[: dot.start()] for name in wanted for dot in re.finditer(r"\.", name)}
    matrices: dict[str, tuple[_Place, dict[str, StoredTensor]]] = {}
    left = []
    for name, stored in tensors.items():
        if is_vision(name) or is_derived(name):
            continue
        if quantization is None and (is_quantised(name) or _NARROW.match(stored.dtype)):
            raise CheckpointError(
                f"the checkpoint is quantised: the tensor {name} is stored as {stored.dtype}, and config.json has no "
                "quantization_config",
                hint="fetch config.json again: without it nobody knows what the bytes mean",
            )
        place = _place(name, our_name(name, family))
        if place is not None and place.part in ASIDE and _fits(place, wanted) and place.module in modules:
            continue
        if place is not None and place.ours in wanted and _fits(place, wanted):
            matrices.setdefault(place.base, (place, {}))[1][place.part] = stored
        elif is_quantised(name):
            raise CheckpointError(
                f"nothing here reads the tensor {name} of a quantised checkpoint",
                hint="take a checkpoint in compressed-tensors' layout or of ModelOpt, or a GGUF file",
            )
        else:
            left.append(name)
    return matrices, left


def _place(published: str, ours: str | None) -> _Place | None:
    """Where a tensor belongs by its name alone, `ours` without regard to experts and parts."""
    if ours is None:
        return None
    module, _, part = ours.rpartition(".")
    if part not in PARTS and part not in ASIDE:
        return _Place(ours=ours, slot=None, base=published, part="weight")
    base = published.removesuffix("." + part)
    if found := _EXPERT.fullmatch(module):
        name, half = _HALVES[found[3]]
        return _Place(ours=f"{found[1]}.{name}", slot=(int(found[2]), half), base=base, part=part)
    return _Place(ours=f"{module}.weight", slot=None, base=base, part=part)


def _fits(place: _Place, wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether there is an expert of that number, where the place is an expert's."""
    return place.slot is None or (place.ours in wanted and place.slot[0] < wanted[place.ours][0])


def _target(place: _Place, shape: tuple[int, ...]) -> tuple[Target, tuple[int, ...]]:
    """An empty target for a matrix, and the matrix's shape."""
    if place.slot is None:
        return Target(ours=place.ours, home=place.base), shape
    experts, rows, columns = shape
    halves = 2 if place.ours.endswith("gate_up_proj") else 1
    home = place.base.rsplit(".", 2)[0]
    return Target(ours=place.ours, home=home, experts=experts, halves=halves), (rows // halves, columns)


def _refuse_missing(targets: Mapping[str, Mapping[str, Target]], family: Family) -> None:
    missing = []
    for name, found in targets.items():
        missing += [] if found else [published_name(name, family)]
        for target in found.values():
            missing += target.missing()
    if missing:
        raise MissingWeights(_listed("the checkpoint lacks", missing), hint=_other_save("config.json asks for more"))
    for target in (target for found in targets.values() for target in found.values()):
        first = target.first
        for recipe in target.recipes.values():
            if recipe.form != first.form:
                raise ShapeMismatch(
                    f"{first.name} is stored as {first.form}, {recipe.name} as {recipe.form}",
                    hint="all experts of a layer are stored alike: quantise them alike",
                )


def _ordered(targets: Mapping[str, Mapping[str, Target]], family: Family) -> list[Target]:
    first, ties = [], []
    for name, found in targets.items():
        published = published_name(name, family)
        own = next((target for target in found.values() if published.startswith(target.home)), None)
        own = own or next(iter(found.values()))
        first.append(own)
        for target in found.values():
            if target is not own:
                target.tie = True
                ties.append(target)
                if target.first.form != own.first.form:
                    raise UnexpectedWeights(
                        f"{target.first.name} is stored as {target.first.form}, {own.first.name}, to which it is tied, "
                        f"as {own.first.form}",
                        hint="the model has one stack and one embedding: a checkpoint that unties them cannot be run",
                    )
    return first + ties


def _other_save(how: str) -> str:
    return f"{how}: do config and weights come from the same save?"


def _listed(what: str, names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:3])}{rest}"
