"""Measure how properties of OpenVINO's CPU plugin change the target's speed and its best tokens.

`compare` opens one candidate at a time next to the given target and times their passes in turns.
Other work on the machine then affects both alike. `choose` names the property for later openings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import geometric_mean
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import DeviceError, one_line
from dovetail.runtime.system import machine
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.exactness import largest_difference
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.properties import default_properties
from dovetail.runtime.target.session import opened
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tune.cost_cache import CHOOSABLE, Chosen
from dovetail.runtime.tune.measure import check_seconds

CONTEXT = 128  # tokens before a timed pass
NODES = (1, 8, 16)  # nodes of a timed pass; 1 is plain decoding
CHAIN = 16  # tokens of the text in one pass
TOKENS = 128  # tokens of the text
SAMPLES = 7  # least number of pairs of passes for each size
PROMPT = "The three most important discoveries in the history of science, and what each of them changed:"


@dataclass(frozen=True)
class Property:
    """A property of OpenVINO's CPU plugin, as --ov-config takes it."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True)
class Compared(Property):
    """The effect of one property, compared with the given properties.

    speedups: by nodes, (low, median, high) of how many times as fast a pass is. The interval holds
    the true speedup in 98 of 100 cases.
    """

    speedups: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    samples: int = 0  # pairs of passes of each size
    same: float | None = None  # part, 0 to 1, of a text's tokens after which the target's best token stays the same
    rows_equal: bool | None = None  # in trees and in passes of every width but 1 (exactness.py)
    problem: str | None = None  # OpenVINO's reason for refusing the property; nothing was measured then


def candidates(given: Mapping[str, str], threads: int | None = None) -> list[Property]:
    """Return the properties worth a try here, without those already set."""
    tried = [("DYNAMIC_QUANTIZATION_GROUP_SIZE", size) for size in ("0", "32", "64", "128")]
    tried += [("INFERENCE_PRECISION_HINT", "f32"), ("INFERENCE_PRECISION_HINT", "bf16"), ("ENABLE_CPU_PINNING", "NO")]
    facts, cores = machine.cpu(), machine.usable_cores()
    if facts.threads > facts.cores:
        tried.append(("ENABLE_HYPER_THREADING", "NO"))
    if threads is None and cores > 1:
        tried.append(("INFERENCE_NUM_THREADS", str(cores - 1)))  # leaves a core to the drafter
    now = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32", **default_properties(), **given}  # 32 is OpenVINO's default
    return [Property(name, value) for name, value in tried if now.get(name) != value]


def compare(
    base: OpenVINOTarget,
    open_with: Callable[[Property], OpenVINOTarget],
    prompt: Sequence[int],
    tried: Sequence[Property],
    *,
    seconds: float,
    progress: Progress = silent,
) -> list[Compared]:
    """Return a record for each property of `tried`, measured for about `seconds` in all.

    base: the target as given; empty at the end. open_with: opens the target with one more property.
    prompt: tokens before the measured text. SAMPLES of every size may take longer than `seconds`.
    Raises InputError, and DeviceError if `base` cannot read the text.
    """
    check_seconds(seconds)
    end = perf_counter() + seconds
    progress("comparing", 0, len(tried))
    text = greedy_text(base, prompt, min(TOKENS, base.max_context - len(prompt)))
    best = best_tokens(base, prompt, text)

    def compared(done: int, one: Property) -> Compared:
        """Open a candidate, read the text, time passes and close: at most two models are open."""
        until = perf_counter() + (end - perf_counter()) / (len(tried) - done)
        try:
            candidate = open_with(one)
            same = float(np.mean(best_tokens(candidate, prompt, text) == best))
            exact = OpenVINOTarget(candidate.model, candidate.max_context)  # computes no row alone
            equal = largest_difference(exact) == 0
            ratios = _time(base, candidate, until, lambda part: progress("comparing", done + part, len(tried)))
        except DeviceError as error:
            return Compared(one.name, one.value, problem=one_line(error))
        samples = len(ratios[NODES[0]])
        ranks = np.clip(0.5 + np.array([-1.3, 0.0, 1.3]) / samples**0.5, 0.0, 1.0)  # 2.6 deviations of the binomial
        speedups = {nodes: tuple(np.quantile(found, ranks).tolist()) for nodes, found in ratios.items()}
        return Compared(one.name, one.value, speedups, samples, same, equal)

    rows = []
    for done, one in enumerate(tried):
        rows.append(compared(done, one))
        progress("comparing", done + 1, len(tried))
    return rows


