"""Measure costs on this machine: passes of the target by nodes, calls of the drafter by rows.

Both depend on the context. The measurement takes all points in turns, round after round in shuffled
order, so that other work on the machine affects all points alike. A point's time is the median.
Each point runs twice: OpenVINO's first pass after a change of width takes longer, and this extra
time is recorded separately.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from random import Random
from statistics import median
from time import perf_counter
from typing import Literal

import numpy as np

from dovetail.runtime.drafter.graph_io import CHUNK
from dovetail.runtime.drafter.model import ModelDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.policy.choose import WIDTHS
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.system.arrays import SequenceId
from dovetail.runtime.system.bounds import check_number
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.exactness import largest_difference
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.tune.cost_cache import CostKey, Measured, recall

log = logging.getLogger(__name__)

CONTEXTS = (128, 1024, 4096)
ALL_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
ROWS = (1, 2, 4, 8, 16, 64, CHUNK)
# Values for a quick measurement: a user who opens a pair for the first time waits for an answer.
QUICK_CONTEXTS = (128, 1024)
QUICK_SECONDS = 4.0

FEW = {*WIDTHS, CHUNK}  # sizes to measure when time is short
SAMPLES = 2  # least number of times for each point

Engine = Literal["target", "draft"]
Sizes = dict[Engine, list[int]]  # nodes of a pass, rows of a call


def known_or_measured(
    manifest: Manifest,
    target: OpenVINOTarget,
    drafter: OnnxDrafter | ModelDrafter | None,
    threads: int | None,
    ov_config: Mapping[str, str] | None = None,
    *,
    draft_model: Manifest | None = None,
    progress: Progress = silent,
) -> Costs:
    """Return a pair's costs on this machine, from the cache or from a quick measurement.

    A measurement is kept in the cache. A log warning says if rows are not equal on this machine.
    threads, ov_config: as passed to open target and drafter. Raises DeviceError.
    """
    device = drafter.device_key if drafter else None
    key = partial(CostKey.of, manifest, device, threads, ov_config, target.exact, draft_model)
    known = recall(key(target.layers))
    if known is not None:
        warn_of_rows(known)
        return known.costs
    time = partial(
        measure, target, drafter, contexts=QUICK_CONTEXTS, widths=WIDTHS, seconds=QUICK_SECONDS, progress=progress
    )
    measured = measured_alike(manifest.name, target, key, time)
    warn_of_rows(measured)
    with suppress(OSError):  # without a writable cache the next start measures again
        measured.store()
    return measured.costs


def measured_alike(
    pair: str,
    target: OpenVINOTarget,
    key: Callable[[tuple[int, str] | None], CostKey],
    time: Callable[[], Costs],
    earlier: float = 0.0,
) -> Measured:
    """Return costs whose times all hold for the target's layers as they lie now.

    The target is timed again if the device of its first layers has failed meanwhile. key: by layers. earlier:
    seconds that the measurement has taken before.
    """
    begin = perf_counter()
    while True:
        layers, costs, apart = target.layers, time(), rows_apart(target)
        if target.layers == layers:
            return Measured(pair, key(layers), costs, round(earlier + perf_counter() - begin, 2), rows_apart=apart)


def rows_apart(target: OpenVINOTarget) -> float:
    """Return the largest difference in logits between rows that exact text needs equal."""
    return largest_difference(target) if target.exact else 0.0


def warn_of_rows(measured: Measured) -> None:
    """Log a warning if rows were not equal when the costs were measured."""
    if measured.rows_apart:
        log.warning(
            "the target's rows differ by up to %.2g logits between passes here, so drafts may change the text: "
            "dovetail-run tune --properties shows which properties of OpenVINO keep rows equal", measured.rows_apart,
        )  # fmt: skip


def measure(
    target: OpenVINOTarget,
    drafter: OnnxDrafter | ModelDrafter | None,
    *,
    contexts: Iterable[int],
    widths: Iterable[int],
    seconds: float,
    progress: Progress = silent,
) -> Costs:
    """Time passes of `widths` nodes and calls of any drafter at `contexts`, for about `seconds`.

    Contexts beyond the target's room are left out. If time is too short for SAMPLES of
    every point, only FEW sizes and the largest are measured, for as long as they take. Raises
    InputError, DeviceError.
    """
    check_seconds(seconds)
    begin = perf_counter()
    progress("measuring", 0, 1)
    room = max(0, target.max_context - CHUNK)
    contexts = [context for context in _ascending("contexts", contexts, 0) if context <= room] or [room]
    every: Sizes = {"target": _ascending("widths", widths, 1)}
    if drafter:
        every["draft"] = [rows for rows in ROWS if rows <= drafter.capacity]
    few: Sizes = {engine: [n for n in sizes if n in FEW or n == sizes[-1]] for engine, sizes in every.items()}
    seq = target.open()
    watch = _Stopwatch(target, drafter, seq, contexts)
    try:
        watch.warm_up(few)
        for point in watch.shuffled(few):
            watch.time(point)
        sizes, one_round = few, watch.predict(few, every)
        if perf_counter() - begin + (1 + SAMPLES) * one_round / 1e3 <= seconds:
            sizes = every
            watch.warm_up(every)
        points, queue = watch.shuffled(sizes), list[_Point]()
        while (left := seconds - (perf_counter() - begin)) > 0 or watch.sampled(points) < 1:
            queue = queue or watch.shuffled(sizes)
            watch.time(queue.pop())
            progress("measuring", min(1 - left / seconds, watch.sampled(points)), 1)
        return watch.costs(sizes)
    finally:
        target.close(seq)
        if drafter:
            drafter.rewind(seq, 0)


def check_seconds(seconds: float) -> None:
    """Raise InputError for a duration that no measurement can have."""
    check_number("seconds", seconds, InputError, "give another number of seconds", most=86400)


@dataclass(frozen=True)
class _Point:
    """A call to time: a pass of `size` nodes or a call of `size` rows, after `context`."""

    engine: Engine
    size: int
    context: int


@dataclass
class _Stopwatch:
    """Times calls as the loop makes them: a pass includes the layout of the tree's paths, not its growth."""

    target: OpenVINOTarget
    drafter: OnnxDrafter | ModelDrafter | None
    seq: SequenceId
    contexts: Sequence[int]
    order: Random = field(default_factory=lambda: Random(0))
    times: dict[_Point, list[float]] = field(default_factory=lambda: defaultdict(list))  # ms
    switches: list[float] = field(default_factory=list)  # ms

    def shuffled(self, sizes: Sizes) -> list[_Point]:
        points = [_Point(engine, n, at) for engine in sizes for n, at in product(sizes[engine], self.contexts)]
        return self.order.sample(points, len(points))

    def time(self, point: _Point) -> None:
        """Call the point twice. Record the second time and, for the target, the first's excess."""
        first, second = self.call(point), self.call(point)
        self.times[point].append(second)
        if point.engine == "target":
            self.switches.append(first - second)

    def warm_up(self, sizes: Sizes) -> None:
        """Call each size without a time once: the first call of a shape is slower."""
        for engine in sizes:
            for size in reversed(sizes[engine]):
                point = _Point(engine, size, self.contexts[-1])
                if point not in self.times:
                    self.call(point)

    def call(self, point: _Point) -> float:
        """Return the time of one call in ms."""
        if point.engine == "draft" and self.drafter:
            # A drafter with a shorter context starts over, so that a longer text makes it no slower.
            self.drafter.pretend_length(self.seq, min(point.context, self.drafter.capacity - point.size))
            return self.drafter.time_pass(self.seq, point.size, clock=perf_counter)
        self.target.pretend_length(self.seq, point.context)
        return self.target.time_pass(self.seq, point.size, clock=perf_counter)

    def sampled(self, points: Sequence[_Point]) -> float:
        """Return the part, 0 to 1, of the required times of `points`: SAMPLES for each point."""
        return sum(min(len(self.times[point]), SAMPLES) for point in points) / (SAMPLES * len(points))

    def predict(self, known: Sizes, wanted: Sizes) -> float:
        """Return ms of a round over `wanted`, by times of `known`, which has the largest sizes."""
        curves = {engine: self.curve(engine, known[engine]) for engine in wanted}
        calls = ((curves[engine], size) for engine in wanted for size in wanted[engine])
        total = sum(curve.at(context, size) for curve, size in calls for context in self.contexts)
        return 2 * total + median(self.switches) * len(wanted["target"]) * len(self.contexts)

    def costs(self, sizes: Sizes) -> Costs:
        """Return the medians."""
        target = self.curve("target", sizes["target"])
        draft = self.curve("draft", sizes["draft"]) if self.drafter else None
        return Costs(target, draft, max(0.0, median(self.switches)))

    def curve(self, engine: Engine, sizes: Sequence[int]) -> Curve:
        """Return the medians as a curve that never falls."""
        ms = [[median(self.times[_Point(engine, size, context)]) for size in sizes] for context in self.contexts]
        return Curve.fit(self.contexts, sizes, np.array(ms))


def _ascending(name: str, values: Iterable[int], low: int) -> list[int]:
    ordered = sorted(set(values))
    if not ordered or ordered[0] < low:
        raise InputError(f"{name} {ordered} cannot be measured: give at least one value, from {low}")
    return ordered
