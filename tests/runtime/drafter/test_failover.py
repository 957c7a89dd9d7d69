"""A drafter goes on: on the CPU when its device fails, with the last pairs when its context is full, after Ctrl-C."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.drafter import failover as steady
from dovetail.runtime.drafter import onnx as onnx_drafter
from dovetail.runtime.drafter.failover import SteadyDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.tree.limits import TreeLimits


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_device_that_fails_in_round_7_leaves_the_text_as_it_is(
    HostDevice, pairs, caplog: pytest.LogCaptureFixture, fault: str, sampling: dict[str, Any]
) -> None:
    expected = pairs.text(pairs.cpu(), **sampling)
    spoiled = (lambda down: down.view(np.uint8).fill(0xFF)) if fault == "nan" else None  # all bits set: nan
    device = HostDevice()
    drafter = SteadyDrafter(pairs.on(device), pairs.cpu)
    engine = pairs.engine(drafter)
    assert engine.drafter_device == "CUDA (fp16)"
    tokens: list[int] = []
    with caplog.at_level(logging.WARNING):
        for number, chunk in enumerate(engine.stream(pairs.prompt, 80, raw=True, **sampling)):
            tokens += chunk.token_ids
            if number == 7:
                assert engine.drafter_device == "CUDA (fp16)" and not caplog.records
                device.alter = spoiled
                device.fail_at = 0 if spoiled else device.calls.count("wait") + 2
            last = chunk
    assert tuple(tokens) == expected
    assert engine.drafter_device == "CPU (int8)" and device.closed
    assert engine.drafter_note is not None and engine.drafter_note.startswith("moved there: ")
    [record] = caplog.records
    assert "moves from CUDA (fp16) to CPU (int8)" in record.message and "\n" not in record.message
    assert last.metrics is not None and last.metrics.drafted > 0 and last.metrics.bus_bytes > 0


def test_a_provider_that_refuses_at_load_leaves_the_text_as_it_is(
    HostDevice, pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way from a folder: CUDA seems usable, its device does not start."""

    def refuse() -> Any:
        raise DeviceError("cudaStreamCreateWithFlags: no CUDA-capable device is detected (code 100): check nvidia-smi")

    expected = (
        Engine.from_pretrained(pairs.pair, drafter_device="cpu", tree=pairs.limits).generate(pairs.prompt, 60).token_ids
    )
    monkeypatch.setattr(onnx_drafter, "cuda_problem", lambda: None)
    monkeypatch.setattr(onnx_drafter, "CudaDevice", refuse)
    engine = Engine.from_pretrained(pairs.pair, tree=pairs.limits)
    assert engine.generate(pairs.prompt, 60).token_ids == expected
    assert engine.drafter_device == "CPU (int8)"
    assert engine.drafter_note is not None and "no CUDA: cudaStreamCreateWithFlags" in engine.drafter_note
    with pytest.raises(DeviceError, match="cannot run on CUDA: cudaStreamCreateWithFlags") as told:
        Engine.from_pretrained(pairs.pair, tree=pairs.limits, drafter_device="cuda")
    assert "\n" not in str(told.value)


def test_a_device_that_fails_while_the_pair_is_measured_is_left(
    HostDevice, pairs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    monkeypatch.setattr(onnx_drafter, "cuda_problem", lambda: None)
    monkeypatch.setattr(onnx_drafter, "CudaDevice", lambda: HostDevice(fail_at=5))
    engine = Engine.from_pretrained(pairs.pair)
    assert engine.drafter_device == "CPU (int8)" and "illegal memory access" in str(engine.drafter_note)
    assert len(engine.generate(pairs.prompt, 8, raw=True).token_ids) > 0


def test_with_no_second_drafter_the_failure_is_raised(HostDevice, pairs) -> None:
    engine = pairs.engine(SteadyDrafter(pairs.on(HostDevice(fail_at=6))))
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.generate(pairs.prompt, 60, raw=True)


@pytest.fixture
def short(pairs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SteadyDrafter]]:
    """Opens drafters that hold 64 pairs and read 16 of them again."""
    monkeypatch.setattr(steady, "KEPT", 16)
    assert pairs.manifest.drafter is not None
    narrow = replace(pairs.manifest, drafter=replace(pairs.manifest.drafter, max_context=64))
    yield lambda: SteadyDrafter(OnnxDrafter.open(pairs.pair, narrow, device="cpu", threads=1))


