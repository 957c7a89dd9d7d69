"""A drafter of another kind: any object with DraftSession's four methods drafts for an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dovetail.runtime import (
    DraftSession,
    DraftTree,
    Engine,
    MarkovLogits,
    ScriptedTarget,
    ScriptedTokenizer,
    TreeLimits,
)
from dovetail.runtime.drafter.session import DraftNoise
from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.tree.growth import Judge

ALPHABET = "abcdefgh"


class PairTable:
    """Drafts without a model: a chain of the tokens that last followed the last two."""

    device = "a table"

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None) -> None:
        assert len(tokens) == len(features)
        self.tokens += tokens.tolist()

    def propose(self, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None) -> DraftTree:
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        followed = dict(zip(pairs, self.tokens[2:], strict=False))
        text = list(self.tokens)
        for _ in range(min(limits.depth, limits.width - 1)):
            if (after := followed.get(tuple(text[-2:]))) is None:
                break
            text.append(after)
        chain = text[len(self.tokens) - 1 :]
        return DraftTree(np.array(chain), np.arange(len(chain)) - 1, np.zeros(len(chain), np.float32))

    def reset(self, keep: int = 0) -> None:
        del self.tokens[keep:]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 5}], ids=["greedy", "sampled"])
def test_a_session_from_outside_drafts_the_text_of_plain_decoding(sampling: dict[str, Any]) -> None:
    session, logits = PairTable(), MarkovLogits(len(ALPHABET), seed=1)
    assert isinstance(session, DraftSession)
    engine = Engine(ScriptedTarget(logits), session, ScriptedTokenizer(ALPHABET), tree=TreeLimits(6, 5, 1, lookup=0))
    assert engine.drafter_device == "a table" and engine.drafter_note is None
    for prompt in ("abc", "abcd", "ha"):  # each a new text, the second goes on from the first
        drafted = engine.generate(prompt, 80, **sampling)
        plain = engine.generate(prompt, 80, speculate=False, **sampling)
        assert drafted.token_ids == plain.token_ids
        assert drafted.metrics.accepted > 20 and plain.metrics.drafted == 0
