"""A tokenizer built from GGUF metadata splits, merges and skips as the tokenizer that the file was made from."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers

from dovetail.exporter.target.gguf.header import read_header
from dovetail.exporter.target.gguf.tokenizer import write_gguf_tokenizer
from dovetail.exporter.target.tokenizer_copy import probe_tokenizer
from dovetail.runtime.errors import SourceError
from dovetail.runtime.text.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Merges over spaces, lines, digits and letters: where the pre-tokenizer cuts decides which of them apply.
MERGES = [
    "Ġ Ġ",
    "ĠĠ ĠĠ",
    "Ċ Ċ",
    "1 2",
    "12 3",
    "123 4",
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ hello",
    "Ã ©",
    "' s",
    "a b",
]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


def write_gguf(path: Path, tokens: list[str], types: list[int], **fields: Any) -> Path:
    """A GGUF file with one tensor; `fields` are tokenizer fields: scalars, strings or lists of them."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(64)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        if name == "chat_template" and isinstance(value, str):
            writer.add_chat_template(value)
        elif name == "chat_template":
            writer.add_uint32("tokenizer.chat_template", value)
        elif isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_string(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_gguf(path: Path, **fields: Any) -> Path:
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*CONTROL, *ALPHABET, *merged, "<tool>", "[PAD0]", "[PAD1]"]
    kinds = {**dict.fromkeys(CONTROL, 3), "<tool>": 4, "[PAD0]": 5, "[PAD1]": 5}
    defaults = {"model": "gpt2", "pre": "smollm", "merges": MERGES, "eos_token_id": 2, "bos_token_id": 1}
    return write_gguf(path, tokens, [kinds.get(token, 1) for token in tokens], **{**defaults, **fields})


def converted(tmp_path: Path, gguf: Path) -> Tokenizer:
    write_gguf_tokenizer(gguf, tmp_path / "target")
    return Tokenizer.from_folder(tmp_path / "target")


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.encode(text)]


# --- byte-level BPE


@pytest.mark.parametrize("pre", ["gpt-2", "default", "phi-2", "smollm", "starcoder", "refact", "qwen2", "llama-bpe"])
def test_every_supported_pre_tokenizer_passes_the_probe(tmp_path: Path, pre: str) -> None:
    write_gguf_tokenizer(byte_level_gguf(tmp_path / "m.gguf", pre=pre), tmp_path / "target")
    probe_tokenizer(tmp_path / "target")


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "a 1234", ["a", " ", "1234"]),
        ("smollm", "a1234", ["a", "1", "2", "3", "4"]),
        ("starcoder", "a1234", ["a", "1", "2", "3", "4"]),
        ("qwen2", "a1234", ["a", "1", "2", "3", "4"]),
        ("llama-bpe", "a1234", ["a", "123", "4"]),
        # blank lines before a digit: digits are cut off first, so the lines stay together
        ("smollm", "a\n\n1", ["a", "\n\n", "1"]),
        ("gpt-2", "a\n\n1", ["a", "\n", "\n", "1"]),
        ("smollm", "a     hello", ["a", "    ", " hello"]),
        ("qwen2", "e\u0301", ["é"]),
        ("smollm", "ab<tool>ab<|im_end|>", ["ab", "<tool>", "ab", "<|im_end|>"]),
    ],
)
def test_text_is_cut_as_the_named_pre_tokenizer_cuts(tmp_path: Path, pre: str, text: str, expected: list[str]) -> None:
    tokenizer = converted(tmp_path, byte_level_gguf(tmp_path / "m.gguf", pre=pre, add_bos_token=False))
    assert pieces(tokenizer, text) == expected


