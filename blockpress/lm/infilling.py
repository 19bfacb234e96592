"""`LM.infill` and `LM.edit`: the part of the door that fills holes.

Invariant: every argument is checked here, by name, before the first forward.
Run it:  python -m pytest tests/lm/test_infill.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Unpack, overload

from blockpress.decoding import Event, Reply
from blockpress.lm.execute import Answer
from blockpress.lm.fills import EditOptions, InfillOptions
from blockpress.lm.rounds import replies_of

if TYPE_CHECKING:
    from blockpress.lm.requests import RequestBuilder


class Infilling:
    """What `LM` offers to fill holes; the model is LM's."""

    answer: Answer

    if TYPE_CHECKING:

        @property
        def _builder(self) -> RequestBuilder: ...

    @overload
    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        **options: Unpack[InfillOptions],
    ) -> Reply: ...

    @overload
    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | None = None,
        max_tokens: int | None = None,
        *,
        seed: Sequence[int],
        **options: Unpack[InfillOptions],
    ) -> list[Reply]: ...

    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | None = None,
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        **options: Unpack[InfillOptions],
    ) -> Reply | list[Reply]:
        """Fill the hole between two texts, or the holes between the texts of a list (docs/infilling.md).

        Args:
            prefix: the text before the hole; or the texts around several, and no `suffix`.
            max_tokens: most tokens that each hole may add to the text; None: four canvases of them.
            seed: as in `generate`; with a list of them there is a reply for each.
            options: `lm.fills.InfillOptions`.

        Returns:
            a `Reply`: `text` is the hole, or all of them joined, `holes` each, `whole` the text with all of them.

        Raises:
            RequestError, PromptTooLong, TextError: what cannot be honoured, before any forward.
        """
        return replies_of(self.infill_stream(prefix, suffix, max_tokens, seed, **options), seed)

    def infill_stream(
        self,
        prefix: str | Sequence[str],
        suffix: str | None = None,
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        **options: Unpack[InfillOptions],
    ) -> Iterator[Event]:
        """As `infill`, but gives events: `Denoised` per step, `Text` per hole, and `Done`."""
        return self._builder.fills.infill(self.answer, prefix, suffix, max_tokens, seed, **options)

    @overload
    def edit(
        self,
        text: str,
        span: tuple[int, int],
        instruction: str | None = None,
        noise: float | None = 0.5,
        seed: int = 0,
        **options: Unpack[EditOptions],
    ) -> Reply: ...

    @overload
    def edit(
        self,
        text: str,
        span: tuple[int, int],
        instruction: str | None = None,
        noise: float | None = 0.5,
        *,
        seed: Sequence[int],
        **options: Unpack[EditOptions],
    ) -> list[Reply]: ...

    def edit(
        self,
        text: str,
        span: tuple[int, int],
        instruction: str | None = None,
        noise: float | None = 0.5,
        seed: int | Sequence[int] = 0,
        **options: Unpack[EditOptions],
    ) -> Reply | list[Reply]:
        """Write a span of a text anew, starting from what stands there.

        Args:
            span: (start, stop), in characters.
            instruction: what to do; None: nothing is said, and the text around the span decides.
            noise: how much of the old text noise replaces at the start, from 0 (none) to 1.
            options: `lm.fills.EditOptions`.

        Returns, raises: as `infill`; `text` is what stands in the span now.
        """
        return replies_of(self.edit_stream(text, span, instruction, noise, seed, **options), seed)

    def edit_stream(
        self,
        text: str,
        span: tuple[int, int],
        instruction: str | None = None,
        noise: float | None = 0.5,
        seed: int | Sequence[int] = 0,
        **options: Unpack[EditOptions],
    ) -> Iterator[Event]:
        """As `edit`, but gives the events of `infill_stream`."""
        return self._builder.fills.edit(self.answer, text, span, instruction, noise, seed, **options)
