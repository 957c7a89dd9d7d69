"""`doctor` describes the machine, names what each lack costs, and exits 7 only where nothing can run.

Of a pair it says whether it fits and what speed to expect.  There is a GPU in few places: capturing is tried on the
CPU, through the same calls.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.runtime.devices import openvino as openvino_gpu
from dovetail.runtime.devices.cuda import PROVIDER, cuda_problem
from dovetail.runtime.devices.openvino import OpenVinoDevice
from dovetail.runtime.devices.webgpu import WebGpuDevice
from dovetail.runtime.doctor import diagnose as doctor
from dovetail.runtime.doctor.diagnose import Cuda, OpenVinoGpu, WebGpu
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.pair import known as pairs
from dovetail.runtime.pair.manifest import read_manifest, write_manifest
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.system import machine
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.tune.cost_cache import CostKey, Measured

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
    """Both engines there, without importing them; no GPU, much memory, and 20 GB/s."""
    monkeypatch.setattr(doctor, "openvino_devices", lambda: (("CPU",), ""))
    monkeypatch.setattr(doctor, "onnxruntime_providers", lambda: ((PROVIDER, "CPUExecutionProvider"), ""))
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ())
    monkeypatch.setattr(doctor, "try_cuda", lambda: (Cuda("13.0"), "no NVIDIA driver"))
    monkeypatch.setattr(machine, "ram_mb", lambda: (16384, 8192))
    monkeypatch.setattr(machine, "memory_bandwidth", lambda: 20.0)


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
    assert {"model", "cores", "threads", "usable", "instruction_sets", "quota"} == set(report["cpu"])
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


@pytest.mark.parametrize("deaf", [False, True])
def test_gpu_is_used_only_when_what_is_captured_replays(
    invoke, monkeypatch: pytest.MonkeyPatch, HostDevice: type, deaf: bool
) -> None:
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: (doctor.Gpu("GTX 1050", "2048 MiB", "580.1"),))
    monkeypatch.setattr(doctor, "cuda_problem", lambda: None)
    monkeypatch.setattr(doctor, "missing_libraries", lambda: [])
    monkeypatch.setattr(doctor, "CudaDevice", lambda _: HostDevice(deaf=deaf))
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["gpus"] == [{"name": "GTX 1050", "memory": "2048 MiB", "driver": "580.1"}]
    assert (report["cuda"]["free_mb"], report["cuda"]["total_mb"]) == (3072, 4096)
    assert report["drafter_device"] == ("cpu" if deaf else "cuda") and report["cuda"]["capture"] is not deaf
    assert any("gave 1.0 for 2.0" in note for note in report["notes"]) is deaf


@pytest.mark.skipif(cuda_problem() is None or bool(doctor.nvidia_gpus()), reason="there is a GPU")
def test_here_there_is_no_gpu_and_it_says_why_and_what_that_costs(invoke, capfd: pytest.CaptureFixture[str]) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0 and result.stderr == "" and capfd.readouterr() == ("", "")
    lines = dict(line.split("  ", maxsplit=1) for line in result.stdout.splitlines() if "  " in line)
    assert lines["NVIDIA GPU"].strip() == "none found" and lines["drafter"].strip() == "CPU"
    assert lines["CUDA"].strip() == f"not usable: {cuda_problem()}" and lines["capture test"].strip() == "not tried"
    (note,) = (line for line in result.stdout.splitlines() if line.startswith("note: No GPU"))
    assert "smaller speedup" in note and str(cuda_problem()) in note


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA may well work here")
def test_a_provider_that_does_not_load_is_one_sentence_and_no_noise(
    HostDevice: type, capfd: pytest.CaptureFixture[str]
) -> None:
    problem = doctor.capture_problem(HostDevice(provider=PROVIDER))
    assert problem and "pip install '.[cuda]'" in problem and "\n" not in problem
    assert capfd.readouterr() == ("", "")


def test_the_real_engines_are_found_here() -> None:
    assert "CPU" in doctor.openvino_devices()[0]
    assert "CPUExecutionProvider" in doctor.onnxruntime_providers()[0]


def test_memory_bandwidth_is_in_gigabytes_per_second() -> None:
    assert 0.5 < machine.memory_bandwidth() < 5000


# --- of a pair: 2 layers of 2 KV heads of 4, 2**20 tokens of context: 64 MiB of KV, and 64 the drafter's on the CPU

COSTS = Costs(
    Curve((128, 1024), (1, 3, 8, 32), ((16.0, 17.0, 20.0, 40.0), (20.0, 21.0, 25.0, 60.0))),
    Curve((128, 1024), (1, 4, 128), ((1.5, 1.8, 15.0), (1.8, 2.5, 20.0))),
    switch_ms=1.0,
)


@pytest.fixture
def gpu_pair(pair: Path) -> Path:
    """`pair` with a float16 graph, for which its drafter's needs on a GPU are known."""
    manifest = read_manifest(pair)
    assert manifest.drafter
    drafter = replace(
        manifest.drafter, files={**manifest.drafter.files, "cuda": "drafter/drafter.fp16.onnx"}, workspace=(2**20, 1024)
    )
    write_manifest(pair, replace(manifest, drafter=drafter))
    return pair