def choose(rows: Sequence[Compared]) -> Chosen:
    """Choose the quickest precision or group size that keeps rows equal and surely beats the base.

    Passes of all NODES count alike. The choice is empty if no property qualifies.
    """
    found = [row for row in rows if row.name in CHOOSABLE and row.rows_equal]
    sure = [row for row in found if geometric_mean(low for low, _, _ in row.speedups.values()) > 1]
    best = max(sure, key=_speedup, default=None)
    return Chosen({best.name: best.value}, _speedup(best)) if best else Chosen({}, 1.0)


def _speedup(row: Compared) -> float:
    return geometric_mean(middle for _, middle, _ in row.speedups.values())


def greedy_text(target: OpenVINOTarget, prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` tokens, at least one, that plain decoding writes after the prompt."""
    with opened(target) as seq:
        text = [int(target.prefill(seq, np.array(prompt, np.int64)).logits[0].argmax())]
        while len(text) < count:
            text.append(int(target.verify({seq: DraftTree.root(text[-1])})[seq].logits[0].argmax()))
            target.commit(seq, np.zeros(1, np.int64))
        return text


def best_tokens(target: OpenVINOTarget, prompt: Sequence[int], text: Sequence[int]) -> NDArray[np.int64]:
    """Return the target's best token after each of `text` [T], read in chains; int64 [T]."""
    best: list[NDArray[np.int64]] = []
    with opened(target) as seq:
        target.prefill(seq, np.array(prompt, np.int64))
        for begin in range(0, len(text), CHAIN):
            tokens = np.array(text[begin : begin + CHAIN], np.int64)
            best.append(target.verify({seq: DraftTree.chain(tokens)})[seq].logits.argmax(1))
            target.commit(seq, np.arange(len(tokens)))
    return np.concatenate(best)


def _time(
    base: OpenVINOTarget, candidate: OpenVINOTarget, until: float, tell: Callable[[float], None]
) -> dict[int, list[float]]:
    """Return by nodes how many times as fast `candidate` was in each pair of passes.

    Timing ends at `until`, but not before SAMPLES pairs. tell: takes the finished part, 0 to 1.
    """
    turns, order, begin = [base, candidate], Random(0), perf_counter()
    ratios: dict[int, list[float]] = {nodes: [] for nodes in NODES}
    for nodes in NODES:
        for target in turns:
            _pass_ms(target, nodes)  # the first pass of a shape is slower
    samples = 0
    while samples < SAMPLES or perf_counter() < until:
        for nodes in order.sample(NODES, len(NODES)):
            ms = {target: _pass_ms(target, nodes) for target in turns}
            ratios[nodes].append(ms[base] / ms[candidate])
        turns.reverse()
        samples += 1
        tell(min(1.0, samples / SAMPLES, (perf_counter() - begin) / max(until - begin, 1e-9)))
    return ratios


def _pass_ms(target: OpenVINOTarget, nodes: int) -> float:
    """Return the second of two passes in ms: the first after a change of width takes longer."""
    ms = 0.0
    with opened(target) as seq:
        for _ in range(2):
            target.pretend_length(seq, max(0, min(CONTEXT, target.max_context - max(NODES))))
            ms = target.time_pass(seq, nodes)
    return ms
