"""Estimate a pair's memory and speed here from sizes, memory bandwidth and measured costs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.runtime.doctor.memory import estimate_memory
from dovetail.runtime.drafter.vram import plan_pair
from dovetail.runtime.errors import DeviceError, IntegrityError, PairError
from dovetail.runtime.pair.check import check_pair
from dovetail.runtime.pair.known import REFERENCE_PAIRS, pairs_dir, resolve_pair
from dovetail.runtime.pair.layout import MANIFEST_NAME, TARGET_WEIGHTS
from dovetail.runtime.pair.manifest import Manifest, read_manifest
from dovetail.runtime.policy.choose import widths
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.tune.cost_cache import properties_line, recall_default, target_properties

RUNTIMES_MB = 150.0  # Python, both engines and a tokenizer; an allowance, not a measurement
CONTEXT = 128  # context in tokens for the estimated speed


@dataclass(frozen=True)
class Ram:
    """An estimate of RAM from sizes."""

    parts_mb: dict[str, float]  # weights as stored, KV at the full context, also of a drafter on the CPU
    needed_mb: float
    available_mb: int
    fits: bool  # with the full context
    context: int  # tokens that fit, 0 if the weights do not fit

    def __str__(self) -> str:
        sizes = " + ".join(f"{size} {part.replace('_', ' ')}" for part, size in self.parts_mb.items())
        return f"about {sizes} = {self.needed_mb} MiB (an estimate), {self.available_mb} MiB are free"


@dataclass(frozen=True)
class Vram:
    """An estimate of the drafter's GPU memory."""

    plan: dict[str, float | int] | None  # sizes in MiB; None without a plan within --vram
    fits: bool | None  # None if the free VRAM or the plan is unknown
    said: str  # the arithmetic and the conclusion


@dataclass(frozen=True)
class Tree:
    """The tree that pays first: above this acceptance length its rounds beat plain decoding."""

    width: int
    verify_ms: float  # of a round
    draft_ms: float  # of a round, with one call of the drafter per level, or one for a block
    acceptance_length: float


@dataclass(frozen=True)
class Speed:
    """The speed of plain decoding, measured or bound by the memory's bandwidth."""

    plain_tokens_per_s: float
    measured: str | None = None  # date of the measurement, ISO 8601
    tree: Tree | None = None


@dataclass(frozen=True)
class PairEstimate:
    """The estimate for one pair."""

    folder: str
    name: str
    drafter_device: str | None  # None without a drafter
    ram: Ram
    vram: Vram | None  # None without a graph for a GPU
    speed: Speed
    properties: dict[str, Any]  # see target_properties
    problem: str | None  # why the pair cannot run here
    notes: tuple[str, ...]  # other facts and their cost


def find_pair(named: str) -> tuple[Path, Manifest]:
    """Return folder and manifest of an existing pair. Nothing is built, no digest computed.

    Raises InputError for an unknown name, PairError.
    """
    built = Path(named).is_dir() or (pairs_dir() / named / MANIFEST_NAME).is_file()
    if named in REFERENCE_PAIRS and not built:
        raise PairError(f"pair {named} is not built yet: dovetail-export pair {named} builds it")
    folder = resolve_pair(named)
    manifest = read_manifest(folder)
    check_pair(manifest)
    if TARGET_WEIGHTS not in manifest.files:
        raise IntegrityError(f"{TARGET_WEIGHTS} has no digest in {MANIFEST_NAME}: export the pair again")
    return folder, manifest


def estimate_pair(
    folder: Path,
    manifest: Manifest,
    *,
    available_mb: int,
    bandwidth: float,
    free_vram_mb: int | None,
    vram: int | None,
    other_gpu: str | None = None,
) -> PairEstimate:
    """Return the estimate for a pair.

    bandwidth: GB/s. free_vram_mb: None without CUDA. vram: bytes, None for the pair's own limit.
    other_gpu: a way to a GPU that works; it takes a drafter that does not run on CUDA.
    """
    video = estimate_vram(manifest, free_vram_mb, vram)
    device = None if manifest.drafter is None else "cpu"
    if video and video.fits and free_vram_mb is not None:
        device = "cuda"
    elif device and other_gpu:
        device = other_gpu
    ram = estimate_ram(folder, manifest, device, available_mb)
    speed = estimate_speed(manifest, device, bandwidth)
    problem = (
        None if ram.context else f"the pair {manifest.name} does not fit: {ram}: free memory or take a smaller pair"
    )
    properties = target_properties(manifest)
    notes = []
    if 0 < ram.context < manifest.target.max_context:
        notes.append(f"The context has {manifest.target.max_context} tokens; about {ram.context} fit the free memory.")
    if device == "cpu" and speed.tree:
        tree = speed.tree
        share = tree.draft_ms / (tree.draft_ms + tree.verify_ms)
        notes.append(
            f"Drafting {tree.width} nodes on the CPU takes {tree.draft_ms:.1f} ms, {share:.0%} of a round. The target "
            "waits meanwhile. A GPU could shorten the wait."
        )
    return PairEstimate(str(folder), manifest.name, device, ram, video, speed, properties, problem, tuple(notes))


