"""Many texts at once through the real engines of a tiny pair: the texts of each request alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.batch_engine import BatchEngine, Job
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import InputError
from dovetail.runtime.front import Chunk
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.tree.limits import TreeLimits

LIMITS = TreeLimits(width=8, depth=3, top_k=2, lookup=4)


def asked(count: int) -> list[tuple[list[int], dict[str, Any]]]:
    rng = np.random.default_rng(1)
    system = [int(token) for token in rng.integers(5, 90, 120)]
    made = []
    for index in range(count):
        prompt = system[: int(rng.integers(0, 121))] + [
            int(token) for token in rng.integers(5, 90, rng.integers(1, 60))
        ]
        options = dict[str, Any](max_new_tokens=int(rng.integers(1, 40)), speculate=index % 5 != 0)
        if index % 2:
            options |= {"temperature": 0.8, "seed": index}
        made.append((prompt, options))
    return made


def run(engine: BatchEngine, requests: list[tuple[list[int], dict[str, Any]]]) -> list[tuple[int, ...]]:
    jobs = [engine.submit(engine.ask(prompt, **options)) for prompt, options in requests]
    tokens: dict[Job, list[int]] = {job: [] for job in jobs}
    while not engine.idle:
        for job, chunk in engine.step():
            assert isinstance(chunk, Chunk)
            tokens[job] += chunk.token_ids
    return [tuple(tokens[job]) for job in jobs]


@pytest.mark.parametrize("slots", [1, 4, 9])
@pytest.mark.parametrize("scheduled", [True, False])
def test_answers_of_a_pair_at_once_are_those_of_each_alone(tiny_full_pair: Path, slots: int, scheduled: bool) -> None:
    tree, requests = None if scheduled else LIMITS, asked(24)
    with Engine.from_pretrained(tiny_full_pair, drafter_device="cpu", threads=1, tree=LIMITS) as engine:
        want = [engine.generate(prompt, **{**options, "speculate": False}).token_ids for prompt, options in requests]
    with BatchEngine.from_pretrained(
        tiny_full_pair, slots=slots, drafter_device="cpu", threads=1, tree=tree, kv_cache="64MB"
    ) as engine:
        assert run(engine, requests) == want
        assert run(engine, requests[::-1]) == want[::-1]  # now with kept prefixes
        stats = engine.stats()
        assert (stats.requests, stats.running, stats.waiting) == (48, 0, 0) and stats.kv_used == 0
        assert stats.drafted > 0


def test_answers_of_a_draft_model_at_once_are_those_of_each_alone(tiny_full_pair: Path) -> None:
    requests = asked(12)
    with Engine.from_pretrained(tiny_full_pair, drafter_device="cpu", threads=1, tree=LIMITS) as engine:
        want = [engine.generate(prompt, **{**options, "speculate": False}).token_ids for prompt, options in requests]
    with BatchEngine.from_pretrained(
        tiny_full_pair, slots=3, threads=1, tree=LIMITS, kv_cache="64MB", draft_model=tiny_full_pair
    ) as engine:
        assert run(engine, requests) == want


@pytest.mark.parametrize(("fixture", "accepted"), [("language_pair", 100), ("dflash_pair", 0)])
def test_answers_of_another_kind_of_drafter_at_once_are_those_of_each_alone(
    fixture: str, accepted: int, request: pytest.FixtureRequest
) -> None:
    requests, pair = asked(12), request.getfixturevalue(fixture)
    with Engine.from_pretrained(pair, drafter_device="cpu", threads=1, tree=LIMITS) as engine:
        want = [engine.generate(prompt, **{**options, "speculate": False}).token_ids for prompt, options in requests]
    with BatchEngine.from_pretrained(
        pair, slots=3, drafter_device="cpu", threads=1, tree=LIMITS, kv_cache="64MB"
    ) as engine:
        assert run(engine, requests) == want
        assert run(engine, requests[::-1]) == want[::-1]  # now with kept prefixes
        assert engine.stats().accepted > accepted


@pytest.mark.parametrize("slots", [1, 3])
def test_kept_prefixes_stay_within_the_memory(tiny_full_pair: Path, slots: int) -> None:
    with BatchEngine.from_pretrained(
        tiny_full_pair, slots=slots, drafter_device="cpu", threads=1, tree=LIMITS
    ) as engine:
        target = engine._batch.target
        assert isinstance(target, OpenVINOTarget)
        blocks = target.model.blocks
        for _ in range(3):
            run(engine, asked(10))
        assert target.model.blocks == blocks and 0 <= target.room <= engine._memory


def test_a_kv_cache_that_is_no_size_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for size in ("many", "0GB", -1, True):
        with pytest.raises(InputError, match=r"kv_cache|size"):
            BatchEngine.from_pretrained(tmp_path, kv_cache=size)
