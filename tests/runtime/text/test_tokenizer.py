"""Tokenizer: text survives, pieces concatenate, templates render, bad files and messages are one typed error."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

from dovetail.runtime.errors import InputError, IntegrityError
from dovetail.runtime.text.stop_strings import StopFilter
from dovetail.runtime.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["Hello", "world", "def", "return", "über", "日本", "日", "語", "naïve", "the", "12"]
TEXTS = [
    "Hello world",
    " leading, trailing ",
    "runs   of    spaces\n\n\ttabs\r\nand lines\n",
    "def f(x):\n    return x  # 12345\n",
    "naïve über ÄÖÜ ß",
    "日本語 中文 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0001f600",
    "a\ufffdb \ufffd\ufffd",
    "",
]


def byte_level() -> Backend:
    """Every byte is a token, a few merges on top, as in GPT-2's descendants."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in WORDS + [" " + word for word in WORDS]:
        symbols = split.pre_tokenize_str(word)[0][0]
        left = symbols[0]
        for right in symbols[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
            left += right
    backend = Backend(BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


def sentencepiece_like() -> Backend:
    """Metaspace by normalizer and byte fallback, with Llama-2's decoder and a BOS."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in ["▁" + word for word in WORDS] + ["▁▁"]:
        for symbol in word:
            vocab.setdefault(symbol, len(vocab))
        left = word[0]
        for right in word[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
            left += right
    backend = Backend(BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace() -> Backend:
    """A Unigram model behind the Metaspace pre-tokenizer, byte fallback included."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁" + word, -2.0) for word in WORDS] + [(word, -3.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    backend = Backend(Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


BACKENDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like, "metaspace": metaspace}
TOKENIZERS = {name: Tokenizer(build().to_str().encode()) for name, build in BACKENDS.items()}


def write_folder(folder: Path, **files: Any) -> Path:
    """A target folder with the byte-level tokenizer; `files` are JSON files by stem."""
    (folder / "tokenizer.json").write_text(byte_level().to_str(), encoding="utf-8")
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.add(token) for token in ids), detokenizer.flush()]


# --- encode and decode


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
def test_text_survives_encoding(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_post_processor_acts_on_raw_text_only_when_asked() -> None:
    tokenizer = TOKENIZERS["sentencepiece_like"]
    with_bos = tokenizer.encode("Hello")
    assert with_bos[0] == 1
    assert tokenizer.encode("Hello", add_special_tokens=False) == with_bos[1:]


def test_special_tokens_in_text_are_recognised_and_skipped_in_decode() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("<|im_start|>the<tool><|im_end|>")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "the<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>the<tool><|im_end|>"


def test_saved_truncation_and_padding_do_not_touch_prompts() -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer(backend.to_str().encode())
    assert tokenizer.encode("Hello world, def") == TOKENIZERS["byte_level"].encode("Hello world, def")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", [1, "Hello"]),
        ("<s>Hello", [1, "Hello"]),
        ("<s><s>Hello", [1, 1, "Hello"]),
        ("</s>Hello", [1, 2, "Hello"]),
    ],
)
def test_a_text_that_begins_with_bos_gets_no_second(text: str, expected: list[Any]) -> None:
    tokenizer = TOKENIZERS["sentencepiece_like"]
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode(text) == [t for each in expected for t in (plain if each == "Hello" else [each])]


def test_a_vocabulary_without_bos_keeps_what_the_text_repeats() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert len(tokenizer.encode("<|im_start|><|im_start|>")) == 2


RULES: dict[str, tuple[str, Any]] = {
    "replaces nothing": ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}),
    "grows in sequence": (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}] * 40,
        },
    ),
    "grows while decoding": ("decoder", {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10_000}),
    "size of a table": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 64).decode()},
    ),
    "no table": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"abc").decode()}),
    "no base64": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "a?"}),
}


@pytest.mark.parametrize(("part", "rule"), RULES.values(), ids=RULES)
def test_rules_that_would_take_the_memory_are_refused(tmp_path: Path, part: str, rule: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**json.loads(byte_level().to_str()), part: rule}))
    with pytest.raises(IntegrityError, match=r"tokenizer\.json.*export the target again") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [r"Replac\u0065", r"\u0052eplace"])
