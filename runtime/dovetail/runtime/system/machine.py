"""Facts about this machine within the limits of its container: CPU, memory, system, versions.

This module needs only the standard library, except `memory_bandwidth`, which also measures. `root`
is the folder that holds `proc` and `sys`.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from time import perf_counter

ROOT = Path("/")
CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")

# Instruction sets that make INT8 passes quick, newest last within each family. Names as in
# /proc/cpuinfo.
INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "sve", "sve2",
)  # fmt: skip
INT8_SETS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})

PACKAGES = ("dovetail-spec", "openvino", "onnxruntime-gpu", "onnxruntime", "tokenizers", "numpy")

COPIED_BYTES = 128 << 20  # source and copy exceed the caches of nearly all machines
COPIES = 5


@dataclass(frozen=True)
class Cpu:
    """Facts about the CPU."""

    model: str
    cores: int  # physical cores
    threads: int  # logical CPUs
    usable: int  # logical CPUs that this process may keep busy
    instruction_sets: tuple[str, ...]
    quota: float | None = None  # number of CPUs whose time the container allows, None without a limit


def cpu(cpuinfo: Path = CPUINFO, root: Path = ROOT) -> Cpu:
    """Return the CPU as the system describes it. Cores default to the number of logical CPUs."""
    entries = list(_cpu_entries(cpuinfo))
    threads = os.cpu_count() or 1
    quota = cpu_quota(root)
    physical = {
        (entry["physical id"], entry["core id"]) for entry in entries if {"physical id", "core id"} <= set(entry)
    }
    first = entries[0] if entries else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    return Cpu(
        model=first.get("model name") or _cpu_name() or platform.machine() or "unknown",
        cores=len(physical) or threads,
        threads=threads,
        usable=_within(quota, len(_allowed_cpus())),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        quota=quota,
    )


def usable_cores(root: Path = ROOT, allowed: Collection[int] | None = None) -> int:
    """Return how many threads an engine should run: one for each usable core within the quota.

    allowed: logical CPUs, by default those of the affinity mask.
    """
    return _within(cpu_quota(root), _quick_cores(root, allowed))


def quota_threads(root: Path = ROOT, allowed: Collection[int] | None = None) -> int | None:
    """Return the threads that the quota allows, or None if the quota covers all usable cores."""
    threads = usable_cores(root, allowed)
    return threads if threads < _quick_cores(root, allowed) else None


def cpu_quota(root: Path) -> float | None:
    """Return how many CPUs' time the process's control groups allow, None without a limit."""
    quotas = []
    for folder in _control_groups("cpu", root):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # "max" and -1 are no limit
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def ram_mb(root: Path = ROOT) -> tuple[int, int]:
    """Return total and available memory in MiB, within this process's control groups."""
    rows = _table(root / "proc/meminfo")
    if rows:
        total, available = (int(rows[name].split()[0]) << 10 for name in ("MemTotal:", "MemAvailable:"))
    else:
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _control_groups("memory", root):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit and used and limit[0].isdecimal():  # "max" is no limit
            stat = _table(folder / "memory.stat")  # the system frees unused file pages on demand
            idle = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
            total = min(total, int(limit[0]))
            available = min(available, int(limit[0]) - max(0, int(used[0]) - idle))
    return total >> 20, max(0, available) >> 20


def memory_bandwidth() -> float:
    """Return GB/s between memory and all usable threads, reads and writes: the best of COPIES."""
    import numpy as np

    threads = cpu().usable
    targets, sources = (np.array_split(np.empty(COPIED_BYTES, np.uint8), threads) for _ in range(2))
    times = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), sources))  # Linux provides memory, near the CPU, at the first write
        for _ in range(COPIES):
            begin = perf_counter()
            list(pool.map(np.copyto, targets, sources))  # copyto releases the interpreter lock
            times.append(perf_counter() - begin)
    return 2 * COPIED_BYTES / min(times) / 1e9


def peak_rss_mb() -> float:
    """Return the most memory that this process has held so far, in MiB, mapped weights included."""
    for line in _lines(STATUS):
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages of PACKAGES."""
    return {"python": platform.python_version(), **package_versions(*PACKAGES)}


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of the installed packages among `packages`, without an import."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def describe() -> dict[str, object]:
    """Return the machine's facts for a report: CPU, cores, threads, instruction sets, RAM, OS."""
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


def _within(quota: float | None, threads: int) -> int:
    """Return how many of `threads` the quota allows. A part of a CPU counts as a whole one."""
    return threads if quota is None else max(1, min(threads, math.ceil(quota)))


def _quick_cores(root: Path, allowed: Collection[int] | None) -> int:
    """Return the number of physical cores in `allowed` that a pass should use.

    Efficiency cores are left out if there are at most two for each performance core, because a pass
    waits for its slowest thread. OpenVINO runs a language model on the same cores.
    """
    allowed = _allowed_cpus() if allowed is None else allowed
    cores: dict[str, int] = {}  # list of hyper-threads -> one logical CPU of the core
    for number in allowed:
        siblings = _words(root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores[siblings[0] if siblings else str(number)] = number  # some containers and macOS have no sysfs
    performance, efficiency = (
        set(cores.values()) & _cpu_list(root / f"sys/devices/{kind}/cpus") for kind in ("cpu_core", "cpu_atom")
    )
    return len(performance) if 0 < len(efficiency) <= 2 * len(performance) else max(1, len(cores))


def _control_groups(controller: str, root: Path) -> list[Path]:
    """Return the folders of this process's control groups, versions 1 and 2, inner groups first."""
    mounts: dict[str, tuple[str, Path]] = {}  # controller, "" for version 2 -> mounted group, mount point
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        if kind.startswith(("cgroup ", "cgroup2 ")):
            mounted, at = mount.split()[3:5]
            names = [""] if kind.startswith("cgroup2") else kind.split()[-1].split(",")
            mounts |= dict.fromkeys(names, (mounted, root / at.lstrip("/")))
    found: list[Path] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        for name in {"", controller} & mounts.keys() & set(controllers.split(",")):
            mounted, top = mounts[name]
            path = PurePosixPath(group)  # a container may see the host's path but a mount of its own group
            inner = path.relative_to(mounted).parts if path.is_relative_to(mounted) else ()
            found += [top.joinpath(*inner[:depth]) for depth in range(len(inner), -1, -1)]
    return found


def _lines(file: Path) -> list[str]:
    """Return the lines of a file, or [] if the system lacks the file."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _table(file: Path) -> dict[str, str]:
    """Return the file's lines "name value" as a dict."""
    return {name: value for name, _, value in (line.partition(" ") for line in _lines(file))}


def _cpu_list(file: Path) -> set[int]:
    """Return the logical CPUs of a list such as "0-3,8"."""
    ranges = (part.split("-") for words in _words(file) for part in words.split(","))
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_entries(cpuinfo: Path) -> Iterator[dict[str, str]]:
    for block in "\n".join(_lines(cpuinfo)).split("\n\n"):
        rows = [line.partition(":") for line in block.splitlines() if ":" in line]
        if rows:
            yield {key.strip(): value.strip() for key, _, value in rows}


def _cpu_name() -> str:
    if sys.platform != "darwin":
        return platform.processor()
    done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def mib(size: int) -> float:
    """Return `size` bytes in MiB, rounded for display."""
    return round(size / 2**20, 1)
