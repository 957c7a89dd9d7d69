"""Tokenizer: text survives, and bad files are one typed error."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.text.backends import CHATML, TEXTS, TOKENIZERS, byte_level, write_folder

from dovetail.runtime.errors import InputError, IntegrityError
from dovetail.runtime.text.tokenizer import Tokenizer


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