def test_a_rule_whose_name_is_escaped_is_refused_too(tmp_path: Path, name: str) -> None:
    part, rule = RULES["grows while decoding"]
    text = json.dumps({**json.loads(byte_level().to_str()), part: rule}, indent=1)
    (tmp_path / "tokenizer.json").write_text(text.replace('"Replace"', f'"{name}"'))
    with pytest.raises(IntegrityError, match=r"rules make 10000 characters"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(("rule", "named"), [("", "recursion limit"), ('"decoder": {"type": "Replace"}, ', "nested")])
def test_a_deep_tokenizer_is_refused(tmp_path: Path, rule: str, named: str) -> None:
    (tmp_path / "tokenizer.json").write_text(f'{{{rule}"normalizer": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(IntegrityError, match=named):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(IntegrityError, match="generation_config"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_inside_tokenizers_is_an_input_error() -> None:
    table = (16).to_bytes(4, "little") + b"\xff" * 16 + b"abc"  # a table that points outside itself
    rule = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    tokenizer = Tokenizer(json.dumps({**json.loads(byte_level().to_str()), "normalizer": rule}).encode())
    with pytest.raises(InputError, match=r"tokenizer\.json fails"):
        tokenizer.encode("Hello")


def test_lone_surrogate_is_an_input_error() -> None:
    with pytest.raises(InputError, match="valid Unicode"):
        TOKENIZERS["byte_level"].encode("a\ud800b")


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("Hello")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "Hello"


# --- incremental detokenisation


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_pieces_of_real_text_concatenate_and_split_no_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_pieces_of_any_tokens_concatenate_to_the_full_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token = st.integers(0, tokenizer.vocab_size)  # the last one does not exist
    whole = st.text(alphabet="a 日é😀\ufffd\n12", max_size=4).map(tokenizer.encode)
    ids = [token for part in data.draw(st.lists(st.one_of(whole, token.map(lambda t: [t])))) for token in part]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=20), st.lists(st.integers(0, 80)))
def test_pieces_concatenate_for_any_split_of_the_bytes(text: str, cuts: list[int]) -> None:
    """Token boundaries anywhere: the text is cut at random byte offsets and each part encoded on its own."""
    tokenizer, encoded = TOKENIZERS["byte_level"], text.encode()
    to_symbol = {byte: symbol for symbol, byte in symbols_of_bytes().items()}
    vocab = Backend.from_str(byte_level().to_str()).get_vocab()
    bounds = sorted({0, len(encoded), *(cut for cut in cuts if cut < len(encoded))})
    ids: list[int] = []
    for start, end in itertools.pairwise(bounds):
        part = "".join(to_symbol[byte] for byte in encoded[start:end])
        ids += [vocab[part]] if part in vocab else [vocab[symbol] for symbol in part]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def symbols_of_bytes() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others from U+0100 on in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def test_a_character_appears_with_its_last_token() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a😀b")
    assert streamed(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


def test_invalid_bytes_are_not_held_back_until_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    lone = tokenizer.encode("😀")[0]
    pieces = streamed(tokenizer, [lone] * 50)
    assert "".join(pieces[:-1]) == "\ufffd" * 49
    assert pieces[-1] == "\ufffd"


def byte_tokens(tokenizer: Tokenizer, content: bytes) -> list[int]:
    backend = Backend.from_str(sentencepiece_like().to_str())
    return [backend.token_to_id(f"<0x{byte:02X}>") for byte in content]


THAI = "สวัสดี"


def test_letters_of_byte_tokens_come_as_they_are_complete() -> None:
    tokenizer = TOKENIZERS["sentencepiece_like"]
    ids = byte_tokens(tokenizer, THAI.encode())
    assert streamed(tokenizer, ids) == [piece for letter in THAI for piece in ("", "", letter)] + [""]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\xe0b", "a\ufffdb"),
        (THAI.encode()[:-1], THAI[:-1] + "\ufffd"),
        (b"\xff" + THAI.encode() + b"\xff\xff", "\ufffd" + THAI + "\ufffd\ufffd"),
        (b"\xf0\x9f\x98x", "\ufffdx"),
    ],
)
def test_a_bad_byte_spoils_no_letter_of_its_run(content: bytes, expected: str) -> None:
    tokenizer = TOKENIZERS["sentencepiece_like"]
    ids = byte_tokens(tokenizer, content)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == expected == content.decode(errors="replace")


