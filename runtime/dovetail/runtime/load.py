"""Open a pair folder: two sessions, a tokenizer and a policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dovetail.runtime.devices.gpus import GPUS, gpu_expected
from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.model import ModelDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import drafter_bytes, open_cpu, open_drafter
from dovetail.runtime.drafter.session import check_device
from dovetail.runtime.drafter.vram import check_draft_model, check_limit
from dovetail.runtime.errors import DeviceError, InputError, PairError
from dovetail.runtime.pair.check import read_sound
from dovetail.runtime.pair.layout import MANIFEST_NAME, TARGET, TARGET_GRAPH
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.policy.calibration import pair_calibration
from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.policy.estimates import check_slowdown
from dovetail.runtime.system.bounds import THREADS_MOST, check_whole
from dovetail.runtime.system.progress import Progress
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.layers.attention import LARGEST_TREE
from dovetail.runtime.target.layers.choose import FLAG, check_layers, layer_device, read_count, takes_layers
from dovetail.runtime.target.layers.plan import LayerPlan, fitting, plans
from dovetail.runtime.target.layers.take import TakeLayers
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.text.vocabularies import translation
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tune.cost_cache import CostKey, chosen_properties, recall
from dovetail.runtime.tune.measure import QUICK_CONTEXTS, known_or_measured

LEVEL_ROWS = 8  # of the call by which a GPU is compared with the CPU: a usual level of a tree

_ALL_HERE = "all layers of the target run on the CPU: %s"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """How to open a pair; see Engine.from_pretrained. Raises InputError."""

    drafter_device: str
    vram: int | None  # bytes
    fit: bool
    threads: int | None
    tree: TreeLimits | None
    ov_config: Mapping[str, str]
    exact: bool
    max_slowdown: float
    draft_model: str | Path | None = None
    slots: int = 1  # texts at a time
    kv_cache: int | None = None  # bytes for the KV of all texts; None for no limit
    gpu_layers: int | str | None = None  # of the target, or "auto"; None for the pair's own number

    def __post_init__(self) -> None:
        check_device(self.drafter_device)
        if self.threads is not None:
            check_whole("threads", self.threads, InputError, "give another number, or none", most=THREADS_MOST)
        if self.kv_cache is not None:
            check_whole("kv_cache", self.kv_cache, InputError, "give bytes, or e.g. 4GB", most=2**50)
        check_slowdown(self.max_slowdown)
        check_limit(self.vram, self.fit, self.drafter_device)
        check_layers(self.gpu_layers, self.drafter_device, self.vram)
        if not takes_layers(self.gpu_layers):  # else these flags are those of the layers
            check_draft_model(self.draft_model, self.drafter_device, self.vram)
        if self.draft_model is not None and not isinstance(self.draft_model, str | Path):
            raise InputError(f"draft model {self.draft_model!r:.80} is no path: give the folder of a pair")


@dataclass(frozen=True)
class Parts:
    """The parts of an engine. scheduler: None with fixed trees."""

    target: OpenVINOTarget
    drafter: FailoverDrafter | ModelDrafter | None
    tokenizer: Tokenizer
    tree: TreeLimits
    scheduler: Scheduler | None
    stop_tokens: frozenset[int]


def load(pair: Path, options: LoadOptions, progress: Progress) -> Parts:
    """Open a pair. Every file is checked before a weight is loaded.

    progress: of a measurement. Raises PairError, DeviceError, InputError.
    """
    manifest = read_sound(pair, options.tree)
    tokenizer = Tokenizer.from_folder(pair / TARGET)
    stop_tokens = frozenset({*tokenizer.eos_token_ids, *manifest.target.eos_token_ids})
    read = manifest if options.draft_model is None else replace(manifest, drafter=None)  # its own is not opened
    take, vram = first_layers(
        pair, read, options.gpu_layers, drafter_device=options.drafter_device, vram=options.vram, fit=options.fit,
        texts=options.slots, threads=options.threads,
    )  # fmt: skip
    if take and options.tree:
        LARGEST_TREE.check(options.tree)
    if not take and options.draft_model is None and (options.drafter_device in GPUS or options.vram is not None):
        _ = manifest.needed_drafter  # raises before seconds of loading
    own, model = None, None
    if options.draft_model is not None:
        own, model = open_draft_model(Path(options.draft_model), tokenizer, manifest, options.threads)
    properties = {**chosen_properties(manifest, options.threads), **options.ov_config}
    open_target = partial(
        OpenVINOTarget.load, pair, read, threads=options.threads, ov_config=properties, exact=options.exact,
        sequences=options.slots, kv_cache=options.kv_cache,
    )  # fmt: skip
    target = open_with_layers(open_target, take, wished=options.gpu_layers is not None)
    tree = options.tree or manifest.tree
    measure = partial(
        known_or_measured, manifest, target, threads=options.threads, ov_config=options.ov_config, progress=progress
    )
    schedule = partial(Scheduler, plain_rows=target.plain_rows, max_slowdown=options.max_slowdown)
    facts = manifest.drafter
    if model or facts is None:
        if options.tree is not None:
            return Parts(target, model, tokenizer, tree, None, stop_tokens)
        return Parts(target, model, tokenizer, BOUNDS, schedule(measure(model, draft_model=own)), stop_tokens)
    on_cpu = partial(open_cpu, pair, facts, threads=options.threads, texts=options.slots)

    def kept(device: str) -> Costs | None:
        """Return the costs of a drafter's device from the cache."""
        known = recall(
            CostKey.of(manifest, device, options.threads, options.ov_config, target.exact, layers=target.layers)
        )
        return known.costs if known else None

    compared = options.drafter_device == "auto" and options.tree is None
    if compared and options.vram is None and (slower := _known_to_be_slower(kept)):
        drafter = on_cpu(slower)
    else:
        drafter = open_drafter(
            pair, manifest, device=options.drafter_device, threads=options.threads, vram=vram,
            fit=options.fit, texts=options.slots,
        )  # fmt: skip
    scheduler = None
    if options.tree is None:
        drafter, costs = _measured(measure, drafter, on_cpu, options.drafter_device)
        if compared and drafter.device_key in GPUS:
            drafter, costs = _quickest(measure, drafter, costs, on_cpu)
        scheduler = schedule(costs, pair_calibration(pair, manifest))
        tree = replace(BOUNDS, top_k=min(BOUNDS.top_k, drafter.top_k), depth=facts.positions or BOUNDS.depth)
    second = on_cpu if drafter.device_key in GPUS else None
    return Parts(target, FailoverDrafter(drafter, second), tokenizer, tree, scheduler, stop_tokens)


