"""`doctor` describes the machine, names what each lack costs, and exits 7 only where nothing can run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.runtime import machine
from dovetail.runtime.cli import doctor

CPUINFO = """processor\t: 0
model name\t: Test CPU
flags\t\t: fpu avx2 avx512f avx512_vnni
physical id\t: 0
core id\t\t: 0

processor\t: 1
model name\t: Test CPU
flags\t\t: fpu avx2 avx512f avx512_vnni
physical id\t: 0
core id\t\t: 0
"""


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines there, without importing them."""
    monkeypatch.setattr(doctor, "openvino_devices", lambda: (("CPU",), ""))
    monkeypatch.setattr(doctor, "onnxruntime_providers", lambda: ((doctor.CUDA, "CPUExecutionProvider"), ""))
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ())
    monkeypatch.setattr(doctor, "why_no_cuda", lambda: "no NVIDIA driver")


def test_cpuinfo_gives_model_cores_and_instruction_sets(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    cpu = machine.cpu(file)
    assert (cpu.model, cpu.cores) == ("Test CPU", 1)
    assert cpu.instruction_sets == ("avx2", "avx512f", "avx512_vnni")


def test_missing_cpuinfo_is_no_error(tmp_path: Path) -> None:
    cpu = machine.cpu(tmp_path / "none")
    assert cpu.model and cpu.cores >= 1 and cpu.instruction_sets == ()


@pytest.mark.usefixtures("engines")
def test_json_holds_cpu_engines_and_notes(invoke) -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"model", "cores", "threads", "usable", "instruction_sets"} == set(report["cpu"])
    assert report["openvino_devices"] == ["CPU"] and report["ram_total_mb"] > 0
    assert report["drafter_device"] == "cpu" and report["gpus"] == []
    assert any("smaller speedup" in note for note in report["notes"])


@pytest.mark.usefixtures("engines")
def test_text_says_where_both_models_run(invoke) -> None:
    lines = dict(line.split(maxsplit=1) for line in invoke("doctor").stdout.splitlines())
    assert lines["target"].strip() == "CPU (OpenVINO)" and lines["drafter"].strip() == "CPU"


@pytest.mark.usefixtures("engines")
def test_missing_engine_is_exit_7_and_still_reported(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "openvino_devices", lambda: ((), "OpenVINO cannot be imported (x): pip install openvino")
    )
    result = invoke("doctor", "--json")
    assert result.exit_code == 7
    assert json.loads(result.stdout)["problems"] == ["OpenVINO cannot be imported (x): pip install openvino"]
    assert result.stderr == "error: OpenVINO cannot be imported (x): pip install openvino\n"


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("problem", [None, "cuDNN does not load"])
def test_gpu_is_used_only_when_cuda_works(invoke, monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: (doctor.Gpu("GTX 1050", "2048 MiB", "580.1"),))
    monkeypatch.setattr(doctor, "why_no_cuda", lambda: problem)
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["gpus"] == [{"name": "GTX 1050", "memory": "2048 MiB", "driver": "580.1"}]
    assert report["drafter_device"] == ("cpu" if problem else "cuda")
    assert any("cuDNN" in note for note in report["notes"]) is bool(problem)


def test_the_real_engines_are_found_here() -> None:
    assert "CPU" in doctor.openvino_devices()[0]
    assert "CPUExecutionProvider" in doctor.onnxruntime_providers()[0]


def test_missing_cuda_libraries_are_one_sentence_and_no_noise(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if doctor.nvidia_gpus():
        pytest.skip("CUDA may well work here")
    monkeypatch.setattr(doctor, "cuda_problem", lambda: None)  # a driver and a device, but nothing else
    problem = doctor.why_no_cuda()
    assert problem and "dovetail-spec[cuda]" in problem
    assert capfd.readouterr() == ("", "")


def test_probe_model_runs() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(doctor.PROBE_MODEL, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["x"]
