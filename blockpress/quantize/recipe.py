"""Which weights of a checkpoint are quantised, under which names, and which stay as they are.

    quantised   the linear layers of attention, of the dense MLP and of self-conditioning, and the experts
    as it is    embedding (and head), router, norms, scalars, vision; what `keep` names; rows that do not fit

Experts that are stored as two stacks are written one by one, as in the published quantised checkpoints:

    model.decoder.layers.3.experts.gate_up_proj [128, 1408, 2816]
        -> model.decoder.layers.3.experts.E.{gate_proj, up_proj}.*      gate is the first half of the rows

Invariant: every tensor of the checkpoint has one entry, and the entries' slots make up the whole quantised checkpoint.

Run it:  python -m pytest tests/quantize/test_convert.py
Source: the published checkpoints in compressed-tensors' layout; NVIDIA's recipe for `experts_only`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from blockpress.checkpoints.index import FLOATS
from blockpress.checkpoints.names import our_name
from blockpress.checkpoints.safetensors.stream import CODES, Slot
from blockpress.quantize.encoders import Format, scale_dtype

# Names in our network, so that every published name of a tensor matches.
_LINEAR = re.compile(
    r"(?:layers\.\d+\.(?:self_attn\.[qkvo]|(?:mlp|(?P<expert>experts)\.\d+)\.(?:gate|up|down))"
    r"|self_conditioning\.(?:gate|up|down))_proj\.weight"
)
_STACK = re.compile(r"layers\.\d+\.experts\.(?P<which>gate_up|down)_proj")

# For `ignore`: what readers would otherwise take for quantised linear layers.
UNTOUCHED = ("lm_head", r"re:.*\.router\.proj$", r"re:.*\.vision_tower\..*", r"re:.*\.embed_vision\..*")

# Fused layers: other engines run them as one matrix, so they share one global scale.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class Module:
    """One linear layer that is written: its name, and its rows `start` to `start + rows` of a stored matrix.

    `expert` is its index in a stack, None where it is stored as a matrix of its own.
    """

    name: str
    rows: int
    columns: int
    expert: int | None = None
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored tensor: `modules` is what it is written as, empty where it is copied; `smaller`: it is quantised."""

    name: str
    code: str
    shape: tuple[int, ...]
    kind: str
    modules: tuple[Module, ...] = ()
    smaller: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizationRecipe:
    """The layout of a quantised checkpoint, before any weight is read. `notes` say what is not quantised, and why."""

    form: Format
    entries: tuple[Entry, ...]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]

    def slots(self) -> list[Slot]:
        """Every tensor that is written."""
        return [slot for entry in self.entries for slot in self.slots_of(entry)]

    def fused_with(self, entry: Entry) -> tuple[str, ...]:
        """The fused layers of this one, itself among them: stored tensors that share its global scale."""
        home, _, leaf = entry.name.removesuffix(".weight").rpartition(".")
        group = next((names for names in _FUSED if leaf in names), ())
        names = tuple(f"{home}.{name}.weight" for name in group if f"{home}.{name}.weight" in self._quantised)
        return names or (entry.name,)

    @cached_property
    def _quantised(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.entries if entry.smaller)

    def slots_of(self, entry: Entry) -> Iterator[Slot]:
        """The tensors that one entry becomes."""
        if not entry.modules:
            yield Slot(name=entry.name, code=entry.code, shape=entry.shape)
        for module in entry.modules:
            if not entry.smaller:
                yield Slot(name=module.name + ".weight", code=entry.code, shape=(module.rows, module.columns))
                continue
            layout = self.form.layout(module.rows, module.columns, scale_dtype(getattr(torch, FLOATS[entry.code])))
            for part, (dtype, shape) in layout.items():
                yield Slot(name=f"{module.name}.{part}", code=CODES[dtype], shape=shape)


def make_recipe(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    form: Format,
    keep: Sequence[str] = (),
    experts_only: bool = False,
) -> QuantizationRecipe:
    """Decide for every tensor whether it is quantised.

    Args:
        tensors: of the checkpoint, by published name: safetensors' code of the type, and the shape.
        keep: patterns with `*` and `?`; a linear layer whose whole name matches one stays as it is. A stack of experts
            stays where its own name or that of any of its experts' layers matches.
        experts_only: keep every linear layer that is not an expert's.
    """
    entries, notes, unmatched = [], [], set(keep)
    for name, (code, shape) in tensors.items():
        entry = _entry(name, code, shape)
        if entry.modules:
            names = [name.removesuffix(".weight"), *(module.name for module in entry.modules)]
            hit = {pattern for pattern in keep if any(fnmatch.fnmatchcase(n, pattern) for n in names)}
            unmatched -= hit
            supported = form.supports(entry.modules[0].columns)
            wanted = not hit and not (experts_only and entry.kind != "experts")
            if wanted and not supported:
                notes.append(f"{name} stays as it is: rows of {entry.modules[0].columns} do not fit {form.name}")
            entry = replace(entry, smaller=wanted and supported)
        entries.append(entry)
    notes += [f"nothing is called {pattern}: --keep has no effect" for pattern in sorted(unmatched)]
    final = tuple(_joined(entries))
    ignore = (*UNTOUCHED, *(name for entry in final if not entry.smaller for name in _ignored(entry)))
    return QuantizationRecipe(form=form, entries=final, ignore=tuple(dict.fromkeys(ignore)), notes=tuple(notes))


def _entry(name: str, code: str, shape: tuple[int, ...]) -> Entry:
    ours = our_name(name) or ""
    if (match := _LINEAR.fullmatch(ours)) and len(shape) == 2:
        linear = Module(name=name.removesuffix(".weight"), rows=shape[0], columns=shape[1])
        return Entry(name=name, code=code, shape=shape, kind=_kind(name, match), modules=(linear,))
    if (match := _STACK.fullmatch(ours)) and len(shape) == 3:
        modules = tuple(_experts(name.rpartition(".")[0], match["which"], shape))
        return Entry(name=name, code=code, shape=shape, kind="experts", modules=modules)
    return Entry(name=name, code=code, shape=shape, kind="kept")


def _kind(name: str, match: re.Match[str]) -> str:
    if match["expert"]:
        return "experts"
    if ".self_attn." in name:
        return "attention"
    return "dense MLP" if ".mlp." in name else "self-conditioning"


def _experts(home: str, which: str, shape: tuple[int, ...]) -> Iterator[Module]:
    count, rows, columns = shape
    names = ("gate_proj", "up_proj") if which == "gate_up" else ("down_proj",)
    size = rows // len(names)
    for expert in range(count):
        for index, name in enumerate(names):
            full = f"{home}.{expert}.{name}"
            yield Module(name=full, rows=size, columns=columns, expert=expert, start=index * size)


def _joined(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Split both of a layer's stacks into experts, or neither: no reader takes half of a layer's experts stacked."""
    known = list(entries)
    split = {_home(entry) for entry in known if entry.smaller and len(entry.shape) == 3}
    for entry in known:
        yield replace(entry, modules=()) if len(entry.shape) == 3 and _home(entry) not in split else entry


def _home(entry: Entry) -> str:
    return entry.name.rpartition(".")[0]


def _ignored(entry: Entry) -> Iterator[str]:
    if entry.kind == "experts" and len(entry.shape) == 3:
        which = "(gate|up|gate_up)" if entry.name.endswith("gate_up_proj") else "down"
        yield rf"re:{re.escape(_home(entry))}\.(\d+\.)?{which}_proj$"
    elif entry.modules:
        yield entry.modules[0].name
