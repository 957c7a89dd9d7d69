"""Properties are compared on a real target: what changes nothing shows as such, what is refused says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.system import machine
from dovetail.runtime.system.machine import Cpu
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.tune import properties
from dovetail.runtime.tune.properties import (
    NODES,
    SAMPLES,
    Compared,
    Property,
    best_tokens,
    candidates,
    compare,
    greedy_text,
)

PROMPT = list(range(5, 25))
UNPINNED, EXACT, UNKNOWN = (
    Property("ENABLE_CPU_PINNING", "NO"),
    Property("INFERENCE_PRECISION_HINT", "f32"),
    Property("NO_SUCH_PROPERTY", "1"),
)
CPU = Cpu("A CPU", 2, 2, 2, ("avx2",))


@pytest.fixture
def open_with(tiny_pair: Path) -> Callable[..., OpenVINOTarget]:
    def open_with(*more: Property) -> OpenVINOTarget:
        config = {each.name: each.value for each in more}
        return OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1, ov_config=config)

    return open_with


class Altered(OpenVINOTarget):
    """A target whose best token is another one after every fourth token of a chain."""

    def verify(self, *offers: Any, rows: int = 0):
        ((seq, result),) = super().verify(*offers).items()
        logits = np.array(result.logits)
        logits[::4] *= -1
        return {seq: replace(result, logits=logits)}


class Failing(OpenVINOTarget):
    """A target that compiles and then cannot run."""

    def verify(self, *offers: Any, rows: int = 0):
        raise DeviceError("the target failed\non the CPU")


def test_each_property_has_its_row_and_the_base_writes_the_same_after(open_with) -> None:
    base, told = open_with(), list[float]()
    before = greedy_text(base, PROMPT, 40)

    def progress(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
        told.append(done / total)

    rows = compare(base, open_with, PROMPT, [UNPINNED, UNKNOWN, EXACT], seconds=0.01, progress=progress)
    assert not base._texts and greedy_text(base, PROMPT, 40) == before
    unpinned, unknown, exact = rows
    assert [(row.name, row.value) for row in rows] == [(one.name, one.value) for one in (UNPINNED, UNKNOWN, EXACT)]
    assert unpinned.same == 1.0 and exact.same is not None and 0 < exact.same <= 1
    for row in (unpinned, exact):
        assert row.problem is None and tuple(row.speedups) == NODES and row.samples >= SAMPLES
        assert all(0 < low <= middle <= high for low, middle, high in row.speedups.values())
    assert (unknown.speedups, unknown.samples, unknown.same) == ({}, 0, None)
    assert unknown.problem is not None
    assert "Unsupported property NO_SUCH_PROPERTY" in unknown.problem and "\n" not in unknown.problem
    assert told[0] == 0 and told[-1] == 1 and told == sorted(told)


def test_a_best_token_that_changes_is_counted(open_with) -> None:
    def altered(one: Property) -> OpenVINOTarget:
        target = open_with(one)
        return Altered(target.model, target.max_context)

    (row,) = compare(open_with(), altered, PROMPT, [UNPINNED], seconds=0.01)
    assert row.same == 0.75


def test_a_candidate_that_fails_when_it_runs_is_refused(open_with) -> None:
    def failing(one: Property) -> OpenVINOTarget:
        target = open_with(one)
        return Failing(target.model, target.max_context)

    rows = compare(open_with(), failing, PROMPT, [UNPINNED], seconds=0.01)
    assert rows == [Compared(UNPINNED.name, UNPINNED.value, problem="the target failed on the CPU")]


def test_a_text_that_is_read_in_chains_predicts_itself(open_with) -> None:
    target = open_with()
    text = greedy_text(target, PROMPT, 40)  # the last chain is shorter
    assert len(set(text)) > 1
    assert best_tokens(target, PROMPT, text)[:-1].tolist() == text[1:]


def test_a_ratio_above_one_is_a_quicker_candidate(open_with, monkeypatch) -> None:
    base = open_with()
    monkeypatch.setattr(properties, "_pass_ms", lambda target, nodes: nodes * (30.0 if target is base else 20.0))
    (row,) = compare(base, open_with, PROMPT, [UNPINNED], seconds=0.01)
    assert row.speedups == dict.fromkeys(NODES, (1.5, 1.5, 1.5))


def test_what_was_given_or_does_not_apply_is_no_candidate(monkeypatch) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: CPU)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    group, threads = "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_NUM_THREADS=1"
    every = [str(one) for one in candidates({})]
    assert len(every) == len(set(every)) == 6 and threads in every
    given = {str(one) for one in candidates({group: "128"})}  # in place of the default, which is worth a try then
    assert {*every} - given == {f"{group}=128"} and given - {*every} == {f"{group}=64"}
    assert [str(one) for one in candidates({}, threads=2)] == [one for one in every if one != threads]
    monkeypatch.setattr(machine, "cpu", lambda: replace(CPU, threads=4))
    assert {str(one) for one in candidates({})} - set(every) == {"ENABLE_HYPER_THREADING=NO"}


def test_rows_are_judged_where_none_is_computed_alone(open_with) -> None:
    def open_single(*more: Property) -> OpenVINOTarget:
        target = open_with(*more)
        target.exact = False
        return target

    (row,) = compare(open_single(), open_single, PROMPT, [UNPINNED], seconds=0.05)
    assert row.rows_equal is True


def test_seconds_that_cannot_be_are_an_input_error(open_with) -> None:
    with pytest.raises(InputError, match="seconds 0"):
        compare(open_with(), open_with, PROMPT, [UNPINNED], seconds=0)
