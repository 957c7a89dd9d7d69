"""What the drafter costs on this machine's GPU: calls captured and not, bytes on the bus, VRAM.

    python tests/bench/gpu.py PAIR --vram 3GB > gpu.json

JSON goes to stdout, and a block of Markdown to paste into a report goes to stderr. The pair's speed
is `dovetail-run bench PAIR --drafter-device cuda`'s to tell.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import numpy as np

from dovetail.runtime.cli.main import fail
from dovetail.runtime.devices.cuda import cuda_build, driver_cuda, gpu_name
from dovetail.runtime.doctor.diagnose import nvidia_gpus
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.runners.cuda import CudaRunner
from dovetail.runtime.drafter.vram import parse_size
from dovetail.runtime.errors import DovetailError
from dovetail.runtime.pair.check import read_sound
from dovetail.runtime.system import machine
from dovetail.runtime.tree.limits import TreeLimits

ROOT = Path(__file__).resolve().parents[2]
SEQ = 1  # the number of a text

REPEATS = 200
PAIRS = 9  # new ones of a round: two more than a tree of six levels gives, as a repeat may bring


def latencies(drafter: OnnxDrafter, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Milliseconds of a call, by its bucket of rows: captured, and launched anew; medians, in turns."""
    runner = drafter._runner
    assert isinstance(runner, CudaRunner)
    out = {}
    for bucket, graph in sorted(runner._buckets.items()):
        launched = runner._ort.RunOptions()
        launched.add_run_config_entry("gpu_graph_id", "-1")  # ONNX Runtime's word for: neither capture nor replay
        ways = {"captured": graph, "uncaptured": replace(graph, run_options=launched)}
        took: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, chosen in ways.items():
                runner._buckets[bucket] = chosen
                begin = perf_counter()
                runner.run(bucket, 64, None, upload_features=False)
                took[way].append((perf_counter() - begin) * 1e3)
        runner._buckets[bucket] = graph
        out[str(bucket)] = {way: round(median(times), 4) for way, times in took.items()}
    return out


def bytes_of_a_round(drafter: OnnxDrafter, feature_size: int) -> int:
    """Moved both ways by one tree of 16 nodes and the pairs it may give."""
    drafter.rewind(SEQ, 0)
    drafter.extend(SEQ, np.zeros(PAIRS, np.int64), np.zeros((PAIRS, feature_size), np.float32))
    before = drafter.report.bus_bytes
    drafter.propose(SEQ, TreeLimits(width=16, depth=6, top_k=min(4, drafter.top_k), lookup=0))
    drafter.extend(SEQ, np.zeros(PAIRS, np.int64), np.zeros((PAIRS, feature_size), np.float32))
    return drafter.report.bus_bytes - before


def used_vram_mb() -> int | None:
    """What nvidia-smi says that this process holds; None where it says nothing."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]) is None:
        return None
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return next((int(row[1]) for row in rows if row[0] == str(os.getpid()) and row[1].isdigit()), None)


def gpu_facts() -> dict[str, str | None]:
    """The GPU that CUDA sees first and its driver; None for what nobody tells."""
    listed, newest = nvidia_gpus(), driver_cuda()
    return {
        "name": gpu_name(),
        "listed": "; ".join(f"{gpu.name}, {gpu.memory}" for gpu in listed) or None,
        "driver": listed[0].driver if listed else None,
        "driver_cuda": f"{newest[0]}.{newest[1]}" if newest else None,
        "built_for_cuda": cuda_build(),
    }


def commit() -> str | None:
    """The commit of this clone, with "-dirty" where files differ from it; None outside a clone."""
    if shutil.which("git") is None:
        return None
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def report(open_drafter: Callable[[], OnnxDrafter], feature_size: int) -> dict[str, Any]:
    """All of it, as JSON."""
    drafter = open_drafter()
    return {
        "device": drafter.device,
        "max_context": drafter.capacity,
        "call_ms": latencies(drafter),
        "bytes_per_round": bytes_of_a_round(drafter, feature_size),
        "vram_mb": used_vram_mb(),
        "gpu": gpu_facts(),
        "commit": commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def block(found: dict[str, Any]) -> str:
    """Return the report as Markdown to paste: facts, then a row for each bucket. It names no path."""
    gpu, machine_facts, unknown = found["gpu"], found["machine"], "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    used = unknown if found["vram_mb"] is None else f"{found['vram_mb']} MiB"
    facts = {
        "pair": found["pair"],
        "drafter": f"{found['device']}, context of {found['max_context']}",
        "GPU": f"{gpu['name'] or unknown} (nvidia-smi: {gpu['listed'] or unknown})",
        "driver": f"{gpu['driver'] or unknown}, supports CUDA {gpu['driver_cuda'] or unknown}",
        "ONNX Runtime built for": f"CUDA {gpu['built_for_cuda'] or unknown}",
        "commit": found["commit"] or unknown,
        "versions": versions,
        "CPU": "{cpu}, {cores} cores, {usable_threads} usable threads, {ram_mb} MiB".format(**machine_facts),
        "system": machine_facts["os"],
        "VRAM": f"{used} by nvidia-smi, limit {found['vram_limit_mb']} MiB",
        "bytes of a round on the bus": found["bytes_per_round"],
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    calls = [f"| {rows} | {ms['captured']} | {ms['uncaptured']} |" for rows, ms in found["call_ms"].items()]
    table = ["| rows of a call | captured, ms | launched anew, ms |", "|---:|---:|---:|", *calls]
    return "\n".join(["| fact | value |", "|---|---|", *rows, "", *table])


@click.command()
@click.argument("pair", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--vram", default="3GB", show_default=True, help="Memory that the drafter may take.")
def main(pair: Path, vram: str) -> None:
    """Measure the drafter of PAIR on the GPU."""
    try:
        manifest = read_sound(pair)
        limit = parse_size(vram)
        found = report(lambda: open_drafter(pair, manifest, device="cuda", vram=limit), manifest.target.feature_size)
    except DovetailError as error:
        sys.exit(fail(str(error), error.exit_code))
    found = {"pair": manifest.name, "vram_limit_mb": limit >> 20, **found}
    click.echo(json.dumps(found, indent=1))
    click.echo(f"\nPaste into a report:\n\n{block(found)}", err=True)


if __name__ == "__main__":
    main()
