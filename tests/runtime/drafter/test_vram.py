"""The arithmetic of --vram: sizes are read, sums are right, and a limit is kept, refused or fitted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dovetail.runtime.drafter.vram import (
    BUCKETS,
    CONTEXT,
    CUDA_ITSELF,
    LEAST_CONTEXT,
    check_limit,
    parse_size,
    plan,
    plan_on_openvino,
    plan_on_webgpu,
    plan_pair,
)
from dovetail.runtime.errors import DeviceError, InputError, ManifestError
from dovetail.runtime.pair.manifest import DrafterFacts, FileEntry, Manifest, TargetFacts

MIB = 2**20
FACTS = DrafterFacts(
    blocks=2, hidden_size=576, feature_size=576, target_vocab_size=49152, draft_vocab_size=8192,
    num_kv_heads=3, head_size=64, top_k=10, tree_slots=64, max_context=8192, tokenizer_sha256="t",
    files={"cpu": "drafter/cpu.onnx", "cuda": "drafter/cuda.onnx"}, workspace=(8 * MIB, 4096),
)  # fmt: skip
TARGET = TargetFacts("llama", 576, 576, 49152, 30, 8192, "int8", ("tap",), (1,), "t")


def pair(**facts: Any) -> Manifest:
    files = {"drafter/cuda.onnx": FileEntry(MIB, "0" * 64), "drafter/cuda.onnx.data": FileEntry(70 * MIB, "0" * 64)}
    return Manifest("tiny", TARGET, replace(FACTS, **facts), files)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GB", 3 * 10**9),
        ("3g", 3 * 10**9),
        ("512MiB", 512 * MIB),
        ("1.5 GiB", 3 * 2**29),
        ("4096", 4096),
        ("8kb", 8000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-3GB", "3TB", "3 G B", "1e9", "nan", "3,5GB", "0GB", "0.5", "0.0001k", "9" * 400, "٣GB"]
)
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"give e\.g\. 3GB") as told:
        parse_size(text)
    assert repr(text) in str(told.value)


def test_the_sum_by_hand() -> None:
    got = plan(FACTS, weights=100, context=1000)
    state = 2 * (64 + 1000) * 2 * 3 * 64 * 2 + 65 * 576 * 2  # blocks, rows, keys and values, halves; and the bank
    row, noise = 8 * 8 + (64 + 576) * 2 + 10 * (4 + 4), 8192 * 4
    assert (got.state, got.rows, got.workspace) == (state, sum(BUCKETS) * row, 2 * (8 * MIB + 4096 * 1000))
    assert got.total == 100 + state + got.rows + got.workspace + CUDA_ITSELF
    assert got.arena(got.total) == 100 + got.workspace
    assert plan(replace(FACTS, noise=True), weights=100, context=1000).rows == got.rows + noise


def test_a_pair_s_weights_are_graph_and_data() -> None:
    got = plan_pair(pair())
    assert (got.weights, got.context) == (71 * MIB, CONTEXT)
    assert plan_pair(pair(max_context=700)).context == 700


def test_the_line_shows_a_sum_that_is_right() -> None:
    line = str(plan_pair(pair()))
    parts, total = line.split(" = ")
    shown = [float(part.split()[0]) for part in parts.split(" + ")]
    assert sum(shown) == pytest.approx(float(total.split()[0]), abs=0.3)
    assert total.endswith(f"MiB with a context of {CONTEXT}")


def test_3_gb_are_plenty_and_what_is_too_little_is_refused_with_the_arithmetic() -> None:
    assert plan_pair(pair(), parse_size("3GB")).context == CONTEXT
    with pytest.raises(DeviceError, match=r"does not fit 500.0 MiB of VRAM: 71.0 weights .* --vram, or --fit") as told:
        plan_pair(pair(), 500 * MIB)
    assert "\n" not in str(told.value)


def test_fit_takes_the_longest_context_that_fits() -> None:
    whole = plan_pair(pair())
    got = plan_pair(pair(), whole.total - 1, fit=True)
    assert LEAST_CONTEXT <= got.context == CONTEXT - 256 and got.total < whole.total
    least = plan(FACTS, 71 * MIB, LEAST_CONTEXT)
    assert plan_pair(pair(), least.total, fit=True).context == LEAST_CONTEXT
    with pytest.raises(DeviceError, match=r"with the shortest context either: .*fewer draft tokens"):
        plan_pair(pair(), least.total - 1, fit=True)


def test_a_pair_s_own_limit_holds_unless_another_is_given() -> None:
    limit = plan_pair(pair()).total - 1
    assert plan_pair(pair(vram=limit)).context < CONTEXT
    assert plan_pair(pair(vram=limit), 3 * 10**9).context == CONTEXT


def test_pairs_without_the_facts_are_told_what_to_do() -> None:
    with pytest.raises(DeviceError, match="export the drafter again"):
        plan_pair(pair(workspace=()))
    with pytest.raises(DeviceError, match="no float16 drafter"):
        plan_pair(pair(files={"cpu": "drafter/cpu.onnx"}))
    for wrong in ({"workspace": (1,)}, {"workspace": (1, -1)}, {"vram": -1}):
        with pytest.raises(ManifestError, match=r"export the (drafter|pair) again"):
            pair(**wrong)


@pytest.mark.parametrize(
    ("vram", "fit", "device", "said"),
    [
        (None, True, "auto", "--fit has nothing"),
        (5, False, "cpu", "for a drafter on a GPU"),
        (0, False, "auto", "vram 0 is"),
        (1.5, False, "auto", "vram 1.5 is"),
        (True, False, "auto", "vram True is"),
    ],
)
def test_limits_that_make_no_sense_are_refused(vram: Any, fit: bool, device: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_limit(vram, fit, device)


def test_a_plan_on_webgpu_counts_float32_and_every_captured_call() -> None:
    cuda, got = plan(FACTS, weights=100, context=1000), plan_on_webgpu(FACTS, 100, 1000)
    assert (got.weights, got.state, got.context) == (100, 2 * cuda.state, 1000)
    assert got.workspace == 5 * 2 * (FACTS.workspace[0] + 1000 * FACTS.workspace[1])
    half = sum(BUCKETS) * 2 * (FACTS.tree_slots + FACTS.feature_size)  # what is float16 with CUDA
    assert got.rows == cuda.rows + half + sum(BUCKETS) * FACTS.hidden_size * 4
    assert (got.cuda, got.webgpu, got.total) == (0, 64 * MIB, 100 + got.state + got.rows + got.workspace + 64 * MIB)
    assert "64.0 webgpu = " in str(got) and "cuda" not in str(got)
    assert got.as_dict()["webgpu_mb"] == 64.0 and "cuda_mb" not in got.as_dict()


def test_a_plan_on_openvino_counts_float32_and_the_state_twice() -> None:
    cuda, got = plan(FACTS, weights=100, context=1000), plan_on_openvino(FACTS, 100, 1000)
    assert (got.weights, got.state, got.context) == (100, 2 * 2 * cuda.state, 1000)
    assert got.workspace == 2 * 2 * (FACTS.workspace[0] + 1000 * FACTS.workspace[1])
    assert got.rows == cuda.rows + sum(BUCKETS) * 2 * (FACTS.tree_slots + FACTS.feature_size)
    assert got.total == 100 + got.state + got.rows + got.workspace + 64 * MIB
    assert "64.0 opencl = " in str(got) and "cuda" not in str(got) and got.as_dict()["opencl_mb"] == 64.0