def open_with_layers(
    open_target: Callable[..., OpenVINOTarget], take: TakeLayers | None, *, wished: bool
) -> OpenVINOTarget:
    """Return the target with its first layers elsewhere, or with all layers here if that fails.

    wished: whether the user gave the number. Then a failure is raised: DeviceError, InputError.
    """
    try:
        return open_target(take=take)
    except (DeviceError, InputError) as error:
        if take is None or wished:
            raise
        problem = str(error)
    log.warning(_ALL_HERE, problem)  # outside the handler, because a traceback would keep the session
    return open_target()


def first_layers(
    pair: Path, manifest: Manifest, given: int | str | None, *, drafter_device: str, vram: int | None,
    fit: bool, texts: int, threads: int | None,
) -> tuple[TakeLayers | None, int | None]:  # fmt: skip
    """Return what opens the target's first layers on a GPU, None without them, and the VRAM left for the drafter.

    manifest: without the pair's drafter if that is not opened. given: number of layers or "auto"; None for the
    pair's own, which is 0 wherever it cannot be.
    Raises InputError, DeviceError.
    """
    wished = manifest.target.gpu_layers if given is None else given
    if (count := read_count(wished)) == 0 or (given is None and drafter_device in ("cpu", "openvino-gpu")):
        return None, vram
    try:
        check_layers(wished, drafter_device, vram, "the pair's gpu_layers" if given is None else FLAG)
        device, found = layer_device(drafter_device), list[LayerPlan]()
        if vram is not None:
            mix = FeatureMix.of_pair(pair, manifest)
            found = plans(pair / TARGET_GRAPH, device, manifest.target.max_context, texts, mix)
            room = vram - drafter_bytes(device.key, pair, manifest, vram, fit=fit)
            count = fitting(found, count, room, " beside the drafter")
    except (DeviceError, InputError) as error:
        if given is not None:
            raise
        log.warning(_ALL_HERE, error)
        return None, vram
    assert count is not None  # check_layers has seen to it
    left = vram - found[count - 1].total if vram is not None and count <= len(found) else vram
    return TakeLayers(count, device, manifest.target.max_context, texts, threads), left