@pytest.mark.usefixtures("engines")
def test_measured_costs_give_plain_speed_and_when_trees_pay(invoke, pair: Path) -> None:
    Measured("tiny", CostKey.of(read_manifest(pair), "cpu", None), COSTS, 4.0, "2026-11-22T14:35:47+00:00").store()
    result = invoke("doctor", str(pair), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    # Four nodes: a pass of 17.6 ms and three calls of 1.7 for three rows, against a plain step of 16
    tree = {"width": 4, "verify_ms": 17.6, "draft_ms": 5.1, "acceptance_length": 1.42}
    assert report["pair"]["speed"] == {
        "plain_tokens_per_s": 62.5, "measured": "2026-11-22T14:35:47+00:00", "tree": tree,
    }  # fmt: skip
    assert any("5.1 ms, 22% of a round" in note for note in report["notes"])
    assert "on 2026-11-22" in invoke("doctor", str(pair)).stdout


@pytest.mark.usefixtures("engines")
def test_costs_of_a_pair_s_own_layers_give_the_speed(invoke, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.runtime.target.layers.choose.layer_device", lambda _: OrtDevice.cpu())
    manifest = read_manifest(pair)
    write_manifest(pair, replace(manifest, target=replace(manifest.target, gpu_layers="1")))
    key = CostKey.of(manifest, "cpu", None, layers=(1, "cpu"))
    Measured("tiny", key, COSTS, 4.0, "2026-11-22T14:35:47+00:00").store()
    assert json.loads(invoke("doctor", str(pair), "--json").stdout)["pair"]["speed"]["plain_tokens_per_s"] == 62.5


@pytest.mark.usefixtures("engines")
def test_a_block_is_drafted_with_one_call(invoke, pair: Path) -> None:
    manifest = read_manifest(pair)
    assert manifest.drafter
    write_manifest(pair, replace(manifest, drafter=replace(manifest.drafter, positions=5)))
    Measured("tiny", CostKey.of(read_manifest(pair), "cpu", None), COSTS, 4.0, "2026-11-22T14:35:47+00:00").store()
    report = json.loads(invoke("doctor", str(pair), "--json").stdout)
    assert report["pair"]["speed"]["tree"]["draft_ms"] == 1.7


@pytest.mark.usefixtures("engines")
def test_a_pair_without_a_drafter_needs_no_gpu(invoke, pair: Path) -> None:
    def gpu_notes() -> list[str]:
        notes = json.loads(invoke("doctor", str(pair), "--json").stdout)["notes"]
        return [note for note in notes if "GPU" in note]

    assert len(gpu_notes()) == 1
    write_manifest(pair, replace(read_manifest(pair), drafter=None))
    assert gpu_notes() == []


@pytest.mark.usefixtures("engines")
def test_without_costs_speed_is_a_bound_from_the_bandwidth_and_called_so(invoke, pair: Path) -> None:
    speed = json.loads(invoke("doctor", str(pair), "--json").stdout)["pair"]["speed"]
    assert speed == {"plain_tokens_per_s": 20e9 / 4096, "measured": None, "tree": None}
    (line,) = (line for line in invoke("doctor", str(pair)).stdout.splitlines() if line.startswith("speed"))
    assert "at most" in line and "estimate" in line and f"dovetail-run tune {pair} measures it" in line


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(("free", "context", "exit_code"), [(278, 2**20, 0), (214, 2**19, 0), (149, 0, 7)])
def test_ram_fits_wholly_in_part_or_not(
    invoke, pair: Path, monkeypatch: pytest.MonkeyPatch, free: int, context: int, exit_code: int
) -> None:
    monkeypatch.setattr(machine, "ram_mb", lambda: (16384, free))
    result = invoke("doctor", str(pair), "--json")
    report = json.loads(result.stdout)
    ram = report["pair"]["ram"]
    assert (ram["needed_mb"], ram["fits"], ram["context"]) == (278.0, free == 278, context)
    assert any(f"about {context} fit" in note for note in report["notes"]) is (free == 214)
    assert result.exit_code == exit_code
    assert ("150.0 runtimes = 278.0 MiB" in result.stderr and result.stderr.count("\n") == 1) is bool(exit_code)


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    ("free_mb", "vram", "fits", "device", "said"),
    [
        (None, None, None, "cpu", "would take "),
        (None, "4GB", True, "cpu", "within --vram of 3814 MiB"),
        (None, "100MB", False, "cpu", "does not fit 95.4 MiB of VRAM: "),
        (3072, None, True, "cuda", "3072 MiB are free: it fits"),
        (500, None, False, "cpu", "500 MiB are free: the drafter may have to run on the CPU"),
        (3072, "100MB", False, "cpu", "otherwise the drafter runs on the CPU"),
    ],
)
def test_vram_decides_where_the_drafter_runs(
    invoke,
    gpu_pair: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_mb: int | None,
    vram: str | None,
    fits: bool | None,
    device: str,
    said: str,
) -> None:
    if free_mb is not None:
        monkeypatch.setattr(doctor, "try_cuda", lambda: (Cuda("13.0", free_mb=free_mb, total_mb=4096), None))
    flags = ["--vram", vram] if vram else []
    result = invoke("doctor", str(gpu_pair), *flags, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["pair"]
    assert (found["vram"]["fits"], found["drafter_device"]) == (fits, device)
    assert said in found["vram"]["said"] and "512.0 cuda = 5" in found["vram"]["said"]  # 512 MiB are CUDA's own
    assert ("drafter_kv" in found["ram"]["parts_mb"]) is (device == "cpu")


@pytest.mark.usefixtures("engines")
def test_a_pair_that_does_not_tell_its_vram_is_no_error(invoke, gpu_pair: Path) -> None:
    manifest = read_manifest(gpu_pair)
    assert manifest.drafter
    write_manifest(gpu_pair, replace(manifest, drafter=replace(manifest.drafter, workspace=())))
    result = invoke("doctor", str(gpu_pair), "--json")
    vram = json.loads(result.stdout)["pair"]["vram"]
    assert result.exit_code == 0 and vram["fits"] is None and "export the drafter again" in vram["said"]


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["./nowhere"], 3, "dovetail.json is missing"),
        (["smollm2-135m"], 3, "dovetail-export pair smollm2-135m builds it"),
        (["gpt-17"], 2, "pair 'gpt-17' is unknown"),
        (["--vram", "3GB"], 2, "name a pair"),
        (["./nowhere", "--vram", "much"], 2, "size 'much' is unknown"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_nothing_is_built(
    invoke, monkeypatch: pytest.MonkeyPatch, arguments: list[str], exit_code: int, said: str
) -> None:
    monkeypatch.setattr(pairs, "build_pair", lambda *_: pytest.fail("it was built"))
    result = invoke("doctor", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.usefixtures("engines")
def test_webgpu_is_one_line(invoke, gpu_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "try_webgpu", lambda: WebGpu("0.4.0", ("Intel Arc A770", "llvmpipe (software)")))
    lines = dict(line.split(maxsplit=1) for line in invoke("doctor", str(gpu_pair)).stdout.splitlines())
    assert lines["WebGPU"] == "works, plugin 0.4.0; adapters: Intel Arc A770, llvmpipe (software)"
    assert lines["drafter"] == "GPU (WebGPU)"
    assert "No GPU can be used" not in invoke("doctor").stdout
    facts = json.loads(invoke("doctor", str(gpu_pair), "--json").stdout)
    assert facts["webgpu"]["adapters"] == ["Intel Arc A770", "llvmpipe (software)"]
    assert facts["drafter_device"] == facts["pair"]["drafter_device"] == "webgpu"
    monkeypatch.setattr(doctor, "try_webgpu", lambda: WebGpu(None, (), "the plugin is not installed: install it"))
    lines = dict(line.split(maxsplit=1) for line in invoke("doctor").stdout.splitlines())
    assert lines["WebGPU"] == "not usable: the plugin is not installed: install it" and lines["drafter"] == "CPU"


@pytest.mark.usefixtures("engines")
def test_openvino_s_gpu_is_one_line(invoke, gpu_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "try_webgpu", lambda: WebGpu(None, (), "the plugin is not installed: install it"))
    monkeypatch.setattr(doctor, "try_openvino_gpu", lambda: OpenVinoGpu("Intel(R) Arc(TM) A770, driver 25.1"))
    lines = invoke("doctor", str(gpu_pair)).stdout.splitlines()
    assert "OpenVINO GPU  works: Intel(R) Arc(TM) A770, driver 25.1" in lines
    assert "drafter       GPU (OpenVINO's GPU)" in lines
    assert "No GPU can be used" not in invoke("doctor").stdout
    facts = json.loads(invoke("doctor", str(gpu_pair), "--json").stdout)
    assert facts["openvino_gpu"] == {"name": "Intel(R) Arc(TM) A770, driver 25.1", "gpus": {}, "problem": None}
    assert facts["drafter_device"] == facts["pair"]["drafter_device"] == "openvino-gpu"
    monkeypatch.setattr(
        doctor, "try_openvino_gpu", lambda: OpenVinoGpu(None, {}, "OpenVINO finds no Intel GPU: install")
    )
    assert "OpenVINO GPU  not usable: OpenVINO finds no Intel GPU: install" in invoke("doctor").stdout.splitlines()


@pytest.mark.usefixtures("engines")
def test_several_gpus_of_openvino_are_listed_by_its_names(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"GPU.0": "Intel(R) UHD Graphics", "GPU.1": "Intel(R) Arc(TM) A770"}
    monkeypatch.setattr(doctor, "try_openvino_gpu", lambda: OpenVinoGpu(gpus["GPU.1"], gpus))
    listed = "GPU.0 is Intel(R) UHD Graphics; GPU.1 is Intel(R) Arc(TM) A770"
    lines = invoke("doctor").stdout.splitlines()
    assert f"OpenVINO GPU  works: Intel(R) Arc(TM) A770; {listed}" in lines
    assert json.loads(invoke("doctor", "--json").stdout)["openvino_gpu"]["gpus"] == gpus


def test_a_machine_without_an_intel_gpu_is_told_which_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (openvino_gpu, doctor):
        monkeypatch.setattr(module, "openvino_gpus", dict)
    facts = doctor.try_openvino_gpu()
    assert facts.name is None and facts.problem and "intel-opencl-icd" in facts.problem


def test_openvino_s_device_runs_one_node_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device = OpenVinoDevice(DRAFTING, "CPU")
    assert doctor.openvino_probe_problem(device) is None
    monkeypatch.setattr(doctor, "PROBE_MODEL", b"no graph")
    assert "cannot read a graph" in str(doctor.openvino_probe_problem(device))


@pytest.mark.usefixtures("swiftshader")
def test_a_software_adapter_is_named_and_not_used() -> None:
    facts = doctor.try_webgpu()
    [adapter] = facts.adapters
    assert adapter.startswith("SwiftShader") and adapter.endswith("(software)") and facts.plugin
    assert facts.problem and "is no GPU" in facts.problem
    assert doctor.probe_problem(WebGpuDevice(DRAFTING, software=True)) is None
