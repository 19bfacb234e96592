"""Typed decisions: from contexts and questions to prompts and pinned canvases, and from what is read there to answers.

The prefill of a context is one pass of the network, not the engine's: its pages hold contexts of canvases that are as
long as the model's, and its steps read all of a canvas from the vocabulary (ADR 0032).

Invariant: a context's answers do not depend on the other contexts of the call, and everything is checked before the
first forward.
Run it:  python -m pytest tests/lm/test_decide.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

from blockpress.chat import Chat, EncodedChat
from blockpress.config import GenerationConfig
from blockpress.config.checks import is_count, value_text
from blockpress.decide import Decision, DecisionUsage
from blockpress.decide.answers import answer_question
from blockpress.decide.form import DecisionForm, FormBuilder
from blockpress.decide.questions import Question, check_questions
from blockpress.decoding.slots import read_slots
from blockpress.diffusion import Schedule, step_rules
from blockpress.errors import BlockpressError, RequestError
from blockpress.lm.arguments import Conversation, is_integer
from blockpress.lm.rows import check_context_length, check_ids
from blockpress.model import Network, VisionTower
from blockpress.ops.computing import computing
from blockpress.text import Tokenizer

MOST_DRAWS = 1024
"""Most draws of noise that are averaged."""
MOST_STEPS = 1024

Context = str | Conversation


@final
class Decider:
    """Decides with one model. `chat`: its chat format, None without one. `tower`: what sees pictures."""

    def __init__(
        self,
        network: Network,
        generation: GenerationConfig,
        tokenizer: Tokenizer,
        chat: Chat | None,
        tower: Callable[[], VisionTower],
    ) -> None:
        self._network, self._generation, self._tokenizer = network, generation, tokenizer
        self._chat, self._tower = chat, tower
        closing = () if chat is None else chat.controls.stops[:1]
        fill = (*network.config.eos_ids, *generation.stop_ids, network.config.pad_id or 0)[0]
        sizes = {"canvas": network.config.canvas_length, "vocab": network.config.vocab_size}
        self._forms = FormBuilder(tokenizer, end=[*closing, fill], **sizes)

    def decide(
        self,
        context: Context | Sequence[Context],
        questions: Sequence[Question],
        *,
        form: Sequence[str] | None = None,
        steps: int = 1,
        draws: int = 1,
        seed: int = 0,
    ) -> Decision | list[Decision]:
        """`LM.decide`, which says what is what."""
        config = self._network.config
        if not config.has_canvas:
            raise RequestError(
                f"a decision is asked of a model of the family {config.family}, which has no canvas to read it from",
                hint="use DiffusionGemma, or `generate` with a choice",
            )
        asked = check_questions(questions)
        for name, count, most in (("steps", steps, MOST_STEPS), ("draws", draws, MOST_DRAWS)):
            if not is_count(count, 1, most):
                raise RequestError(
                    f"{name} is {value_text(count)}", hint=f"{name} must be a whole number from 1 to {most}"
                )
        if not is_integer(seed):
            raise RequestError(f"seed is {value_text(seed)}", hint="seed must be a whole number")
        layout = self._forms.listed(asked) if form is None else self._forms.given(asked, form)
        many = is_batch_of_contexts(context)
        prompts = self._prompts(context if many else [context], layout, many)
        sampling = self._generation.sampling
        schedule = Schedule(steps=int(steps), t_min=sampling.t_min, t_max=sampling.t_max)
        decisions = []
        for prompt in prompts:
            read = read_slots(
                self._network,
                prompt.ids,
                layout.canvases,
                schedule=schedule,
                accept=step_rules(sampling)[0],
                draws=int(draws),
                seed=int(seed),
                images=self._images(prompt),
            )
            answers = tuple(answer_question(question, logs) for question, logs in zip(asked, read.options, strict=True))
            usage = DecisionUsage(
                input_tokens=len(prompt.ids),
                output_tokens=sum(slot.width for canvas in layout.canvases for slot in canvas.slots),
                canvases=len(layout.canvases) * int(draws),
                forwards=read.forwards,
            )
            decisions.append(Decision(answers=answers, usage=usage))
        return decisions if many else decisions[0]

    def _prompts(self, contexts: Sequence[Any], layout: DecisionForm, many: bool) -> list[EncodedChat]:
        """Raises RequestError, TextError: they name what is wrong and, with `many`, the context's number."""
        config, prompts = self._network.config, []
        for number, context in enumerate(contexts):
            try:
                prompt = self._prompt(context, layout.text)
                check_ids(config, prompt.ids, "context")
                check_context_length(config, len(prompt.ids), len(layout.canvases[0].ids))
            except BlockpressError as error:
                if not many:
                    raise
                raise type(error)(f"context {number}: {error.message}", hint=error.hint) from error
            prompts.append(prompt)
        return prompts

    def _prompt(self, context: Any, text: str | None) -> EncodedChat:
        """The context with the questions after it; a chat goes on to its answer, after an empty thought."""
        if isinstance(context, str) and self._chat is None:
            whole = context if text is None else f"{context}\n\n{text}\n"
            return EncodedChat(ids=self._tokenizer.encode(whole), pictures=[], image_spans=[])
        if isinstance(context, bytes | Mapping) or not isinstance(context, Sequence):
            raise RequestError(f"context is {value_text(context)}", hint="give a text, or a list of messages")
        if self._chat is None:
            raise RequestError(
                f"context is {value_text(context)}, and the model has no chat template", hint="give a text"
            )
        encoded = self._chat.encode(with_questions(context, text))
        ids = after_thought(self._chat, self._tokenizer, encoded.ids)
        return EncodedChat(ids=ids, pictures=encoded.pictures, image_spans=encoded.image_spans)

    @computing()
    @torch.inference_mode()
    def _images(self, prompt: EncodedChat) -> Any:
        if not prompt.pictures:
            return None
        seen = zip(prompt.image_spans, self._tower()(prompt.pictures), strict=True)
        return [{span.start: features for span, features in seen}]


def after_thought(chat: Chat, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """A chat's prompt that goes on to the answer: after an empty thought, if the model has thoughts."""
    controls = chat.controls
    if controls.thought is None or ids[-1] == controls.thought_end:
        return ids
    opened = controls.section_after(ids) == "thought"
    thought = "<channel|>" if opened else "<|channel>thought\n<channel|>"
    return [*ids, *tokenizer.encode(thought, add_special=False)]


def with_questions(context: Any, text: str | None) -> Any:
    """The messages of a chat, with the questions' text at the end of the user's last one."""
    if isinstance(context, str):
        return [{"role": "user", "content": context if text is None else f"{context}\n\n{text}"}]
    if text is None or not isinstance(context, Sequence) or not context:
        return context
    last = context[-1]
    if isinstance(last, Mapping) and last.get("role") == "user":
        content = last.get("content")
        if isinstance(content, str):
            return [*context[:-1], {**last, "content": f"{content}\n\n{text}"}]
        if isinstance(content, list | tuple):
            return [*context[:-1], {**last, "content": [*content, {"type": "text", "text": f"\n\n{text}"}]}]
    return [*context, {"role": "user", "content": text}]


def is_batch_of_contexts(context: Any) -> bool:
    """Whether it is a list of contexts, rather than a text or one conversation.

    Raises:
        RequestError: it is none of them.
    """
    if isinstance(context, str):
        return False
    if isinstance(context, bytes | Mapping) or not isinstance(context, Sequence) or not context:
        raise RequestError(
            f"context is {value_text(context)}", hint="give a text, a list of messages, or a list of such contexts"
        )
    return not isinstance(context[0], Mapping)
