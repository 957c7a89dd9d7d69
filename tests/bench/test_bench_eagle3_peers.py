"""The figures of eagle3_peers.py, from made-up answers."""

from __future__ import annotations

from typing import Any

import pytest
from tests.bench.eagle3_peers import summary, table


def answer(tokens: list[int], rounds: int) -> dict[str, Any]:
    return {"tokens": tokens, "count": len(tokens), "rounds": rounds, "later_ms": 100.0}


def test_the_acceptance_length_is_tokens_by_passes_over_all_prompts() -> None:
    rows = [
        {"ours": answer([1, 2, 3, 4, 5], 2), "theirs": answer([1, 2, 3, 4, 6], 4)},
        {"ours": answer([7, 8, 9], 2), "theirs": answer([7, 8, 9], 1)},
    ]
    ours, theirs = summary(rows, ["ours", "theirs"])
    assert ours["acceptance_length"] == pytest.approx(6 / 4) and theirs["acceptance_length"] == pytest.approx(6 / 5)
    assert ours["same_text"] == 2 and theirs["same_text"] == 1
    assert table([ours, theirs]).splitlines()[-1] == "| theirs | 1.200 | 30.0 | 1 of 2 |"
