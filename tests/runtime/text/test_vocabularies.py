"""Tokens of two tokenizers are matched by their bytes: each common one both ways, every other by its parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dovetail.runtime.errors import MismatchError
from dovetail.runtime.text.tokenizer import Spelling, Tokenizer
from dovetail.runtime.text.vocabularies import LEAST_SHARE, SAMPLE, translation

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# The last two are a letter of two bytes, and a space with a letter.
MERGES = [("t", "h"), ("t", "e"), ("h", "e"), ("i", "n"), ("h", "t"), ("th", "e"), ("Ã", "¼"), ("Ġ", "t")]


def byte_level(merges: Sequence[tuple[str, str]], seed: int | None, special: Sequence[str] = ("<s>",)) -> Tokenizer:
    """A tokenizer of bytes and merges. seed: of the order of its ids, None for the usual order."""
    pieces = [*dict.fromkeys([*ALPHABET, *(piece for a, b in merges for piece in (a, b, a + b))])]
    if seed is not None:
        Random(seed).shuffle(pieces)
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    return Tokenizer(backend.to_str().encode())


def sentencepiece(words: Sequence[str]) -> Tokenizer:
    """A tokenizer as Llama's: pieces with a mark for the space, other bytes by name."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys([*words, *"".join(words)])]
    vocab = [(piece, -float(len(pieces) - len(piece))) for piece in pieces]
    backend = Backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend.to_str().encode())


TOKENIZERS = st.one_of(
    st.builds(
        byte_level,
        st.lists(st.sampled_from(MERGES), unique=True),
        st.one_of(st.none(), st.integers(0, 99)),
        st.sampled_from([(), ("<s>",), ("<s>", "</s>"), ("the",)]),
    ),
    st.builds(sentencepiece, st.lists(st.sampled_from(["▁the", "he", "n", "▁a", "ü", "is"]), min_size=1, unique=True)),
)


@given(TOKENIZERS, TOKENIZERS)
def test_tokens_are_matched_by_their_bytes(target: Tokenizer, own: Tokenizer) -> None:
    theirs, ours = target.spellings(), own.spellings()
    words = translation(target, own, 1000, 1000) if enough(target, own) else None
    if words is None:
        return
    pairs = dict(zip(words.own.tolist(), words.target.tolist(), strict=True))
    assert len(pairs) == len(words.own) == len({*pairs.values()})  # one to one
    assert {ours[one] for one in pairs} == {*theirs.values()} & {*ours.values()}  # all common tokens, no other
    for one, other in pairs.items():
        assert ours[one] == theirs[other] and words.spell(other) == (one,)
    for token, spelling in theirs.items():
        spelled = words.spell(token)
        assert b"".join(ours[each].text for each in spelled) == spelling.text
        assert spelling.special or not any(ours[each].special for each in spelled)


def enough(target: Tokenizer, own: Tokenizer) -> bool:
    spelled = target.spellings()
    sample = [spelled[token] for token in target.encode(SAMPLE, add_special_tokens=False)]
    known = {*own.spellings().values()}
    return sum(each in known for each in sample) >= LEAST_SHARE * len(sample)


def test_spellings_are_exact() -> None:
    level = byte_level(MERGES, 5).spellings()
    assert {text for text, special in level.values() if not special} >= {bytes([byte]) for byte in range(256)}
    assert {b" t", "ü".encode(), b"the"[:2]} <= {text for text, _ in level.values()}
    assert Spelling(b"<s>", True) in level.values()
    piece = sentencepiece(["▁the", "▁"]).spellings().values()
    assert {b" the", b" ", b"\xff", b"t"} <= {text for text, _ in piece}


def test_a_token_is_read_as_the_models_own_tokenizer_reads_its_text() -> None:
    """Its merges make "ht" + "e" of what the longest piece first would cut otherwise."""
    target = byte_level([("h", "t"), ("ht", "e")], None)
    own = byte_level([("t", "e"), ("h", "t")], 1)
    words = translation(target, own, 1000, 1000)
    [hte] = [token for token, spelling in target.spellings().items() if spelling.text == b"hte"]
    assert words.spell(hte) == tuple(own.encode("hte", add_special_tokens=False))
    assert [own.spellings()[each].text for each in words.spell(hte)] == [b"h", b"te"]


def test_ids_beyond_either_models_rows_are_not_proposed() -> None:
    target, own = byte_level(MERGES, None), byte_level(MERGES, 4)
    words = translation(target, own, 250, 230)
    assert words.own.max() < 230 and words.target.max() < 250
    assert all(own_id < 230 for token in range(1000) for own_id in words.spell(token))


def test_too_few_common_tokens_are_told_in_one_line() -> None:
    target = byte_level(MERGES, None)
    content = json.loads(byte_level([], None)._backend.to_str())
    content["model"]["vocab"] = {f"{piece}{piece}": index for piece, index in content["model"]["vocab"].items()}
    with pytest.raises(
        MismatchError, match=r"the draft model knows 0% of the target's tokens .*: give a model"
    ) as told:
        translation(target, Tokenizer(json.dumps(content).encode()), 1000, 1000)
    assert "\n" not in str(told.value)
