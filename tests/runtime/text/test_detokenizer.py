"""Detokenizer: pieces concatenate to the text, and no letter is split or held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.text.backends import TEXTS, TOKENIZERS, byte_level, sentencepiece_like, streamed
from tokenizers import Tokenizer as Backend

from dovetail.runtime.text.stop_strings import StopFilter
from dovetail.runtime.text.tokenizer import Tokenizer


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
