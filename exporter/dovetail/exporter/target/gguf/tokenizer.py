"""Makes a Hugging Face tokenizer from the metadata of a GGUF file.

A GGUF file holds its vocabulary, merges (or scores) and llama.cpp's name of the pre-tokenizer. This
module builds the tokenizer from these with the `tokenizers` library. The GGUF conversion in
transformers turns some byte-level tokenizers into Metaspace tokenizers, which drop every space
without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import TokenType
from tokenizers import (  # ships stubs without py.typed
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from dovetail.exporter.target.gguf.header import read_header
from dovetail.runtime.errors import SourceError

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# llama.cpp's list (src/llama-vocab.cpp), without the tokens of gpt-oss
_TURN_ENDS = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<|endoftext|>",
        "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip
_REQUIRED: Any = object()
Value = TypeVar("Value")


@dataclass(frozen=True)
class GgufFacts:
    """Facts about the model of a GGUF file; None if the file lacks a fact."""

    architecture: str  # "llama", "qwen2", ...
    name: str | None
    license: str | None
    context_length: int | None  # tokens
    vocab_size: int
    tokenizer_model: str  # "gpt2": byte-level BPE, "llama": SentencePiece BPE
    tokenizer_pre: str | None  # llama.cpp's name of the pre-tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # end of sequence first, then the ends of turns


def gguf_facts(path: Path | str) -> GgufFacts:
    """Facts of a GGUF file. Raises SourceError if the file is unreadable or has no tokenizer."""
    return _facts(_Metadata(Path(path)))


def write_gguf_tokenizer(gguf_path: Path | str, out_dir: Path | str) -> GgufFacts:
    """Write tokenizer.json, its configuration files and chat_template.jinja to `out_dir`.

    Raises SourceError before it writes: unreadable file, unknown tokenizer model or pre-tokenizer.
    """
    metadata, folder = _Metadata(Path(gguf_path)), Path(out_dir)
    facts = _facts(metadata)
    vocabulary = _Vocabulary.read(metadata)
    tokenizer = _MODELS[facts.tokenizer_model](metadata, vocabulary)
    _add_tokens(tokenizer, vocabulary)
    named = _named_tokens(metadata, vocabulary, facts)
    add_bos, add_eos = _adds(metadata, facts)
    _add_template(tokenizer, named if add_bos else {}, named if add_eos else {})
    template = metadata.get("tokenizer.chat_template", str, None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": facts.context_length} if facts.context_length else {}),
        **named,
        **({"chat_template": template} if template else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(_json(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(_json(named), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return facts


class _Metadata:
    """The keys and values of a GGUF file; every failure is a SourceError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = read_header(path).metadata

    def get(self, key: str, kind: type[Value], default: Any = _REQUIRED) -> Value:
        """The value of `key`, or `default`. Raises SourceError for another type or no value."""
        value = self._values.get(key, default)
        if value is not default and type(value) is not kind:
            raise self.error(f"{key} is {value!r:.40}, no {kind.__name__}")
        return self._given(key, value)

    def items(self, key: str, kind: type[Value], default: Any = _REQUIRED) -> list[Value]:
        """The array `key` with items of `kind`, or `default`. Raises SourceError as `get` does."""
        value = self._values.get(key, default)
        if value is not default and not (isinstance(value, list) and all(type(item) is kind for item in value)):
            raise self.error(f"{key} is no array of {kind.__name__}")
        return self._given(key, value)

    def _given(self, key: str, value: Any) -> Any:
        if value is _REQUIRED:
            raise SourceError(f"{self.path} has no {key}: use the checkpoint's Hub id or its folder instead")
        return value

    def error(self, what: str) -> SourceError:
        return SourceError(f"{self.path}: {what}: use the checkpoint's Hub id or its folder instead")


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens in id order with their types, without the unused tokens that pad the end."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, metadata: _Metadata) -> _Vocabulary:
        tokens = metadata.items("tokenizer.ggml.tokens", str)
        types = metadata.items("tokenizer.ggml.token_type", int, [int(TokenType.NORMAL)] * len(tokens))
        if len(types) != len(tokens):
            raise metadata.error(f"{len(types)} token types for {len(tokens)} tokens")
        used = np.flatnonzero(np.asarray(types) != TokenType.UNUSED)
        count = int(used[-1]) + 1 if used.size else 0
        ids = {token: index for index, token in enumerate(tokens[:count])}
        if len(ids) != count:
            raise metadata.error(f"{count - len(ids)} tokens occur twice in the vocabulary")
        return cls(tokens[:count], types[:count], ids)

    def of_type(self, *types: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def _facts(metadata: _Metadata) -> GgufFacts:
    architecture = metadata.get("general.architecture", str)
    model = metadata.get("tokenizer.ggml.model", str)
    if model not in _MODELS:
        raise metadata.error(f"tokenizer model {model!r} is none of {', '.join(_MODELS)}")
    return GgufFacts(
        architecture=architecture,
        name=metadata.get("general.name", str, None),
        license=metadata.get("general.license", str, None),
        context_length=metadata.get(f"{architecture}.context_length", int, None),
        vocab_size=len(metadata.items("tokenizer.ggml.tokens", str)),
        tokenizer_model=model,
        tokenizer_pre=metadata.get("tokenizer.ggml.pre", str, None),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id", int, None),
        eos_token_ids=_end_token_ids(metadata),
    )


def _end_token_ids(metadata: _Metadata) -> tuple[int, ...]:
    """Ids that end an answer: the file's end tokens, and control tokens in llama.cpp's list.

    Many files name only the end of a document, but their chat template ends a turn with another
    token.
    """
    vocabulary = _Vocabulary.read(metadata)
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom"))
    known = (vocabulary.ids[token] for token in vocabulary.of_type(TokenType.CONTROL) if token in _TURN_ENDS)
    return tuple(dict.fromkeys(end for end in (*named, *known) if end is not None))


# --- byte-level BPE ("gpt2")


def _byte_level(metadata: _Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", str, None)
    if pre not in _PRE_TOKENIZERS:
        raise metadata.error(f"pre-tokenizer {pre!r} is none of {', '.join(_PRE_TOKENIZERS)}")
    merges = [_merge(metadata, merge) for merge in metadata.items("tokenizer.ggml.merges", str)]
    tokenizer = Tokenizer(_bpe(metadata, vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(metadata: _Metadata, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise metadata.error(f"merge {merge!r} is not a pair")
    return left, right


def _bpe(metadata: _Metadata, vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocabulary.ids, merges, **options)
    except Exception as error:  # `tokenizers` raises a bare Exception for a merge outside the vocabulary
        raise metadata.error(f"merges do not fit the vocabulary ({error})") from error


def _words() -> pre_tokenizers.PreTokenizer:
    """Split words by GPT-2's regular expression, which ByteLevel contains."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


def _split(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return lambda: pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# llama.cpp's names (src/llama-vocab.cpp) -> the pre-tokenizers of the checkpoints with these names.
_PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _words,
    "default": _words,
    "phi-2": _words,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "qwen2": _split(_QWEN2_SPLIT),
    "deepseek-r1-qwen": _split(_QWEN2_SPLIT),
    "llama-bpe": _split(_LLAMA3_SPLIT),
}
_NFC = frozenset({"qwen2"})
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})  # a word that is a token is not built from merges
_BOS_BY_DEFAULT = frozenset({"llama-bpe"})


# --- SentencePiece BPE with byte fallback ("llama")


def _sentencepiece(metadata: _Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    scores = metadata.items("tokenizer.ggml.scores", float)
    if len(scores) < len(vocabulary.tokens):
        raise metadata.error(f"{len(scores)} scores for {len(vocabulary.tokens)} tokens")
    byte_fallback = len(vocabulary.of_type(TokenType.BYTE)) == 256
    unknown = vocabulary.of_type(TokenType.UNKNOWN)
    options = {"unk_token": unknown[0], "fuse_unk": True} if unknown else {}
    merges = _merges_by_score(vocabulary, scores)
    tokenizer = Tokenizer(_bpe(metadata, vocabulary, merges, byte_fallback=byte_fallback, **options))
    spaces = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every split of every piece, best score first, because SentencePiece joins these first.

    Ties have the order that transformers gives them when it converts a SentencePiece model.
    """
    pieces = {token: vocabulary.ids[token] for token in vocabulary.of_type(TokenType.NORMAL)}
    ranked = []
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append(
                    (-scores[index], -len(left), -len(right), index, pieces[left], pieces[right], left, right)
                )
    return [(left, right) for *_, left, right in sorted(ranked)]


_MODELS: Mapping[str, Callable[[_Metadata, _Vocabulary], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}


# --- special tokens


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add control and unknown tokens as special tokens, and user-defined tokens as text."""
    special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    defined = vocabulary.of_type(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])


def _named_tokens(metadata: _Metadata, vocabulary: _Vocabulary, facts: GgufFacts) -> dict[str, str]:
    """{"bos_token": "<s>", ...} for the special tokens that the file names."""
    ids: dict[str, int | None] = {
        "bos_token": facts.bos_token_id,
        "eos_token": metadata.get("tokenizer.ggml.eos_token_id", int, None),
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id", int, None),
        "pad_token": metadata.get("tokenizer.ggml.padding_token_id", int, None),
    }
    beyond = [index for index in ids.values() if index is not None and not 0 <= index < len(vocabulary.tokens)]
    if beyond:
        raise metadata.error(f"special token {beyond[0]} is beyond the vocabulary of {len(vocabulary.tokens)}")
    return {name: vocabulary.tokens[index] for name, index in ids.items() if index is not None}


def _adds(metadata: _Metadata, facts: GgufFacts) -> tuple[bool, bool]:
    """Whether raw text gets BOS and EOS, by the file or else by llama.cpp's defaults."""
    default = facts.tokenizer_model == "llama" or facts.tokenizer_pre in _BOS_BY_DEFAULT
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bool, default)
    return add_bos, metadata.get("tokenizer.ggml.add_eos_token", bool, False)


def _add_template(tokenizer: Tokenizer, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    bos, eos = before.get("bos_token"), after.get("eos_token")
    around: Iterable[str] = [token for token in (bos, eos) if token is not None]
    if around:
        single = " ".join(part for part in (bos, "$A", eos) if part is not None)
        special_tokens = [(token, tokenizer.token_to_id(token)) for token in around]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special_tokens)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
