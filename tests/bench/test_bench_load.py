"""The benchmark under load: a real engine in a process of its own, and the table of what was measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.errors import InputError


def test_users_are_answered_by_an_engine_of_their_own_process(
    tiny_full_pair: Path, bench_script: Callable[[str], ModuleType]
) -> None:
    load = bench_script("load")
    prompts = [[5, 6, 7 + index] for index in range(5)]
    with load.Engine(sys.executable, "dovetail", tiny_full_pair, 2) as engine:
        engine.ask(prompts[:3], [2] * 3)
        result = engine.ask(prompts, [6, 2, 5, 3, 4])
    assert [answer["count"] for answer in result["answers"]] == [len(each["tokens"]) for each in result["answers"]]
    assert len(result["answers"]) == 5
    asked = zip(result["answers"], (6, 2, 5, 3, 4), strict=True)
    assert all(0 < answer["count"] <= most and answer["first_ms"] > 0 for answer, most in asked)
    assert len({answer["count"] for answer in result["answers"]}) > 1
    absent = load.Engine(sys.executable, "dovetail", tiny_full_pair / "absent", 2)
    with pytest.raises(InputError, match=r"run .* by hand to see why"), absent:
        pass


def test_the_table_compares_loads_with_the_same_server_without_drafts(
    bench_script: Callable[[str], ModuleType],
) -> None:
    load = bench_script("load")

    def row(engine: str, seconds: float, last: int) -> dict[str, object]:
        answer = {"count": 4, "first_ms": 50.0, "between_ms": [10.0, 20.0, 30.0], "tokens": [1, 2, 3, last]}
        return {"engine": engine, "users": 4, "part": 0, "seconds": seconds, "answers": [answer] * 10}

    rows = [row("dovetail", 2.0, 4), row("dovetail, no drafts", 4.0, 4), row("openvino-genai", 5.0, 9)]
    assert load.table(rows, [each["engine"] for each in rows], (1, 4)).splitlines()[2:] == [
        "| 4 | dovetail | 20.0 | 2.00x | 50 / 50 | 20 / 30 | 10 of 10 |",
        "| 4 | dovetail, no drafts | 10.0 | 1.00x | 50 / 50 | 20 / 30 | 10 of 10 |",
        "| 4 | openvino-genai | 8.0 | 0.80x | 50 / 50 | 20 / 30 | 0 of 10 |",
    ]
