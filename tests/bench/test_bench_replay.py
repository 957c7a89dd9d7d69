"""Recorded drafts meet the scheduler again: the text stays, good drafts save passes, bad ones cost next to nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from dovetail.runtime.costs import Costs, Curve
from dovetail.runtime.engine import Engine
from dovetail.runtime.schedule import Scheduler
from dovetail.runtime.tree import DraftTree

COSTS = Costs(Curve((0,), (1, 64), ((20.0, 40.0),)), Curve((0,), (1, 128), ((1.0, 3.0),)), switch_ms=5.0)


@pytest.fixture(scope="module")
def script(bench_script) -> ModuleType:
    return bench_script("replay")


def chains(script: ModuleType, right: bool) -> object:
    """An answer of 200 tokens that repeats nothing, and after each of them a chain of up to four sure tokens."""
    answer = np.arange(10, 210)
    trees = []
    for place in range(len(answer) - 1):
        chain = answer[place : place + 5] + np.array([0, 300, 300, 300, 300])[: len(answer) - place] * (not right)
        trees.append(
            DraftTree(chain, np.arange(-1, len(chain) - 1), np.linspace(0, -0.04, len(chain), dtype=np.float32))
        )
    return script.Record((1, 2, 3), tuple(answer.tolist()), tuple(trees))


@pytest.mark.parametrize("right", [True, False])
def test_a_replay_takes_what_its_drafts_are_worth(script: ModuleType, right: bool) -> None:
    rounds, ms = script.replay(chains(script, right), COSTS, Scheduler(COSTS), script.Clock())
    plain = 199 * 20.0
    assert (rounds < 60 and ms < 0.5 * plain) if right else (rounds > 190 and plain < ms < 1.05 * plain)


def test_a_pair_is_recorded_and_replayed(script: ModuleType, tiny_full_pair: Path, tmp_path: Path) -> None:
    prompts, out, costs = tmp_path / "prompts.jsonl", tmp_path / "drafts.npz", tmp_path / "tune.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello there", "One, two, three")))
    costs.write_text(json.dumps({"costs": COSTS.as_dict()}))
    command = ["record", str(tiny_full_pair), str(prompts), "--out", str(out), "-n", "24"]
    assert CliRunner().invoke(script.main, command, catch_exceptions=False).exit_code == 0
    with Engine.from_pretrained(tiny_full_pair) as engine:
        for each, prompt in zip(script.load(out), ("Hello there", "One, two, three"), strict=True):
            told = engine.generate(prompt, max_new_tokens=24, speculate=False).token_ids
            assert each.answer[: len(told)] == told and len(each.trees) == len(each.answer) - 1 >= len(told) - 1
            assert all(len(tree) > 1 for tree in each.trees)
            engine.reset()
    command = ["play", str(tiny_full_pair), str(out), "--costs", str(costs)]
    row = (
        CliRunner()
        .invoke(script.main, command, catch_exceptions=False)
        .stdout.splitlines()[-1]
        .strip("| ")
        .split(" | ")
    )
    assert row[:2] == ["drafts", "tune"] and int(row[-1]) == 2 and 0.5 < float(row[2].rstrip("x")) < 10


@pytest.mark.parametrize("name", ["drafts.npz", "tune.json"])
def test_files_of_another_kind_are_refused(script: ModuleType, tiny_full_pair: Path, tmp_path: Path, name: str) -> None:
    script.save(tmp_path / "drafts.npz", [chains(script, True)])
    (tmp_path / "tune.json").write_text(json.dumps({"costs": COSTS.as_dict()}))
    (tmp_path / name).write_text("{}")
    command = ["play", str(tiny_full_pair), str(tmp_path / "drafts.npz"), "--costs", str(tmp_path / "tune.json")]
    result = CliRunner().invoke(script.main, command, catch_exceptions=False)
    assert result.exit_code == 2 and name in result.stderr and len(result.stderr.splitlines()) == 1
