"""The drafter's INT8 graph on GPUs: what holds for WebGPU and for OpenVINO alike."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="graphs are changed, and a pair is exported")
pytest.importorskip("torch", reason="a pair is exported")

from tests.runtime.drafter.conftest import Gpu, OpenVinoCpu

from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.session import Ask
from dovetail.runtime.errors import DeviceError

SEQ = 1  # the number of a text
Exact = Callable[[Any], OnnxDrafter]


@pytest.fixture(scope="module", params=["webgpu", "openvino"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    found: Gpu = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def drafter(pairs: Any, gpu: Gpu) -> OnnxDrafter:
    """One drafter for the tests that leave it as it was: opening compiles for a second."""
    return gpu.on(pairs)


@pytest.fixture
def exact(pairs: Any, exact_of: Exact) -> OnnxDrafter:
    return exact_of(pairs)


def test_buckets_draft_what_the_cpu_does(pairs, drafter: OnnxDrafter, exact: OnnxDrafter, stream) -> None:
    """Calls of 1 to 128 rows in turns: KV and bank stay on the device, shared by all numbers of rows."""
    tokens, features = stream
    begin = 0
    drafter.rewind(SEQ, 0)
    for rows in (9, 1, 128, 3, 17, 40, 2):
        for session in (drafter, exact):
            session.extend(SEQ, tokens[begin : begin + rows], features[begin : begin + rows])
        begin += rows
        got, want = (session.propose(SEQ, pairs.limits) for session in (drafter, exact))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.parents, want.parents)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_noise_is_added_and_taken_away_again(pairs, drafter: OnnxDrafter, exact: OnnxDrafter, stream) -> None:
    tokens, features = stream

    def noise(depth: int, ids: np.ndarray) -> np.ndarray:
        # The plugin's ReduceLogSumExp alone would overflow at 300.
        return np.sin(ids * 7.0 + depth).astype(np.float32) * 3 + 300

    drafter.rewind(SEQ, 0)
    for each in (noise, None):
        for session in (drafter, exact):
            session.extend(SEQ, tokens[:9], features[:9], each)
        got, want = (session.propose(SEQ, pairs.limits, None, each) for session in (drafter, exact))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_any_thread_may_call(gpu: Gpu, pairs, drafter: OnnxDrafter, stream) -> None:
    drafter.rewind(SEQ, 0)
    for begin in (0, 9):
        user = Thread(target=drafter.extend, args=(SEQ, stream[0][begin : begin + 9], stream[1][begin : begin + 9]))
        user.start()
        user.join()
    assert drafter.length(SEQ) == 18
    other = gpu.on(pairs)
    other.extend(SEQ, stream[0][:18], stream[1][:18])
    got, want = (each.propose(SEQ, pairs.limits) for each in (drafter, other))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_after_a_nan_the_device_is_as_new(gpu: Gpu, pairs, drafter: OnnxDrafter, stream) -> None:
    tokens, features = stream
    spoiled = features[:5].copy()
    spoiled[-1] = np.nan
    session = gpu.on(pairs)
    with pytest.raises(DeviceError, match=re.escape(gpu.name) + ".*no numbers"):
        session.extend(SEQ, tokens[:5], spoiled)
    assert session.length(SEQ) == 0
    trees = []
    drafter.rewind(SEQ, 0)
    for each in (session, drafter):
        each.extend(SEQ, tokens[:9], features[:9])
        trees.append(each.propose(SEQ, pairs.limits))
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
    assert trees[0].logprobs.tolist() == trees[1].logprobs.tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", ["fail", "spoil"])
def test_a_device_that_fails_in_round_7_leaves_the_text_as_it_is(
    gpu: Gpu, pairs, caplog: pytest.LogCaptureFixture, fault: str, sampling: dict[str, Any]
) -> None:
    expected = pairs.text(pairs.cpu(), **sampling)
    device = gpu.new()
    engine = pairs.engine(FailoverDrafter(gpu.on(pairs, device), pairs.cpu))
    tokens: list[int] = []
    with caplog.at_level(logging.WARNING):
        for number, chunk in enumerate(engine.stream(pairs.prompt, 80, raw=True, **sampling)):
            tokens += chunk.token_ids
            if number == 7:
                assert engine.drafter_device == gpu.name and not caplog.records
                setattr(device, fault, True)
            last = chunk
    assert tuple(tokens) == expected
    assert engine.drafter_device == "CPU (int8)"
    assert engine.drafter_note is not None and engine.drafter_note.startswith("moved there: ")
    [record] = caplog.records
    assert f"moves from {gpu.name} to CPU (int8)" in record.message and "\n" not in record.message
    assert last.metrics is not None and last.metrics.drafted > 0 and last.metrics.bus_bytes > 0


def test_several_texts_are_drafted_as_each_alone(gpu: Gpu, language_pair: Path, pairs) -> None:
    """A small language model as the drafter, which reads tokens alone."""
    model, rng = type(pairs)(language_pair), np.random.default_rng(1)
    parts = {seq: (rng.integers(0, 200, n), np.zeros((n, 0), np.float32)) for seq, n in ((1, 30), (2, 17))}
    together = gpu.on(model, texts=2)
    together.extend_all(parts)
    trees = together.propose_all({seq: Ask(model.limits, None) for seq in parts})
    for seq, part in parts.items():
        session = gpu.on(model)
        session.extend(seq, *part)
        want = session.propose(seq, model.limits)
        np.testing.assert_array_equal(trees[seq].tokens, want.tokens)
        np.testing.assert_allclose(trees[seq].logprobs, want.logprobs, atol=1e-4)


def test_a_block_drafter_drafts_what_it_does_on_the_cpu(gpu: Gpu, dflash_pair: Path, pairs, exact_of: Exact) -> None:
    block, rng = type(pairs)(dflash_pair), np.random.default_rng(1)
    atol = 1e-4 if gpu.new is OpenVinoCpu else 0.02  # the plugin quantises activations of layers as large as these
    assert block.text(block.cpu()) == block.text(gpu.on(block))
    size = block.manifest.target.feature_size
    tokens, features = rng.integers(0, 200, 190), rng.standard_normal((190, size)).astype(np.float32)
    got, want = gpu.on(block), exact_of(block)
    for begin, end in ((0, 9), (9, 150), (150, 152), (152, 190)):
        for session in (got, want):
            session.extend(SEQ, tokens[begin:end], features[begin:end])
        trees = [session.propose(SEQ, block.limits) for session in (got, want)]
        np.testing.assert_array_equal(trees[0].tokens, trees[1].tokens)
        np.testing.assert_allclose(trees[0].logprobs, trees[1].logprobs, atol=atol)
