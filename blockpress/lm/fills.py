"""What calls of `infill` and `edit` ask for, checked.

Invariant: what cannot be filled is refused by the name of its argument, before any forward.
Run it:  python -m pytest tests/lm/test_infill.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Unpack, cast, final

from blockpress.chat import Chat
from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.config.checks import is_count, value_text
from blockpress.decoding import Cancel, Event
from blockpress.errors import RequestError
from blockpress.lm.arguments import AnySampling, ConstraintOptions, as_list, check_cancel, check_edits, is_integer
from blockpress.lm.constraints import ConstraintCache
from blockpress.lm.decide import after_thought
from blockpress.lm.execute import Answer
from blockpress.lm.given import check_noise
from blockpress.lm.infill import Fill, Infiller
from blockpress.lm.rounds import run_fills
from blockpress.lm.seams import Seams
from blockpress.model import Network
from blockpress.text import Tokenizer

CANVASES = 4
"""How many canvases a hole may fill if `max_tokens` is not given."""
FILL = "<fill>"
"""What marks a hole where the text is shown to the model."""


class InfillOptions(ConstraintOptions, total=False):
    """The options of `LM.infill`.

    instruction: what the text answers; it stands before the text, by the chat template where the model has one.
    sampling: how canvases are denoised; None: the checkpoint's. cancel: as in `LM.generate`. regex, choice, schema,
    grammar: what the hole must be, if there is one.
    """

    instruction: str | None
    sampling: AnySampling | None
    cancel: Cancel | None


class EditOptions(ConstraintOptions, total=False):
    """The options of `LM.edit`. max_tokens: most tokens that the new text adds. The others as in `InfillOptions`."""

    max_tokens: int | None
    sampling: AnySampling | None
    cancel: Cancel | None


def read_pieces(prefix: object, suffix: object) -> tuple[str, ...]:
    """The texts around the holes. Raises RequestError: they are no texts, or leave no hole."""
    if isinstance(prefix, str):
        if not isinstance(suffix, str):
            raise RequestError(
                f"suffix is {value_text(suffix)}", hint="give the text after the hole; '' if there is none"
            )
        return prefix, suffix
    if not isinstance(prefix, Sequence) or not all(isinstance(piece, str) for piece in prefix):
        raise RequestError(f"prefix is {value_text(prefix)}", hint="give a text, or the list of texts around the holes")
    if suffix is not None:
        raise RequestError(
            f"suffix is {value_text(suffix)} beside a list of texts", hint="put it at the end of the list"
        )
    pieces = tuple(prefix)
    if len(pieces) < 2:
        raise RequestError(f"prefix has {len(pieces)} texts", hint="give one more than there are holes")
    for number, piece in enumerate(pieces[1:-1], 1):
        if not piece:
            raise RequestError(f"prefix[{number}] is empty", hint="two holes need text between them: make them one")
    return pieces


def read_span(text: object, span: object) -> tuple[str, str, str]:
    """The text before, in and after a span of characters. Raises RequestError: the span is none of the text."""
    if not isinstance(text, str):
        raise RequestError(f"text is {value_text(text)}", hint="give a text")
    if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 2 or not all(map(is_integer, span)):
        raise RequestError(f"span is {value_text(span)}", hint="span must be (start, stop), positions in the text")
    start, stop = (int(place) for place in span)
    if not 0 <= start <= stop <= len(text):
        raise RequestError(
            f"span is ({start}, {stop}), and the text has {len(text)} characters",
            hint=f"give 0 <= start <= stop <= {len(text)}",
        )
    return text[:start], text[start:stop], text[stop:]


def check_fill(
    sampling: AnySampling | None, config: ModelConfig, default: Sampling, max_tokens: object, instruction: object
) -> Sampling:
    """The sampling of a fill. Raises RequestError: an argument that is wrong, or that a fill cannot honour."""
    if not config.has_canvas:
        raise RequestError(
            f"a model of the family {config.family} has no canvas, which infilling needs",
            hint="use one that has, or `generate`",
        )
    chosen = default if sampling is None else sampling
    if not isinstance(chosen, Sampling):
        raise RequestError(f"sampling is {value_text(chosen)}", hint="give a blockpress.Sampling")
    if chosen.stop:
        raise RequestError(f"sampling.stop is {chosen.stop!r}", hint="leave it out: a hole ends at the text after it")
    for field in ("max_verifications", "max_repairs"):
        if getattr(chosen, field):
            raise RequestError(
                f"sampling.{field} is {getattr(chosen, field)}, and the causal pass does not see what follows a hole",
                hint=f"leave {field} out",
            )
    check_edits(chosen, config)
    if max_tokens is not None and not is_count(max_tokens):
        raise RequestError(
            f"max_tokens is {value_text(max_tokens)}", hint="max_tokens must be a whole number from 1, or None"
        )
    if instruction is not None and (not isinstance(instruction, str) or not instruction.strip()):
        raise RequestError(f"instruction is {value_text(instruction)}", hint="give a text, or None")
    return chosen


@final
class FillBuilder:
    """Makes the fillers of one model's calls. chat: None for a model without a chat template."""

    def __init__(
        self,
        network: Network,
        generation: GenerationConfig,
        tokenizer: Tokenizer,
        chat: Chat | None,
        constraints: ConstraintCache,
    ) -> None:
        self._network, self._generation, self._tokenizer = network, generation, tokenizer
        self._chat, self._constraints = chat, constraints

    def infill(
        self,
        answer: Answer,
        prefix: str | Sequence[str],
        suffix: str | None,
        max_tokens: int | None,
        seed: int | Sequence[int],
        *,
        instruction: str | None = None,
        sampling: AnySampling | None = None,
        cancel: Cancel | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> Iterator[Event]:
        """The events of `LM.infill`, a row for each seed. Raises as that."""
        pieces = read_pieces(prefix, suffix)
        chosen = check_fill(sampling, self._network.config, self._generation.sampling, max_tokens, instruction)
        hole = self._constraints.hole(constraint)
        if hole is not None and len(pieces) > 2:
            raise RequestError(
                f"{hole[1]} is given for {len(pieces) - 1} holes", hint="fill one hole at a time, each with its own"
            )
        shape: dict[str, Any] = {} if hole is None else {"hole": hole[0], "about": hole[1]}
        fill: dict[str, Any] = {"sampling": chosen, "most": self._most(max_tokens), **shape}
        return self._run(answer, check_cancel(cancel), pieces, instruction, FILL.join(pieces), seed, **fill)

    def edit(
        self,
        answer: Answer,
        text: str,
        span: tuple[int, int],
        instruction: str | None,
        noise: float | None,
        seed: int | Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: AnySampling | None = None,
        cancel: Cancel | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> Iterator[Event]:
        """The events of `LM.edit`, a row for each seed. Raises as that."""
        before, old, after = read_span(text, span)
        level = check_noise(noise)
        chosen = check_fill(sampling, self._network.config, self._generation.sampling, max_tokens, instruction)
        hole = self._constraints.hole(constraint)
        given: dict[str, Any] = {} if hole is None else {"hole": hole[0], "about": hole[1]}
        given |= {} if level == 1 or not old else {"old": old, "noise": level}
        fill: dict[str, Any] = {"sampling": chosen, "most": self._most(max_tokens), **given}
        return self._run(answer, check_cancel(cancel), (before, after), instruction, text, seed, **fill)

    def _most(self, max_tokens: int | None) -> int:
        return CANVASES * self._network.config.canvas_length if max_tokens is None else int(max_tokens)

    def _run(
        self,
        answer: Answer,
        cancel: Cancel | None,
        pieces: tuple[str, ...],
        instruction: str | None,
        shown: str,
        seed: int | Sequence[int],
        **fill: Any,
    ) -> Iterator[Event]:
        config = self._network.config
        base, stop_ids = self._base(instruction, shown)
        seeds = [cast("int", seed)] if is_integer(seed) else as_list(cast("Sequence[int]", seed), "seed")
        if not seeds:
            raise RequestError("seed is empty", hint="give at least one")
        fillers = [
            Infiller(
                Fill(pieces=pieces, base=base, stop_ids=stop_ids, seed=int(each), **fill),
                self._seams,
                config.canvas_length,
                config.context_length,
            )
            for each in seeds
        ]
        fillers[0].check()
        return run_fills(answer, self._network, [filler.run() for filler in fillers], cancel)

    def _base(self, instruction: str | None, shown: str) -> tuple[list[int], tuple[int, ...]]:
        """What stands before the text, and the ids that end it."""
        stop_ids = tuple(self._generation.stop_ids)
        if instruction is None:
            return self._tokenizer.encode("") or [stop_ids[0]], stop_ids
        if self._chat is None:
            return self._tokenizer.encode(instruction), stop_ids
        encoded = self._chat.encode([{"role": "user", "content": f"{instruction}\n\n{shown}"}])
        return after_thought(self._chat, self._tokenizer, encoded.ids), (*self._chat.controls.stops, *stop_ids)

    @cached_property
    def _seams(self) -> Seams:
        vocabulary = self._constraints.vocabulary
        pieces = self._tokenizer.token_bytes()[: vocabulary.size]
        return Seams(self._tokenizer, vocabulary, [*pieces, *[None] * (vocabulary.size - len(pieces))])
