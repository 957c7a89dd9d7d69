"""Recorded drafts meet the scheduler again: the text stays, good drafts save passes, bad ones cost next to nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dovetail.runtime.engine import Engine
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.testing.policy import ScriptedPolicy
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

COSTS = Costs(
    Curve((0, 1000), (1, 64), ((20.0, 40.0), (40.0, 60.0))),
    Curve((0,), (1, 128), ((1.0, 3.0),)),
    switch_ms=5.0,
)


@pytest.fixture(scope="module")
def script(bench_script) -> ModuleType:
    return bench_script("replay")


def chains(script: ModuleType, right: bool, prompt: int = 3) -> Any:
    """An answer of 200 tokens that repeats nothing, and after each of them a chain of up to four sure tokens."""
    answer = np.arange(10, 210)
    trees = []
    for place in range(len(answer) - 1):
        chain = answer[place : place + 5] + np.array([0, 300, 300, 300, 300])[: len(answer) - place] * (not right)
        trees.append(
            DraftTree(chain, np.arange(-1, len(chain) - 1), np.linspace(0, -0.04, len(chain), dtype=np.float32))
        )
    return script.Record(tuple(range(1000, 1000 + prompt)), tuple(answer.tolist()), tuple(trees))


@pytest.mark.parametrize("prompt", [3, 600])
def test_a_replay_takes_what_its_drafts_are_worth(script: ModuleType, prompt: int) -> None:
    """Of long prompts the drafter has read the end alone."""
    good, bad = chains(script, True, prompt), chains(script, False, prompt)
    plain = script.plain_ms(good, COSTS)
    assert script.replay(good, COSTS, ScriptedPolicy(draft=0.0)) == (199, plain)
    rounds, ms = script.replay(good, COSTS, Scheduler(COSTS))
    assert rounds < 60 and ms < 0.5 * plain
    rounds, ms = script.replay(bad, COSTS, Scheduler(COSTS))
    assert rounds > 190 and plain < ms < 1.05 * plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pair_is_recorded_and_replayed(
    script: ModuleType, tiny_full_pair: Path, tmp_path: Path, temperature: float
) -> None:
    prompts, out, costs = tmp_path / "prompts.jsonl", tmp_path / "drafts.npz", tmp_path / "tune.json"
    asked = "Hello there", "One, two, three", "word " * 2000
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    costs.write_text(json.dumps({"costs": asdict(COSTS)}))
    command = ["record", str(tiny_full_pair), str(prompts), "--out", str(out), "-n", "24"]
    command += ["--temperature", str(temperature), "--seed", "3"]
    result = CliRunner().invoke(script.main, command, catch_exceptions=False)
    assert result.exit_code == 0 and "3/3 3: too long, left out" in result.stderr
    with Engine.from_pretrained(tiny_full_pair) as engine:
        for each, prompt in zip(script.load(out), asked[:2], strict=True):
            told = engine.generate(
                prompt, max_new_tokens=24, speculate=False, temperature=temperature, seed=3
            ).token_ids
            assert each.answer[: len(told)] == told and len(each.trees) == len(each.answer) - 1 >= len(told) - 1
            assert all(len(tree) > 1 for tree in each.trees) and each.sampled == bool(temperature)
            engine.reset()
    command = ["play", str(tiny_full_pair), str(out), "--costs", str(costs)]
    result = CliRunner().invoke(script.main, command, catch_exceptions=False)
    row = result.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["drafts", "tune"] and int(row[-1]) == 2 and 0.5 < float(row[2].rstrip("x")) < 10


@pytest.mark.parametrize("content", [b"", b"{}", b"cut", b"other"])
@pytest.mark.parametrize("name", ["drafts.npz", "tune.json"])
def test_files_of_another_kind_are_refused(
    script: ModuleType, tiny_full_pair: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    script.save(tmp_path / "drafts.npz", [chains(script, True)])
    (tmp_path / "tune.json").write_text(json.dumps({"costs": asdict(COSTS)}))
    if content == b"cut":
        content = (tmp_path / name).read_bytes()[:-200]
    if content == b"other":
        np.savez(tmp_path / "other.npz", tokens=np.arange(3))
        content = (tmp_path / "other.npz").read_bytes()
    (tmp_path / name).write_bytes(content)
    command = ["play", str(tiny_full_pair), str(tmp_path / "drafts.npz"), "--costs", str(tmp_path / "tune.json")]
    result = CliRunner().invoke(script.main, command, catch_exceptions=False)
    assert result.exit_code == 2 and name in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("out", ["drafts", "nowhere/drafts.npz"])
def test_a_record_has_a_place_before_it_is_made(
    script: ModuleType, tiny_full_pair: Path, tmp_path: Path, out: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    command = ["record", str(tiny_full_pair), str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / out)]
    result = CliRunner().invoke(script.main, command, catch_exceptions=False)
    assert result.exit_code == 2 and "--out" in result.stderr and not (tmp_path / out).exists()


@pytest.mark.parametrize("drafts", [False, True], ids=["repeats alone", "draft model"])
def test_a_pair_without_a_drafter_is_recorded_and_replayed(
    script: ModuleType, tiny_pair: Path, tmp_path: Path, drafts: bool
) -> None:
    """The pair's own target is a draft model that is always right."""
    prompts, out, costs = tmp_path / "prompts.jsonl", tmp_path / "drafts.npz", tmp_path / "tune.json"
    prompts.write_text(json.dumps({"prompt": "One, two, three"}))
    costs.write_text(json.dumps({"costs": asdict(COSTS if drafts else replace(COSTS, draft=None))}))
    command = ["record", str(tiny_pair), str(prompts), "--out", str(out), "-n", "40"]
    command += ["--draft-model", str(tiny_pair)] if drafts else []
    result = CliRunner().invoke(script.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    (each,) = script.load(out)
    assert all(script.is_chain(tree) and (len(tree) > 1) is drafts for tree in each.trees)
    assert not script.is_chain(DraftTree(np.arange(5), np.array([-1, 0, 0, 1, 2]), np.zeros(5, np.float32)))
    chains = [tree.tokens[tree.paths()[0]].tolist() for tree in each.trees] if drafts else []
    for place, chain in enumerate(chains):
        assert chain[: len(each.answer) - place] == [*each.answer[place : place + len(chain)]]
    result = CliRunner().invoke(script.main, ["play", str(tiny_pair), str(out), "--costs", str(costs)])
    assert result.exit_code == 0
    row = result.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert float(row[2].rstrip("x")) > (2.0 if drafts else 0.9)


def test_what_a_draft_model_has_read_is_not_charged_again(script: ModuleType) -> None:
    """Of a chain whose tokens are all kept, the model has run all but the last."""
    each = chains(script, True)
    clock = script.Clock(COSTS)
    target = script.ReplayTarget(each, clock)
    target.prefill(1, np.array(each.prompt))
    drafter = script.ReplayDrafter(each, target, clock)
    features = np.zeros((5, 1), np.float32)
    drafter.extend(1, np.array([*each.prompt, each.answer[0]]), features)
    limits = TreeLimits(width=5, depth=4, top_k=1, lookup=0)
    assert len(drafter.propose(1, limits)) == 5
    before = clock.ms
    drafter.extend(1, np.array(each.answer[1:6]), features)
    assert clock.ms - before == COSTS.call_ms(0, 2)
