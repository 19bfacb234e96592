"""One request in the engine: its row, its context, and how much of the context is in pages.

    new --submit--> waiting --schedule--> running --end--> ended
                                          |     ^
                            pages run out |     | schedule, once there is room
                                          v     |
                                         preempted

Invariant: `context[:num_computed_tokens]` is what the request's pages hold, and nothing else; without pages it is 0.
Run it:  python -m pytest tests/engine/test_scheduler.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from blockpress.config import AutoregressiveSampling, LayerKind, Sampling
from blockpress.config.checks import value_text
from blockpress.errors import RequestError

if TYPE_CHECKING:  # a row imports torch, which scheduling does without
    from blockpress.decoding import SequenceState

Mode = Literal["diffusion", "autoregressive"]
State = Literal["new", "waiting", "running", "preempted", "ended"]


@dataclass(frozen=True)
class HashedImageSpan:
    """Soft tokens in a prompt: the position of the first, their number, and a digest of the image's features."""

    start: int
    length: int
    digest: bytes

    @property
    def stop(self) -> int:
        return self.start + self.length


@final
class Request:
    """One request. Requests compare by identity."""

    def __init__(self, row: SequenceState, sampling: Sampling | AutoregressiveSampling) -> None:
        self.row, self.sampling = row, sampling
        row.edits = sampling
        self.handle = self
        """The request that the caller holds: the engine works on a copy that no caller can change."""
        self.images = row.images
        """The features of the prompt's images, by the position of the first soft token; the copy has its own."""
        self.image_spans: tuple[HashedImageSpan, ...] = ()
        """The images of the prompt, in order; set when the request is submitted."""
        self.context = list(row.prompt)
        """The tokens of the context: the prompt, then what was committed."""
        self.last_commit_start = len(self.context)
        """The position at which the tokens of the last commit begin: they are read in one forward, never in chunks."""
        self.num_computed_tokens = 0
        """How many tokens of the context are in pages."""
        self.slot: int | None = None
        """The row of its canvas in `CanvasState`, 0 to max_running - 1; kept while it is preempted."""
        self.step = 0
        """Denoising steps done on the current canvas; 0: not started."""
        self.tables: dict[LayerKind, list[int]] = {}
        """Block tables, one per kind of layer: page i holds positions i*P to i*P + P - 1; DROPPED once released."""
        self.digests: list[bytes] = []
        """Digests of the context's full pages; computed once, as far as they were needed."""
        self.num_draft_tokens = 0
        """How many of the context's last tokens, from `last_commit_start` on, are a draft that is not yet verified."""
        self.state: State = "new"
        self.num_cached_tokens = 0
        """How many tokens of the prompt were in cached pages when it first ran; set on the caller's request."""
        self.first_run: float | None = None
        """When it left the queue, by `time.monotonic`; set on the caller's request."""
        self.number = -1
        """Its rank in order of submission."""

    def copy(self) -> Request:
        """The copy that an engine works on."""
        copy = Request(self.row, self.sampling)
        copy.handle = self
        copy.images = {start: features.detach().clone() for start, features in self.row.images.items()}
        return copy

    @property
    def mode(self) -> Mode:
        """How it is decoded: canvas by canvas, or one token at a time."""
        return "autoregressive" if isinstance(self.sampling, AutoregressiveSampling) else "diffusion"

    @property
    def num_logit_tokens(self) -> int:
        """How many of the context's last tokens must go through a forward because their hidden states are needed."""
        if self.num_draft_tokens:
            return self.num_draft_tokens
        if isinstance(self.sampling, AutoregressiveSampling):
            return 1
        return 1 if self.sampling.reads_drafts or self.row.logprobs is not None else 0

    @property
    def at_last_step(self) -> bool:
        """Whether the next step of its canvas is the last one allowed."""
        if isinstance(self.sampling, AutoregressiveSampling):
            return False
        return self.step + 1 == self.sampling.steps - self.row.skipped_steps(self.sampling.steps)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens of the context that are not in pages yet."""
        return len(self.context) - self.num_computed_tokens


def check_request(request: object) -> None:
    """Raises RequestError: what is handed in as a request is none."""
    if not isinstance(request, Request):
        raise RequestError(
            f"request is {value_text(request)}", hint="give a Request, as `LM.build_requests` makes them, one at a time"
        )