def test_a_stop_string_of_byte_tokens_is_seen_at_its_last_byte() -> None:
    tokenizer = TOKENIZERS["sentencepiece_like"]
    detokenizer, stops = tokenizer.detokenizer(), StopFilter(["สดี"])
    ids = byte_tokens(tokenizer, (THAI + "ก").encode())
    pieces, seen = list[str](), 0
    for token in ids:
        pieces.append(stops.add(detokenizer.add(token)))
        seen += 1
        if stops.stopped:
            break
    assert ("".join(pieces), seen) == ("สวั", 3 * len(THAI))


def test_flush_gives_the_unfinished_character_and_resets() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = tokenizer.detokenizer()
    first, *_ = tokenizer.encode("語é😀")[1:]
    assert detokenizer.add(first) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.add(tokenizer.encode("a")[0]) == "a"


# --- the folder


def test_folder_gives_named_tokens_template_eos_and_digest(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "chat_template": CHATML}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    assert tokenizer.eos_token_ids == tuple(tokenizer.encode("<|im_end|>"))
    assert tokenizer.has_chat_template
    assert tokenizer.digest() == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.vocab_size == byte_level().get_vocab_size()


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [7, 8, 7]}, {"eos_token_id": 3}, (7, 8, 3)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": 7}, {"text_config": {"eos_token_id": [7, 4]}}, (7, 4)),
        ({}, {}, ()),
    ],
)
def test_eos_ids_of_all_configs_are_united(
    tmp_path: Path, generation: dict[str, Any], model: dict[str, Any], expected: tuple[int, ...]
) -> None:
    folder = write_folder(tmp_path, generation_config=generation, config=model)
    assert Tokenizer.from_folder(folder).eos_token_ids == expected


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"version": "1.0"}', b"\xff\xfe", b"[]"])
def test_missing_or_malformed_tokenizer_is_an_integrity_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json.*export the target again") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stem", ["tokenizer_config", "special_tokens_map", "generation_config"])
def test_malformed_side_files_are_integrity_errors(tmp_path: Path, stem: str) -> None:
    write_folder(tmp_path)
    (tmp_path / f"{stem}.json").write_text("[1")
    with pytest.raises(IntegrityError, match=stem):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"), [(CHATML, {7, 3, 9}), (CHATML.replace("<|im_end|>", "<|other|>"), {7, 3}), (None, {7, 3})]
)
def test_ends_of_turns_are_found_where_the_template_has_them(
    tmp_path: Path, template: str | None, expected: set[int]
) -> None:
    """The configs name other tokens than the template ends turns with, as in GGUF files of base models."""
    config = {"chat_template": template, "eos_token": "<|im_start|>"}
    write_folder(tmp_path, tokenizer_config=config, generation_config={"eos_token_id": 7}, config={"eos_token_id": 3})
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = {name: tokenizer.encode(name)[0] for name in ("<|im_start|>", "<|im_end|>")}
    named = {ids["<|im_end|>"] if each == 9 else each for each in expected}
    assert set(tokenizer.eos_token_ids) == {*named, ids["<|im_start|>"]}


def test_what_ends_a_message_of_many_ends_no_turn() -> None:
    """gpt-oss writes several messages a turn, each ended by <|end|>, the last by <|return|>."""
    template = "{{ '<|end|>' }}{{ '<|return|>' }}{{ '<|endoftext|>' }}"
    backend = byte_level()
    backend.add_special_tokens(["<|end|>"])
    alone = Tokenizer(backend.to_str().encode(), chat_template=template)
    assert alone.eos_token_ids == (backend.token_to_id("<|end|>"),)
    backend.add_special_tokens(["<|return|>"])
    backend.add_tokens(["<|endoftext|>"])  # no control token
    both = Tokenizer(backend.to_str().encode(), chat_template=template)
    assert both.eos_token_ids == (backend.token_to_id("<|return|>"),)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bos_token": None}, {"bos_token": "<s>", "eos_token": "</s>"}),
        ({"bos_token": "<b>"}, {"bos_token": "<s>", "eos_token": "</s>"}),
        ({"bos_token": None, "added_tokens_decoder": {}}, {}),
        ({"eos_token": "<e>", "added_tokens_decoder": {}}, {"eos_token": "<e>"}),
    ],
)
def test_named_tokens_come_from_the_file_that_transformers_prefers(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, str]
) -> None:
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    write_folder(tmp_path, tokenizer_config=config, special_tokens_map=named)
    assert Tokenizer.from_folder(tmp_path).special_tokens == expected


