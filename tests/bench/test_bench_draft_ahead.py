"""Drafting during passes: what is drafted ahead is what the record holds, and the replayed text stays."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from tests.bench.replay import Record, load, plain_ms, replay
from tests.bench.replay import main as recorder

from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.tree.draft_tree import DraftTree

COSTS = Costs(Curve((0,), (1, 64), ((20.0, 40.0),)), Curve((0,), (1, 128), ((2.0, 2.0),)), switch_ms=1.0)


@pytest.fixture(scope="module")
def script(bench_script) -> ModuleType:
    return bench_script("draft_ahead")


def tree(root: int, right: list[int], wrong: list[int], share: float = 0.7) -> DraftTree:
    """A chain of `right` tokens, and a `wrong` one beside each of them."""
    tokens, parents, logprobs, tip = [root], [-1], [0.0], 0
    for good, bad in zip(right, wrong, strict=True):
        above = logprobs[tip]
        tokens += [good, bad]
        parents += [tip, tip]
        logprobs += [above + np.log(share), above + np.log(0.9 - share)]
        tip = len(tokens) - 2
    return DraftTree(np.array(tokens), np.array(parents), np.array(logprobs, np.float32))


def record(length: int = 60, good: bool = True) -> Record:
    """A drafter that is right at every place, or at none."""
    answer = [1 + place for place in range(length)]  # nothing repeats
    trees = []
    for place in range(length - 1):
        right = [*range(place + 2, place + 8)]
        wrong = [600 + token for token in right]
        trees.append(tree(answer[place], right if good else wrong, [1200 + token for token in right]))
    return Record((7, 8), tuple(answer), tuple(trees))


def ahead(script: ModuleType, way: str, each: Record, levels: tuple[float, ...] = (1.0,) * 8, call_ms: float = 2.0):
    return script.Ahead(script.WAYS[way], each, call_ms, [*levels])


def test_the_likeliest_ends_are_the_records_best_nodes_beside_what_is_verified(script: ModuleType) -> None:
    each = record()
    whole = each.trees[3]
    verified = DraftTree(whole.tokens[:4], whole.parents[:4], whole.logprobs[:4])  # right, wrong, right
    device = ahead(script, "3 ends", each)
    device.during(3, verified, 20.0)
    a, b, c = each.answer[4:7]
    assert device._ends == [(a, b, c), (a, 1200 + b), (a, b, 1200 + c)]
    device.turn(3 + 3)
    assert device.depth == 3 and device.hits == 1
    device.turn(3 + 2)
    assert device.depth == 0 and device.hits == 1


def test_a_path_that_ends_with_the_record_goes_on_by_the_next_record_if_it_is_right(script: ModuleType) -> None:
    each = record()
    device = ahead(script, "1 end", each)
    device.during(3, each.trees[3], 20.0)
    assert device._ends == [each.answer[4 : 4 + 7]]


@pytest.mark.parametrize(("pass_ms", "calls", "wait_ms"), [(5.0, 1, 1.0), (4.0, 1, 0.0), (3.0, 0, 0.0), (21.0, 9, 0.0)])
def test_a_pass_has_time_for_whole_calls_alone(script: ModuleType, pass_ms: float, calls: int, wait_ms: float) -> None:
    each = record()
    device = ahead(script, "1 end", each)
    device.during(3, DraftTree.root(each.answer[3]), pass_ms)
    assert (device.calls, device.wait_ms) == (calls, wait_ms)
    device.turn(4)
    assert (device.depth > 0) == (calls > 0)


def test_levels_are_compared_at_the_same_token(script: ModuleType) -> None:
    assert script.kept_by_level([record()]) == [1.0] * 6
    each = record()
    cut = [tree(each.answer[p], [*each.answer[p + 1 : p + 3]], [99, 98]) for p in range(10)]
    for shallow in cut[1::2]:
        shallow.tokens[3] = 97  # every second tree is wrong at its second level
    assert script.kept_by_level([Record((7,), each.answer[:9], tuple(cut[:8]))])[:2] == [1.0, pytest.approx(4 / 7)]


def test_a_tree_drafted_ahead_is_worse_by_its_depth(script: ModuleType) -> None:
    each = record(400)
    device = ahead(script, "1 end", each, (1.0, 0.5, 0.5))
    device.depth = 1

    def right(place: int) -> int:
        held, node, count = device.tree(place), 0, 0
        while (child := held.child(node, each.answer[place + 1 + count])) is not None:
            node, count = child, count + 1
        return count

    counts = [right(place) for place in range(300)]
    assert 0.4 < np.mean([count > 0 for count in counts]) < 0.6 and {*counts} == {0, 6}
    device.way = script.WAYS["3 ends, as good"]
    assert {right(place) for place in range(300)} == {6}


def speed(script: ModuleType, way: str, each: Record) -> float:
    (ratio,), _ = script.play(script.WAYS[way], [each], [1.0] * 8, COSTS, None, BOUNDS, 0.0)
    return ratio


def test_drafts_ahead_save_their_calls_where_the_path_ends_as_guessed(script: ModuleType) -> None:
    good, poor = record(300), record(300, good=False)
    today, one, free = (speed(script, way, good) for way in ("today", "1 end", "no time for any draft"))
    assert today * 1.1 < one < free * 1.001
    assert speed(script, "1 end", poor) < 1.0


def test_today_is_the_schedule_itself(script: ModuleType) -> None:
    each = record()
    _, ms = replay(each, COSTS, Scheduler(COSTS))
    assert speed(script, "today", each) == pytest.approx(plain_ms(each, COSTS) / ms)


def test_small_numbers_replay_as_the_tokens_do(script: ModuleType) -> None:
    each = record()
    small = script.compact(each)
    assert max(small.trees[0].tokens) < max(each.trees[0].tokens)
    assert replay(small, COSTS, Scheduler(COSTS)) == replay(each, COSTS, Scheduler(COSTS))


def test_every_way_replays_a_recorded_text(
    script: ModuleType, tiny_full_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out, costs = tmp_path / "prompts.jsonl", tmp_path / "drafts.npz", tmp_path / "tune.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello there", "One, two", "Three")))
    costs.write_text(json.dumps({"costs": asdict(COSTS)}))
    command = ["record", str(tiny_full_pair), str(prompts), "--out", str(out), "-n", "24"]
    assert CliRunner().invoke(recorder, command, catch_exceptions=False).exit_code == 0
    asked = [str(tiny_full_pair), str(out), "--costs", str(costs), "--call-ms", "1", "--call-ms", "4"]
    result = CliRunner().invoke(script.main, asked, catch_exceptions=False)
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[ms, way] for ms in ("1", "4") for way in script.WAYS]
    assert all(row[4] == "+0.0%" for row in rows if row[1] == "today")


def test_a_record_without_drafts_is_refused(script: ModuleType, tiny_full_pair: Path, tmp_path: Path) -> None:
    from tests.bench.replay import save

    each = record()
    bare = Record(each.prompt, each.answer, tuple(DraftTree.root(token) for token in each.answer[:-1]))
    save(out := tmp_path / "bare.npz", [bare])
    assert len(load(out)) == 1
    (costs := tmp_path / "tune.json").write_text(json.dumps({"costs": asdict(COSTS)}))
    result = CliRunner().invoke(script.main, [str(tiny_full_pair), str(out), "--costs", str(costs)])
    assert result.exit_code == 2 and "record a pair that has a drafter" in result.stderr
