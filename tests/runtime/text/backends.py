"""Small tokenizers of the kinds that models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

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
