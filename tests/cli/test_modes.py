"""`blockpress run` in both modes, and with pictures: what is asked, what is printed, and what is refused by name."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import blockpress
from blockpress import LM, sudoku
from blockpress.chat import ToolCall
from blockpress.checkpoints import save_checkpoint
from blockpress.cli.chat import Stream
from blockpress.cli.doctor import PUZZLE
from blockpress.cli.meter import Meter
from blockpress.cli.serialize import ended, event_to_dict, reply_to_dict
from blockpress.config import PRESETS, AutoregressiveSampling, GenerationConfig, Sampling
from blockpress.decoding import Committed, Done, ReasoningDelta, Reply, Text, ToolCallEvent, Usage
from blockpress.text.builder import write_digits_tokenizer

from .. import chat_tokenizer
from .conftest import Call, Screen

PROMPT = sudoku.layout(PUZZLE)
WARM = ("--mode", "autoregressive", "--temperature", 1.5, "--top-k", 9, "--top-p", 0.9, "--seed", 3)
HOT = AutoregressiveSampling(temperature=1.5, top_k=9, top_p=0.9)


@pytest.fixture(scope="session")
def causal(workspace: Path, random_network: Callable[..., Any]) -> Path:
    """A checkpoint of the family without canvases, for grids, with random weights."""
    path = workspace / "cli-causal"
    config = replace(PRESETS["sudoku-nano"](), family="gemma4", canvas_length=1)
    generation = GenerationConfig.from_dict({"do_sample": True, "temperature": 0.8, "top_k": 4}, config)
    save_checkpoint(path, random_network(config, seed=1), generation=generation)
    write_digits_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def shown(workspace: Path) -> tuple[Path, Path, Path]:
    """Two images and a video of two seconds."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    one, two, film = workspace / "one.png", workspace / "two.png", workspace / "film.mp4"
    Image.fromarray(pixels[0]).save(one)
    Image.fromarray(pixels[1]).save(two)
    with av.open(str(film), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return one, two, film


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight can be read."""

    def load(*arguments: Any, **options: Any) -> LM:
        raise AssertionError("weights were read")

    monkeypatch.setattr("blockpress.lm.load", load)


def plain(value: Any) -> Any:
    """As it comes out of JSON."""
    return json.loads(json.dumps(value))


def test_autoregressive_mode_gives_the_library_s_answer(call: Call, untrained: Path) -> None:
    lm = blockpress.load(untrained)
    for options, sampling in ((("--mode", "autoregressive", "--seed", 3), None), (WARM, HOT)):
        reply = lm.generate(PROMPT, 12, 3, sampling, mode="autoregressive")
        done = call("run", untrained, PROMPT, "--max-tokens", 12, *options)
        assert done.code == 0 and done.out.removesuffix("\n") == (reply.text or "").removesuffix("\n")
        assert ended(reply) in done.err
        said = call("run", untrained, PROMPT, "--max-tokens", 12, "--json", *options).out
        assert json.loads(said) == plain(reply_to_dict(reply))
    assert reply.tokens != lm.generate(PROMPT, 12, 3, mode="autoregressive").tokens


@pytest.mark.parametrize("mode", ["diffusion", "verified", "autoregressive"])
def test_json_and_events_have_log_probabilities(call: Call, untrained: Path, mode: Any) -> None:
    lm, options = blockpress.load(untrained), ("--mode", mode, "--max-tokens", 12, "--steps", 2, "--logprobs", 2)
    options = options if mode != "autoregressive" else (*options[:4], *options[6:])
    sampling = None if mode == "autoregressive" else lm.generation.sampling.with_(steps=2)
    reply = lm.generate(PROMPT, 12, sampling=sampling, mode=mode, logprobs=2)
    said = json.loads(call("run", untrained, PROMPT, "--json", *options).out)
    assert said == plain(reply_to_dict(reply)) and len(said["logprobs"]) == len(said["tokens"]) > 0
    first = (reply.logprobs or [])[0]
    assert said["logprobs"][0] == {
        "token": reply.tokens[0],
        "logprob": first.logprob,
        "top": [{"token": token, "logprob": logprob} for token, logprob in first.top],
    }
    told = [json.loads(line) for line in call("run", untrained, PROMPT, "--events", *options).out.splitlines()]
    assert [each for event in told if event["event"] == "commit" for each in event["logprobs"]] == said["logprobs"]
    assert (said["usage"]["verifications"] > 0) == (mode == "verified")


def test_verifications_are_reported_and_their_limit_is_honoured(call: Call, untrained: Path) -> None:
    options = ("--max-tokens", 5, "--steps", 2)
    reply = blockpress.load(untrained).generate(PROMPT, 5, sampling=Sampling(steps=2, max_verifications=1))
    said = json.loads(call("run", untrained, PROMPT, "--json", "--max-verifications", 1, *options).out)
    assert said == plain(reply_to_dict(reply)) and (reply.usage.verifications, reply.usage.redos) == (1, 1)
    assert (
        "1 canvas, 4 steps, 1 verification"
        in call("run", untrained, PROMPT, "--mode", "verified", "--max-verifications", 1, *options).err
    )
    older = call("run", untrained, PROMPT, "--json", "--checks", 1, *options)
    assert json.loads(older.out) == said and "blockpress: --checks is now --max-verifications\n" in older.err
    assert "--checks" not in call("run", "--help").out


def test_autoregressive_events_are_an_object_a_token(call: Call, untrained: Path) -> None:
    lm = blockpress.load(untrained)
    events = list(lm.stream(PROMPT, 12, 3, HOT, mode="autoregressive"))
    said = [
        json.loads(line)
        for line in call("run", untrained, PROMPT, "--events", "--max-tokens", 12, *WARM).out.splitlines()
    ]
    assert said == [plain(event_to_dict(lm, event)) for event in events]
    assert {event["event"] for event in said} == {"commit", "text", "done"}
    assert [len(event["tokens"]) for event in said if event["event"] == "commit"] == [1] * said[-1]["usage"]["forwards"]


def test_an_autoregressive_chat_gives_the_library_s_answer(call: Call, seeing: Path) -> None:
    wanted = blockpress.load(seeing).chat(
        [{"role": "user", "content": "Hi"}], thinking=True, seed=3, sampling=HOT, mode="autoregressive", max_tokens=20
    )
    said = json.loads(call("run", seeing, "Hi", "--thinking", "--json", "--max-tokens", 20, *WARM).out)
    assert said == plain(reply_to_dict(wanted, chat=True))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--stop", "7", "--stop", "88"), {"stop": ("7", "88")}),
        (("--temperature", 0.5), {"temperature": 0.5}),
        (("--top-k", 2), {"top_k": 2}),
        (("--top-k", 0), {"top_k": None}),
        (("--top-p", 0.5), {"top_p": 0.5}),
        (("--temperature", 0), {"temperature": 0.0}),
        (("--edit", "min_p=0.1", "--edit", "presence-penalty=1.5"), {"min_p": 0.1, "presence_penalty": 1.5}),
        (("--edit", 'logit_bias={"5": -100, "6": 2}'), {"logit_bias": {5: -100.0, 6: 2.0}}),
        (("--edit", "suppress_tokens=[5]", "--edit", "top_k=3"), {"suppress_tokens": (5,), "top_k": 3}),
        (("--edit", "allowed_token_ids=[5, 6]"), {"allowed_token_ids": (5, 6)}),
    ],
)
def test_options_override_the_checkpoint_s_sampling(
    call: Call, causal: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...], wanted: dict[str, Any]
) -> None:
    seen: list[Any] = []
    stream = LM.stream

    def watched(*arguments: Any, **given: Any) -> Any:
        seen.append(arguments[4])
        return stream(*arguments, **given)

    monkeypatch.setattr(LM, "stream", watched)
    assert call("run", causal, "1", "--max-tokens", 3, *options).code == 0
    own = AutoregressiveSampling(temperature=0.8, top_k=4)
    assert seen == [own.with_(**wanted)]


def test_a_model_without_canvases_needs_no_mode(call: Call, causal: Path) -> None:
    reply = blockpress.load(causal).generate(PROMPT, 10, 2)
    said = json.loads(call("run", causal, PROMPT, "--max-tokens", 10, "--seed", 2, "--json").out)
    assert said == plain(reply_to_dict(reply)) and said["usage"]["canvases"] == 0


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    "option", ["steps", "entropy-bound", "t-min", "t-max", "stability", "confidence", "max-verifications"]
)
def test_diffusion_options_are_refused_in_autoregressive_mode(
    call: Call, untrained: Path, causal: Path, option: str
) -> None:
    done = call("run", untrained, "1", "--mode", "autoregressive", f"--{option}", 1)
    assert done.code == 2 and f"--{option} is given in the mode autoregressive" in done.err
    assert "--mode diffusion" in done.err
    done = call("run", causal, "1", f"--{option}", 1)
    assert done.code == 2 and f"leave out --{option}: there is no canvas" in done.err


@pytest.mark.usefixtures("weightless")
def test_autoregressive_options_are_refused_in_diffusion_mode(call: Call, untrained: Path) -> None:
    for mode in ((), ("--mode", "diffusion")):
        done = call("run", untrained, "1", *mode, "--temperature", 1)
        assert done.code == 2 and "--temperature is given in the mode diffusion" in done.err
        assert "--mode autoregressive" in done.err


@pytest.mark.usefixtures("weightless")
def test_invalid_options_are_refused_before_weights_are_read(call: Call, untrained: Path, causal: Path) -> None:
    token = ("--mode", "autoregressive")
    for model, options, words in (
        (causal, ("--mode", "diffusion"), "has no canvas"),
        (untrained, ("--mode", "fast"), "--mode"),
        (causal, ("--mode", "verified"), "has no canvas"),
        (causal, ("--max-verifications", 1), "leave out --max-verifications: there is no canvas"),
        (untrained, ("--mode", "verified", "--max-verifications", 0), "--max-verifications is 0 in the mode verified"),
        (untrained, ("--max-verifications", -1), "max_verifications is -1"),
        (untrained, ("--max-verifications", 1, "--checks", 1), "leave out --max-verifications or --checks"),
        (causal, ("--checks", 1), "leave out --max-verifications: there is no canvas"),
        (untrained, ("--logprobs", 1), "add --json or --events"),
        (untrained, (*token, "--temperature", -1), "temperature is -1"),
        (untrained, (*token, "--temperature", 1, "--top-k", -2), "top_k is -2"),
        (untrained, (*token, "--temperature", 1, "--top-p", 2), "top_p is 2"),
        (untrained, (*token, "--top-k", 2), "--top-k is given with a temperature of 0"),
        (causal, ("--temperature", 0, "--top-p", 0.5), "--top-p is given with a temperature of 0"),
    ):
        done = call("run", model, "1", *options)
        assert done.code == 2 and not done.out and words in done.err
    done = call("sudoku", PUZZLE, "--model", causal)
    assert done.code == 2 and "family gemma4, which has no canvas" in done.err


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("minp=0.1", "--edit is 'minp=0.1'"),
        ("steps=4", "--edit is 'steps=4'"),
        ("min_p", "--edit is 'min_p'"),
        ("min_p=much", "give min_p= and a value in JSON"),
        ("min_p=2", "min_p is 2"),
        ('logit_bias={"a": 1}', "logit_bias is {'a': 1}"),
    ],
)
def test_edits_that_are_none_are_refused(call: Call, untrained: Path, edit: str, words: str) -> None:
    done = call("run", untrained, "1", "--edit", edit)
    assert done.code == 2 and not done.out and words in done.err


def test_a_canvas_is_drawn_by_the_edits_of_its_options(call: Call) -> None:
    lm = blockpress.load("sudoku-nano")
    assert lm.tokenizer is not None
    five, six = lm.tokenizer.encode("56", add_special=False)
    given = ("--top-k", 3, "--edit", f'logit_bias={{"{five}": 100}}', "--edit", f"suppress_tokens=[{six}]")
    assert call("run", "sudoku-nano", PUZZLE, "--max-tokens", 9, *given).out.strip() == "5" * 9


def test_images_come_before_the_text(call: Call, seeing: Path, shown: tuple[Path, Path, Path]) -> None:
    one, two, film = map(str, shown)
    content: list[dict[str, Any]] = [{"type": "image", "image": one}, {"type": "image", "image": two}]
    content += [{"type": "video", "video": film}, {"type": "text", "text": "What?"}]
    lm, messages = blockpress.load(seeing), [{"role": "user", "content": content}]
    files = ("--video", film, "--image", one, "--image", two)
    for budget in (None, 140):
        wanted = lm.chat(messages, max_tokens=10, soft_tokens=budget)
        options = () if budget is None else ("--soft-tokens", budget)
        said = json.loads(call("run", seeing, "What?", *files, *options, "--max-tokens", 10, "--json").out)
        assert said == plain(reply_to_dict(wanted, chat=True))
    swapped = ("--image", two, "--image", one, "--video", film)
    assert json.loads(call("run", seeing, "What?", *swapped, "--max-tokens", 10, "--json").out) != said
    wanted = lm.chat(messages, max_tokens=10, mode="autoregressive")
    said = json.loads(
        call("run", seeing, "What?", *files, "--mode", "autoregressive", "--max-tokens", 10, "--json").out
    )
    assert said == plain(reply_to_dict(wanted, chat=True))


@pytest.mark.usefixtures("weightless")
def test_unusable_images_are_refused(
    call: Call, seeing: Path, untrained: Path, talker: Path, shown: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    one, _, film = shown
    broken = tmp_path / "broken.png"
    broken.write_bytes(one.read_bytes()[:200])
    for model, options, words in (
        (seeing, ("--image", tmp_path / "no.png"), "--image is"),
        (seeing, ("--video", tmp_path / "no.mp4"), "--video is"),
        (seeing, ("--image", one, "--image", broken), f"--image {broken}"),
        (seeing, ("--image", one, "--soft-tokens", 71), "--soft-tokens is 71"),
        (seeing, ("--soft-tokens", 70), "--soft-tokens is given with nothing to show"),
        (seeing, ("--image", one, "--raw"), "--image is given with --raw"),
        (seeing, ("--video", film, "--raw"), "--video is given with --raw"),
        (untrained, ("--image", one), "--image is given with cli-untrained, which has no chat template"),
        (untrained, ("--video", film), "--video is given with cli-untrained, which has no chat template"),
        (talker, ("--image", one), "--image is given with cli-talker, which sees nothing"),
        (talker, ("--video", film), "--video is given with cli-talker, which sees nothing"),
    ):
        done = call("run", model, "Hi", *options)
        assert done.code == 2 and not done.out and words in done.err, done.err


@pytest.fixture(scope="session")
def talker(workspace: Path, random_network: Callable[..., Any]) -> Path:
    """A checkpoint with a chat template that sees nothing."""
    path = workspace / "cli-blind" / "cli-talker"
    config = replace(PRESETS["tiny"](), vocab_size=len(chat_tokenizer.VOCABULARY), canvas_length=8, vision=None)
    save_checkpoint(
        path, random_network(config, seed=2), generation=GenerationConfig(), tokenizer=chat_tokenizer.TOKENIZER
    )
    return path


def test_a_terminal_gets_tokens_as_they_come(call: Call, seeing: Path, screen: Screen) -> None:
    reply = blockpress.load(seeing).chat(
        [{"role": "user", "content": "Hi"}], seed=3, sampling=HOT, mode="autoregressive", max_tokens=20
    )
    done = call("run", seeing, "Hi", "--max-tokens", 20, *WARM, screen=screen)
    assert done.code == 0 and reply.text and "\x1b" not in done.out
    assert done.out.removesuffix("\n") == reply.text.removesuffix("\n")
    cost = done.err.splitlines()[-1]
    assert ended(reply) in cost and "tokens per forward" in cost and "ms per forward" in cost
    assert not any(word in done.err for word in ("entropy", "step", "canvas"))


def test_a_stream_on_a_terminal_is_spelled_out_and_kept_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(1, 2, 0, 0, 2, 1.0)
    events = [
        ReasoningDelta(0, "hm"),
        Text(0, "a\x1b"),
        ToolCallEvent(0, ToolCall(name="ls", arguments={})),
        Text(0, "b"),
    ]
    events += [Done(0, Reply("a\x1bb", [], "stop", usage))]

    def printed() -> tuple[str, str]:
        stream = Stream()
        for event in events:
            stream.see(event)
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    assert printed() == ("a\x1bb\n", "hm\ncall:ls{}\n")
    monkeypatch.setattr("blockpress.cli.chat.is_terminal", lambda stream: True)
    assert printed()[0] == "a\\x1b\nb\n"


def test_the_summary_says_how_an_autoregressive_answer_ended() -> None:
    usage = Usage(1, 9, 0, 0, 9, 1.0)
    assert ended(Reply("", [], "length", usage)) == "at its length after 9 tokens: 9 forwards"
    usage = replace(usage, completion_tokens=1, forwards=1, reasoning_tokens=1)
    assert ended(Reply("", [], "stop", usage)) == "stopped after 1 token: 1 forward, 1 token of thought"


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_the_meter_counts_as_usage_does(seeing: Path, mode: Any) -> None:
    """Counted event by event, answers that were begun again included."""
    lm, retries = blockpress.load(seeing), 0
    sampling = lm.generation.sampling if mode == "diffusion" else HOT
    for seed in range(15):
        meter = Meter(sampling, lm.generation.stop_ids, lm.config.canvas_length)
        options: dict[str, Any] = {"seed": seed, "sampling": sampling, "max_tokens": 30}
        for event in lm.chat_stream([{"role": "user", "content": "Hi"}], mode=mode, **options):
            if isinstance(event, Done):
                assert meter.forwards == event.reply.usage.forwards
                retries += event.reply.usage.empty_retries
            meter.see(event)
    assert retries


def test_the_autoregressive_meter_has_no_steps() -> None:
    meter = Meter(HOT, stop_ids=(1,), canvas_length=1)
    assert meter.now() == ["0.0 tokens per forward"] == meter.result()
    for number in range(3):
        meter.see(Committed(0, number, [5], 0))
        meter.go_on()
    assert meter.now() == ["1.0 tokens per forward"] and meter.forwards == 3
    time, each = meter.result()
    assert time.endswith("ms per forward") and each == "1.0 tokens per forward"


class Typed(io.StringIO):
    """A stdin that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`typing("Hi", KeyboardInterrupt)`: what a person types, line by line; then the end of input."""

    def typing(*lines: Any) -> None:
        left = iter([*lines, EOFError])

        def typed(prompt: str) -> str:
            line = next(left)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", typed)
        monkeypatch.setattr(io, "StringIO", Typed)

    return typing


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_a_conversation_keeps_pictures_and_drops_thoughts(
    call: Call,
    seeing: Path,
    shown: tuple[Path, Path, Path],
    screen: Screen,
    typing: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
) -> None:
    asked: list[Any] = []
    stream = LM.chat_stream

    def watched(lm: LM, messages: Any, **options: Any) -> Any:
        """The answer's events, its message with a thought that a trained model would have had."""
        asked.append((messages, options["mode"], options["soft_tokens"]))
        for event in stream(lm, messages, **options):
            done = isinstance(event, Done)
            yield replace(event, reply=replace(event.reply, thinking="Hm.")) if done else event

    monkeypatch.setattr(LM, "chat_stream", watched)
    typing("Hi", "And?", "So?")
    options = ("--mode", mode, "--soft-tokens", 70, "--max-tokens", 12, "--fast")
    done = call("run", seeing, "--image", shown[0], *options, screen=screen)
    assert done.code == 0 and [each[1:] for each in asked] == [(mode, 70)] * 3
    first, *others = asked[2][0]
    assert [part["type"] for part in first["content"]] == ["image", "text"] and first["content"][1]["text"] == "Hi"
    assert [message["role"] for message in others] == ["assistant", "user", "assistant", "user"]
    assert [message["content"] for message in others[1::2]] == ["And?", "So?"]
    assert all("thinking" not in message for message in others)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": str(shown[0])}, {"type": "text", "text": "Hi"}]}
    ]
    reply = blockpress.load(seeing).chat(messages, max_tokens=12, soft_tokens=70, mode=mode)
    assert others[0]["content"] == reply.text


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_an_interrupted_answer_ends_the_conversation(
    call: Call, seeing: Path, screen: Screen, typing: Callable[..., None], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    stream = LM.chat_stream

    def interrupted(lm: LM, messages: Any, **options: Any) -> Any:
        yield next(stream(lm, messages, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(LM, "chat_stream", interrupted)
    typing("Hi", "never asked")
    done = call("run", seeing, "--mode", mode, "--fast", screen=screen)
    assert done.code == 130 and "interrupted" in done.err
    if mode == "diffusion":
        assert done.out.endswith("\x1b[?25h")
