"""Measured costs in the cache: one file for each combination of target, drafter and machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dovetail.runtime.devices.cuda import driver_cuda, gpu_name
from dovetail.runtime.devices.openvino import chosen_gpu, gpu_facts
from dovetail.runtime.devices.webgpu import adapter_name, plugin_version
from dovetail.runtime.drafter.runners.cpu import SPIN_US
from dovetail.runtime.errors import InputError, ManifestError
from dovetail.runtime.pair.files import cache_file, write_cache
from dovetail.runtime.pair.layout import TARGET_WEIGHTS
from dovetail.runtime.pair.manifest import Manifest, parse_record
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.system import machine as here
from dovetail.runtime.target.layers.choose import own_layers
from dovetail.runtime.target.properties import default_properties, kv_properties

CHOOSABLE = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")  # properties that `tune` may choose


@dataclass(frozen=True)
class CostKey:
    """Everything that costs depend on. If one fact differs, Dovetail measures again."""

    target: str  # digest of the weights
    drafter: str  # digests of graph and weights
    device: str | None  # of the drafter, "cpu" or one of GPUS; "model" for a draft model; None without a drafter
    threads: int | None  # the user's number, None for the engines' choice
    cpu: str
    usable_threads: int  # threads that this process may run on
    openvino: str
    onnxruntime: str
    ov_config: Mapping[str, str] = field(default_factory=dict)  # the target's properties: defaults, chosen, given
    exact: bool = True  # whether a plain pass computes two rows
    spin_us: int = SPIN_US  # how long the drafter's threads wait for work
    gpu: str | None = None  # the drafter's: name, and versions of what it runs on
    layers: str | None = None  # of the target that run elsewhere: how many, and on what; None if none does

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        device: str | None,
        threads: int | None,
        ov_config: Mapping[str, str] | None = None,
        exact: bool = True,
        draft_model: Manifest | None = None,
        layers: tuple[int, str] | None = None,
    ) -> CostKey:
        """Return a pair's key on this machine. The pair must have file digests.

        draft_model: of the pair whose target drafts; `device` is then "model". layers: see OpenVINOTarget.
        """
        cpu, versions = here.cpu(), here.versions()
        drafter = ""
        if draft_model:
            drafter = f"{draft_model.files[TARGET_WEIGHTS].sha256}, {draft_model.target.max_context} tokens"
        elif device:
            drafter = "".join(entry.sha256 for entry in manifest.drafter_files("cuda" if device == "cuda" else "cpu"))
        return cls(
            target=manifest.files[TARGET_WEIGHTS].sha256,
            drafter=drafter,
            device=device,
            threads=threads,
            cpu=cpu.model,
            usable_threads=cpu.usable,
            openvino=versions.get("openvino", "unknown"),
            onnxruntime=versions.get("onnxruntime-gpu") or versions.get("onnxruntime", "unknown"),
            ov_config={**default_properties(), **chosen_properties(manifest, threads), **(ov_config or {})},
            exact=exact,
            gpu=_gpu(device),
            layers=f"{layers[0]} on {_gpu(layers[1]) or layers[1]}" if layers else None,
        )

    @property
    def file(self) -> Path:
        facts = asdict(self)
        for name in ("gpu", "layers"):  # the names of files without them are older than these facts
            if facts[name] is None:
                del facts[name]
        return cache_file("costs", json.dumps(facts, sort_keys=True))


def _gpu(device: str | None) -> str | None:
    if device == "cuda":
        return f"{gpu_name()}, {driver_cuda()}"
    if device == "webgpu":
        return f"{adapter_name()}, plugin {plugin_version()}"
    return gpu_facts(chosen_gpu()) if device == "openvino-gpu" else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Measured:
    """Costs, and the circumstances of their measurement for display."""

    pair: str
    key: CostKey
    costs: Costs
    seconds: float  # duration of the measurement
    date: str = field(default_factory=_now)  # ISO 8601, UTC
    machine: Mapping[str, Any] = field(default_factory=here.describe)
    versions: Mapping[str, str] = field(default_factory=here.versions)
    rows_apart: float = 0.0  # largest difference in logits between rows that exact text needs equal, 0 if they are

    def store(self) -> None:
        """Write the costs to the cache atomically, in place of older costs. Raises OSError."""
        write_cache(self.key.file, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Chosen:
    """The quickest OpenVINO properties that `tune` found among those that keep rows equal."""

    properties: Mapping[str, str]  # replacements for defaults, empty if none is quicker
    speedup: float  # of passes, over the defaults
    date: str = field(default_factory=_now)

    def store(self, manifest: Manifest, threads: int | None) -> None:
        """Write the choice for this target on this machine to the cache. Raises OSError."""
        write_cache(_choice_file(manifest, threads), json.dumps(asdict(self), indent=1) + "\n")


def recall_choice(manifest: Manifest, threads: int | None) -> Chosen | None:
    """Return the choice of `tune` for this target on this machine. None without a valid file."""
    try:
        raw = json.loads(_choice_file(manifest, threads).read_text(encoding="utf-8"))
        chosen = parse_record(Chosen, raw, "choice")
    except (OSError, ValueError, RecursionError, ManifestError):
        return None
    return chosen if {*chosen.properties} <= {*CHOOSABLE} else None


def chosen_properties(manifest: Manifest, threads: int | None) -> dict[str, str]:
    """Return the properties that replace defaults when this target is opened here."""
    chosen = recall_choice(manifest, threads)
    return dict(chosen.properties) if chosen else {}


def target_properties(
    manifest: Manifest, threads: int | None = None, given: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the target's OpenVINO properties on this machine as JSON, for display.

    set: all properties by name. chosen: the choice of `tune`, None without one. given: properties
    from --ov-config.
    """
    chosen, own = recall_choice(manifest, threads), given or {}
    return {
        "set": {**default_properties(), **(chosen.properties if chosen else {}), **own, **kv_properties(own)},
        "chosen": asdict(chosen) if chosen else None,
        "given": dict(own),
    }