def open_draft_model(
    pair: Path, tokenizer: Tokenizer, manifest: Manifest, threads: int | None
) -> tuple[Manifest, ModelDrafter]:
    """Open a pair's target as the drafter of another. tokenizer, manifest: of the pair that it drafts for.

    Raises PairError, also for a tokenizer with too few common tokens, and DeviceError.
    """
    if not pair.exists():
        raise PairError(
            f"draft model {pair} does not exist: give the folder that dovetail-export draft-model prints for a model"
        )
    if not (pair / MANIFEST_NAME).exists():
        raise PairError(
            f"draft model {pair} is no pair: give the folder that dovetail-export draft-model {pair} prints"
        )
    own, size, common = read_sound(pair), manifest.target.vocab_size, None
    rows, note = own.target.vocab_size, f"draft model {own.name}"
    if own.target.tokenizer_sha256 != manifest.target.tokenizer_sha256:
        other = Tokenizer.from_folder(pair / TARGET)
        if not tokenizer.has_ids_of(other):
            common = translation(tokenizer, other, size, rows)
            note += f" with {len(common.own)} of the target's {tokenizer.vocab_size} tokens"
    model = OpenVINOTarget.load(pair, replace(own, drafter=None), threads=threads)
    return own, ModelDrafter(model, size, rows, note, common)


def _measured(
    measure: Callable[[OnnxDrafter], Costs], drafter: OnnxDrafter, open_cpu: Callable[[str], OnnxDrafter], device: str
) -> tuple[OnnxDrafter, Costs]:
    """Return the drafter and measured costs. A GPU that fails meanwhile is left, if `device` allows that."""
    problem = None
    try:
        costs = measure(drafter)
    except DeviceError as error:
        if device in GPUS or drafter.device_key not in GPUS:
            raise
        problem = str(error)
    if problem:  # outside the handler, because a traceback would keep the session longer than its device
        log.warning("the drafter runs on the CPU: %s", problem)
        drafter.close()
        drafter = open_cpu(f"no {GPUS[drafter.device_key]}: {problem}")
        costs = measure(drafter)
    return drafter, costs


def _quickest(
    measure: Callable[[OnnxDrafter], Costs], gpu: OnnxDrafter, costs: Costs, open_cpu: Callable[[str], OnnxDrafter]
) -> tuple[OnnxDrafter, Costs]:
    """Return the GPU's drafter with its costs, or the CPU's if that is quicker. The note says which and why."""
    cpu = open_cpu("")
    cpu_costs = measure(cpu)
    slower, note = _compared(gpu.device_key, costs, cpu_costs)
    left, taken, costs = (gpu, cpu, cpu_costs) if slower else (cpu, gpu, costs)
    left.close()
    taken.note = note
    return taken, costs


def _known_to_be_slower(kept: Callable[[str], Costs | None]) -> str | None:
    """Return the note for the CPU if an earlier start found it quicker than a GPU, so that the GPU stays closed.

    A GPU that comes first and has not been measured is tried.
    """
    cpu = kept("cpu")
    for gpu in GPUS:
        if cpu and (costs := kept(gpu)):
            slower, note = _compared(gpu, costs, cpu)
            return note if slower else None
        if gpu_expected(gpu):
            return None
    return None


def _compared(gpu: str, costs: Costs, cpu: Costs) -> tuple[bool, str]:
    """Return whether a GPU drafts a level slower than the CPU, and a note with both times."""
    gpu_ms, cpu_ms = (each.call_ms(QUICK_CONTEXTS[-1], LEVEL_ROWS) for each in (costs, cpu))
    slower, name = gpu_ms > cpu_ms, GPUS[gpu]
    times = f"a call takes {gpu_ms:.1f} ms with {name}, {cpu_ms:.1f} ms on the CPU"
    return slower, f"{'the CPU' if slower else name} is quicker: {times}"
