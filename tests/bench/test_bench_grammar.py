"""The benchmark of answers under schemas, on a tiny pair: a stopped run goes on, and what is wrong is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.front import GenerationResult
from dovetail.runtime.sampling.constraint import grammar_source


@pytest.fixture
def script(bench_script: Callable[[str], ModuleType]) -> ModuleType:
    return bench_script("grammar")


def test_every_schema_can_be_used_compact_too(script: ModuleType) -> None:
    rows = [json.loads(line) for line in script.SCHEMAS.read_text().splitlines()]
    assert len({row["name"] for row in rows}) == 20
    for row in rows:
        assert grammar_source(json_schema=row["schema"])
        assert grammar_source(json_schema={**row["schema"], "x-guidance": {"whitespace_flexible": False}})


def test_a_stopped_run_goes_on_and_unfinished_answers_are_not_valid(
    script: ModuleType, tiny_full_pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"

    def opener(pair: Path) -> Engine:
        return Engine.from_pretrained(pair, tree=TreeLimits(8, 3, 2), drafter_device="cpu", threads=1)

    arguments = [str(tiny_full_pair), "--schemas", "1", "--subjects", "1", "-n", "30", "--compact", "--out", str(out)]
    first = CliRunner().invoke(script.main, arguments, obj=opener)
    assert first.exit_code == 1, first.output  # 30 tokens are too few for a person
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["temperature"] for row in rows] == [0.0, 0.7]
    for row in rows:
        assert row["same"] and not row["valid"] and (row["tokens"], row["finish"]) == (30, "length")
        assert row["text"].startswith('{"first_name":"')
        assert row["accepted"] + row["rounds"] == 29
    assert first.output.splitlines()[2].startswith("| 0.0 | 1 | 0 | 1 | 30 | ")
    out.write_text(out.read_text().splitlines()[0] + "\n")
    again = CliRunner().invoke(script.main, arguments, obj=opener)
    assert again.exit_code == 1 and len(out.read_text().splitlines()) == 2
    assert json.loads(out.read_text().splitlines()[0]) == rows[0]


def test_an_answer_that_a_grammar_or_a_schema_refuses_is_not_valid(script: ModuleType, tiny_full_pair: Path) -> None:
    schema: dict[str, Any] = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    with Engine.from_pretrained(tiny_full_pair, tree=TreeLimits(lookup=0), drafter_device="cpu", threads=1) as engine:
        constraint = engine.constraint(json_schema=schema)
        result = engine.generate("the", 60, raw=True, constraint=constraint)
        assert result.finish_reason == "stop" and script.valid(result, schema, constraint)
        for ids in (result.token_ids[:-1], (*result.token_ids, 5), (5,)):
            other = GenerationResult(result.text, ids, "stop", None, result.metrics)
            assert not script.valid(other, schema, constraint)
        assert not script.valid(engine.generate("the", 1, raw=True, constraint=constraint), schema, constraint)