def test_llama3_words_need_no_merges(tmp_path: Path) -> None:
    """A token without a merge path is used for a whole word there, and never elsewhere."""
    fields = {"merges": MERGES[:-1], "add_bos_token": False}  # "ab" is a token, its merge is gone
    llama = converted(tmp_path, byte_level_gguf(tmp_path / "l.gguf", pre="llama-bpe", **fields))
    assert pieces(llama, "ab") == ["ab"]
    qwen = converted(tmp_path, byte_level_gguf(tmp_path / "q.gguf", pre="qwen2", **fields))
    assert pieces(qwen, "ab") == ["a", "b"]


def test_token_types_decide_what_decode_skips(tmp_path: Path) -> None:
    tokenizer = converted(tmp_path, byte_level_gguf(tmp_path / "m.gguf"))
    ids = tokenizer.encode("<|im_start|>hello<tool><|im_end|>")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "hello<tool>"


def test_tokens_that_pad_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    gguf = byte_level_gguf(tmp_path / "m.gguf")
    tokenizer = converted(tmp_path, gguf)
    assert len(read_header(gguf).metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 2
    assert tokenizer.decode([tokenizer.vocab_size]) == ""


def test_ids_are_those_of_the_file(tmp_path: Path) -> None:
    tokenizer = converted(tmp_path, byte_level_gguf(tmp_path / "m.gguf"))
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert tokenizer.encode("!") == [3 + ALPHABET.index("!")]
    assert tokenizer.eos_token_ids == (2,)


# --- SentencePiece BPE


def sentencepiece_gguf(path: Path, **fields: Any) -> tuple[Path, dict[str, float]]:
    """Random pieces over a small alphabet with random distinct scores, byte fallback for the rest."""
    rng = random.Random(7)
    words = {"".join(rng.choice("▁abc") for _ in range(rng.randint(2, 4))) for _ in range(60)}
    normal = [*sorted(words), *"▁abc"]
    rng.shuffle(normal)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    types = [int(TokenType.UNKNOWN), *[int(TokenType.CONTROL)] * 2, *[int(TokenType.BYTE)] * 256]
    types += [int(TokenType.NORMAL)] * len(normal)
    scores = {piece: -float(rank) for rank, piece in enumerate(normal)}
    defaults = {"model": "llama", "scores": [0.0] * 259 + [*scores.values()], "bos_token_id": 1, "eos_token_id": 2}
    return write_gguf(path, tokens, types, **{**defaults, **fields}), scores


def merge_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, told naively: join the best-scoring neighbours, leftmost first, until none is a piece."""
    parts = list(text)
    while True:
        joins = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not joins:
            return parts
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_sentencepiece_merges_follow_the_scores(tmp_path: Path) -> None:
    gguf, scores = sentencepiece_gguf(tmp_path / "m.gguf", add_bos_token=False)
    tokenizer = converted(tmp_path, gguf)
    ids = {piece: 259 + rank for rank, piece in enumerate(scores)}
    rng = random.Random(11)
    for _ in range(300):
        text = "".join(rng.choice(" abc") for _ in range(rng.randint(1, 12)))
        expected = [ids[piece] for piece in merge_by_score("▁" + text.replace(" ", "▁"), scores)]
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text


def test_sentencepiece_keeps_every_text_and_adds_bos(tmp_path: Path) -> None:
    gguf, _ = sentencepiece_gguf(tmp_path / "m.gguf")
    tokenizer = converted(tmp_path, gguf)
    assert tokenizer.encode("a")[0] == 1
    probe_tokenizer(tmp_path / "target")


def test_sentencepiece_without_space_prefix_adds_none(tmp_path: Path) -> None:
    gguf, _ = sentencepiece_gguf(tmp_path / "m.gguf", add_space_prefix=False, add_bos_token=False)
    tokenizer = converted(tmp_path, gguf)
    assert pieces(tokenizer, "b") == ["b"]
    assert tokenizer.decode(tokenizer.encode(" a  b")) == " a  b"


# --- the folder


def test_folder_holds_named_tokens_template_and_context(tmp_path: Path) -> None:
    gguf = byte_level_gguf(tmp_path / "m.gguf", chat_template=TEMPLATE, padding_token_id=2, unknown_token_id=0)
    tokenizer = converted(tmp_path, gguf)
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    assert tokenizer.special_tokens == {**named, "pad_token": "<|im_end|>"}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == "<|im_start|>user\nab<|im_end|>\n"
    assert (tmp_path / "target" / "chat_template.jinja").read_text() == TEMPLATE
    config = json.loads((tmp_path / "target" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 64
    assert config["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("bos", "eos", "expected"), [(True, False, [1, 3]), (True, True, [1, 3, 2]), (False, False, [3])]
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path: Path, bos: bool, eos: bool, expected: list[int]) -> None:
    gguf = byte_level_gguf(tmp_path / "m.gguf", add_bos_token=bos, add_eos_token=eos)
    assert converted(tmp_path, gguf).encode("!") == expected


def test_transformers_reads_the_same_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="only the export extra installs transformers")
    ours = converted(tmp_path, byte_level_gguf(tmp_path / "m.gguf", chat_template=TEMPLATE))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "target")
    for text in ("hello  hello\n\n123é", "<|im_start|>ab<|im_end|>", " a"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    messages = [{"role": "user", "content": "ab"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"eos_token_id": 2}, (2, 0)),  # <|endoftext|> ends an answer wherever it is a control token
        ({"eos_token_id": 0}, (0, 2)),  # the template ends turns with <|im_end|>
        ({"eos_token_id": 0, "eot_token_id": 1}, (0, 1, 2)),
        ({"eos_token_id": 0, "eom_token_id": 1}, (0, 1, 2)),
    ],
)
def test_every_token_that_ends_an_answer_is_found(
    tmp_path: Path, fields: dict[str, int], expected: tuple[int, ...]
) -> None:
    gguf = byte_level_gguf(tmp_path / "m.gguf", **fields)
    assert write_gguf_tokenizer(gguf, tmp_path / "target") == expected


def test_text_that_looks_like_the_end_of_a_turn_ends_nothing(tmp_path: Path) -> None:
    tokens = [*CONTROL[:2], "[EOS]", *ALPHABET, "ab"]
    fields = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"], "eos_token_id": 1}
    gguf = write_gguf(tmp_path / "m.gguf", tokens, [3, 3] + [1] * 258, **fields)
    assert write_gguf_tokenizer(gguf, tmp_path / "target") == (1, 0)


# --- files that cannot be used


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pre": "tekken"}, "'tekken'"),
        ({"model": "t5"}, "'t5'"),
        ({"eos_token_id": 9999}, "9999"),
        ({"merges": ["h e", "x"]}, "'x'"),
        ({"merges": ["zz qq"]}, "do not fit"),
        ({"model": "llama"}, "scores"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>', no int"),
        ({"chat_template": 7}, "chat_template is 7, no str"),
        ({"merges": "h e"}, "merges is no array of str"),
        ({"eos_token_id": True}, "eos_token_id is True, no int"),
    ],
)
def test_what_is_not_supported_is_named_with_the_remedy(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    gguf = byte_level_gguf(tmp_path / "m.gguf", **fields)
    with pytest.raises(SourceError, match="Hub id or its folder instead") as caught:
        write_gguf_tokenizer(gguf, tmp_path / "target")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file_is_a_source_error(tmp_path: Path, share: float) -> None:
    gguf = byte_level_gguf(tmp_path / "m.gguf")
    content = gguf.read_bytes()
    gguf.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SourceError, match=r"m\.gguf is .*: (download it again|give another file)$") as caught:
        write_gguf_tokenizer(gguf, tmp_path / "target")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_missing_file_and_other_formats_are_source_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="name a GGUF file"):
        write_gguf_tokenizer(tmp_path / "none.gguf", tmp_path / "target")
    (tmp_path / "text.gguf").write_text("not a model " * 100)
    with pytest.raises(SourceError, match="not a GGUF file"):
        write_gguf_tokenizer(tmp_path / "text.gguf", tmp_path / "target")
