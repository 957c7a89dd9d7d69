"""The GPU's drafter without a GPU: real graphs, buffers and calls on a host device.

HostDevice stands for CUDA at the seam of cuda_runner; ONNX Runtime runs the float16 graph of a tiny pair on its CPU
provider.  What only a GPU can show is in test_gpu.py.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread, get_ident
from time import sleep
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.devices import ort
from dovetail.runtime.devices.ort import check_placement
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.runners import cuda as cuda_runner
from dovetail.runtime.drafter.runners.cuda import CudaRunner
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.drafter.vram import BUCKETS, plan_pair
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text

CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def exact(pairs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Opens the same drafter in float32 on the CPU."""
    import torch

    from dovetail.exporter.drafter.export import load_drafter, save
    from dovetail.exporter.drafter.graph import to_onnx
    from dovetail.models.drafter import DraftModel

    manifest = pairs.manifest
    checkpoint = Path(manifest.provenance["drafter"]["checkpoint"])
    drafter = load_drafter(checkpoint, pairs.pair / "target")
    assert isinstance(drafter, DraftModel)
    folder = tmp_path_factory.mktemp("f32")
    facts = manifest.drafter
    save(to_onnx(drafter, torch.float32, tree_slots=facts.tree_slots, top_k=facts.top_k), folder / "f32.onnx")
    in_f32 = replace(manifest, drafter=replace(facts, files={**facts.files, "cpu": "f32.onnx"}))
    return lambda: open_drafter(folder, in_f32, device="cpu", threads=1)


class Claims:
    """A session that says it runs on CUDA, of which ONNX Runtime gave every node to the CPU."""

    def __init__(self, session: Any):
        self.get_provider_graph_assignment_info = session.get_provider_graph_assignment_info

    def get_providers(self) -> list[str]:
        return [CUDA]


def test_float16_in_buckets_drafts_what_float32_does(HostDevice, pairs, exact, stream) -> None:
    """Calls of 1 to 128 rows in turns: what another call left in a bucket's rows is not seen."""
    tokens, features = stream
    got, want = pairs.on(HostDevice()), exact()
    begin = 0
    for rows in (9, 1, 128, 3, 17, 40, 2):
        for session in (got, want):
            session.extend(SEQ, tokens[begin : begin + rows], features[begin : begin + rows])
        begin += rows
        pairs.assert_alike(got.propose(SEQ, pairs.limits), want.propose(SEQ, pairs.limits))


def test_a_call_is_one_copy_up_one_down_and_one_wait(HostDevice, pairs, stream) -> None:
    device = HostDevice()
    session = pairs.on(device)
    device.calls.clear()
    session.extend(SEQ, stream[0][:9], stream[1][:9])
    assert device.calls == ["up", "down", "wait"]
    session.propose(SEQ, TreeLimits(width=12, depth=3, top_k=3, lookup=0))  # two levels below the root's children
    assert device.calls == ["up", "down", "wait"] * 3


def test_features_cross_the_bus_once_and_levels_only_small_rows(HostDevice, pairs, stream) -> None:
    session = pairs.on(HostDevice())
    features = 8 * pairs.manifest.target.feature_size * 2
    session.extend(SEQ, stream[0][:5], stream[1][:5])
    first = session.report.bus_bytes
    session.propose(SEQ, TreeLimits(width=6, depth=2, top_k=3, lookup=0))  # one call
    level = session.report.bus_bytes - first
    assert 0 <= first - level - features < 256  # the block's padding


def test_every_bucket_has_its_own_graph_and_memory(HostDevice, pairs, stream) -> None:
    session = pairs.on(HostDevice())
    runner = session._runner
    assert isinstance(runner, CudaRunner)
    assert [len(runner.rows(n).input_ids) for n in (1, 8, 9, 16, 17, 128)] == [8, 8, 16, 16, 128, 128]
    before = {bucket: (graph.inputs.address, graph.outputs.address) for bucket, graph in runner._buckets.items()}
    assert sorted(before) == list(BUCKETS) and len({address for pair in before.values() for address in pair}) == 6
    ids = {b: graph.run_options.get_run_config_entry("gpu_graph_id") for b, graph in runner._buckets.items()}
    assert ids == {8: "1", 16: "2", 128: "3"}
    session.extend(SEQ, stream[0][:150], stream[1][:150])
    assert before == {b: (graph.inputs.address, graph.outputs.address) for b, graph in runner._buckets.items()}