@pytest.mark.parametrize("value", ["</s>", [1, "2"], {"id": 3}, True, -1])
def test_eos_that_is_no_id_is_an_integrity_error(tmp_path: Path, value: object) -> None:
    with pytest.raises(IntegrityError, match="eos_token_id"):
        Tokenizer.from_folder(write_folder(tmp_path, generation_config={"eos_token_id": value}))


def test_importing_the_module_costs_neither_tokenizers_nor_jinja2() -> None:
    code = "import sys, dovetail.runtime.text.tokenizer; sys.exit(bool({'tokenizers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- chat templates


def with_template(template: str | None, **special_tokens: str) -> Tokenizer:
    return Tokenizer(byte_level().to_str().encode(), special_tokens=special_tokens, chat_template=template)


USER = [{"role": "user", "content": "Hello"}]


def test_template_ends_where_the_assistant_begins() -> None:
    tokenizer = with_template(CHATML)
    assert tokenizer.apply_chat_template(USER) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(USER, add_generation_prompt=False).endswith("Hello<|im_end|>\n")
    assert tokenizer.encode_chat(USER) == tokenizer.encode(tokenizer.apply_chat_template(USER))


def test_template_file_wins_over_the_config(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"chat_template": "old"})
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(USER) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(USER) == "new"


def test_of_several_templates_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config={"chat_template": named}))
    assert tokenizer.apply_chat_template(USER) == "plain"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hello"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}a{{ messages | length }}{% endgeneration %}b", "a1b"),
        ("{% if tools is none %}no tools{% endif %}", "no tools"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ custom }}", "kept"),
    ],
)
def test_templates_find_what_checkpoints_expect(template: str, expected: str) -> None:
    assert with_template(template, bos_token="<s>").apply_chat_template(USER, custom="kept") == expected


@pytest.mark.parametrize(
    "messages",
    [
        "Hello",
        {"role": "user", "content": "Hello"},
        [],
        ["Hello"],
        [{"content": "Hello"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
    ],
)
def test_messages_of_another_shape_are_input_errors(messages: Any) -> None:
    with pytest.raises(InputError, match="message"):
        with_template("{{ messages }}").apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('unknown role ' + messages[0].role) }}",
        "{{ messages[7]['content'] + 'x' }}",
        "{{ 1 + messages[0].content }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.no.such }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% if %}",
        "{{ 'a' | nosuchfilter }}",
    ],
)
def test_what_a_template_refuses_is_one_line_of_input_error(template: str) -> None:
    with pytest.raises(InputError, match="chat template") as caught:
        with_template(template).apply_chat_template(USER)
    assert "\n" not in str(caught.value)


def test_no_template_is_an_input_error_with_the_remedy() -> None:
    tokenizer = with_template(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match="raw=True"):
        tokenizer.apply_chat_template(USER)


PARTS: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
READS_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}<{{ p.text | trim }}>{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
READS_PARTS_ALONE = "{% for m in messages %}{% for p in m['content'] %}<{{ p['text'] }}>{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        ("{{ messages[0].content }}", PARTS[0]["content"], "hi"),
        ("{{ messages[0]['content'] + '!' }}", PARTS[0]["content"], "hi!"),
        ("{{ messages[0].content | trim }}", PARTS[0]["content"] * 2, "hi\nhi"),
        ("{{ messages[0].content | tojson }}", PARTS[0]["content"], '"hi"'),
        (READS_PARTS, PARTS[0]["content"] * 2, "user:<hi><hi>"),
        (READS_PARTS, "hi", "user:hi"),
        (READS_PARTS_ALONE, PARTS[0]["content"], "<hi>"),
        (READS_PARTS_ALONE, "hi", "<hi>"),
        ("{{ messages[0].content }}", [], ""),
    ],
)
def test_parts_of_a_content_are_its_text(template: str, content: Any, expected: str) -> None:
    assert with_template(template).apply_chat_template([{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize(
    ("part", "named"),
    [({"type": "image_url", "image_url": {}}, "'image_url'"), ("hi", "'str'"), ({"type": "text"}, "without text")],
)
def test_parts_that_are_no_text_are_input_errors(part: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        with_template(CHATML).apply_chat_template([{"role": "user", "content": [part]}])


def test_tool_calls_may_stand_for_a_content() -> None:
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert with_template("{{ messages[0].tool_calls | length }}").apply_chat_template(call) == "1"
