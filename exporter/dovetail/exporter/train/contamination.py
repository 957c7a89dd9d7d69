"""Finds training text that repeats a benchmark's prompts, by runs of words.

Training leaves out a conversation that shares a run of 13 words with a benchmark prompt. A prompt
of 6 to 12 words is one run. A shorter prompt has no run, because chance alone repeats it. Words are
letters and digits in lower case, so another layout does not hide a copy. In scripts without spaces
between words, such as Chinese and Thai, each letter counts as a word, so that shorter passages count.
Source: the 13-gram rule of GPT-3's contamination study (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

N = 13
SHORTEST = 6

# Thai, Lao, Myanmar, Khmer, kana, Chinese characters.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class Forbidden:
    """The word runs of texts that training must not contain."""

    def __init__(self, texts: Iterable[str]):
        self._runs: dict[int, set[tuple[str, ...]]] = {}  # run length -> runs
        for text in texts:
            words = _words(text)
            if len(words) >= SHORTEST:
                size = min(N, len(words))
                self._runs.setdefault(size, set()).update(_runs(words, size))

    def __bool__(self) -> bool:
        return bool(self._runs)

    def touches(self, text: str) -> bool:
        words = _words(text)
        return any(not runs.isdisjoint(_runs(words, size)) for size, runs in self._runs.items())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], size: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False)