def properties_line(properties: Mapping[str, Any]) -> str:
    """Return `target_properties` as one line for display."""
    named = ", ".join(f"{name}={value}" for name, value in properties["set"].items())
    chosen = properties["chosen"]
    if properties["given"]:
        return f"{named}; with --ov-config"
    if not chosen:
        return f"{named}; the defaults (dovetail-run tune looks for better ones)"
    if not chosen["properties"]:
        kept = "the defaults", "no other that keeps rows equal is surely quicker"
    else:
        kept = "them", f"passes {chosen['speedup']:.2f}x as fast"
    return f"{named}; tune chose {kept[0]} on {chosen['date'][:10]}: {kept[1]}"


def _choice_file(manifest: Manifest, threads: int | None) -> Path:
    cpu = here.cpu()
    weights = manifest.files[TARGET_WEIGHTS].sha256 if TARGET_WEIGHTS in manifest.files else manifest.name
    facts = [weights, threads, cpu.model, cpu.usable, list(cpu.instruction_sets), here.versions().get("openvino")]
    return cache_file("properties", json.dumps(facts))


def recall_default(manifest: Manifest, device: str | None) -> Measured | None:
    """Return the costs measured with default flags and this device of the drafter, or None.

    If the pair's own number of layers does not open on the GPU, costs of all layers on the CPU hold.
    """
    layers = own_layers(manifest.target.gpu_layers)
    kept = (recall(CostKey.of(manifest, device, None, layers=each)) for each in dict.fromkeys((layers, None)))
    return next(filter(None, kept), None)


def recall(key: CostKey) -> Measured | None:
    """Return the measured costs of `key`, or None without a valid file."""
    try:
        measured = parse_record(Measured, json.loads(key.file.read_text(encoding="utf-8")), "costs")
    except (OSError, ValueError, RecursionError, ManifestError, InputError):
        return None
    return measured if measured.key == key else None
