"""Chats that show pictures and videos, from files of pixels to the answer, on a tiny network with a tower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

import blockpress
from blockpress import LM, Done
from blockpress.chat import Chat, ChatTemplate
from blockpress.checkpoints import load_picture_settings, load_vision
from blockpress.config import Sampling
from blockpress.decoding import SequenceState
from blockpress.decoding.generate import generate
from blockpress.errors import BlockpressError, MediaError, RequestError
from blockpress.model import Network
from blockpress.multimodal import expand, insert_placeholders, prepare_images
from blockpress.text import Tokenizer
from tests import chat_tokenizer
from tests.builders.chats import save_seeing

from . import published

PICTURE_TOKENS = ["<|image>", "<image|>", "<|video|>"]
TEMPLATE = ChatTemplate.own().source
SHORT = Sampling(steps=4)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """A model that was saved and loaded."""
    folder = tmp_path_factory.mktemp("seeing")
    save_seeing(folder)
    return blockpress.load(folder)


def image(seed: int, size: tuple[int, int] = (60, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def showing(*parts: Any) -> list[dict[str, Any]]:
    """A user's message: texts as they are, images, and parts that are given whole."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    content = [p if isinstance(p, dict) else {"type": "image", "image": p} for p in content]
    return [{"role": "user", "content": content}]


def test_a_chat_with_pictures_equals_its_steps_run_by_hand(lm: LM):
    one, two = image(1), image(2, (60, 70))
    settings = load_picture_settings(lm.path, lm.config)
    pictures = prepare_images([one, two], settings)
    text, shown = insert_placeholders("<bos><|turn>user\nSee <|image|> and <|image|>!<turn|>\n<|turn>model\n", pictures)
    assert shown == pictures
    assert lm.tokenizer is not None
    # The template of ours begins the answer with an empty thought.
    ids = lm.tokenizer.encode(text + "<|channel>thought\n<channel|>", add_special=False)
    prompt = expand(ids, [p.soft_tokens for p in pictures], lm.config)
    row = SequenceState(0, prompt.ids, 3, stop_ids=(1,), canvas_length=12, room=12)
    features = load_vision(lm.path, config=lm.config)(pictures)
    row.images = {run.start: f for run, f in zip(prompt.image_spans, features, strict=True)}
    (wanted,) = [event.reply for event in generate(lm.network, [row], SHORT) if isinstance(event, Done)]

    reply = lm.chat(showing("See ", one, " and ", two, "!"), seed=3, sampling=SHORT, max_tokens=12, retry_empty=False)
    assert reply.usage.prompt_tokens == len(prompt.ids)
    assert reply.tokens == wanted.tokens[: len(reply.tokens)]
    assert reply.tokens


def test_pictures_change_the_answer_and_batches_do_not(lm: LM):
    asked = [showing("See ", image(1)), showing("No picture."), showing("See ", image(9)), showing(image(4), image(5))]
    options: dict[str, Any] = {"sampling": SHORT, "max_tokens": 12, "retry_empty": False}
    alone = [lm.chat(question, seed=7, **options) for question in asked]
    assert [reply.tokens for reply in lm.chat(asked, seed=7, **options)] == [reply.tokens for reply in alone]
    assert alone[0].tokens != alone[2].tokens
    first, again = lm.chat(asked[0], seed=[7, 8], **options)
    assert first.tokens == alone[0].tokens != again.tokens