def test_after_a_nan_the_device_is_as_new(HostDevice, pairs, stream) -> None:
    """Padded rows read and write row 0 of KV and bank, where the first text's root is."""
    tokens, features = stream
    spoiled = features[:5].copy()
    spoiled[-1] = np.nan
    session = pairs.on(HostDevice())
    with pytest.raises(DeviceError, match="no numbers"):
        session.extend(SEQ, tokens[:5], spoiled)
    assert session.length(SEQ) == 0
    trees = []
    for each in (session, pairs.on(HostDevice())):
        each.extend(SEQ, tokens[:9], features[:9])
        trees.append(each.propose(SEQ, pairs.limits))
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
    assert trees[0].logprobs.tolist() == trees[1].logprobs.tolist()


def test_calls_of_all_threads_run_on_one(HostDevice, pairs, stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would capture the graphs again for every other thread, and free none of them."""
    threads = set()

    def recorded(*arguments: Any) -> None:
        threads.add(get_ident())
        ort.call(*arguments)

    monkeypatch.setattr(cuda_runner, "call", recorded)
    session = pairs.on(HostDevice())
    for begin in (0, 9):
        user = Thread(target=session.extend, args=(SEQ, stream[0][begin : begin + 9], stream[1][begin : begin + 9]))
        user.start()
        user.join()
    assert session.length(SEQ) == 18 and len(threads) == 1 and get_ident() not in threads


def test_an_interrupt_waits_for_the_call_that_runs(HostDevice, pairs, stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the call was handed to the runner's thread, and before anybody waits for the call."""
    session = pairs.on(HostDevice())
    runner, returned = session._runner, list[bool]()
    assert isinstance(runner, CudaRunner)
    submit = runner._thread.submit

    def interrupted(work: Any, *arguments: Any) -> None:
        monkeypatch.undo()

        def slow() -> None:
            sleep(0.2)
            work(*arguments)
            returned.append(True)

        submit(slow)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner._thread, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.extend(SEQ, stream[0][:9], stream[1][:9])
    assert returned


def test_a_failed_capture_frees_the_device_at_once(HostDevice, pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's traceback holds the session. A cycle with it would keep VRAM until the collector runs."""

    def failing(session: Any, *_: Any) -> None:
        raise DeviceError(f"{type(session).__name__} failed: export the drafter again")

    monkeypatch.setattr(cuda_runner, "call", failing)
    device = HostDevice()
    gc.disable()
    try:
        with pytest.raises(DeviceError, match="InferenceSession failed"):
            pairs.on(device)
        assert device.closed
    finally:
        gc.enable()


def test_nodes_that_would_run_elsewhere_are_named(HostDevice, pairs) -> None:
    session = pairs.on(HostDevice())._runner._session

    with pytest.raises(
        DeviceError, match=r"\d+ nodes would not run on CUDA.*: \w+ '.+' on CPUExecutionProvider"
    ) as told:
        check_placement(Claims(session), CUDA, DRAFTING)
    assert "\n" not in str(told.value) and " more: use --drafter-device cpu" in str(told.value)
    with pytest.raises(DeviceError, match="could not load its CUDAExecutionProvider"):
        check_placement(session, CUDA, DRAFTING)


def test_a_device_that_is_too_small_is_told_with_the_arithmetic(HostDevice, pairs) -> None:
    device = HostDevice(room=20_000)
    with pytest.raises(DeviceError, match=r"out of memory.*planned: .* weights \+ .* = .* MiB") as told:
        pairs.on(device)
    assert device.closed and "\n" not in str(told.value)


def test_what_is_allocated_is_what_was_planned(HostDevice, pairs) -> None:
    device = HostDevice()
    session = pairs.on(device)
    plan, held = plan_pair(pairs.manifest), sum(block.nbytes for block in device.blocks.values())
    assert session.capacity == plan.context
    assert plan.state + plan.rows <= held <= plan.state + plan.rows + 60 * 256  # what blocks are rounded up by


def test_the_arena_gets_what_a_limit_leaves(HostDevice, pairs) -> None:
    free, limited = HostDevice(), HostDevice()
    pairs.on(free)
    pairs.on(limited, vram=3 * 10**9)
    plan = plan_pair(pairs.manifest)
    assert free.arena is None and limited.arena == 3 * 10**9 - plan.state - plan.rows - plan.cuda > plan.weights


def test_nodes_that_stop_a_capture_are_named(HostDevice, pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses to capture without naming a node; without capturing it tells where it placed them."""
    opened: list[int] = []

    def refuse_once(*arguments: Any) -> Any:
        opened.append(1)
        if len(opened) == 1:
            raise DeviceError("This session cannot use the graph capture feature")
        return ort.open_session(*arguments)

    monkeypatch.setattr(cuda_runner, "open_session", refuse_once)
    assert "cannot use the graph capture" in pairs.on(HostDevice()).report.note  # all nodes are where they belong

    def claimed(session: Any, *_: Any) -> None:
        check_placement(Claims(session), CUDA, DRAFTING)

    monkeypatch.setattr(cuda_runner, "check_placement", claimed)
    opened.clear()
    with pytest.raises(DeviceError, match="nodes would not run on CUDAExecutionProvider: "):
        pairs.on(HostDevice())


def test_calls_that_are_not_captured_are_launched_and_told(
    HostDevice, pairs, stream, caplog: pytest.LogCaptureFixture
) -> None:
    device = HostDevice(captures=False)
    with caplog.at_level(logging.WARNING):
        launched, captured = pairs.on(device), pairs.on(HostDevice())
    [record] = caplog.records
    for said in (record.message, launched.report.note):
        assert "launched one by one" in said and "cannot use the graph capture feature" in said and "\n" not in said
    assert captured.report.note == "a CUDA device was found"
    device.calls.clear()
    for session in (launched, captured):
        session.extend(SEQ, stream[0][:9], stream[1][:9])
    assert device.calls == ["up", "down", "wait"]
    got, want = (session.propose(SEQ, pairs.limits) for session in (launched, captured))
    assert got.tokens.tolist() == want.tokens.tolist() and got.logprobs.tolist() == want.logprobs.tolist()
    launched.close()
    assert device.closed


def test_a_device_that_neither_captures_nor_launches_leaves_the_drafter_to_the_cpu(
    HostDevice, pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [HostDevice(captures=False, launches=False) for _ in range(2)]
    opened = iter(devices)
    monkeypatch.setattr(opening, "cuda_problem", lambda: None)
    monkeypatch.setattr(opening, "CudaDevice", lambda _: next(opened))
    with Engine.from_pretrained(pairs.pair, tree=pairs.limits) as engine:
        assert engine.drafter_device == "CPU (int8)" and "no CUDA: no kernel image" in str(engine.drafter_note)
    with pytest.raises(DeviceError, match="cannot run on CUDA: no kernel image"):
        Engine.from_pretrained(pairs.pair, tree=pairs.limits, drafter_device="cuda")
    assert all(device.closed for device in devices)


@pytest.mark.parametrize("way", ["close", "drop", "engine", "failed"])
def test_a_session_goes_before_its_device_and_a_failed_one_stays(HostDevice, pairs, way: str) -> None:
    """ONNX Runtime ends the process when it destroys a captured graph on a device that failed."""
    device, gone = HostDevice(), list[bool]()
    drafter: Any = pairs.on(device)
    session = weakref.ref(drafter._runner._session)
    close = device.close

    def closing() -> None:
        gone.append(session() is None)
        close()

    device.close = closing
    if way == "engine":
        with pairs.engine(FailoverDrafter(drafter)) as engine:
            del drafter
            engine.generate(pairs.prompt, 4, raw=True)
    elif way == "drop":
        del drafter
        gc.collect()
    else:
        device.fail_at = 1 if way == "failed" else 0
        drafter.close()
        drafter.close()
    assert device.closed and gone == [way != "failed"]


@pytest.mark.parametrize("left", ["interrupted", "failed"])
def test_a_device_waits_for_a_session_that_a_traceback_holds(
    HostDevice, pairs, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """The engine is closed while an error from within a call is on its way, on a device that is well."""
    device, gone = HostDevice(), list[bool]()
    opened = [pairs.on(device)]
    session, close = weakref.ref(opened[0]._runner._session), device.close

    def closing() -> None:
        gone.append(session() is None)
        close()

    device.close = closing
    problem = KeyboardInterrupt if left == "interrupted" else RuntimeError

    def raise_it(self: Any, *_: Any) -> None:
        raise problem

    def leave() -> None:
        with pairs.engine(FailoverDrafter(opened.pop())) as engine:
            monkeypatch.setattr("onnxruntime.InferenceSession.run_with_iobinding", raise_it)
            engine.generate(pairs.prompt, 30, raw=True)

    with pytest.raises((KeyboardInterrupt, DeviceError)) as told:
        leave()
    del told
    gc.collect()
    assert gone == [True] and device.closed
