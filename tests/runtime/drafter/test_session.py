"""A drafter of another kind: any object with the methods of Drafter drafts for an engine."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dovetail.runtime import (
    Drafter,
    DraftTree,
    Engine,
    MarkovLogits,
    ScriptedTarget,
    ScriptedTokenizer,
    TreeLimits,
)
from dovetail.runtime.drafter.session import DeviceReport, DraftNoise
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.growth import Judge

ALPHABET = "abcdefgh"


class PairTable:
    """Drafts without a model: a chain of the tokens that last followed the last two."""

    device, capacity, top_k = "a table", 1000, 1
    report = DeviceReport()

    def __init__(self) -> None:
        self.texts: dict[SequenceId, list[int]] = {}

    def length(self, seq: SequenceId) -> int:
        return len(self.texts.get(seq, ()))

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        assert len(tokens) == len(features)
        self.texts.setdefault(seq, []).extend(tokens.tolist())

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        read = self.texts[seq]
        followed: dict[tuple[int, ...], int] = dict(zip(pairwise(read), read[2:], strict=False))
        text = list(read)
        for _ in range(min(limits.depth, limits.width - 1)):
            if (after := followed.get(tuple(text[-2:]))) is None:
                break
            text.append(after)
        chain = text[len(read) - 1 :]
        return DraftTree(np.array(chain), np.arange(len(chain)) - 1, np.zeros(len(chain), np.float32))

    def rewind(self, seq: SequenceId, keep: int) -> None:
        del self.texts.get(seq, [])[keep:]

    def close(self) -> None:
        self.texts.clear()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 5}], ids=["greedy", "sampled"])
def test_a_session_from_outside_drafts_the_text_of_plain_decoding(sampling: dict[str, Any]) -> None:
    session, logits = PairTable(), MarkovLogits(len(ALPHABET), seed=1)
    assert isinstance(session, Drafter)
    engine = Engine(ScriptedTarget(logits), session, ScriptedTokenizer(ALPHABET), tree=TreeLimits(6, 5, 1, lookup=0))
    assert engine.drafter_device == "a table" and not engine.drafter_note
    for prompt in ("abc", "abcd", "ha"):  # each a new text, the second goes on from the first
        drafted = engine.generate(prompt, 80, **sampling)
        plain = engine.generate(prompt, 80, speculate=False, **sampling)
        assert drafted.token_ids == plain.token_ids
        assert drafted.metrics.accepted > 20 and plain.metrics.drafted == 0
