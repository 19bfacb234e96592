"""How `run` asks a model: by the chat template that it has, or with the plain prompt; and how a chat looks.

Invariant: thoughts never go to stdout when it is no terminal, so that what is piped on is the answer alone.

Run it:  blockpress run ./my-checkpoint "What is 17 * 23?" --thinking
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """A model and how it is asked. `chat`: by its chat template; else prompts are given as they are.

    `shown`: parts of a message, images and videos, that stand before the text of a chat's first message. `record`: what
    an answer is recorded by.
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

    @property
    def mode(self) -> Mode:
        """How the model writes. Whether canvases are checked, their sampling says."""
        return "diffusion" if isinstance(self.sampling, Sampling) else "autoregressive"

    def stream(self, text: str, before: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """The events of the answer to `text`; `before`: the messages of a chat so far."""
        events = self._stream(text, before)
        return events if self.record is None else self.record.watch(text, events)

    def _stream(self, text: str, before: Sequence[dict[str, Any]]) -> Iterator[Event]:
        if not self.chat:
            return self.lm.stream(
                text, self.max_tokens, self.seed, self.sampling, mode=self.mode, logprobs=self.logprobs
            )
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
        )

    def opening(self) -> list[dict[str, Any]]:
        """The messages that every conversation begins with."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def message(self, text: str, *, first: bool) -> dict[str, Any]:
        """What the user says; the first message shows what is to be shown."""
        if first and self.shown:
            return {"role": "user", "content": [*self.shown, {"type": "text", "text": text}]}
        return {"role": "user", "content": text}


class ChatView:
    """A `TextView` whose thoughts, dimmed, and calls leave upwards before the answer does."""

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
        """The run is over; `verdict` says in words how it ended."""
        self._view.finish(verdict)

    def release(self) -> Sequence[Text]:
        lines, self._released = self._released, []
        return [*lines, *self._view.release()]

    def draw(self, width: int, height: int) -> Sequence[Text]:
        return self._view.draw(width, height)


class Stream:
    """An answer as text that comes: on stdout, and beside it what an `Aside` prints."""

    def __init__(self) -> None:
        self._aside, self._watched = Aside(), is_terminal(sys.stdout)
        self._open = False

    def see(self, event: Event) -> None:
        """Print the event's text, and behind the last a line's end."""
        if self._open and (
            isinstance(event, Done)
            or (self._watched and isinstance(event, ReasoningDelta | ToolCallEvent | MalformedToolCallEvent))
        ):
            print(flush=True)
            self._open = False
        self._aside.see(event)
        if isinstance(event, FinalText) and event.text:
            # A terminal would obey what a file only holds.
            print(without_controls(event.text) if self._watched else event.text, end="", flush=True)
            self._open = not event.text.endswith("\n")


class Aside:
    """What a chat says beside its answer, on stderr: thoughts (dimmed on a terminal) and calls."""

    def __init__(self) -> None:
        self._dim = is_terminal(sys.stderr)
        self._open = False

    def see(self, event: Event) -> None:
        """Print the event if it is one of those."""
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
    """A call as the model wrote it, and why it could not be read."""
    if isinstance(event, ToolCallEvent):
        return write_call(event.call.name, event.call.arguments)
    return f"no call ({event.call.fault}): {event.call.raw}"
