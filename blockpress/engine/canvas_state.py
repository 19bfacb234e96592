"""The state of canvases between two forwards: one row ("slot") of a few tensors per running request.

    slot     canvas    what the next step reads                 signal      self-conditioning embedding of the last step
             argmax    of the last step, to detect changes      unchanged   consecutive steps without a change
             pins      tokens that it must hold, or UNPINNED    banned      which of `ids` each position must not take
             start     tokens in its first noise, or UNPINNED       decided  accepted tokens, of canvases with penalties
    padding  the last row, for padding entries of a batch

`ids` is the union of what all running requests ban, padded with ids that none bans: so the tensors keep their shapes
while requests come and go, and the addresses in a captured step stay valid.

Invariant: a slot belongs to its request from the first step of its first canvas to its end, preemption included.
Run it:  python -m pytest tests/engine/test_runner.py
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from itertools import islice

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from blockpress.config import Sampling
from blockpress.diffusion.pins import UNPINNED
from blockpress.engine.request import Request
from blockpress.model import Network
from blockpress.ops.transfer import to_device

MIN_IDS = 8


@dataclass(frozen=True, kw_only=True)
class StepFeatures:
    """Optional features that the canvases of a forward need: a forward without them does not pay for them.

    begins: some canvas is at its first step. pinned: some canvas has pins. banned: the number of `ids`, 0 if no canvas
    bans any. custom: some canvas has a custom rule for accepting or settling, a constraint, or edited logits.
    goes_on: some canvas has a further step, which needs the self-conditioning embedding; captured steps compute it in
    any case.
    """

    begins: bool = True
    pinned: bool = False
    banned: int = 0
    custom: bool = False
    goes_on: bool = True


class CanvasState:
    """State for `count` canvases of a network's length. A network without canvases takes no memory here."""

    def __init__(self, network: Network, count: int) -> None:
        config, self._device = network.config, network.device
        self._vocab, self.length = config.vocab_size, config.canvas_length if config.has_canvas else 0
        shape = (count + 1, self.length)
        self.padding_slot = count
        self.canvas = torch.zeros(shape, dtype=torch.long, device=self._device)
        self.argmax = torch.zeros(shape, dtype=torch.long, device=self._device)
        self.signal = torch.zeros((*shape, config.hidden_size), dtype=network.dtype, device=self._device)
        self.unchanged = torch.zeros(count + 1, dtype=torch.long, device=self._device)
        self.pins = torch.full(shape, UNPINNED, device=self._device)
        self.start = torch.full(shape, UNPINNED, device=self._device)
        self.decided = torch.full(shape, UNPINNED, device=self._device)
        self.ids: Int[Tensor, " ids"] = torch.empty(0, dtype=torch.long, device=self._device)
        self.banned: Bool[Tensor, "slots canvas ids"] = torch.zeros((*shape, 0), dtype=torch.bool, device=self._device)
        self._column: dict[int, int] = {}
        self._owner: dict[int, Request] = {}
        self._bans: dict[int, Mapping[int, Container[int]]] = {}
        self._pinned: set[int] = set()
        self._held: dict[int, Mapping[int, int]] = {}
        """The pins that each slot holds; a row that pins more has others."""
        self._started: set[int] = set()

    def begin(self, requests: Sequence[Request]) -> StepFeatures:
        """Write what is given of canvases before their first step, and pins that have changed; returns which features
        the step needs."""
        starting = [request for request in requests if request.step == 0]
        for request in requests:
            slot = slot_of(request)
            if self._held.get(slot) is not request.row.pins:
                self._held[slot] = request.row.pins
                self._put(slot, request.row.pins, self.pins, self._pinned)
        for request in starting:
            slot = slot_of(request)
            self._owner[slot], self._bans[slot] = request, dict(request.row.banned_ids)
            self._put(slot, request.row.start, self.start, self._started)
        if any(token not in self._column for request in starting for token in self._bans[slot_of(request)]):
            self._gather_ids()
        elif len(self.ids):
            for request in starting:
                self._ban(slot_of(request))
        slots = [slot_of(request) for request in requests]
        return StepFeatures(
            begins=bool(starting),
            pinned=any(slot in self._pinned for slot in slots),
            banned=len(self.ids) if any(self._bans[slot] for slot in slots) else 0,
            custom=any(has_custom_rules(request) or needs_own_pass(request) for request in requests),
            goes_on=not requests or not all(request.at_last_step for request in requests),
        )

    def _put(self, slot: int, given: Mapping[int, int], tokens: Int[Tensor, "slots canvas"], used: set[int]) -> None:
        """Write given tokens to a slot; `used`: the slots that have any."""
        if given:
            tokens[slot] = to_device(torch.tensor([given.get(i, UNPINNED) for i in range(self.length)]), self._device)
            used.add(slot)
        elif slot in used:
            tokens[slot] = UNPINNED
            used.discard(slot)

    def _gather_ids(self) -> None:
        """The union of what the running requests ban; new tensors only if it does not fit the present ones."""
        for slot in [slot for slot, owner in self._owner.items() if owner.slot != slot]:
            del self._owner[slot], self._bans[slot]
        ids = sorted({token for banned in self._bans.values() for token in banned})
        width = min(self._vocab, max(MIN_IDS, len(self.ids), 1 << (len(ids) - 1).bit_length()))
        known = set(ids)
        ids += islice((other for other in numbers() if other not in known), width - len(ids))
        self._column = {token: column for column, token in enumerate(ids)}
        if width > len(self.ids):
            self.ids = torch.empty(width, dtype=torch.long, device=self._device)
            self.banned = torch.zeros(*self.pins.shape, width, dtype=torch.bool, device=self._device)
        self.ids.copy_(to_device(torch.tensor(ids), self._device))
        for slot in self._owner:
            self._ban(slot)

    def _ban(self, slot: int) -> None:
        if not self._bans[slot]:
            self.banned[slot] = False
            return
        mask = torch.zeros(self.length, len(self.ids), dtype=torch.bool)
        for token, positions in self._bans[slot].items():
            mask[:, self._column[token]] = torch.tensor([i in positions for i in range(self.length)])
        self.banned[slot] = to_device(mask, self._device)


def has_custom_rules(request: Request) -> bool:
    """Whether a request has a custom rule for accepting or settling."""
    sampling = request.sampling
    return isinstance(sampling, Sampling) and not (sampling.accept is None and sampling.settle is None)


def needs_own_pass(request: Request) -> bool:
    """Whether the vocabulary is read for a request's canvas alone: it has a constraint, or edited logits."""
    edits = request.row.edits
    return request.row.constraint is not None or edits.edits_logits or edits.truncates


def slot_of(request: Request) -> int:
    """The slot of a running request."""
    assert request.slot is not None, "a running request has a slot"
    return request.slot