def test_a_full_context_begins_anew_with_the_last_pairs(pairs, short, stream) -> None:
    tokens, features = stream
    session, fresh = short(), pairs.cpu()
    for begin in range(0, 60, 6):
        session.extend(tokens[begin : begin + 6], features[begin : begin + 6])
    session.extend(tokens[60:70], features[60:70])  # 70 do not fit: the last parts of at least 16, and these
    assert session.length == 70 and session._drafter.length == 26
    fresh.extend(tokens[44:70], features[44:70])
    want, got = fresh.propose(pairs.limits), session.propose(pairs.limits)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_a_text_longer_than_the_drafter_s_context_is_drafted_to_its_end(pairs, short) -> None:
    """A chain gives token for token what no drafts give in the same arithmetic."""
    chain = TreeLimits(width=5, depth=4, top_k=1, lookup=0)
    plain = pairs.engine(None).generate(pairs.prompt, 150, raw=True, tree=TreeLimits(1, 0, 1, lookup=0))
    engine = pairs.engine(short())
    lengths, tokens = [], list[int]()
    for chunk in engine.stream(pairs.prompt, 150, raw=True, tree=chain):
        lengths.append(engine._drafter.length if engine._drafter else 0)  # type: ignore[union-attr]
        tokens += chunk.token_ids
        last = chunk
    assert last.metrics is not None and last.metrics.drafted > last.metrics.rounds * 3
    assert max(lengths) > 140 and tuple(tokens) == plain.token_ids


def test_a_reset_behind_what_is_held_begins_there(pairs, short, stream) -> None:
    tokens, features = stream
    session = short()
    for begin in range(0, 100, 5):
        session.extend(tokens[begin : begin + 5], features[begin : begin + 5])
    for keep in (97, 90, 20, 0):
        session.reset(keep)
        assert session.length == keep
    session.extend(tokens[:9], features[:9])
    fresh = short()
    fresh.extend(tokens[:9], features[:9])
    pairs.assert_alike(session.propose(pairs.limits), fresh.propose(pairs.limits))


@pytest.mark.parametrize("room", [300, 512, 700])
def test_a_context_shorter_than_a_prompt_reads_its_end(pairs, stream, room: int) -> None:
    tokens, features = (np.concatenate([part] * 3) for part in stream)
    assert pairs.manifest.drafter is not None
    narrow = replace(pairs.manifest, drafter=replace(pairs.manifest.drafter, max_context=room))
    session = SteadyDrafter(OnnxDrafter.open(pairs.pair, narrow, device="cpu", threads=1))
    begin = 0
    for count in (511, 7, 150, 9):
        session.extend(tokens[begin : begin + count], features[begin : begin + count])
        begin += count
        held = session._drafter.length
        assert session.length == begin and 0 < held <= room
        fresh = SteadyDrafter(OnnxDrafter.open(pairs.pair, narrow, device="cpu", threads=1))
        fresh.extend(tokens[begin - held : begin], features[begin - held : begin])
        pairs.assert_alike(session.propose(pairs.limits), fresh.propose(pairs.limits))
    session.reset(600)
    session.extend(tokens[600:610], features[600:610])
    assert session.length == 610


def test_an_interrupt_while_the_drafter_moves_leaves_it_on_the_cpu(HostDevice, pairs, stream) -> None:
    tokens, features = stream
    device = HostDevice()
    session = SteadyDrafter(pairs.on(device), pairs.cpu)
    session.extend(tokens[:100], features[:100])

    def interrupted() -> None:
        raise KeyboardInterrupt

    device.close, device.fail_at = interrupted, 1
    with pytest.raises(KeyboardInterrupt):
        session.extend(tokens[100:105], features[100:105])
    session.reset(100)
    session.extend(tokens[100:120], features[100:120])
    assert session.device == "CPU (int8)" and session.length == 120
    fresh = pairs.cpu()  # what was kept is read when there is something new
    fresh.extend(tokens[:120], features[:120])
    pairs.assert_alike(session.propose(pairs.limits), fresh.propose(pairs.limits))


def test_after_an_interrupted_call_the_kept_pairs_are_still_the_last(pairs, stream) -> None:
    """The first of two chunks was read when Ctrl-C came: the rollback takes it from the drafter alone."""
    tokens, features = stream
    session = SteadyDrafter(pairs.cpu())
    session.extend(tokens[:100], features[:100])
    runner = session._drafter._runner
    run, calls = runner.run, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    runner.run = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.extend(tokens[100:240], features[100:240])
    session.reset(100)
    kept, _ = session._recent.last(100, 256)
    np.testing.assert_array_equal(kept, tokens[:100])
