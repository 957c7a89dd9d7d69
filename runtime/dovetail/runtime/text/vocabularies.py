"""Match the tokens of two tokenizers by their bytes, so that a draft model may have another one.

Source: token-level intersection (TLI), 'Accelerating LLM Inference with Lossless Speculative
Decoding for Heterogeneous Vocabularies', 2502.05202.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from dovetail.runtime.drafter.translation import Translation
from dovetail.runtime.errors import MismatchError
from dovetail.runtime.text.tokenizer import Tokenizer

# Below this share of common tokens even a model that is always right has less than one accepted
# token a round: share / (1 - share).
LEAST_SHARE = 0.5
SAMPLE = '''
The library opens at nine o'clock. Most visitors come for the newspapers, some for the warm rooms, and a few
to write letters. "How many books have you got?" asked the boy. There were 4,217 of them in 2019, he was told;
since then 35% more have been bought.

1. Choose a topic, e.g. history or medicine.
2. Read the introduction, and note what is not explained.

def count(words: list[str]) -> dict[str, int]:
    """Return how often each word occurs."""
    seen = {}
    for word in words:
        seen[word] = seen.get(word, 0) + 1
    return seen

{"name": "Zoë", "tags": ["a", "b"], "price": 12.5}
Der Zug nach München fährt um 8:15 Uhr ab. ¿Dónde está la biblioteca? 今天天气很好。 Это просто пример.
'''


def translation(target: Tokenizer, own: Tokenizer, target_rows: int, own_rows: int) -> Translation:
    """Return how a draft model with the tokenizer `own` reads and proposes tokens of `target`.

    rows: ids of each model. Raises MismatchError if too little of a sample text is common tokens.
    """
    theirs, ours = target.spellings(), own.spellings()
    ids = {spelling: token for token, spelling in sorted(ours.items(), reverse=True) if token < own_rows}
    common = {token: ids[spelling] for token, spelling in theirs.items() if token < target_rows and spelling in ids}
    sample = target.encode(SAMPLE, add_special_tokens=False)
    share = sum(token in common for token in sample) / max(len(sample), 1)
    if share < LEAST_SHARE:
        raise MismatchError(
            f"the draft model knows {share:.0%} of the target's tokens in a sample text, less than {LEAST_SHARE:.0%}: "
            "give a model whose tokenizer has more tokens of the target's"
        )
    plain = {token: spelling.text for token, spelling in ours.items() if token < own_rows and not spelling.special}
    pieces = {text: token for token, text in plain.items()}
    longest = max(map(len, pieces), default=0)

    def read(text: bytes) -> list[int]:
        """Return own ids of `text`: of the draft model's tokenizer, if they have these bytes exactly."""
        try:
            tokens = own.encode(text.decode(), add_special_tokens=False)
            if all(token in plain for token in tokens) and b"".join(plain[token] for token in tokens) == text:
                return tokens
        except UnicodeDecodeError:
            pass  # a part of a character
        found, begin = list[int](), 0
        while begin < len(text):  # the longest piece first
            end = next((end for end in range(begin + longest, begin, -1) if text[begin:end] in pieces), begin + 1)
            found.append(pieces.get(text[begin:end], 0))
            begin = min(end, len(text))
        return found

    @cache
    def spell(token: int) -> tuple[int, ...]:
        if token in common:
            return (common[token],)
        return tuple(read(theirs[token].text)) or (0,) if token in theirs else (0,)

    proposed = {mine: token for token, mine in sorted(common.items(), reverse=True)}  # each own token once
    return Translation(np.array([*proposed], np.int64), np.array([*proposed.values()], np.int64), spell)
