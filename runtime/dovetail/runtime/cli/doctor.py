"""`dovetail-run doctor`: report what this machine can run, where, and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from dovetail.runtime.devices.gpus import GPUS
from dovetail.runtime.doctor import estimate, predict
from dovetail.runtime.doctor.diagnose import Diagnosis, OpenVinoGpu, WebGpu, diagnose
from dovetail.runtime.doctor.gpus import find_gpu
from dovetail.runtime.drafter.vram import parse_size
from dovetail.runtime.errors import DeviceError, InputError


@click.command(short_help="Report what this machine can run, and on what.")
@click.argument("pair", required=False, metavar="[PAIR]")
@click.option("--vram", metavar="SIZE", help="GPU memory that PAIR's drafter may take, e.g. 3GB.")
@click.option("--gpu", metavar="NAME", help='Predict PAIR\'s drafter on a GPU that is not here, e.g. "RTX 3050 4GB".')
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(pair: str | None, vram: str | None, gpu: str | None, as_json: bool) -> None:
    """Report what this machine offers, what is missing, and what that costs.

    With PAIR (a folder or a known name) the report says whether PAIR fits and estimates the speed.
    With --gpu it also predicts what PAIR's drafter would do on another GPU.

    \b
    Exit codes: 0 a pair, or PAIR, can run here (with or without a GPU),
                2 a flag or the name of PAIR or of a GPU is wrong,
                3 PAIR cannot be read,
                7 an engine is missing or has no CPU device, or PAIR does not fit the memory.
    """
    for flag, value in (("--vram", vram), ("--gpu", gpu)):
        if value is not None and pair is None:
            raise InputError(f"{flag} {value} needs a pair: name a pair, or leave out {flag}")
    limit, other = None if vram is None else parse_size(vram), None if gpu is None else find_gpu(gpu)
    report = diagnose(pair, limit, other)
    click.echo(json.dumps(asdict(report), indent=2, ensure_ascii=False) if as_json else render(report))
    if report.problems:
        raise DeviceError(report.problems[0])


def render(report: Diagnosis) -> str:
    """Return the report for display, one fact a line."""
    cuda, drafter = report.cuda, report.pair.drafter_device if report.pair else report.drafter_device
    gpus = [f"{gpu.name}, {gpu.memory}, driver {gpu.driver}" for gpu in report.gpus]
    captures = {True: "a captured graph replays", False: "fails", None: "not tried"}
    built = f", built for CUDA {cuda.built_for}" if cuda.built_for else ", built without CUDA"
    bandwidth = f"{report.memory_bandwidth} GB/s of copies"
    rows = [
        ("CPU", f"{report.cpu.model}: {report.cpu.cores} cores, {report.cpu.usable} usable threads"),
        ("instructions", " ".join(report.cpu.instruction_sets) or "unknown"),
        ("memory", f"{report.ram_total_mb} MiB, {report.ram_available_mb} MiB free, {bandwidth}"),
        ("system", f"{report.os}, Python {report.versions['python']}"),
        ("OpenVINO", _engine(report.versions, "openvino", "", report.openvino_devices)),
        ("ONNX Runtime", _engine(report.versions, "onnxruntime", built, report.onnxruntime_providers)),
        ("NVIDIA GPU", "; ".join(gpus) or "none found"),
        ("driver", f"supports CUDA {cuda.driver}" if cuda.driver else "none found"),
        ("CUDA", f"not usable: {report.cuda_problem}" if report.cuda_problem else "works"),
        ("libraries", f"found {', '.join(cuda.found) or 'none'}; missing {', '.join(cuda.missing) or 'none'}"),
        ("VRAM", "unknown" if cuda.free_mb is None else f"{cuda.total_mb} MiB, {cuda.free_mb} MiB free"),
        ("capture test", captures[cuda.capture]),
        ("WebGPU", _webgpu(report.webgpu)),
        ("OpenVINO GPU", _openvino_gpu(report.openvino_gpu)),
        ("target", "CPU (OpenVINO)" if "CPU" in report.openvino_devices else "cannot run"),
        ("drafter", f"GPU ({GPUS[drafter]})" if drafter in GPUS else "CPU" if drafter else "none"),
        *(estimate.rows(report.pair) if report.pair else ()),
        *(predict.rows(report.prediction, report.pair.folder) if report.prediction and report.pair else ()),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _webgpu(facts: WebGpu) -> str:
    seen = f"; adapters: {', '.join(facts.adapters)}" if facts.adapters else ""
    return f"not usable: {facts.problem}{seen}" if facts.problem else f"works, plugin {facts.plugin}{seen}"


def _openvino_gpu(facts: OpenVinoGpu) -> str:
    seen = "; ".join(f"{device} is {name}" for device, name in facts.gpus.items())
    listed = f"; {seen}" if len(facts.gpus) > 1 else ""
    return f"not usable: {facts.problem}{listed}" if facts.problem else f"works: {facts.name}{listed}"


def _engine(versions: dict[str, str], package: str, built: str, devices: tuple[str, ...]) -> str:
    """Return an engine's version and devices. built: facts that the version does not tell."""
    found = [f"{name} {version}" for name, version in versions.items() if name.startswith(package)]
    if not found:
        return "not installed"
    return f"{found[0]}{built}: {', '.join(devices)}" if devices else f"{found[0]}: no device"
