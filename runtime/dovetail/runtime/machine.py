"""What this machine is: CPU, memory, system, versions.

Standard library only, and nothing is measured by running it, but for `memory_bandwidth`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
TOPOLOGY = Path("/sys/devices/system/cpu")

# What makes INT8 passes quick, newest first within each family; names as in /proc/cpuinfo.
INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "sve", "sve2",
)  # fmt: skip
INT8_SETS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})

PACKAGES = ("dovetail-spec", "openvino", "onnxruntime-gpu", "onnxruntime", "tokenizers", "numpy")

COPIED_BYTES = 128 << 20  # with its copy more than the caches of nearly all machines hold
COPIES = 5


@dataclass(frozen=True)
class Cpu:
    """cores: physical; threads: logical; usable: logical ones this process may run on."""

    model: str
    cores: int
    threads: int
    usable: int
    instruction_sets: tuple[str, ...]


def cpu(cpuinfo: Path = CPUINFO) -> Cpu:
    """The CPU as the system describes it; unknown facts are "unknown" or the logical count."""
    entries = list(_cpu_entries(cpuinfo))
    threads = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    physical = {
        (entry["physical id"], entry["core id"]) for entry in entries if {"physical id", "core id"} <= set(entry)
    }
    first = entries[0] if entries else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    return Cpu(
        model=first.get("model name") or _cpu_name() or platform.machine() or "unknown",
        cores=len(physical) or threads,
        threads=threads,
        usable=usable,
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
    )


def physical_cores() -> int:
    """Physical cores this process may run on; hyper-threads of one core count once."""
    allowed = _allowed_cpus()
    cores = set()
    for cpu in allowed:
        try:
            cores.add((TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:  # no sysfs: containers, macOS
            return len(allowed)
    return max(1, len(cores))


def ram_mb() -> tuple[int, int]:
    """Total and available memory in MiB."""
    if MEMINFO.exists():
        rows = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        return int(rows["MemTotal"].split()[0]) // 1024, int(rows["MemAvailable"].split()[0]) // 1024
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return total, total


def memory_bandwidth() -> float:
    """GB/s between memory and all usable threads, reads and writes counted: the best of some copies.

    It takes some tenths of a second and 256 MiB.
    """
    import numpy as np

    threads = len(_allowed_cpus())
    targets, sources = (np.array_split(np.empty(COPIED_BYTES, np.uint8), threads) for _ in range(2))
    times = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), sources))  # memory is had, and near a CPU, once it is written
        for _ in range(COPIES):
            begin = perf_counter()
            list(pool.map(np.copyto, targets, sources))  # other threads run meanwhile
            times.append(perf_counter() - begin)
    return 2 * COPIED_BYTES / min(times) / 1e9


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in MiB (mapped weights included)."""
    if STATUS.exists():
        rows = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in rows:
            return round(int(rows["VmHWM"].split()[0]) / 1024, 1)
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)


def versions() -> dict[str, str]:
    """Python's version and that of every package of PACKAGES that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, object]:
    """The machine for a report: {"cpu", "cores", "threads", "ram_mb", "os"}."""
    facts = cpu()
    return {
        "cpu": facts.model,
        "cores": facts.cores,
        "threads": facts.threads,
        "usable_threads": facts.usable,
        "instruction_sets": list(facts.instruction_sets),
        "ram_mb": ram_mb()[0],
        "os": platform.platform(),
    }


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_entries(cpuinfo: Path) -> Iterator[dict[str, str]]:
    if not cpuinfo.exists():
        return
    for block in cpuinfo.read_text().split("\n\n"):
        rows = [line.partition(":") for line in block.splitlines() if ":" in line]
        if rows:
            yield {key.strip(): value.strip() for key, _, value in rows}


def _cpu_name() -> str:
    if sys.platform != "darwin":
        return platform.processor()
    done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
