"""The stream decoder against decoding the whole at once, for every kind of decoder that `tokenizers` has."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models

from blockpress.errors import RequestError, TextError
from blockpress.text import StreamDecoder, Tokenizer
from blockpress.text.detokenizer import _BYTE_OF_CHAR
from tests.conftest import num_examples

BYTES = [
    f"<0x{byte:02X}>"
    for byte in (0x20, 0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xEF, 0xBF, 0xBD, 0xFF)
]
WORDS = ["▁", "▁▁", "a", "▁b", "c▁", "\ufffd", "é", "##ing", "n't", ".", "x</w>", "|", "<0xZZ>", "<0x+F>"]
CHAR_OF_BYTE = {byte: char for char, byte in _BYTE_OF_CHAR.items()}


def words(decoder: Any) -> Tokenizer:
    pieces = ["<unk>", *BYTES, *WORDS]
    backend = tokenizers.Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    pieces = [bytes([b]) for b in (0x41, 0x20, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0, 0xFF)]
    pieces += [b"\xe2\x82", b"\xac\xe2", b"\x82\xac\xf0", b"\x9f\x98\x80 a", b"\xef\xbf\xbd", b"abc"]
    vocabulary = {"".join(CHAR_OF_BYTE[byte] for byte in piece): number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.add_tokens([AddedToken("日本", special=False)])
    return Tokenizer(backend)


GEMMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
LIVE: dict[str, Callable[[], Tokenizer]] = {
    "gemma": lambda: words(decoders.Sequence(GEMMA)),
    "llama": lambda: words(decoders.Sequence([*GEMMA, decoders.Strip(" ", 1, 0)])),
    "strip more": lambda: words(decoders.Sequence([*GEMMA, decoders.Strip(" ", 3, 0)])),
    "byte tokens made by replacing": lambda: words(decoders.Sequence([decoders.Replace("ZZ", "80"), *GEMMA])),
    "no fuse": lambda: words(decoders.Sequence(GEMMA[:2])),
    "fuse": lambda: words(decoders.Fuse()),
    "byte level": byte_level,
    "metaspace": lambda: words(decoders.Metaspace()),
    "wordpiece": lambda: words(decoders.WordPiece()),
    "none": lambda: words(None),
}
HELD: dict[str, Callable[[], Tokenizer]] = {
    "suffix": lambda: words(decoders.BPEDecoder()),
    "ctc": lambda: words(decoders.CTC(pad_token="a", word_delimiter_token="|")),
    "pattern over all": lambda: words(decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("aé|éa"), "!")])),
    "text over all": lambda: words(decoders.Sequence([decoders.Fuse(), decoders.Replace("aé", "!")])),
}
MADE = {name: make() for name, make in (LIVE | HELD).items()}


def stream(tokenizer: Tokenizer, chunks: list[list[int]], **options: Any) -> tuple[str, StreamDecoder]:
    decoder = StreamDecoder(tokenizer, **options)
    return "".join([decoder.feed(chunk) for chunk in chunks]) + decoder.finish(), decoder


def cut(ids: list[int], data: st.DataObject) -> list[list[int]]:
    places = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[start:end] for start, end in zip([0, *places], [*places, len(ids)], strict=True)]


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=num_examples(75), deadline=None)
@given(st.data())
def test_streamed_text_is_the_decoded_text_however_ids_are_split(kind: str, data: st.DataObject):
    tokenizer = MADE[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    skip = data.draw(st.booleans())
    out, decoder = stream(tokenizer, cut(ids, data), skip_special=skip)
    assert out == tokenizer.decode(ids, skip_special=skip)
    assert (decoder.stopped, decoder.tokens_used) == (None, len(ids))


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=num_examples(100), deadline=None)
@given(st.data())
def test_a_stop_is_found_however_ids_are_split(kind: str, data: st.DataObject):
    tokenizer = MADE[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=16))
    text = tokenizer.decode(ids)
    stops = data.draw(st.lists(st.text(alphabet="aé €.x\ufffd", min_size=1, max_size=3), max_size=2))
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 4))])
    chunks = cut(ids, data)
    out, decoder = stream(tokenizer, chunks, stop=stops)
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    at, _, stop = min(found, default=(len(text), 0, None))
    assert (out, decoder.stopped) == (text[:at], stop)
    if stop is None:
        assert decoder.tokens_used == len(ids)
        return
    covering = [count for count in range(len(ids) + 1) if tokenizer.decode(ids[:count]).startswith(out)]
    assert decoder.tokens_used in covering
    if kind in LIVE and "\ufffd" not in out:
        assert decoder.tokens_used == covering[0]
    assert decoder.feed([0]) == ""


@pytest.mark.parametrize("kind", LIVE)
def test_plain_words_are_not_held_back(kind: str):
    tokenizer = MADE[kind]
    word = tokenizer.backend.token_to_id("abc" if kind == "byte level" else "a")
    decoder = StreamDecoder(tokenizer)
    lengths = [len(decoder.feed([word])) for _ in range(4)]
    assert all(lengths)


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    return [tokenizer.backend.token_to_id(piece) for piece in pieces]


def test_a_stripped_leading_space_of_byte_tokens_stays_stripped():
    tokenizer = MADE["llama"]
    ids = ids_of(tokenizer, "<0x20>", "<0x20>", "<0xC3>", "<0xA9>", "<0x41>")
    out, decoder = stream(tokenizer, [[one] for one in ids], stop=["A"])
    assert (out, decoder.tokens_used) == (" é", 4)
    assert [stream(tokenizer, [ids], stop=["é"])[1].tokens_used, tokenizer.decode(ids)] == [2, " éA"]


def test_a_decoder_that_strips_the_end_is_held_to_the_end():
    tokenizer = words(decoders.Sequence([*GEMMA, decoders.Strip(" ", 0, 1)]))
    ids = ids_of(tokenizer, "a", "▁", "▁b", "▁")
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(ids), decoder.finish()] == ["", tokenizer.decode(ids)] == ["", "a  b"]


def test_half_a_character_waits_and_ends_as_decode_has_it():
    tokenizer = MADE["gemma"]
    euro = ids_of(tokenizer, "<0xE2>", "<0x82>", "<0xAC>")
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed([one]) for one in [*euro, *ids_of(tokenizer, "a")]] == ["", "", "", "€a"]
    assert (decoder.feed(euro[:2]), decoder.finish(), decoder.finish()) == ("", "\ufffd\ufffd", "")


def test_skipped_control_tokens_do_not_split_a_character():
    tokenizer = MADE["gemma"]
    control = tokenizer.backend.token_to_id("<s>")
    ids = ids_of(tokenizer, "a", "<s>", "<0xC3>", "<s>", "<0xA9>", "<s>", "a", ".")
    out, decoder = stream(tokenizer, [[one] for one in ids], stop=["a."])
    assert control in tokenizer.special_ids
    assert (out, decoder.stopped, decoder.tokens_used) == ("aé", "a.", 5)


def test_a_stop_at_the_very_start_needs_no_tokens():
    tokenizer = MADE["gemma"]
    out, decoder = stream(tokenizer, [[tokenizer.backend.token_to_id("a")]], stop=("a",))
    assert (out, decoder.stopped, decoder.tokens_used) == ("", "a", 0)


def test_a_wrong_id_leaves_the_stream_unchanged():
    tokenizer = MADE["gemma"]
    letter = tokenizer.backend.token_to_id("a")
    decoder = StreamDecoder(tokenizer)
    with pytest.raises(TextError, match="99999"):
        decoder.feed([letter, 99999])
    assert (decoder.feed([letter]), decoder.tokens_used) == ("a", 1)


def test_a_finished_stream_takes_nothing():
    decoder = StreamDecoder(MADE["gemma"])
    decoder.finish()
    with pytest.raises(RequestError, match="finished"):
        decoder.feed([1])


@pytest.mark.parametrize("stop", [[""], ["a", 7], "END"])
def test_wrong_stop_strings_are_refused(stop: Any):
    with pytest.raises(RequestError, match="stop"):
        StreamDecoder(MADE["gemma"], stop=stop)


class Counted:
    """A backend that counts the ids it decodes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._backend.decode(ids, **options)


