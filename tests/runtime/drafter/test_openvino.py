"""The drafter on OpenVINO's GPU, on OpenVINO's CPU device: the same graph, variables, buckets and calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="graphs are changed, and a pair is exported")
pytest.importorskip("torch", reason="a pair is exported")

from click.testing import CliRunner
from tests.runtime.drafter.conftest import Gpu, OpenVinoCpu

from dovetail.runtime.cli.main import cli
from dovetail.runtime.devices import openvino as openvino_gpu
from dovetail.runtime.devices.openvino import INSTALL, OpenVinoDevice, gpu_facts
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter.runners.openvino import OpenVinoRunner
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.drafter.vram import plan_openvino
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError

SEQ = 1  # the number of a text


def test_auto_takes_it_after_the_other_gpus(
    pairs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "OpenVinoDevice", lambda _: OpenVinoCpu())
    texts = []
    for device in ("cpu", "openvino-gpu", "auto"):
        with Engine.from_pretrained(pairs.pair, drafter_device=device, tree=pairs.limits) as engine:
            texts.append(engine.generate(pairs.prompt, 60, raw=True).token_ids)
            named = engine.drafter_device, engine.drafter_note
    assert texts[0] == texts[1] == texts[2] and not caplog.records
    assert named == ("OpenVINO GPU (int8)", f"{gpu_facts('CPU')} was found")


def test_a_machine_without_an_intel_gpu_drafts_on_the_cpu(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_gpu, "openvino_gpus", dict)
    with Engine.from_pretrained(pairs.pair, tree=pairs.limits) as engine:
        assert engine.drafter_device == "CPU (int8)"
        assert f"no OpenVINO's GPU: OpenVINO finds no Intel GPU: {INSTALL}" in str(engine.drafter_note)
    arguments = ["-m", str(pairs.pair), "--drafter-device", "openvino-gpu", "--width", "4", "x"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 7 and result.stderr.count("\n") == 1
    assert "cannot run on OpenVINO's GPU: OpenVINO finds no Intel GPU" in result.stderr


def test_a_graph_that_openvino_refuses_is_told_in_one_line(pairs, tmp_path: Path) -> None:
    facts, plan = pairs.manifest.drafter, plan_openvino(pairs.manifest)
    lost = tmp_path / "lost.onnx"
    with pytest.raises(DeviceError, match=r"cannot read .*lost.onnx.*export the drafter again.*planned: ") as told:
        OpenVinoRunner(lost, facts, plan, OpenVinoCpu())
    assert "\n" not in str(told.value)
    odd = OpenVinoDevice(DRAFTING, "CPU", {"INFERENCE_PRECISION_HINT": "unheard"})
    with pytest.raises(DeviceError, match=r"cannot compile the graph for .*update its driver") as told:
        OpenVinoRunner(pairs.pair / facts.files["cpu"], facts, plan, odd)
    assert "\n" not in str(told.value)


def test_a_graph_that_is_not_the_manifest_s_is_refused(pairs) -> None:
    facts, plan = pairs.manifest.drafter, plan_openvino(pairs.manifest)
    with pytest.raises(DeviceError, match="the manifest says tensor"):
        OpenVinoRunner(pairs.pair / facts.files["cpu"], replace(facts, tree_slots=32), plan, OpenVinoCpu())


def test_the_budget_is_planned_and_refused_with_the_sum(openvino: Gpu, pairs) -> None:
    plan = plan_openvino(pairs.manifest)
    assert plan.weights == sum(each.size for each in pairs.manifest.drafter_files("cpu"))
    with pytest.raises(DeviceError, match=r"does not fit .* \+ 64.0 opencl = "):
        openvino.on(pairs, vram=plan.total - 2**20)


def test_bus_bytes_are_a_call_s_inputs_and_outputs(openvino: Gpu, pairs, stream) -> None:
    session = openvino.on(pairs)
    assert session.report.bus_bytes == 0  # opening does not count
    session.extend(SEQ, stream[0][:5], stream[1][:5])
    runner = session._runner
    assert isinstance(runner, OpenVinoRunner)
    bucket = runner._buckets[8]
    outputs = bucket.rows.top_logprobs.nbytes + bucket.rows.top_ids.nbytes
    assert session.report.bus_bytes == sum(each.byte_size for each in bucket.inputs.values()) + outputs
