"""What `run` prints of an answer: its events and its end, as JSON and in words.

Invariant: JSON has plain names and numbers only, the same for every model; in words, counts of 0 are left out.

Run it:  blockpress run sudoku-nano --events < puzzle.txt
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockpress.decoding import Event, Reply, TokenLogprob
    from blockpress.lm import LM


def reply_to_dict(reply: Reply, chat: bool = False) -> dict[str, Any]:
    """The reply as a JSON object; for a `chat` also its thoughts and calls."""
    chat_fields = {
        "thinking": reply.thinking,
        "tool_calls": [vars(call) for call in reply.tool_calls],
        "broken_calls": [vars(call) for call in reply.broken_calls],
    }
    return {
        "text": reply.text,
        **(chat_fields if chat else {}),
        "tokens": reply.tokens,
        **_logprobs(reply.logprobs),
        "finish_reason": reply.finish_reason,
        **({} if reply.invalid is None else {"invalid": reply.invalid}),
        **({} if reply.whole is None else {"holes": reply.holes, "whole": reply.whole}),
        "usage": vars(reply.usage),
    }


def event_to_dict(lm: LM, event: Event) -> dict[str, Any]:
    """The event as a JSON object; entropies in nats, and lists with one value for each position of the canvas."""
    from blockpress.decoding import (
        Committed,
        Denoised,
        Done,
        Failed,
        MalformedToolCallEvent,
        ReasoningDelta,
        ToolCallEvent,
    )

    if isinstance(event, Denoised):
        return {
            "event": "step",
            "canvas": event.canvas,
            "retry": event.retry,
            "verifications": event.verifications,
            "repairs": event.repairs,
            "step": event.step,
            "text": None if lm.tokenizer is None else lm.decode(event.argmax),
            "tokens": event.argmax.tolist(),
            "accepted": event.accepted.tolist(),
            "changed": event.changed.tolist(),
            "entropy": [round(value, 4) for value in event.entropy.tolist()],
            "settled": event.settled,
        }
    if isinstance(event, Committed):
        commit = {"event": "commit", "canvas": event.canvas, "tokens": event.tokens, "steps": event.steps}
        return commit | _logprobs(event.logprobs)
    if isinstance(event, Done):
        chat = lm.tokenizer is not None and lm.tokenizer.chat_template is not None
        return {"event": "done", **reply_to_dict(event.reply, chat)}
    if isinstance(event, ToolCallEvent):
        return {"event": "call", **vars(event.call)}
    if isinstance(event, MalformedToolCallEvent):
        return {"event": "broken call", **vars(event.call)}
    if isinstance(event, Failed):
        return {"event": "failed", "error": str(event.error)}
    if isinstance(event, ReasoningDelta):
        return {"event": "thought", "text": event.text}
    return {"event": "text", "text": event.text}


def _logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
    """The logprobs of tokens, if there are any, each with those of the likeliest tokens at its position."""
    if logprobs is None:
        return {}
    return {
        "logprobs": [
            {
                "token": scored.token,
                "logprob": scored.logprob,
                "top": [{"token": token, "logprob": logprob} for token, logprob in scored.top],
            }
            for scored in logprobs
        ]
    }


def ended(reply: Reply) -> str:
    """How a reply ended, in words, with its canvases and steps, or in autoregressive decoding its forwards."""
    why = {"stop": "stopped", "length": "at its length", "tool_calls": "called", "cancelled": "cancelled"}
    usage = reply.usage
    work = _counted(usage.forwards, "forward")
    if usage.canvases or usage.steps:
        work = f"{_counted(usage.canvases, 'canvas', 'es')}, {_counted(usage.steps, 'step')}"
    work += f", {_counted(usage.verifications, 'verification')}" if usage.verifications else ""
    work += f", {_counted(usage.repairs, 'repair')}" if usage.repairs else ""
    extra = f", {usage.empty_retries} begun again because empty" if usage.empty_retries else ""
    extra += f", {_counted(usage.reasoning_tokens, 'token')} of thought" if usage.reasoning_tokens else ""
    extra += f"; {reply.invalid}" if reply.invalid else ""
    return f"{why[reply.finish_reason]} after {_counted(usage.completion_tokens, 'token')}: {work}{extra}"


def _counted(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{'' if count == 1 else plural}"