def chat_of(lm: LM) -> Chat:
    return Chat.of(lm.tokenizer, lm.path, lm.config, partial(load_picture_settings, lm.path, lm.config))


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_pictures_of_earlier_turns_keep_their_places(lm: LM):
    """Turns of the model and a tool's answer in between, and the first picture once more at the end."""
    one, two = image(1), image(2, (60, 70))
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {"at": "<|image|>"}}}
    talk = [
        *showing("First ", one),
        said("assistant", "I see <|image|> noise."),
        *showing(two, " and?"),
        said("assistant", "", tool_calls=[call]),
        said("tool", "<|image|>", tool_call_id="a"),
        said("assistant", "Noise."),
        *showing("Again ", one),
    ]
    question = chat_of(lm).encode(talk)
    settings = load_picture_settings(lm.path, lm.config)
    wanted = prepare_images([one, two, one], settings)
    assert [p.patches.tolist() for p in question.pictures] == [p.patches.tolist() for p in wanted]
    assert [run.length for run in question.image_spans] == [p.soft_tokens for p in wanted]
    assert all(set(question.ids[run.start : run.stop]) == {lm.config.image_id} for run in question.image_spans)
    assert sum(run.length for run in question.image_spans) == question.ids.count(lm.config.image_id or -1)
    # The same features at both places of the same picture, and another answer where the last one differs.
    (request,) = lm.build_chat_requests(talk)
    first, second, third = (request.row.images[run.start] for run in question.image_spans)
    assert torch.equal(first, third) and first.shape != second.shape
    options: dict[str, Any] = {"sampling": SHORT, "max_tokens": 12, "retry_empty": False, "seed": 3}
    assert lm.chat(talk, **options).tokens != lm.chat([*talk[:-1], *showing("Again ", image(3))], **options).tokens


def test_a_tool_may_show_pictures(lm: LM, film: Path):
    """The published template puts them after the result's text; their order is that of the messages."""
    one, two = image(1), image(2, (60, 70))
    calls = [{"id": name, "function": {"name": name}} for name in "ab"]
    parts = [{"type": "image", "image": one}, {"type": "text", "text": "seen"}]
    films = [{"type": "video", "video": str(film)}, {"type": "image", "image": two}]
    talk = [*showing("Look."), said("assistant", None, tool_calls=calls)]
    talk += [said("tool", films, name="b"), said("tool", parts, name="a"), *showing("And ", two)]
    wanted = prepare_images([two, one, two], load_picture_settings(lm.path, lm.config))
    for template in (TEMPLATE, published.SOURCE):
        assert lm.tokenizer is not None
        chat = Chat(lm.tokenizer, ChatTemplate(template), lm.config, partial(load_picture_settings, lm.path, lm.config))
        question = chat.encode(talk)
        assert len(question.pictures) == len(question.image_spans) == 6
        assert [p.patches.tolist() for p in question.pictures[3:]] == [p.patches.tolist() for p in wanted]
        after = lm.tokenizer.decode(question.ids[question.image_spans[4].stop :], skip_special=False)
        assert after.startswith("<image|><turn|>\n<|turn>user\nAnd")


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_rows_with_and_without_pictures_answer_as_alone(lm: LM, mode: Any):
    asked = [showing("No picture."), showing(image(4), "and", image(5)), showing("None."), showing("See ", image(1))]
    options: dict[str, Any] = {"mode": mode, "max_tokens": 10}
    # Random weights let rounding grow tenfold in a few steps, so there are few.
    options |= {"sampling": SHORT} if mode == "diffusion" else {}
    alone = [lm.chat(question, seed=7, **options).tokens for question in asked]
    assert [reply.tokens for reply in lm.chat(asked, seed=7, **options)] == alone
    assert [reply.tokens for reply in lm.chat(asked[::-1], seed=7, **options)] == alone[::-1]


def test_videos_need_no_token_of_their_own(lm: LM, film: Path):
    """A frame is an image, so none is needed; and a typed `<|video|>` beside a picture is text."""
    backend = chat_tokenizer.backend()
    backend.add_special_tokens([tokenizers.AddedToken(p, special=True, normalized=False) for p in PICTURE_TOKENS[:2]])
    tokenizer = Tokenizer(backend, chat_template=TEMPLATE)
    other = LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=tokenizer)
    assert backend.token_to_id("<|video|>") is None
    video = {"type": "video", "video": str(film)}
    assert [run.length for run in chat_of(other).encode(showing(video, "?")).image_spans] == [
        run.length for run in chat_of(lm).encode(showing(video, "?")).image_spans
    ]
    question = chat_of(other).encode(showing("I typed <|video|> and <|image|>: ", image(1)))
    assert len(question.image_spans) == 1
    assert "I typed <|video|> and " in tokenizer.decode(question.ids, skip_special=False)


