"""Makes a Hugging Face tokenizer from the metadata of a GGUF file.

A GGUF file holds its vocabulary, merges (or scores) and llama.cpp's name of the pre-tokenizer. The
GGUF conversion in transformers turns some byte-level tokenizers into Metaspace tokenizers, which
drop every space without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers  # stubs, no py.typed
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from dovetail.exporter.target.gguf.header import read_header

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


def write_gguf_tokenizer(file: Path, folder: Path) -> tuple[int, ...]:
    """Write tokenizer.json, its configuration files and chat_template.jinja to `folder`.

    Return the ids that end an answer: end of sequence first, then the ends of turns.
    Raises SourceError before it writes: unreadable file, unknown tokenizer model or pre-tokenizer.
    """
    metadata = _Metadata(file)
    architecture = metadata.get("general.architecture", str)
    model = metadata.get("tokenizer.ggml.model", str)
    if model not in _MODELS:
        raise metadata.error(f"tokenizer model {model!r} is none of {', '.join(_MODELS)}")
    length = metadata.get(f"{architecture}.context_length", int, None)
    vocabulary = _Vocabulary.read(metadata)
    ends = _end_token_ids(metadata, vocabulary)
    tokenizer = _MODELS[model](metadata, vocabulary)
    special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    defined = vocabulary.of_type(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
    named = _named_tokens(metadata, vocabulary)
    # Whether raw text gets BOS and EOS, by the file or else by llama.cpp's defaults.
    default = model == "llama" or metadata.get("tokenizer.ggml.pre", str, None) in _BOS_BY_DEFAULT
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bool, default)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", bool, False)
    _add_template(tokenizer, named.get("bos_token") if add_bos else None, named.get("eos_token") if add_eos else None)
    template = metadata.get("tokenizer.chat_template", str, None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": length} if length else {}),
        **named,
        **({"chat_template": template} if template else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(_json(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(_json(named), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ends


class _Metadata:
    """The keys and values of a GGUF file; every failure is a SourceError."""

    def __init__(self, path: Path) -> None:
        self._header = read_header(path)
        self.error = self._header.error

    def get(self, key: str, kind: type[Value], default: Any = _REQUIRED) -> Value:
        """The value of `key`, or `default`. Raises SourceError for another type or no value."""
        value = self._header.metadata.get(key, default)
        if value is not default and type(value) is not kind:
            raise self.error(f"{key} is {value!r:.40}, no {kind.__name__}")
        return self._given(key, value)

    def items(self, key: str, kind: type[Value], default: Any = _REQUIRED) -> list[Value]:
        """The array `key` with items of `kind`, or `default`. Raises SourceError as `get` does."""
        value = self._header.metadata.get(key, default)
        if value is not default and not (isinstance(value, list) and all(type(item) is kind for item in value)):
            raise self.error(f"{key} is no array of {kind.__name__}")
        return self._given(key, value)

    def _given(self, key: str, value: Any) -> Any:
        if value is _REQUIRED:
            raise self.error(f"has no {key}")
        return value


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


def _end_token_ids(metadata: _Metadata, vocabulary: _Vocabulary) -> tuple[int, ...]:
    """Ids that end an answer: the file's end tokens, and control tokens in llama.cpp's list.

    Many files name only the end of a document, but their chat template ends a turn differently.
    """
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
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]
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


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits words by GPT-2's regular expression
_SINGLE_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])
# llama.cpp's names (src/llama-vocab.cpp) -> the pre-tokenizers of the checkpoints with these names.
_PRE_TOKENIZERS: Mapping[str, pre_tokenizers.PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "default", "phi-2"), _WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _SINGLE_DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _split(_QWEN2_SPLIT)),
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


def _named_tokens(metadata: _Metadata, vocabulary: _Vocabulary) -> dict[str, str]:
    """{"bos_token": "<s>", ...} for the special tokens that the file names."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id", int, None) for name, key in keys.items()}
    beyond = [index for index in ids.values() if index is not None and not 0 <= index < len(vocabulary.tokens)]
    if beyond:
        raise metadata.error(f"special token {beyond[0]} is beyond the vocabulary of {len(vocabulary.tokens)}")
    return {name: vocabulary.tokens[index] for name, index in ids.items() if index is not None}


def _add_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    around = [token for token in (bos, eos) if token is not None]
    if around:
        single = " ".join(part for part in (bos, "$A", eos) if part is not None)
        special_tokens = [(token, tokenizer.token_to_id(token)) for token in around]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special_tokens)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
