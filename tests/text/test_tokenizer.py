"""Text to ids and back: nothing lost in silence, files read and written as checkpoints have them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from blockpress.errors import CheckpointError, DamagedFile, ModelNotFound, TextError
from blockpress.text import Tokenizer
from blockpress.text.builder import digits_tokenizer, write_digits_tokenizer
from tests.conftest import num_examples

SCRIPTS = {
    "latin": "Fix, Schwyz! quäkt Jürgen blöd vom Paß",
    "greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "cyrillic": "Съешь же ещё этих мягких французских булок",
    "hebrew": "דג סקרן שט בים מאוכזב",
    "arabic": "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "bengali": "আমি কাঁচ খেতে পারি",
    "tamil": "நான் கண்ணாடி சாப்பிடுவேன்",
    "telugu": "నేను గాజు తినగలను",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "lao": "ຂອ້ຍກິນແກ້ວໄດ້",
    "georgian": "მინას ვჭამ და არა მტკივა",
    "armenian": "Կրնամ ապակի ուտել",
    "amharic": "ሰማይ አይታረስ ንጉሥ አይከሰስ",
    "khmer": "ខ្ញុំអាចញុំកញ្ចក់បាន",
    "burmese": "ကျွန်တော် မှန်စားနိုင်တယ်",
    "han": "我能吞下玻璃而不傷身體",
    "japanese": "いろはにほへと チリヌルヲ",
    "korean": "키스의 고유조건은 입술끼리",
    "gothic": "𐌼𐌰𐌲 𐌲𐌻𐌴𐍃 𐌹̈𐍄𐌰𐌽",
    "cuneiform": "𒀀𒁀𒂀 𒃀",
    "tibetan": "ཤེལ་སྒོ་ཟ་ནས་ང་ན་གི་མ་རེད།",
    "code": "def f(x: int) -> int:\n\tif x:\n        return x ** 2  # ok\n\r\n",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 e\u0301",
    "newlines": "\n" * 40 + "a\n\n\nb" + " " * 50 + "\t\t\t",
    "controls": "\x00\x07\x1b[31m\x7f\u202e\ufeff\ufffd",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_gemma_round_trips_every_script(gemma: Tokenizer, name: str):
    ids = gemma.encode(SCRIPTS[name])
    assert gemma.decode(ids) == SCRIPTS[name]
    assert max(ids) < gemma.vocab_size == 262_144


@settings(max_examples=num_examples(150), deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_gemma_round_trips_any_text(gemma: Tokenizer, text: str):
    # This vocabulary writes a space as U+2581, so it cannot tell that sign from a space.
    assume("\u2581" not in text)
    assert gemma.decode(gemma.encode(text), skip_special=False) == text


def test_gemma_control_tokens_written_out_are_control_tokens(gemma: Tokenizer):
    ids = gemma.encode("<bos><|turn>user\nhi<turn|>\n")
    assert (ids[0], ids[1], ids[-2]) == (2, 105, 106)
    assert {2, 105, 106, 52, 258_880} <= gemma.special_ids
    assert gemma.decode(ids) == "user\nhi\n"
    assert gemma.decode(ids, skip_special=False) == "<bos><|turn>user\nhi<turn|>\n"


def test_gemma_byte_tokens_join_to_characters(gemma: Tokenizer):
    bytes_of = [gemma.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert gemma.decode(bytes_of) == "€"
    assert gemma.token(bytes_of[0]) == "<0xE2>"


def test_the_digits_tokenizer_encodes_puzzles(digits: Tokenizer):
    assert (digits.vocab_size, digits.pad, digits.eos, digits.bos) == (16, 0, 1, 2)
    assert digits.special_ids == {0, 1, 2, 3, 15}
    assert digits.encode("53\n") == [2, 10, 8, 4]
    assert digits.encode("53\n", add_special=False) == [10, 8, 4]
    assert digits.decode([2, 10, 8, 4, 1]) == "53\n"
    assert digits.encode("") == [2]


@given(st.text(alphabet="0123456789\n"))
def test_the_digits_tokenizer_round_trips(digits: Tokenizer, text: str):
    assert digits.decode(digits.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "sign", "line", "column"),
    [
        ("x", "x", 1, 1),
        ("12\n3 4", " ", 2, 2),
        ("1\n\n😀é", "😀", 3, 1),
        ("12\r\n", "\r", 1, 3),
        ("<unk>5é", "é", 1, 7),
    ],
)
def test_text_outside_the_vocabulary_is_named(digits: Tokenizer, text: str, sign: str, line: int, column: int):
    with pytest.raises(TextError) as caught:
        digits.encode(text)
    assert f"{sign!r} (U+{ord(sign):04X}) at line {line}, column {column}" in caught.value.message
    assert "'9'" in caught.value.hint


def test_a_written_unknown_token_is_accepted(digits: Tokenizer):
    assert digits.encode("5<unk>6") == [2, 10, 3, 11]


def wrap(model: Any, **parts: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    return Tokenizer(backend)


def test_characters_that_vanish_are_named():
    # A BPE model without an unknown token drops what it does not know.
    tokenizer = wrap(models.BPE({"a": 0, "b": 1}, []), decoder=decoders.Fuse())
    assert tokenizer.encode("ab") == [0, 1]
    for text, column in [("xab", 1), ("axb", 2), ("abx", 3)]:
        with pytest.raises(TextError, match=f"'x' .* column {column}"):
            tokenizer.encode(text)


def test_a_fused_unknown_is_named_by_its_first_character():
    tokenizer = wrap(models.Unigram([("a", -1.0), ("<unk>", -9.0)], unk_id=1))
    with pytest.raises(TextError, match=r"'é' .* column 3"):
        tokenizer.encode("aaéüa")


def test_a_model_without_an_unknown_token_that_refuses_is_named_too():
    split = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = wrap(models.WordLevel({"a": 0}, unk_token="<none>"), pre_tokenizer=split)
    with pytest.raises(TextError, match=r"'z' .* column 2"):
        tokenizer.encode("aza")


def test_spaces_that_decoding_gives_back_are_not_lost():
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    tokenizer = wrap(models.WordLevel(vocabulary, unk_token="<unk>"), pre_tokenizer=pre_tokenizers.WhitespaceSplit())
    assert tokenizer.encode("a b") == [1, 2]
    with pytest.raises(TextError, match="U\\+000A"):
        tokenizer.encode("a\nb")


def test_a_byte_level_tokenizer_takes_every_text():
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = wrap(
        models.BPE({sign: number for number, sign in enumerate(signs)}, []),
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        post_processor=processors.ByteLevel(trim_offsets=True),
        decoder=decoders.ByteLevel(),
    )
    for text in [*SCRIPTS.values(), " e\u0301 x"]:
        assert tokenizer.decode(tokenizer.encode(text)) == normalizers.NFC().normalize_str(text)
    assert tokenizer.token(tokenizer.encode("é")[0]) == "\\xc3"
    assert tokenizer.token(tokenizer.encode(" ")[0]) == " "


@pytest.mark.parametrize("text", ["a\ud800", 3, None, b"a"])
def test_only_text_is_encoded(gemma: Tokenizer, text: Any):
    with pytest.raises(TextError, match=r"not text|U\+D800.*column 2"):
        gemma.encode(text)


@pytest.mark.parametrize("wrong", [16, -1, 2**32, 2**70, "5", 1.0, None])
def test_wrong_ids_are_named(digits: Tokenizer, wrong: Any):
    with pytest.raises(TextError, match=f"token id {wrong!r} at position 1") as caught:
        digits.decode([5, wrong])
    assert isinstance(wrong, str | float | None) or "16 pieces" in caught.value.message
    with pytest.raises(TextError):
        digits.token(wrong)


def test_tokens_for_display_are_printable(digits: Tokenizer, gemma: Tokenizer):
    assert [digits.token(number) for number in (2, 4, 5)] == ["<bos>", "\\n", "0"]
    ids = gemma.encode(SCRIPTS["controls"] + SCRIPTS["newlines"] + " hello", add_special=False)
    assert all(gemma.token(one).isprintable() and gemma.token(one) for one in ids)
    assert gemma.token(ids[-1]) == " hello"


def made(folder: Path, config: dict[str, Any], *, post: bool = True, **files: str) -> Tokenizer:
    backend = digits_tokenizer()
    if not post:
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return Tokenizer.from_directory(folder)


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_bos_comes_once_if_either_asks_for_it(tmp_path: Path, post: bool, flag: bool):
    tokenizer = made(tmp_path, {"bos_token": "<bos>", "add_bos_token": flag}, post=post)
    front = [2] if post or flag else []
    assert tokenizer.encode("5") == [*front, 10]
    assert tokenizer.encode("<bos>5") == [2, 10]
    assert tokenizer.encode("5", add_special=False) == [10]
    assert tokenizer.encode("<bos>5", add_special=False) == [2, 10]


def test_eos_comes_once_if_the_config_asks_for_it(tmp_path: Path):
    tokenizer = made(tmp_path, {"eos_token": {"content": "<eos>"}, "add_eos_token": True}, post=False)
    assert tokenizer.encode("5") == tokenizer.encode("5<eos>") == [10, 1]
    assert tokenizer.encode("5", add_special=False) == [10]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path):
    backend = digits_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).encode("12345") == [2, 6, 7, 8, 9, 10]


def test_special_tokens_come_from_the_map_where_the_config_is_silent(tmp_path: Path):
    special = json.dumps(
        {"eos_token": {"content": "<eos>"}, "pad_token": "<bos>", "additional_special_tokens": ["<unk>"]}
    )
    tokenizer = made(tmp_path, {"pad_token": "<pad>"}, special_tokens_map__json=special)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 1, 0)
    assert tokenizer.special_tokens == {"eos_token": "<eos>", "pad_token": "<pad>"}


def test_without_a_config_nothing_is_guessed(tmp_path: Path):
    digits_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.chat_template) == (None, None, None, None)
    assert tokenizer.encode("5") == [2, 10]


def test_the_template_is_found_where_checkpoints_keep_it(tmp_path: Path):
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    assert made(tmp_path / "a", {"chat_template": "C"}).chat_template == "C"
    assert made(tmp_path / "b", {"chat_template": named}).chat_template == "D"
    file = json.dumps({"chat_template": "J"})
    assert made(tmp_path / "c", {"chat_template": "C"}, chat_template__json=file).chat_template == "J"
    both = made(tmp_path / "d", {"chat_template": "C"}, chat_template__json=file, chat_template__jinja="F\n")
    assert both.chat_template == "F\n"


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"bos_token": "<nope>"}, "bos_token='<nope>'"),
        ({"bos_token": 2}, "bos_token=2"),
        ({"add_bos_token": True}, "add_bos_token"),
        ({"add_eos_token": "yes"}, "add_eos_token='yes'"),
        ({"chat_template": 3}, "chat_template"),
        ({"chat_template": [{"name": "rag", "template": "R"}]}, "rag"),
    ],
)
def test_a_config_that_contradicts_itself_is_named(tmp_path: Path, config: dict[str, Any], names: str):
    with pytest.raises(DamagedFile, match=names):
        made(tmp_path, config)


def test_missing_and_damaged_files_are_named(tmp_path: Path):
    assert Tokenizer.find(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(ModelNotFound, match="gone"):
        Tokenizer.from_directory(tmp_path / "gone")
    write_digits_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    for damaged in (b"", b"{}", whole[: len(whole) // 2], b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"tokenizer\.json"):
            Tokenizer.find(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    for damaged in (b"{", b"[]", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"tokenizer_config\.json"):
            Tokenizer.from_directory(tmp_path)


def test_saving_copies_the_files(tmp_path: Path):
    tokenizer = made(tmp_path / "a", {"bos_token": "<bos>", "left": "alone"}, chat_template__jinja="{{ bos_token }}")
    tokenizer.save(tmp_path / "b")
    tokenizer.save(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_saving_one_that_was_never_read_writes_the_files(tmp_path: Path):
    tokenizer = Tokenizer(digits_tokenizer(), config={"bos_token": "<bos>"}, chat_template="a\r\nb")
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert (again.bos, again.chat_template, again.encode("5")) == (2, "a\r\nb", [2, 10])


def test_added_tokens_that_are_no_controls_stay_in_the_text():
    backend = digits_tokenizer()
    backend.add_tokens([AddedToken("<x>", special=False)])
    tokenizer = Tokenizer(backend)
    assert (tokenizer.encode("1<x>"), tokenizer.decode([6, 16]), 16 in tokenizer.special_ids) == (
        [2, 6, 16],
        "1<x>",
        False,
    )


def test_text_needs_neither_torch_nor_transformers():
    code = "import sys, blockpress.text, blockpress.text.builder; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "set()"
