"""One answer under way, as the engine sees it: its row, its context, and how much of that is in pages.

    new --submit--> waiting --plan--> running --end--> ended
                                      |     ^
                               pages run out |  plan, once there is room
                                      v     |
                                      preempted

Invariant: `context[:num_computed_tokens]` is what the request's pages hold, and nothing else; without pages it is 0.
Run it:  python -m pytest tests/engine/test_scheduler.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from blockpress.config import AutoregressiveSampling, LayerKind, Sampling

if TYPE_CHECKING:  # a row knows torch, and this room plans without it
    from blockpress.decoding import SequenceState

Mode = Literal["diffusion", "autoregressive"]
State = Literal["new", "waiting", "running", "preempted", "ended"]


@dataclass(frozen=True)
class HashedImageSpan:
    """Soft tokens in a prompt: the place of the first, how many they are, and a digest of what they show."""

    start: int
    length: int
    digest: bytes

    @property
    def stop(self) -> int:
        return self.start + self.length


@final
class Request:
    """One answer under way. Two requests are never equal, however alike they are."""

    def __init__(self, row: SequenceState, sampling: Sampling | AutoregressiveSampling) -> None:
        self.row, self.sampling = row, sampling
        self.image_spans: tuple[HashedImageSpan, ...] = ()
        """What the prompt shows, in order; filled in before the request is submitted."""
        self.context = list(row.prompt)
        """The tokens that are context: the prompt, then what was committed."""
        self.pending_start = len(self.context)
        """Where in the context the tokens of the last commit begin: they are read in one forward."""
        self.num_computed_tokens = 0
        """How many tokens of the context are in pages."""
        self.slot: int | None = None
        """The place of its canvas in the runner, 0 to max_running - 1; kept while it is preempted."""
        self.step = 0
        """Denoising steps done on the canvas under way; 0: not begun."""
        self.tables: dict[LayerKind, list[int]] = {}
        """Page ids of each kind of layer: entry i holds positions i*P to i*P + P - 1; DROPPED where let go."""
        self.digests: list[bytes] = []
        """What the whole pages of the context hold; computed once, as far as it was needed."""
        self.num_draft_tokens = 0
        """How many of the context's last tokens, from `pending_start` on, are a draft that is not yet verified."""
        self.state: State = "new"
        self.number = -1
        """Its turn: requests are numbered as they are submitted."""

    @property
    def mode(self) -> Mode:
        """How it is answered: canvas by canvas, or token by token."""
        return "autoregressive" if isinstance(self.sampling, AutoregressiveSampling) else "diffusion"

    @property
    def num_logit_tokens(self) -> int:
        """How many of the context's last tokens must go through a forward, since their hidden states are wanted."""
        if self.num_draft_tokens:
            return self.num_draft_tokens
        if isinstance(self.sampling, AutoregressiveSampling):
            return 1
        return 1 if self.sampling.checks or self.row.logprobs is not None else 0

    @property
    def num_pending_tokens(self) -> int:
        """Tokens of the context that are not in pages yet."""
        return len(self.context) - self.num_computed_tokens
