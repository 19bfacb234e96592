"""How `run` prompts a model, by its chat template or with the plain prompt, and how a chat is displayed.

Invariant: thoughts go to stdout only on a terminal, so that a pipe receives the answer alone.

Run it:  blockpress run ./my-checkpoint "What is 17 * 23?" --thinking
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.text import Text

from blockpress.chat.tool_calls import write_call
from blockpress.cli.canvas import TextView
from blockpress.cli.terminal import is_terminal, note, without_controls
from blockpress.config import Sampling
from blockpress.decoding import Done, Event, MalformedToolCallEvent, ReasoningDelta, ToolCallEvent
from blockpress.decoding import Text as FinalText

if TYPE_CHECKING:
    from blockpress.cli.record import CanvasRecording
    from blockpress.config import AutoregressiveSampling
    from blockpress.lm import LM
    from blockpress.lm.arguments import Mode


@dataclass(frozen=True, kw_only=True)
class ChatSession:
    """A model and how it is prompted. `chat`: by its chat template; otherwise prompts are passed as they are.

    `shown`: message parts (images and videos) that precede the text of a chat's first message. `record`:
    where answers are recorded. `constraint`: what the answer must be, as arguments of `LM.generate`.
    """

    lm: LM
    sampling: Sampling | AutoregressiveSampling
    max_tokens: int | None
    seed: int
    chat: bool
    logprobs: int | None = None
    system: str | None = None
    thinking: bool = False
    thinking_budget: int | None = None
    shown: tuple[dict[str, Any], ...] = ()
    soft_tokens: int | None = None
    record: CanvasRecording | None = None
    constraint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """The decoding mode; whether canvases are verified is part of the sampling (`checks`)."""
        return "diffusion" if isinstance(self.sampling, Sampling) else "autoregressive"

    def stream(self, text: str, before: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """The events of the answer to `text`; `before`: the messages of a chat so far."""
        events = self._stream(text, before)
        return events if self.record is None else self.record.watch(text, events)

    def _stream(self, text: str, before: Sequence[dict[str, Any]]) -> Iterator[Event]:
        if not self.chat:
            how: dict[str, Any] = {"mode": self.mode, "logprobs": self.logprobs, **self.constraint}
            return self.lm.stream(text, self.max_tokens, self.seed, self.sampling, **how)
        return self.lm.chat_stream(
            [*self.opening(), *before, self.message(text, first=not before)],
            thinking=self.thinking,
            thinking_budget=self.thinking_budget,
            max_tokens=self.max_tokens,
            seed=self.seed,
            sampling=self.sampling,
            soft_tokens=self.soft_tokens,
            mode=self.mode,
            logprobs=self.logprobs,
            **self.constraint,
        )

    def opening(self) -> list[dict[str, Any]]:
        """The messages that every conversation starts with."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def message(self, text: str, *, first: bool) -> dict[str, Any]:
        """A user message; the first one carries the images and videos."""
        if first and self.shown:
            return {"role": "user", "content": [*self.shown, {"type": "text", "text": text}]}
        return {"role": "user", "content": text}


class ChatView:
    """A `TextView` whose thoughts (dimmed) and calls scroll out above before the answer does."""

    def __init__(self, lm: LM, sampling: Sampling) -> None:
        self._view = TextView(lm, sampling)
        self.meter = self._view.meter
        self._released: list[Text] = []
        self._tail = ""

    def see(self, event: Event) -> None:
        if isinstance(event, ReasoningDelta):
            *lines, self._tail = (self._tail + without_controls(event.text)).split("\n")
            self._released += [Text(line, style="dim") for line in lines]
        elif isinstance(event, ToolCallEvent | MalformedToolCallEvent | FinalText | Done):
            self._released += [Text(self._tail, style="dim")] if self._tail else []
            self._tail = ""
        if isinstance(event, ToolCallEvent | MalformedToolCallEvent):
            self._released.append(Text(without_controls(event_text(event)), style="dim"))
        self._view.see(event)

    def finish(self, verdict: str) -> None:
        """End the run; `verdict` describes how it ended."""
        self._view.finish(verdict)

    def release(self) -> Sequence[Text]:
        lines, self._released = self._released, []
        return [*lines, *self._view.release()]

    def draw(self, width: int, height: int) -> Sequence[Text]:
        return self._view.draw(width, height)


class Stream:
    """Prints an answer to stdout as its text becomes final, and thoughts and calls by an `Aside`."""

    def __init__(self) -> None:
        self._aside, self._watched = Aside(), is_terminal(sys.stdout)
        self._open = False

    def see(self, event: Event) -> None:
        """Print the event's text, and a line end after the last."""
        if self._open and (
            isinstance(event, Done)
            or (self._watched and isinstance(event, ReasoningDelta | ToolCallEvent | MalformedToolCallEvent))
        ):
            print(flush=True)
            self._open = False
        self._aside.see(event)
        if isinstance(event, FinalText) and event.text:
            # A terminal would execute control characters; a file only stores them.
            print(without_controls(event.text) if self._watched else event.text, end="", flush=True)
            self._open = not event.text.endswith("\n")


class Aside:
    """Prints thoughts (dimmed on a terminal) and calls to stderr."""

    def __init__(self) -> None:
        self._dim = is_terminal(sys.stderr)
        self._open = False

    def see(self, event: Event) -> None:
        """Print the event if it is a thought or a call."""
        if isinstance(event, ReasoningDelta):
            text = without_controls(event.text) if self._dim else event.text
            print(f"\x1b[2m{text}\x1b[0m" if self._dim else text, end="", file=sys.stderr, flush=True)
            self._open = True
        elif isinstance(event, FinalText | ToolCallEvent | MalformedToolCallEvent | Done) and self._open:
            print(file=sys.stderr, flush=True)
            self._open = False
        if isinstance(event, ToolCallEvent | MalformedToolCallEvent):
            note(without_controls(event_text(event)))


def event_text(event: ToolCallEvent | MalformedToolCallEvent) -> str:
    """A call as text; if malformed, as the model wrote it, with the fault."""
    if isinstance(event, ToolCallEvent):
        return write_call(event.call.name, event.call.arguments)
    return f"no call ({event.call.fault}): {event.call.raw}"
