"""Threads and memory follow what a container, the affinity mask and the kinds of cores leave; files are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.runtime.doctor.diagnose import notes
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.runners.cpu import CpuRunner
from dovetail.runtime.pair.manifest import DrafterFacts, read_manifest
from dovetail.runtime.system import machine
from dovetail.runtime.target.openvino import OpenVINOTarget

V2 = {"proc/self/mountinfo": "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"}
V1 = {
    "proc/self/mountinfo": (
        "33 31 0:29 /docker/1f /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "36 31 0:32 /docker/1f /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
    ),
    "proc/self/cgroup": "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n",
}
MEMINFO = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1024 kB\nMemAvailable:    8388608 kB\n"}
MIB = 2**20


def tree(folder: Path, *parts: dict[str, str]) -> Path:
    """A root folder with these files."""
    for name, text in {name: text for part in parts for name, text in part.items()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def cores(*siblings: str) -> dict[str, str]:
    """The topology of as many logical CPUs: which are hyper-threads of one core."""
    base = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {base.format(number): f"{text}\n" for number, text in enumerate(siblings)}


def v2(group: str, **files: str) -> dict[str, str]:
    """A group of version 2 that this process is in."""
    inner = f"sys/fs/cgroup{group.rstrip('/')}/"
    return {**V2, "proc/self/cgroup": f"0::{group}\n", **{inner + n.replace("_", ".", 1): t for n, t in files.items()}}


@pytest.mark.parametrize(
    ("quota", "threads"), [("50000", 1), ("100000", 1), ("150000", 2), ("250000", 3), ("400000", 4), ("900000", 4)]
)
@pytest.mark.parametrize("version", [1, 2])
def test_threads_keep_to_the_quota(tmp_path: Path, version: int, quota: str, threads: int) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/"
    if version == 1:
        limit = V1 | {folder + "cpu.cfs_quota_us": f"{quota}\n", folder + "cpu.cfs_period_us": "100000\n"}
    else:
        limit = v2("/", cpu_max=f"{quota} 100000\n")
    root = tree(tmp_path, limit, cores(*"0123"))
    assert machine.usable_cores(root, range(4)) == threads
    assert machine.quota_threads(root, range(4)) == (threads if threads < 4 else None)
    assert machine.cpu_quota(root) == int(quota) / 1e5


@pytest.mark.parametrize(
    "files",
    [
        {},
        v2("/", cpu_max="max 100000\n"),
        v2("/user.slice"),
        V1 | {f"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_{n}_us": text for n, text in (("quota", "-1"), ("period", "100000"))},
        {**V2, "proc/self/cgroup": "0::/../outside\n"},
    ],
    ids=["no cgroups", "max", "no controller", "-1", "a group outside the mount"],
)
def test_without_a_quota_all_cores_count(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files, cores(*"0123"))
    assert (machine.cpu_quota(root), machine.usable_cores(root, range(4))) == (None, 4)


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = tree(tmp_path, v2("/kube/pod/box", cpu_max="max 100000\n"), MEMINFO)
    tree(root, {"sys/fs/cgroup/kube/pod/cpu.max": "200000 100000\n", "sys/fs/cgroup/kube/cpu.max": "800000 100000\n"})
    tree(root, {"sys/fs/cgroup/kube/memory.max": f"{512 * MIB}\n", "sys/fs/cgroup/kube/memory.current": "0\n"})
    assert machine.cpu_quota(root) == 2.0
    assert machine.ram_mb(root) == (512, 512)


def test_a_mounted_group_is_found_by_its_path_outside_the_container(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/"
    limit = {folder + "memory.limit_in_bytes": f"{512 * MIB}\n", folder + "memory.usage_in_bytes": f"{400 * MIB}\n"}
    stat = {folder + "memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\n"}
    assert machine.ram_mb(tree(tmp_path, V1, MEMINFO, limit, stat)) == (512, 212)


def test_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    stat = f"anon 7\ninactive_file {300 * MIB}\n"
    limit = v2("/", memory_max=f"{1024 * MIB}\n", memory_current=f"{900 * MIB}\n", memory_stat=stat)
    assert machine.ram_mb(tree(tmp_path, MEMINFO, limit)) == (1024, 424)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
def test_memory_without_a_limit_is_the_machines(tmp_path: Path, limit: str) -> None:
    root = tree(tmp_path, MEMINFO, v2("/", memory_max=f"{limit}\n", memory_current="5\n"))
    assert machine.ram_mb(root) == (16384, 8192)


def test_hyper_threads_of_one_core_and_cpus_outside_the_mask_do_not_count(tmp_path: Path) -> None:
    root = tree(tmp_path, cores("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"))
    assert machine.usable_cores(root, range(8)) == 4
    assert machine.usable_cores(root, {0, 4, 5}) == 2
    assert machine.usable_cores(tmp_path / "no sysfs", {0, 4, 5}) == 3


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [(range(12), 4), ({8, 9, 10, 11}, 4), ({0, 1, 8, 9}, 1), ({0, 8, 9, 10}, 4)],
    ids=["all", "efficiency alone", "two for a core", "three for a core"],
)
def test_efficiency_cores_would_be_waited_for(tmp_path: Path, allowed: set[int], expected: int) -> None:
    """Four performance cores with two threads each, and four efficiency cores."""
    topology = cores("0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7", *map(str, range(8, 12)))
    kinds = {"sys/devices/cpu_core/cpus": "0-7\n", "sys/devices/cpu_atom/cpus": "8,9-11\n"}
    assert machine.usable_cores(tree(tmp_path, topology, kinds), allowed) == expected


def test_the_machine_of_this_process_is_described_within_its_limits(tmp_path: Path) -> None:
    facts = machine.cpu(root=tree(tmp_path, v2("/", cpu_max="50000 100000\n")))
    assert (facts.usable, facts.quota) == (1, 0.5)
    (said,) = (note for note in notes(replace(facts, threads=4), 8192, None) if "may use" in note)
    assert said.startswith("This process may use 0.5 of 4 hardware threads")


@pytest.mark.parametrize(
    ("config", "pinned"), [({}, False), ({"ENABLE_CPU_PINNING": "YES"}, True)], ids=["default", "the user's choice"]
)
def test_the_target_runs_as_many_threads_as_the_quota_allows(
    tiny_pair: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, str], pinned: bool
) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda root: 0.5)
    monkeypatch.setattr(machine, "_quick_cores", lambda root, allowed: 2)
    compiled = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), ov_config=config).model.compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is pinned


def test_the_drafter_runs_as_many_threads_as_the_quota_allows(
    tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda root: 1.5)
    monkeypatch.setattr(machine, "_quick_cores", lambda root, allowed: 4)
    given: list[int] = []
    monkeypatch.setattr(opening, "CpuRunner", spied(given))
    open_drafter(tiny_full_pair, read_manifest(tiny_full_pair), device="cpu")
    open_drafter(tiny_full_pair, read_manifest(tiny_full_pair), device="cpu", threads=3)
    assert given == [2, 3]


def spied(given: list[int]) -> type[CpuRunner]:
    """CpuRunner, whose sessions add their number of threads to `given`."""

    class Spied(CpuRunner):
        def __init__(self, file: Path, facts: DrafterFacts, threads: int, pairs: int | None = None):
            super().__init__(file, facts, threads, pairs)
            given.append(self._session.get_session_options().intra_op_num_threads)

    return Spied


def test_openvino_keeps_to_the_affinity_mask(tiny_pair: Path) -> None:
    script = (
        "import json, os; from pathlib import Path; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from dovetail.runtime.system import machine; from dovetail.runtime.target.paged import PagedModel;"
        f"model = PagedModel(Path({str(tiny_pair / 'target/openvino_model.xml')!r}));"
        "print(json.dumps([model.compiled.get_property('INFERENCE_NUM_THREADS'), machine.usable_cores()]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [1, 1]
