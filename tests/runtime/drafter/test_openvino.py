"""The drafter on OpenVINO's GPU, on OpenVINO's CPU device: the same graph, variables, buckets and calls."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs are changed, and a pair is exported")
pytest.importorskip("torch", reason="a pair is exported")

from click.testing import CliRunner

from dovetail.runtime.cli.main import cli
from dovetail.runtime.devices import openvino as openvino_gpu
from dovetail.runtime.devices.openvino import INSTALL, OpenVinoDevice, gpu_facts
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_cpu, open_openvino
from dovetail.runtime.drafter.runners.openvino import OpenVinoRunner
from dovetail.runtime.drafter.session import DRAFTING, Ask
from dovetail.runtime.drafter.vram import plan_openvino
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError

SEQ = 1  # the number of a text
# OpenVINO's CPU device otherwise quantises activations, and computes in bfloat16 on some CPUs.
EXACT = {
    "INFERENCE_NUM_THREADS": "1", "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}  # fmt: skip


class Device(OpenVinoDevice):
    """OpenVINO's CPU device, with a fault. fail: whether calls fail. spoil: whether features hold a NaN."""

    def __init__(self) -> None:
        super().__init__(DRAFTING, "CPU", EXACT)
        self.fail = self.spoil = False

    def call(self, request: Any, inputs: Mapping[str, Any]) -> None:
        if self.fail:
            raise DeviceError("the drafter failed: [GPU] CL_OUT_OF_RESOURCES: generate without speculation")
        if self.spoil:
            inputs["features"].data[:] = np.nan
        super().call(request, inputs)


def on(pairs: Any, device: Device | None = None, **options: Any) -> OnnxDrafter:
    return open_openvino(pairs.pair, pairs.manifest, new_device=lambda: device or Device(), **options)


@pytest.fixture(scope="module")
def drafter(pairs: Any) -> OnnxDrafter:
    """One drafter for the tests that leave it as it was."""
    return on(pairs)


def exact_of(pairs: Any, folder: Path) -> OnnxDrafter:
    """The same INT8 weights on the CPU by ONNX Runtime, without quantised activations."""
    file = pairs.pair / pairs.manifest.drafter.files["cpu"]
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    changed = folder / file.relative_to(pairs.pair)
    changed.parent.mkdir(parents=True)
    onnx.save(model, changed)
    data = file.with_name(file.name + ".data")
    (changed.parent / data.name).write_bytes(data.read_bytes())
    return open_cpu(folder, pairs.manifest.drafter, "", threads=1)


@pytest.fixture
def exact(pairs: Any, tmp_path: Path) -> OnnxDrafter:
    return exact_of(pairs, tmp_path)


def test_buckets_draft_what_the_cpu_does(pairs, drafter: OnnxDrafter, exact: OnnxDrafter, stream) -> None:
    """Calls of 1 to 128 rows in turns: KV and bank are variables, which all numbers of rows share."""
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
        return np.sin(ids * 7.0 + depth).astype(np.float32) * 3 + 300

    drafter.rewind(SEQ, 0)
    for each in (noise, None):
        for session in (drafter, exact):
            session.extend(SEQ, tokens[:9], features[:9], each)
        got, want = (session.propose(SEQ, pairs.limits, None, each) for session in (drafter, exact))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_several_texts_are_drafted_as_each_alone(language_pair: Path, pairs) -> None:
    """A small language model as the drafter, which reads tokens alone."""
    model, rng = type(pairs)(language_pair), np.random.default_rng(1)
    parts = {seq: (rng.integers(0, 200, n), np.zeros((n, 0), np.float32)) for seq, n in ((1, 30), (2, 17))}
    together = on(model, texts=2)
    together.extend_all(parts)
    trees = together.propose_all({seq: Ask(model.limits, None) for seq in parts})
    for seq, part in parts.items():
        session = on(model)
        session.extend(seq, *part)
        want = session.propose(seq, model.limits)
        np.testing.assert_array_equal(trees[seq].tokens, want.tokens)
        np.testing.assert_allclose(trees[seq].logprobs, want.logprobs, atol=1e-4)


def test_a_block_drafter_drafts_what_it_does_on_the_cpu(dflash_pair: Path, pairs, tmp_path: Path) -> None:
    block, rng = type(pairs)(dflash_pair), np.random.default_rng(1)
    assert block.text(block.cpu()) == block.text(on(block))
    size = block.manifest.target.feature_size
    tokens, features = rng.integers(0, 200, 190), rng.standard_normal((190, size)).astype(np.float32)
    got, want = on(block), exact_of(block, tmp_path)
    for begin, end in ((0, 9), (9, 150), (150, 152), (152, 190)):
        for session in (got, want):
            session.extend(SEQ, tokens[begin:end], features[begin:end])
        trees = [session.propose(SEQ, block.limits) for session in (got, want)]
        np.testing.assert_array_equal(trees[0].tokens, trees[1].tokens)
        np.testing.assert_allclose(trees[0].logprobs, trees[1].logprobs, atol=1e-4)


