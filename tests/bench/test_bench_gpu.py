"""gpu.py: figures of every bucket, and a block to paste."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.bench.scripts import script

from dovetail.runtime.drafter.open import open_cuda


def test_the_gpu_s_figures_come_from_calls_of_every_bucket(
    tiny_full_pair: Path, HostDevice: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host device the two ways cost the same; what is checked is that both ran, and what was counted."""
    from dovetail.runtime.pair.manifest import read_manifest

    gpu = script("gpu")
    monkeypatch.setattr(gpu, "used_vram_mb", lambda: None)
    monkeypatch.setattr(gpu.latencies, "__defaults__", (3,))
    manifest = read_manifest(tiny_full_pair)
    drafter = open_cuda(tiny_full_pair, manifest, new_device=HostDevice)
    graphs = dict(drafter._runner._buckets)  # type: ignore[attr-defined]  # a CudaRunner's
    found = gpu.report(lambda: drafter, manifest.target.feature_size)
    assert list(found["call_ms"]) == ["8", "16", "128"]
    assert all(ms["captured"] > 0 and ms["uncaptured"] > 0 for ms in found["call_ms"].values())
    assert drafter._runner._buckets == graphs  # type: ignore[attr-defined]  # as above
    assert 0 < found["bytes_per_round"] < 64 * 1024
    json.dumps(found)


def test_the_gpu_script_ends_with_a_block_to_paste(
    tiny_full_pair: Path, HostDevice: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All figures of the JSON on stdout, in tables on stderr, without a path."""
    from dovetail.runtime.doctor.diagnose import Gpu
    from dovetail.runtime.drafter.onnx import OnnxDrafter

    gpu = script("gpu")
    monkeypatch.setattr(gpu, "used_vram_mb", lambda: 700)
    monkeypatch.setattr(gpu.latencies, "__defaults__", (3,))
    monkeypatch.setattr(gpu, "nvidia_gpus", lambda: (Gpu("NVIDIA L4", "23034 MiB", "580.95"),))
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA L4 8.9")
    monkeypatch.setattr(gpu, "driver_cuda", lambda: (13, 0))

    def opened(pair: Path, manifest: Any, *, device: str, vram: int) -> OnnxDrafter:
        assert (device, vram) == ("cuda", 3 * 10**9)
        return open_cuda(pair, manifest, vram=vram, new_device=HostDevice)

    monkeypatch.setattr(gpu, "open_drafter", opened)
    result = CliRunner().invoke(gpu.main, [str(tiny_full_pair)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found, said = json.loads(result.stdout), result.stderr
    for fact in (
        "| GPU | NVIDIA L4 8.9 (nvidia-smi: NVIDIA L4, 23034 MiB) |",
        "| driver | 580.95, supports CUDA 13.0 |",
        f"| pair | {found['pair']} |",
        f"| commit | {found['commit'] or 'unknown'} |",
        f"onnxruntime-gpu {found['versions']['onnxruntime-gpu']}",
        found["machine"]["cpu"],
        "| VRAM | 700 MiB by nvidia-smi, limit 2861 MiB |",
        f"| bytes of a round on the bus | {found['bytes_per_round']} |",
        *(f"| {rows} | {ms['captured']} | {ms['uncaptured']} |" for rows, ms in found["call_ms"].items()),
    ):
        assert fact in said
    assert str(tiny_full_pair) not in said
    assert said.startswith("\nPaste into a report:\n\n| fact | value |\n|---|---|\n")


def test_the_block_to_paste_says_what_nobody_tells(
    tiny_full_pair: Path, HostDevice: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dovetail.runtime.pair.manifest import read_manifest

    gpu = script("gpu")
    for name, value in (("used_vram_mb", None), ("nvidia_gpus", ()), ("gpu_name", None), ("driver_cuda", None)):
        monkeypatch.setattr(gpu, name, lambda value=value: value)
    monkeypatch.setattr(gpu.latencies, "__defaults__", (1,))
    monkeypatch.setattr(gpu, "ROOT", tiny_full_pair)  # no clone
    manifest = read_manifest(tiny_full_pair)
    drafter = open_cuda(tiny_full_pair, manifest, new_device=HostDevice)
    found = gpu.report(lambda: drafter, manifest.target.feature_size)
    said = gpu.block({"pair": "tiny", "vram_limit_mb": 1, **found})
    assert "| GPU | unknown (nvidia-smi: unknown) |" in said and "| commit | unknown |" in said
    assert "| driver | unknown, supports CUDA unknown |" in said and "| VRAM | unknown by nvidia-smi" in said


def test_the_gpu_script_says_in_one_line_what_it_cannot_do(tiny_full_pair: Path) -> None:
    result = CliRunner().invoke(script("gpu").main, [str(tiny_full_pair), "--vram", "much"], catch_exceptions=False)
    assert result.exit_code == 2 and "much" in result.stderr and len(result.stderr.splitlines()) == 1