@pytest.mark.parametrize("piece", ["a", "<0x41>", "▁", "<0xFF>"])
def test_work_is_linear_in_length(piece: str):
    tokenizer = LIVE["llama"]()
    counted = tokenizer.backend = Counted(tokenizer.backend)  # type: ignore[assignment]
    one = tokenizer.backend.token_to_id(piece)
    out, _ = stream(tokenizer, [[one]] * 3000)
    assert len(out) in (2999, 3000)
    assert counted.decoded <= 3 * 3000


def test_gemma_random_ids_stream_to_the_decoded_text(gemma: Tokenizer):
    draw = random.Random(5)
    for _ in range(60):
        pool = [range(gemma.vocab_size), range(238, 494), range(300)][draw.randrange(3)]
        ids = [draw.choice(pool) for _ in range(draw.randint(0, 80))]
        places = sorted(draw.randint(0, len(ids)) for _ in range(5))
        chunks = [ids[a:b] for a, b in zip([0, *places], [*places, len(ids)], strict=True)]
        skip = draw.random() < 0.5
        assert stream(gemma, chunks, skip_special=skip)[0] == gemma.decode(ids, skip_special=skip)


TEXT = "  Ein Satz.\n\n\n\tdef f(x): return x**2  # 日本語 👩‍👩‍👧‍👦 𐌰𐌱 हिन्दी \ufffd <|turn>model\nfin"


def test_gemma_text_streams_whatever_the_split(gemma: Tokenizer):
    ids = gemma.encode(TEXT)
    whole = gemma.decode(ids)
    assert whole == TEXT.replace("<|turn>", "")
    for place in range(len(ids) + 1):
        assert stream(gemma, [ids[:place], ids[place:]])[0] == whole
    for start in range(len(whole)):
        stop = whole[start : start + 3]
        out, decoder = stream(gemma, [[one] for one in ids], stop=[stop])
        assert out == whole[: whole.find(stop)]
        assert gemma.decode(ids[: decoder.tokens_used]).startswith(out)


@settings(max_examples=num_examples(100), deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
@example("\ud7ff\ue000\U0010ffff")
def test_gemma_any_text_streams_token_by_token(gemma: Tokenizer, text: str):
    ids = gemma.encode(text)
    assert stream(gemma, [[one] for one in ids])[0] == gemma.decode(ids)