def test_any_thread_may_call(pairs, drafter: OnnxDrafter, stream) -> None:
    drafter.rewind(SEQ, 0)
    for begin in (0, 9):
        user = Thread(target=drafter.extend, args=(SEQ, stream[0][begin : begin + 9], stream[1][begin : begin + 9]))
        user.start()
        user.join()
    assert drafter.length(SEQ) == 18
    other = on(pairs)
    other.extend(SEQ, stream[0][:18], stream[1][:18])
    got, want = (each.propose(SEQ, pairs.limits) for each in (drafter, other))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_after_a_nan_the_device_is_as_new(pairs, drafter: OnnxDrafter, stream) -> None:
    tokens, features = stream
    spoiled = features[:5].copy()
    spoiled[-1] = np.nan
    session = on(pairs)
    with pytest.raises(DeviceError, match=r"OpenVINO GPU \(int8\).*no numbers"):
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
    pairs, caplog: pytest.LogCaptureFixture, fault: str, sampling: dict[str, Any]
) -> None:
    expected = pairs.text(pairs.cpu(), **sampling)
    device = Device()
    engine = pairs.engine(FailoverDrafter(on(pairs, device), pairs.cpu))
    tokens: list[int] = []
    with caplog.at_level(logging.WARNING):
        for number, chunk in enumerate(engine.stream(pairs.prompt, 80, raw=True, **sampling)):
            tokens += chunk.token_ids
            if number == 7:
                assert engine.drafter_device == "OpenVINO GPU (int8)" and not caplog.records
                setattr(device, fault, True)
            last = chunk
    assert tuple(tokens) == expected
    assert engine.drafter_device == "CPU (int8)"
    assert engine.drafter_note is not None and engine.drafter_note.startswith("moved there: ")
    [record] = caplog.records
    assert "moves from OpenVINO GPU (int8) to CPU (int8)" in record.message and "\n" not in record.message
    assert last.metrics is not None and last.metrics.drafted > 0 and last.metrics.bus_bytes > 0


def test_auto_takes_it_after_the_other_gpus(
    pairs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "OpenVinoDevice", lambda _: Device())
    texts = []
    for device in ("cpu", "openvino-gpu", "auto"):
        with Engine.from_pretrained(pairs.pair, drafter_device=device, tree=pairs.limits) as engine:
            texts.append(engine.generate(pairs.prompt, 60, raw=True).token_ids)
            named = engine.drafter_device, engine.drafter_note
    assert texts[0] == texts[1] == texts[2] and not caplog.records
    assert named == ("OpenVINO GPU (int8)", f"{gpu_facts('CPU')} was found")


def test_a_machine_without_an_intel_gpu_drafts_on_the_cpu(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_gpu, "gpu_facts", lambda *_: None)
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
        OpenVinoRunner(lost, facts, plan, Device())
    assert "\n" not in str(told.value)
    odd = OpenVinoDevice(DRAFTING, "CPU", {"INFERENCE_PRECISION_HINT": "unheard"})
    with pytest.raises(DeviceError, match=r"cannot compile the graph for .*update its driver") as told:
        OpenVinoRunner(pairs.pair / facts.files["cpu"], facts, plan, odd)
    assert "\n" not in str(told.value)


def test_a_graph_that_is_not_the_manifest_s_is_refused(pairs) -> None:
    facts, plan = pairs.manifest.drafter, plan_openvino(pairs.manifest)
    with pytest.raises(DeviceError, match="the manifest says tensor"):
        OpenVinoRunner(pairs.pair / facts.files["cpu"], replace(facts, tree_slots=32), plan, Device())


def test_the_budget_is_planned_and_refused_with_the_sum(pairs) -> None:
    plan = plan_openvino(pairs.manifest)
    assert plan.weights == sum(each.size for each in pairs.manifest.drafter_files("cpu"))
    with pytest.raises(DeviceError, match=r"does not fit .* \+ 64.0 opencl = "):
        on(pairs, vram=plan.total - 2**20)


def test_bus_bytes_are_a_call_s_inputs_and_outputs(pairs, stream) -> None:
    session = on(pairs)
    assert session.report.bus_bytes == 0  # opening does not count
    session.extend(SEQ, stream[0][:5], stream[1][:5])
    runner = session._runner
    assert isinstance(runner, OpenVinoRunner)
    bucket = runner._buckets[8]
    outputs = bucket.rows.top_logprobs.nbytes + bucket.rows.top_ids.nbytes
    assert session.report.bus_bytes == sum(each.byte_size for each in bucket.inputs.values()) + outputs