def estimate_ram(folder: Path, manifest: Manifest, device: str | None, available_mb: int) -> Ram:
    """Return the RAM estimate. device: the drafter's, if any. On a GPU it takes little RAM."""
    sizes = estimate_memory(folder, manifest)
    names = {"target": "target_weights_mb", "target_kv": "target_kv_mb"}
    if device == "cpu":
        names |= {"drafter": "drafter_cpu_weights_mb", "drafter_kv": "drafter_cpu_kv_mb"}
    parts = {part: size for part, name in names.items() if (size := sizes[name]) is not None}
    parts["runtimes"] = RUNTIMES_MB
    needed, most = sum(parts.values()), manifest.target.max_context
    if needed <= available_mb:
        return Ram(parts, round(needed, 1), available_mb, True, most)
    kv = parts.get("target_kv", 0.0) + parts.get("drafter_kv", 0.0)
    room = max(0.0, available_mb - (needed - kv))
    return Ram(parts, round(needed, 1), available_mb, False, int(most * room / kv) if room else 0)


def estimate_vram(manifest: Manifest, free_mb: int | None, limit: int | None, *, where: str = "free") -> Vram | None:
    """Return the VRAM estimate, or None without a drafter for a GPU.

    free_mb: without this process's CUDA context. The plan counts it again, on the safe side.
    where: what these MiB are, for the sentence.
    """
    if manifest.drafter is None or "cuda" not in manifest.drafter.files:
        return None
    try:
        plan = plan_pair(manifest, limit, fit=False)
    except DeviceError as error:
        known = bool(manifest.drafter.workspace)
        return Vram(None, False if known else None, f"{error}; otherwise the drafter runs on the CPU")
    within = f", within --vram of {limit >> 20} MiB" if limit else ""
    if free_mb is None:
        return Vram(plan.as_dict(), True if limit else None, f"would take {plan}{within}")
    fits = plan.total <= free_mb << 20
    conclusion = "it fits" if fits else "the drafter may have to run on the CPU"
    return Vram(plan.as_dict(), fits, f"takes {plan}{within}; {free_mb} MiB are {where}: {conclusion}")


def estimate_speed(manifest: Manifest, device: str | None, bandwidth: float) -> Speed:
    """Return the speed from costs measured with default flags, else plain decoding's bound."""
    known = recall_default(manifest, device)
    if known is None:
        return Speed(round(bandwidth * 1e9 / manifest.files[TARGET_WEIGHTS].size, 1))
    return measured_speed(known.costs, known.date, manifest)


def measured_speed(costs: Costs, date: str, manifest: Manifest) -> Speed:
    """Return the speed from costs. date: of the measurement, ISO 8601."""
    target, limits = costs.target, manifest.tree
    plain_ms, call_ms = target.at(CONTEXT, 1), costs.call_ms(CONTEXT, limits.top_k)
    most = 1 if manifest.drafter and manifest.drafter.positions else limits.depth  # calls
    rounds = {  # a tree of `width` nodes has at most width - 1 levels
        width: (target.at(CONTEXT, width), min(most, width - 1) * call_ms)
        for width in widths(costs, CONTEXT)
        if width > 1
    }
    width, (verify_ms, draft_ms) = min(rounds.items(), key=lambda item: sum(item[1]))
    tree = Tree(width, round(verify_ms, 2), round(draft_ms, 2), round((verify_ms + draft_ms) / plain_ms, 2))
    return Speed(round(1e3 / plain_ms, 1), date, tree)


def tune_command(folder: str) -> str:
    """Return the command that measures a pair's costs."""
    return shlex.join(["dovetail-run", "tune", folder])


def rows(pair: PairEstimate) -> list[tuple[str, str]]:
    """Return names and facts for display."""
    speed, tree = pair.speed, pair.speed.tree
    if speed.measured:
        said = f"plain decoding {speed.plain_tokens_per_s:.1f} tokens/s, as measured here on {speed.measured[:10]}"
    else:
        said = f"plain decoding at most about {speed.plain_tokens_per_s:.0f} tokens/s, an estimate: bandwidth / weights"
        said += f"; {tune_command(pair.folder)} measures it"
    trees = "not measured"
    if tree:
        trees = (
            f"faster than plain decoding above an acceptance length of {tree.acceptance_length} ({tree.width} nodes: "
            f"verify {tree.verify_ms:.1f} ms, draft {tree.draft_ms:.1f} ms)"
        )
    some = f"{pair.ram.context} tokens of context fit" if pair.ram.context else "it does not fit"
    fits = "it fits" if pair.ram.fits else some
    return [
        ("pair", f"{pair.name} ({pair.folder})"),
        ("RAM needed", f"{pair.ram}: {fits}"),
        ("VRAM needed", pair.vram.said if pair.vram else "none: the pair has no drafter for a GPU"),
        ("properties", properties_line(pair.properties)),
        ("speed", said),
        ("trees", trees),
    ]