def test_autoregressive_decoding_sees_pictures(lm: LM):
    question = chat_of(lm).encode(showing("See ", image(1)))
    with torch.inference_mode():
        images = [request.row.images for request in lm.build_chat_requests(showing("See ", image(1)))]
        hidden, _ = lm.network.read(torch.tensor([question.ids]), lm.network.empty_cache(1), images=images)
        wanted = int(lm.network.logits(hidden[:, -1:]).argmax())
    reply = lm.chat(showing("See ", image(1)), mode="autoregressive", max_tokens=1, retry_empty=False)
    assert reply.tokens == [wanted]
    assert (reply.usage.forwards, reply.usage.canvases) == (1, 0)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of noise."""
    file = tmp_path_factory.mktemp("film") / "noise.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for frame in _frames(12):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def _frames(count: int) -> Iterator[av.VideoFrame]:
    for number in range(count):
        yield av.VideoFrame.from_image(image(number, (64, 64)))


def test_a_video_is_a_frame_a_second(lm: LM, film: Path):
    message = [{"role": "user", "content": [{"type": "video", "video": str(film)}, {"type": "text", "text": "What?"}]}]
    question = chat_of(lm).encode(message)
    assert len(question.pictures) == len(question.image_spans) == 3
    assert lm.tokenizer is not None
    text = lm.tokenizer.decode([i for i in question.ids if i != lm.config.image_id], skip_special=False)
    assert "00:00 <|image><image|> 00:01 <|image><image|> 00:02 <|image><image|>What?" in text
    assert lm.chat(message, sampling=SHORT, max_tokens=3).usage.prompt_tokens == len(question.ids)


def test_fewer_soft_tokens_make_a_shorter_prompt(lm: LM):
    def tokens(count: int | None) -> int:
        return len(chat_of(lm).encode(showing(image(1)), soft_tokens=count).ids)

    assert tokens(70) < tokens(None)
    with pytest.raises(BlockpressError, match="71"):
        tokens(71)


def test_a_placeholder_that_somebody_typed_is_text(lm: LM):
    question = chat_of(lm).encode(showing("I typed <|image|> and show ", image(1)))
    assert len(question.pictures) == len(question.image_spans) == 1
    assert chat_of(lm).encode([{"role": "user", "content": "<|image|>"}]).pictures == []


@pytest.mark.parametrize(
    ("source", "kind"),
    [(b"no image", MediaError), ("/nowhere.png", BlockpressError), ("data:image/png;base64,AAAA", MediaError)],
)
def test_a_bad_picture_is_named_by_its_field(lm: LM, source: Any, kind: type[BlockpressError]):
    with pytest.raises(kind) as caught:
        lm.chat(showing("Look: ", image(1), {"type": "image", "image": source}))
    assert caught.value.message.startswith("messages[0].content[2]")


def test_of_several_chats_the_bad_one_is_named(lm: LM):
    with pytest.raises(MediaError, match=r"^conversation 1: messages\[0\].content\[0\]"):
        lm.chat([showing(image(1)), showing(b"")])


def test_a_model_without_vision_refuses_pictures():
    lm = blockpress.load("sudoku-nano")
    assert lm.tokenizer is not None
    lm.tokenizer.chat_template = TEMPLATE
    blind = LM(
        path=lm.path,
        network=Network(replace(lm.config, vision=None)),
        generation=lm.generation,
        tokenizer=chat_tokenizer.TOKENIZER,
    )
    with pytest.raises(RequestError, match=r"messages\[0\].content\[0\] is of type 'image'"):
        blind.chat(showing(image(1)))
