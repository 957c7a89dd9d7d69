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

from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter import window as window_module
from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.window import Window
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_device_that_fails_in_round_7_leaves_the_text_as_it_is(
    HostDevice, pairs, caplog: pytest.LogCaptureFixture, fault: str, sampling: dict[str, Any]
) -> None:
    expected = pairs.text(pairs.cpu(), **sampling)
    spoiled = (lambda down: down.view(np.uint8).fill(0xFF)) if fault == "nan" else None  # all bits set: nan
    device = HostDevice()
    drafter = FailoverDrafter(pairs.on(device), pairs.cpu)
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

    def refuse(_: Any) -> Any:
        raise DeviceError("cudaStreamCreateWithFlags: no CUDA-capable device is detected (code 100): check nvidia-smi")

    expected = (
        Engine.from_pretrained(pairs.pair, drafter_device="cpu", tree=pairs.limits).generate(pairs.prompt, 60).token_ids
    )
    monkeypatch.setattr(opening, "cuda_problem", lambda: None)
    monkeypatch.setattr(opening, "CudaDevice", refuse)
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
    monkeypatch.setattr(opening, "cuda_problem", lambda: None)
    monkeypatch.setattr(opening, "CudaDevice", lambda _: HostDevice(fail_at=5))
    engine = Engine.from_pretrained(pairs.pair)
    assert engine.drafter_device == "CPU (int8)" and "illegal memory access" in str(engine.drafter_note)
    assert len(engine.generate(pairs.prompt, 8, raw=True).token_ids) > 0


def test_with_no_second_drafter_the_failure_is_raised(HostDevice, pairs) -> None:
    engine = pairs.engine(FailoverDrafter(pairs.on(HostDevice(fail_at=6))))
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.generate(pairs.prompt, 60, raw=True)


class Told:
    """A window that is told the pairs of a stream, and drafts below the last of them."""

    def __init__(self, drafter: Any, stream: tuple[np.ndarray, np.ndarray]) -> None:
        self.tokens, self.features = stream
        self.window, self.told = Window(drafter, SEQ), 0

    def extend(self, count: int) -> None:
        """The next `count` pairs, which are read at once."""
        self.window.add(self.features[self.told : self.told + count])
        self.told += count
        self.window.flush(self.text(), None)

    def text(self) -> list[int]:
        return [0, *self.tokens[: self.told].tolist()]

    def propose(self, limits: TreeLimits) -> DraftTree:
        return self.window.propose(self.text(), limits, None, None)

    def cut(self, keep: int) -> None:
        self.window.cut(keep)
        self.window.rewind()
        self.told = keep


def fresh_tree(drafter: OnnxDrafter, stream: tuple[np.ndarray, np.ndarray], pairs: slice, limits: TreeLimits):
    drafter.extend(SEQ, stream[0][pairs], stream[1][pairs])
    return drafter.propose(SEQ, limits)


@pytest.fixture
def short(pairs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], OnnxDrafter]]:
    """Opens drafters that hold 64 pairs and read 16 of them again."""
    monkeypatch.setattr(window_module, "KEPT", 16)
    assert pairs.manifest.drafter is not None
    narrow = replace(pairs.manifest, drafter=replace(pairs.manifest.drafter, max_context=64))
    yield lambda: open_drafter(pairs.pair, narrow, device="cpu", threads=1)


def test_a_full_context_begins_anew_with_the_last_pairs(pairs, short, stream) -> None:
    told = Told(short(), stream)
    for _ in range(10):
        told.extend(6)
    told.extend(10)  # 70 do not fit: the last 16 are read
    assert told.window.start == 54 and told.window.drafter.length(SEQ) == 16
    got, want = told.propose(pairs.limits), fresh_tree(pairs.cpu(), stream, slice(54, 70), pairs.limits)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_a_text_longer_than_the_drafter_s_context_is_drafted_to_its_end(pairs, short) -> None:
    """A chain gives token for token what no drafts give in the same arithmetic."""
    chain = TreeLimits(width=5, depth=4, top_k=1, lookup=0)
    plain = pairs.engine(None).generate(pairs.prompt, 150, raw=True, tree=TreeLimits(1, 0, 1, lookup=0))
    engine = pairs.engine(short())
    chunks = list(engine.stream(pairs.prompt, 150, raw=True, tree=chain))
    metrics = chunks[-1].metrics
    assert metrics is not None and metrics.drafted > metrics.rounds * 3
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == plain.token_ids


