"""Measured costs, kept in the cache: one file for each target, drafter and machine they were measured with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from dovetail.runtime.drafter.cpu import SPIN_US
from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.manifest import Manifest, cache_dir, write_atomically
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.system import machine as here
from dovetail.runtime.target.paged import default_properties

WEIGHTS = "target/openvino_model.bin"
CHOOSABLE = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")  # properties that `tune` may choose


@dataclass(frozen=True)
class CostKey:
    """What costs depend on; where one of these differs they are measured anew.

    target: digest of its weights.  drafter: digests of its graph and weights.  device: of the drafter's file, "cuda"
    or "cpu".  threads: as asked for, None for the engines' choice.  usable_threads: those this process may run on.
    ov_config: properties of OpenVINO for the target: the defaults, those that were chosen, those that were asked for.
    exact: whether a plain pass computes two rows.  spin_us: how long the drafter's threads wait for work.
    """

    target: str
    drafter: str
    device: str
    threads: int | None
    cpu: str
    usable_threads: int
    openvino: str
    onnxruntime: str
    ov_config: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    spin_us: int = SPIN_US

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        device: str,
        threads: int | None,
        ov_config: Mapping[str, str] | None = None,
        exact: bool = True,
    ) -> CostKey:
        """The key of a pair, which must have a drafter and digests of its files, on this machine."""
        assert manifest.drafter is not None
        cpu, versions = here.cpu(), here.versions()
        return cls(
            target=manifest.files[WEIGHTS].sha256,
            drafter="".join(entry.sha256 for entry in manifest.drafter_files(device)),
            device=device,
            threads=threads,
            cpu=cpu.model,
            usable_threads=cpu.usable,
            openvino=versions.get("openvino", "unknown"),
            onnxruntime=versions.get("onnxruntime-gpu") or versions.get("onnxruntime", "unknown"),
            ov_config={**default_properties(), **chosen_properties(manifest, threads), **(ov_config or {})},
            exact=exact,
        )

    @property
    def file(self) -> Path:
        """Where its costs are kept."""
        digest = sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_dir() / "costs" / f"{digest}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Measured:
    """Costs, and for people what they were measured on.  seconds: what it took.  date: ISO 8601, UTC."""

    pair: str
    key: CostKey
    costs: Costs
    seconds: float
    date: str = field(default_factory=_now)
    machine: Mapping[str, Any] = field(default_factory=here.describe)
    versions: Mapping[str, str] = field(default_factory=here.versions)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "costs": self.costs.as_dict()}

    def store(self) -> None:
        """Keep it in place of what is there, whole or not at all.  Raises OSError."""
        self.key.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.key.file, (json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True)
class Chosen:
    """Properties of OpenVINO that `tune` found to be the quickest of those that keep rows equal.

    properties: what is set in place of the defaults; empty if none is quicker.  speedup: of passes, over the defaults.
    """

    properties: Mapping[str, str]
    speedup: float
    date: str = field(default_factory=_now)

    def store(self, manifest: Manifest, threads: int | None) -> None:
        """Keep it for this target on this machine.  Raises OSError."""
        file = _choice_file(manifest, threads)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(asdict(self), indent=1) + "\n").encode())


def recall_choice(manifest: Manifest, threads: int | None) -> Chosen | None:
    """What `tune` chose for this target on this machine; None for nothing, or for a file that says something else."""
    try:
        raw = json.loads(_choice_file(manifest, threads).read_text(encoding="utf-8"))
        properties = {str(name): str(value) for name, value in raw["properties"].items()}
        if not {*properties} <= {*CHOOSABLE}:
            return None
        return Chosen(properties, float(raw["speedup"]), str(raw["date"]))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def chosen_properties(manifest: Manifest, threads: int | None) -> dict[str, str]:
    """The properties that this target is opened with here beside the defaults."""
    chosen = recall_choice(manifest, threads)
    return dict(chosen.properties) if chosen else {}


def _choice_file(manifest: Manifest, threads: int | None) -> Path:
    cpu = here.cpu()
    weights = manifest.files[WEIGHTS].sha256 if WEIGHTS in manifest.files else manifest.name
    facts = [weights, threads, cpu.model, cpu.usable, list(cpu.instruction_sets), here.versions().get("openvino")]
    return cache_dir() / "properties" / f"{sha256(json.dumps(facts).encode()).hexdigest()}.json"


def recall(key: CostKey) -> Measured | None:
    """What was measured for `key`; None where that is nothing, or a file that says something else."""
    try:
        raw = json.loads(key.file.read_text(encoding="utf-8"))
        if raw["key"] != asdict(key):
            return None
        facts = (float(raw["seconds"]), str(raw["date"]), dict(raw["machine"]), dict(raw["versions"]))
        return Measured(str(raw["pair"]), key, Costs.from_dict(raw["costs"]), *facts)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, InputError):
        return None
