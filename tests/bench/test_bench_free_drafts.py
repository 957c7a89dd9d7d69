"""Other sources of drafts: what they offer is what the text holds, and the replayed text stays."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import exp
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from tests.bench.replay import Clock, Record, ReplayDrafter, ReplayTarget, load
from tests.bench.replay import main as recorder

from dovetail.exporter.train.corpus import Corpus
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

LIMITS = TreeLimits(width=12, depth=4, top_k=3, lookup=4)
COSTS = Costs(Curve((0,), (1, 64), ((20.0, 40.0),)), Curve((0,), (1, 128), ((1.0, 3.0),)), switch_ms=1.0)


@pytest.fixture(scope="module")
def script(bench_script) -> ModuleType:
    return bench_script("free_drafts")


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[path][1:].tolist()) for path in tree.paths()}


def test_a_path_branches_where_its_run_was_followed_by_two_tokens(script: ModuleType) -> None:
    text = [1, 2, 3, 4, 0, 2, 3, 5, 0, 1, 2]
    tree = script.Index(script.Source(sizes=(2, 1))).tree(text, LIMITS)
    found = paths(tree)
    assert any(path[:2] == (3, 4) for path in found) and any(path[:2] == (3, 5) for path in found)
    assert tree.tokens[0] == 2 and len(tree) <= LIMITS.width


def test_the_next_best_tokens_of_a_place_are_offered(script: ModuleType) -> None:
    index = script.Index(script.Source(sizes=(1,), places=1, runners=2))
    index.see(3, np.array([9, 8, 7, 6]), np.log(np.array([0.5, 0.3, 0.1, 0.05])))
    tree = index.tree([1, 2, 5, 9, 5], LIMITS)  # 9 followed 5 at place 3
    children = tree.tokens[tree.parents == 0].tolist()
    assert {*children} == {9, 8, 7}


def test_counts_of_what_followed_tell_the_probability(script: ModuleType) -> None:
    index = script.Index(script.Source(sizes=(1,), places=4, counts=True))
    tree = index.tree([1, 5, 1, 5, 1, 5, 1, 6, 1], LIMITS)
    chances = {tree.tokens[node]: exp(tree.logprobs[node]) for node in np.flatnonzero(tree.parents == 0)}
    assert chances[5] > 2 * chances[6] > 0


def test_what_is_wrong_is_offered_with_less_trust(script: ModuleType) -> None:
    index = script.Index(script.Source())
    text = [1, 2, 3, 4, 1, 2]
    before = index.tree(text, LIMITS).logprobs[1]
    for _ in range(20):
        index.tree(text, LIMITS)
        index.learn([9])
    assert index.tree(text, LIMITS).logprobs[1] < before - 1


@pytest.mark.parametrize("keep", [False, True])
def test_texts_before_are_known_if_they_are_kept(script: ModuleType, keep: bool) -> None:
    index = script.Index(script.Source(), keep)
    index.tree([1, 2, 3, 4], LIMITS)
    index.start()
    assert (len(index.tree([8, 1, 2], LIMITS)) > 1) is keep


def test_a_joined_tree_has_the_nodes_of_both(script: ModuleType) -> None:
    one = DraftTree(np.array([1, 2, 3]), np.array([-1, 0, 1]), np.array([0, -0.5, -0.9], np.float32))
    other = DraftTree(np.array([1, 2, 4]), np.array([-1, 0, 1]), np.array([0, -0.1, -0.2], np.float32))
    both = script.joined(one, other, 8)
    assert paths(both) == {(2, 3), (2, 4)} and both.logprobs[1] == np.float32(-0.1)


def test_a_bias_moves_towards_what_the_target_chose(script: ModuleType) -> None:
    trees = [
        DraftTree(np.array([1, 2, 3]), np.array([-1, 0, 0]), np.log(np.array([1, 0.6, 0.3])).astype(np.float32))
    ] * 7
    each = Record((1,), (1, 3, 3, 3, 3, 3, 3, 3), tuple(trees))
    clock = Clock(COSTS)
    target = ReplayTarget(each, clock)
    target.held = 7
    drafter = script.BiasedDrafter(ReplayDrafter(each, target, clock), 0.5)
    tokens, claims = np.array([2, 3]), np.log(np.array([0.6, 0.3]))
    assert drafter.claims(tokens, claims) == pytest.approx(claims)
    drafter.extend(1, np.array([3]), np.zeros((1, 1), np.float32))
    moved = np.exp(drafter.claims(tokens, claims))
    assert moved[1] > 0.6 > 0.3 > moved[0] and moved.sum() < 1


def test_a_head_learns_a_token_that_comes_back(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    weights, features = rng.normal(size=(50, 8)).astype(np.float32), np.ones((6, 8), np.float32)
    worst = int((weights @ features[0]).argmin())
    tokens = [worst, worst, worst, None, worst, worst]
    assert [*script.learnt(weights, features, tokens, 0.0, 0.0)] == [49, 49, 49, np.inf, 49, 49]
    for bias, outer in ((30.0, 0.0), (0.0, 30.0)):
        ranks = [*script.learnt(weights, features, tokens, bias, outer)]
        assert ranks[:4] == [49, 0, 0, np.inf]


@pytest.fixture(scope="module")
def recorded(script: ModuleType, tiny_full_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("free")
    prompts, out = folder / "prompts.jsonl", folder / "drafts.npz"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello there", "One, two", "Three")))
    (folder / "tune.json").write_text(json.dumps({"costs": asdict(COSTS)}))
    command = ["record", str(tiny_full_pair), str(prompts), "--out", str(out), "-n", "24", "--top-k", "5"]
    assert CliRunner().invoke(recorder, command, catch_exceptions=False).exit_code == 0
    assert max(np.bincount(tree.parents[1:]).max() for each in load(out) for tree in each.trees) == 5
    return out


def invoke(script: ModuleType, *arguments: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(script.main, [*map(str, arguments)], catch_exceptions=False)
    return result.exit_code, (result.stdout if result.exit_code == 0 else result.stderr).splitlines()


@pytest.mark.parametrize("flags", [(), ("--alone",), ("--earlier",)])
def test_every_source_replays_the_text(
    script: ModuleType, tiny_full_pair: Path, recorded: Path, flags: tuple[str, ...]
) -> None:
    assert invoke(script, "runners", tiny_full_pair, recorded)[0] == 0
    for each, (ids, logprobs) in zip(load(recorded), script.best_tokens(recorded), strict=True):
        assert ids[:, 0].tolist() == [*each.answer] and (np.diff(logprobs) <= 0).all()
    costs = recorded.with_name("tune.json")
    code, lines = invoke(script, "play", tiny_full_pair, recorded, "--costs", costs, *flags)
    assert code == 0 and len(lines) == 2 + len(script.SOURCES)
    assert all(float(line.split("|")[3].strip(" x")) > 0.5 for line in lines[2:])
    if not flags:
        code, lines = invoke(script, "play", tiny_full_pair, recorded, "--costs", costs, "--bias", 0.3, "--bias", 1)
        assert code == 0 and [line.split(" | ")[0] for line in lines[2:]] == ["| bias, rate 0.3", "| bias, rate 1.0"]


def test_a_head_is_measured(script: ModuleType, tiny_full_pair: Path, recorded: Path) -> None:
    code, lines = invoke(script, "head", tiny_full_pair, recorded)
    assert code == 0 and len(lines) == 2 + len(script.HEADS)
    shares = [[float(cell.strip("% ")) for cell in line.split("|")[3:5]] for line in lines[2:]]
    assert all(0 <= best <= three <= 100 for best, three in shares)


def test_rates_are_counted_apart_for_earlier_texts(script: ModuleType, tmp_path: Path) -> None:
    text = [*range(100, 140), *range(100, 120)]
    Corpus(np.array(text * 2), np.array([60, 60]), np.array([20, 20])).save(tmp_path / "corpus.npz")
    code, lines = invoke(script, "rates", tmp_path / "corpus.npz")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[3].strip() for line in lines[2:]}
    assert code == 0 and all(rows["16", place].startswith("1.00 of") for place in "02")


@pytest.mark.parametrize("places", [None, 3])
def test_best_tokens_of_another_record_are_refused(
    script: ModuleType, tiny_full_pair: Path, recorded: Path, tmp_path: Path, places: int | None
) -> None:
    (copy := tmp_path / "drafts.npz").write_bytes(recorded.read_bytes())
    if places:
        np.savez(tmp_path / "drafts.runners.npz", ids=np.zeros((places, 10), np.int64), logprobs=np.zeros((places, 10)))
    code, lines = invoke(script, "play", tiny_full_pair, copy, "--costs", recorded.with_name("tune.json"))
    assert code == 2 and len(lines) == 1 and "run runners" in lines[0]
