"""Which weights of a checkpoint are made smaller, under which names, and what stays as it is.

    smaller     the linear layers of attention, of the dense MLP and of self-conditioning, and the experts
    as it is    embedding (and head), router, norms, scalars, vision; whatever `keep` names; rows that do not fit

Experts that are stored as two stacks are written one by one, as the published quantised checkpoints have them:

    model.decoder.layers.3.experts.gate_up_proj [128, 1408, 2816]
        -> model.decoder.layers.3.experts.E.{gate_proj, up_proj}.*      gate is the first half of the rows

Invariant: every tensor of the checkpoint has one entry, and the entries' slots are the whole quantised checkpoint.

Run it:  python -m pytest tests/quantize/test_convert.py
Source: the published checkpoints in compressed-tensors' layout; NVIDIA's recipe for `experts_only`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from blockpress.checkpoints.index import FLOATS
from blockpress.checkpoints.names import our_name
from blockpress.checkpoints.safetensors.stream import CODES, Slot
from blockpress.quantize.encoders import Format, scale_dtype

# Names in our network, so that a stack is known under every name under which it is published.
_LINEAR = re.compile(
    r"(?:layers\.\d+\.(?:self_attn\.[qkvo]|(?:mlp|(?P<expert>experts)\.\d+)\.(?:gate|up|down))"
    r"|self_conditioning\.(?:gate|up|down))_proj\.weight"
)
_STACK = re.compile(r"layers\.\d+\.experts\.(?P<which>gate_up|down)_proj")

# What readers would take for a linear layer to be quantised, wherever it lies.
UNTOUCHED = ("lm_head", r"re:.*\.router\.proj$", r"re:.*\.vision_tower\..*", r"re:.*\.embed_vision\..*")

# Layers that other engines run as one, and therefore under one outer scale.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class Module:
    """One linear layer that is written: its name, and where it lies in what was stored.

    `expert` is its place in a stack, None where it is a matrix of its own; `rows` are those of the expert's matrix.
    """

    name: str
    rows: int
    columns: int
    expert: int | None = None
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored tensor: `modules` are what it is written as, none where it is copied; `smaller` where in few bits."""

    name: str
    code: str
    shape: tuple[int, ...]
    kind: str
    modules: tuple[Module, ...] = ()
    smaller: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizationRecipe:
    """The whole of a quantised checkpoint before a weight of it is read. `notes` say what stayed, and why."""

    form: Format
    entries: tuple[Entry, ...]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]

    def slots(self) -> list[Slot]:
        """Every tensor that is written."""
        return [slot for entry in self.entries for slot in self.slots_of(entry)]

    def fused_with(self, entry: Entry) -> tuple[str, ...]:
        """Stored tensors that share an outer scale with this one, itself among them."""
        home, _, own = entry.name.removesuffix(".weight").rpartition(".")
        group = next((names for names in _FUSED if own in names), ())
        names = tuple(f"{home}.{name}.weight" for name in group if f"{home}.{name}.weight" in self._smaller)
        return names or (entry.name,)

    @cached_property
    def _smaller(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.entries if entry.smaller)

    def slots_of(self, entry: Entry) -> Iterator[Slot]:
        """The tensors that one entry becomes."""
        if not entry.modules:
            yield Slot(name=entry.name, code=entry.code, shape=entry.shape)
        for module in entry.modules:
            if not entry.smaller:
                yield Slot(name=module.name + ".weight", code=entry.code, shape=(module.rows, module.columns))
                continue
            layout = self.form.layout(module.rows, module.columns, scale_dtype(FLOATS[entry.code]))
            for part, (dtype, shape) in layout.items():
                yield Slot(name=f"{module.name}.{part}", code=CODES[dtype], shape=shape)


def make_recipe(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    form: Format,
    keep: Sequence[str] = (),
    experts_only: bool = False,
) -> QuantizationRecipe:
    """Decide on every tensor.

    Args:
        tensors: of the checkpoint, by published name: the format's name of the type, and the shape.
        keep: patterns with `*` and `?`; what a linear layer's name matches as a whole stays as it is. A stack of
            experts stays where the name of the stack or of any of its experts' layers does.
        experts_only: keep every linear layer that is not an expert's.
    """
    entries, notes, unmatched = [], [], set(keep)
    for name, (code, shape) in tensors.items():
        entry = _entry(name, code, shape)
        if entry.modules:
            names = [name.removesuffix(".weight"), *(module.name for module in entry.modules)]
            hit = {pattern for pattern in keep if any(fnmatch.fnmatchcase(n, pattern) for n in names)}
            unmatched -= hit
            fits = form.fits(entry.modules[0].columns)
            wanted = not hit and not (experts_only and entry.kind != "experts")
            if wanted and not fits:
                notes.append(f"{name} stays as it is: rows of {entry.modules[0].columns} do not fit {form.name}")
            entry = replace(entry, smaller=wanted and fits)
        entries.append(entry)
    notes += [f"nothing is called {pattern}: --keep has no effect" for pattern in sorted(unmatched)]
    final = tuple(_joined(entries))
    ignore = (*UNTOUCHED, *(name for entry in final if not entry.smaller for name in _ignored(entry)))
    return QuantizationRecipe(form=form, entries=final, ignore=tuple(dict.fromkeys(ignore)), notes=tuple(notes))


def _entry(name: str, code: str, shape: tuple[int, ...]) -> Entry:
    ours = our_name(name) or ""
    if (found := _LINEAR.fullmatch(ours)) and len(shape) == 2:
        linear = Module(name=name.removesuffix(".weight"), rows=shape[0], columns=shape[1])
        return Entry(name=name, code=code, shape=shape, kind=_kind(name, found), modules=(linear,))
    if (found := _STACK.fullmatch(ours)) and len(shape) == 3:
        modules = tuple(_experts(name.rpartition(".")[0], found["which"], shape))
        return Entry(name=name, code=code, shape=shape, kind="experts", modules=modules)
    return Entry(name=name, code=code, shape=shape, kind="kept")


def _kind(name: str, found: re.Match[str]) -> str:
    if found["expert"]:
        return "experts"
    if ".self_attn." in name:
        return "attention"
    return "dense MLP" if ".mlp." in name else "self-conditioning"


def _experts(home: str, which: str, shape: tuple[int, ...]) -> Iterator[Module]:
    count, rows, columns = shape
    names = ("gate_proj", "up_proj") if which == "gate_up" else ("down_proj",)
    size = rows // len(names)
    for expert in range(count):
        for place, name in enumerate(names):
            full = f"{home}.{expert}.{name}"
            yield Module(name=full, rows=size, columns=columns, expert=expert, start=place * size)


def _joined(entries: Iterable[Entry]) -> Iterator[Entry]:
    """A layer's stacks are written one by one both, or neither: no reader takes half a layer's experts stacked."""
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
