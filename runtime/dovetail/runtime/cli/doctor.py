"""`dovetail-run doctor`: can this machine run a pair, on what, and what does it lack."""

from __future__ import annotations

import base64
import json
import platform
import shutil
import subprocess
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO

import click

from .. import machine
from ..devices import cuda_problem
from ..errors import DeviceError

# An ONNX model of one Identity node on one float: enough to see whether a provider really starts.
PROBE_MODEL = base64.b64decode(
    "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE="
)
CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver names it."""

    name: str
    memory: str
    driver: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `doctor` reports. problems: nothing runs until solved; notes: what it costs to leave as is."""

    cpu: machine.Cpu
    ram_total_mb: int
    ram_available_mb: int
    os: str
    versions: dict[str, str]
    openvino_devices: tuple[str, ...]
    onnxruntime_providers: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    cuda_problem: str | None
    drafter_device: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@click.command(short_help="Report what this machine can run, and on what.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Report what this machine offers, and what it costs where something lacks.

    \b
    Exit codes: 0 a pair can run here (with or without a GPU),
                7 an engine is missing or has no CPU device.
    """
    report = diagnose()
    click.echo(json.dumps(asdict(report), indent=2, ensure_ascii=False) if as_json else render(report))
    if report.problems:
        raise DeviceError(report.problems[0])


def diagnose() -> Diagnosis:
    """Look at the CPU, both engines and the GPUs; the CUDA provider is tried on a one-node model."""
    cpu, (total, available) = machine.cpu(), machine.ram_mb()
    devices, openvino_problem = openvino_devices()
    providers, onnxruntime_problem = onnxruntime_providers()
    gpus = nvidia_gpus()
    problem = onnxruntime_problem or why_no_cuda()
    return Diagnosis(
        cpu=cpu,
        ram_total_mb=total,
        ram_available_mb=available,
        os=platform.platform(),
        versions=machine.versions(),
        openvino_devices=devices,
        onnxruntime_providers=providers,
        gpus=gpus,
        cuda_problem=problem,
        drafter_device="cpu" if problem else "cuda",
        problems=tuple(filter(None, (openvino_problem, onnxruntime_problem))),
        notes=tuple(notes(cpu, available, problem)),
    )


def openvino_devices() -> tuple[tuple[str, ...], str]:
    """OpenVINO's devices, and the problem in one line ("" when there is none)."""
    try:
        import openvino
    except ImportError as err:
        return (), f"OpenVINO cannot be imported ({err}): pip install --force-reinstall openvino"
    devices = tuple(str(name) for name in openvino.Core().available_devices)
    return devices, "" if "CPU" in devices else "OpenVINO has no CPU device: reinstall it with pip"


def onnxruntime_providers() -> tuple[tuple[str, ...], str]:
    """ONNX Runtime's execution providers, and the problem in one line ("" when there is none)."""
    try:
        import onnxruntime
    except ImportError as err:
        return (), f"ONNX Runtime cannot be imported ({err}): pip install --force-reinstall onnxruntime-gpu"
    providers = tuple(str(name) for name in onnxruntime.get_available_providers())
    lacking = "" if "CPUExecutionProvider" in providers else "ONNX Runtime has no CPU provider: reinstall it with pip"
    return providers, lacking


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none where it is not installed or finds no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode != 0:
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return tuple(Gpu(*row) for row in rows if len(row) == 3)


def why_no_cuda() -> str | None:
    """Why the drafter cannot run on a GPU here, with the remedy; None when it can.

    A driver with a device is not enough: CUDA's and cuDNN's libraries must load, so a one-node model is tried.
    """
    import onnxruntime

    problem = cuda_problem()
    if problem is not None:
        return problem
    onnxruntime.set_default_logger_severity(4)  # a failure is told below, in one line instead of many
    with redirect_stdout(StringIO()):  # preload_dlls prints what it does not find
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(PROBE_MODEL, providers=[CUDA, "CPUExecutionProvider"])
    onnxruntime.set_default_logger_severity(2)
    if CUDA in session.get_providers():
        return None
    return 'the libraries of CUDA or cuDNN do not load: pip install "dovetail-spec[cuda]"'


def notes(cpu: machine.Cpu, available_mb: int, no_cuda: str | None) -> list[str]:
    """What lacks here, each with its cost in one plain sentence."""
    said = []
    if cpu.instruction_sets and not machine.INT8_SETS & set(cpu.instruction_sets):
        said.append(
            "The CPU has no INT8 dot-product instructions: a tree costs nearly as much per node as plain decoding."
        )
    if cpu.usable < cpu.threads:
        said.append(f"This process may use {cpu.usable} of {cpu.threads} hardware threads, so passes take longer.")
    if available_mb < 2048:
        said.append(f"Only {available_mb} MiB of memory are free: a target that does not fit is slow or is killed.")
    if no_cuda:
        said.append(f"The drafter shares the CPU with the target, which leaves a smaller speedup: {no_cuda}.")
    return said


def render(report: Diagnosis) -> str:
    """The report for a person, one fact a line."""
    gpus = [f"{gpu.name}, {gpu.memory}, driver {gpu.driver}" for gpu in report.gpus]
    rows = [
        ("CPU", f"{report.cpu.model}: {report.cpu.cores} cores, {report.cpu.usable} usable threads"),
        ("instructions", " ".join(report.cpu.instruction_sets) or "unknown"),
        ("memory", f"{report.ram_total_mb} MiB, {report.ram_available_mb} MiB free"),
        ("system", f"{report.os}, Python {report.versions['python']}"),
        ("OpenVINO", _engine(report.versions.get("openvino"), report.openvino_devices)),
        ("ONNX Runtime", _engine(_onnxruntime_version(report.versions), report.onnxruntime_providers)),
        ("NVIDIA GPU", "; ".join(gpus) or "none found"),
        ("CUDA", "not usable" if report.cuda_problem else "works"),
        ("target", "CPU (OpenVINO)" if "CPU" in report.openvino_devices else "cannot run"),
        ("drafter", "CPU" if report.cuda_problem else "GPU (CUDA)"),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _engine(version: str | None, devices: tuple[str, ...]) -> str:
    return f"{version}: {', '.join(devices)}" if version else "not installed"


def _onnxruntime_version(versions: dict[str, str]) -> str | None:
    return versions.get("onnxruntime-gpu") or versions.get("onnxruntime")
