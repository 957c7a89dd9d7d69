"""`auto` takes a GPU where its calls are quicker than the CPU's, as measured on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime import load
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.engine import Engine
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.tune import cost_cache, measure
from dovetail.runtime.tune.cost_cache import CostKey, recall

TARGET = Curve((0,), (1, 64), ((10.0, 20.0),))


@pytest.fixture
def opened(
    HostDevice: type, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[list[Any]]:
    """The devices that are opened as CUDA's. A measurement gives `cuda` and `cpu` ms a call, whatever the rows."""
    cuda, cpu = request.param
    devices: list[Any] = []

    def new(_: Any) -> Any:
        devices.append(HostDevice())
        return devices[-1]

    def costs(_target: Any, drafter: OnnxDrafter, **_: Any) -> Costs:
        ms = {"cuda": cuda, "cpu": cpu}[drafter.device_key]
        return Costs(TARGET, Curve((0,), (1, 128), ((ms, ms),)))

    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    monkeypatch.setattr(opening, "cuda_problem", lambda: None)
    monkeypatch.setattr(opening, "CudaDevice", new)
    monkeypatch.setattr(measure, "measure", costs)
    yield devices


@pytest.mark.parametrize("opened", [(1.0, 2.0)], indirect=True)
def test_a_quicker_gpu_is_taken(opened: list[Any], pairs: Any) -> None:
    for _ in range(2):  # measured, from the cache
        with Engine.from_pretrained(pairs.pair) as engine:
            assert engine.drafter_device == "CUDA (fp16)"
            assert engine.drafter_note == "CUDA is quicker: a call takes 1.0 ms with CUDA, 2.0 ms on the CPU"
    assert len(opened) == 2


@pytest.mark.parametrize("opened", [(1.0, 2.0), (2.0, 1.0)], indirect=True)
def test_a_gpu_without_captured_calls_is_measured_as_any_other(
    opened: list[Any], pairs: Any, HostDevice: type, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(opening, "CudaDevice", lambda _: HostDevice(captures=False))
    with Engine.from_pretrained(pairs.pair) as engine:
        taken = engine.drafter_device == "CUDA (fp16)"
        assert ("launched one by one" in str(engine.drafter_note)) == taken
        assert str(engine.drafter_note).startswith("CUDA is quicker" if taken else "the CPU is quicker")
    assert taken == (request.node.callspec.params["opened"] == (1.0, 2.0))


@pytest.mark.parametrize("opened", [(2.0, 1.0)], indirect=True)
def test_a_slower_gpu_is_left_and_not_opened_again(opened: list[Any], pairs: Any) -> None:
    for _ in range(2):
        with Engine.from_pretrained(pairs.pair) as engine:
            assert engine.drafter_device == "CPU (int8)"
            assert engine.drafter_note == "the CPU is quicker: a call takes 2.0 ms with CUDA, 1.0 ms on the CPU"
            assert engine.scheduler is not None and len(engine.generate(pairs.prompt, 8, raw=True).token_ids) > 0
    assert [device.closed for device in opened] == [True]


def test_a_better_gpu_that_comes_later_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebGPU was measured and slower than the CPU; then CUDA was installed."""
    found = {name: Costs(TARGET, Curve((0,), (1, 128), ((ms, ms),))) for name, ms in (("webgpu", 2.0), ("cpu", 1.0))}
    monkeypatch.setattr(load, "gpu_expected", lambda gpu: False)
    assert str(load._known_to_be_slower(found.get)).startswith("the CPU is quicker: a call takes 2.0 ms with WebGPU")
    monkeypatch.setattr(load, "gpu_expected", lambda gpu: gpu == "cuda")
    assert load._known_to_be_slower(found.get) is None


@pytest.mark.parametrize("opened", [(2.0, 1.0)], indirect=True)
def test_who_asks_for_a_gpu_gets_it(opened: list[Any], pairs: Any) -> None:
    with Engine.from_pretrained(pairs.pair, drafter_device="cuda") as engine:
        assert engine.drafter_device == "CUDA (fp16)" and engine.drafter_note == "a CUDA device was found"


def test_costs_are_kept_for_each_adapter_and_plugin(
    pairs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    keys = []
    for adapter, plugin in (("Intel Arc A770", "0.4.0"), ("Radeon 780M", "0.4.0"), ("Radeon 780M", "0.5.0")):
        monkeypatch.setattr(cost_cache, "adapter_name", lambda adapter=adapter: adapter)
        monkeypatch.setattr(cost_cache, "plugin_version", lambda plugin=plugin: plugin)
        keys.append(CostKey.of(pairs.manifest, "webgpu", None))
    assert len({key.file for key in keys}) == 3 and keys[0].gpu == "Intel Arc A770, plugin 0.4.0"
    assert recall(keys[0]) is None and keys[0].drafter == CostKey.of(pairs.manifest, "cpu", None).drafter


def test_costs_are_kept_for_each_gpu_and_driver_of_openvino(
    pairs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    keys = []
    for facts in ("Intel(R) Arc(TM) A770, driver 25.1", "Intel(R) Arc(TM) A770, driver 25.2"):
        monkeypatch.setattr(cost_cache, "gpu_facts", lambda _, facts=facts: facts)
        keys.append(CostKey.of(pairs.manifest, "openvino-gpu", None))
    assert len({key.file for key in keys}) == 2 and keys[0].gpu == "Intel(R) Arc(TM) A770, driver 25.1"
    assert keys[0].drafter == CostKey.of(pairs.manifest, "cpu", None).drafter