def test_a_cut_behind_what_is_held_begins_there(pairs, short, stream) -> None:
    told = Told(short(), stream)
    for _ in range(20):
        told.extend(5)
    for keep in (97, 90, 20, 0):
        told.cut(keep)
        assert (
            told.window.drafter.length(SEQ) == told.window.length and told.window.waiting == 0
        ) or told.window.length == 0
    told.extend(9)
    pairs.assert_alike(told.propose(pairs.limits), fresh_tree(short(), stream, slice(0, 9), pairs.limits))


@pytest.mark.parametrize("room", [200, 300, 512, 700])
def test_a_context_shorter_than_a_prompt_reads_its_end(pairs, stream, room: int) -> None:
    tokens, features = (np.concatenate([part] * 3) for part in stream)
    long = tokens, features
    assert pairs.manifest.drafter is not None
    narrow = replace(pairs.manifest, drafter=replace(pairs.manifest.drafter, max_context=room))
    told = Told(open_drafter(pairs.pair, narrow, device="cpu", threads=1), long)
    for count in (511, 7, 150, 9):
        told.extend(count)
        held = told.window.drafter.length(SEQ)
        assert told.window.start + held == told.told and 0 < held <= room
        fresh = open_drafter(pairs.pair, narrow, device="cpu", threads=1)
        pairs.assert_alike(
            told.propose(pairs.limits), fresh_tree(fresh, long, slice(told.told - held, told.told), pairs.limits)
        )
    told.cut(600)
    told.extend(10)
    assert told.window.start + told.window.length == 610


def test_an_interrupt_while_the_drafter_moves_leaves_it_on_the_cpu(HostDevice, pairs, stream) -> None:
    device = HostDevice()
    drafter = FailoverDrafter(pairs.on(device), pairs.cpu)
    told = Told(drafter, stream)
    told.extend(100)

    def interrupted() -> None:
        raise KeyboardInterrupt

    device.close, device.fail_at = interrupted, 1
    with pytest.raises(KeyboardInterrupt):
        told.extend(5)
    told.cut(100)
    told.extend(20)
    assert (
        drafter.device == "CPU (int8)" and drafter.length(SEQ) == 120
    )  # what is kept is read when there is something new
    pairs.assert_alike(told.propose(pairs.limits), fresh_tree(pairs.cpu(), stream, slice(0, 120), pairs.limits))


def test_a_drafter_that_moves_while_it_drafts_reads_what_is_kept(HostDevice, pairs, stream, monkeypatch) -> None:
    monkeypatch.setattr(window_module, "KEPT", 60)
    device = HostDevice()
    drafter = FailoverDrafter(pairs.on(device), pairs.cpu)
    told = Told(drafter, stream)
    told.extend(60)
    told.extend(40)
    device.fail_at = 1
    got = told.propose(pairs.limits)
    assert drafter.device == "CPU (int8)" and (told.window.start, told.window.length) == (40, 60)
    pairs.assert_alike(got, fresh_tree(pairs.cpu(), stream, slice(40, 100), pairs.limits))


def test_after_an_interrupted_call_the_kept_pairs_are_still_the_last(pairs, stream) -> None:
    """The first of two chunks was read when Ctrl-C came: the rollback takes it from the drafter alone."""
    drafter = pairs.cpu()
    told = Told(drafter, stream)
    told.extend(100)
    runner = drafter._runner
    run, calls = runner.run, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    runner.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        told.extend(140)
    assert drafter.length(SEQ) > 100
    told.cut(100)
    assert drafter.length(SEQ) == 100 and told.window.waiting == 0
    told.extend(20)
    pairs.assert_alike(told.propose(pairs.limits), fresh_tree(pairs.cpu(), stream, slice(0, 120), pairs.limits))
