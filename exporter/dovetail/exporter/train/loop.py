"""The fitting loop: trains a drafter on seeded batches, with a resumable state and a curve."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import PickleError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from dovetail.exporter.train.batches import Batches, Windows
from dovetail.exporter.train.drafters.trained import Trainee
from dovetail.exporter.train.loss import StepReport, unrolled_loss
from dovetail.exporter.train.optimizers import learning_rate, make_optimizers
from dovetail.exporter.train.plan import FitOptions
from dovetail.runtime.errors import TrainError, one_line
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.system.progress import Progress

CURVE_EVERY = 25  # updates per point of the learning curve
LOOKS = 10  # measurements on held-out text in a run
SAVE_SECONDS = 60.0
TIMED_UPDATES = 20  # updates after which a run with a time limit fixes its length

# Errors of torch for a damaged or foreign file.
_LOAD_FAILURES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, PickleError, BadZipFile)


@dataclass
class FitState:
    """The state of a fit, as `state.pt` stores it. total: updates of the run, 0 while unknown."""

    step: int = 0
    total: int = 0
    seconds: float = 0.0
    positions: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


class Fitting:
    """One run over `batches`; `folder`/state.pt stores its state."""

    def __init__(self, trainee: Trainee, batches: Batches, folder: Path, device: str, progress: Progress):
        self.trainee, self.drafter, self.batches, self.device = trainee, trainee.drafter, batches, device
        self.file, self.progress = folder / "state.pt", progress
        self.options: FitOptions = batches.options
        self.optimizers = make_optimizers(self.drafter, self.options)
        self.state = self._load()

    def run(self, seconds: float | None, measure: Callable[[], float]) -> FitState:
        """Update until the options' epochs end, or for about `seconds`; return the state.

        With `seconds`, the speed of the first updates sets the number of all updates.
        measure: gives the held-out acceptance length, LOOKS times in a run, for the curve.
        """
        state, options = self.state, self.options
        if seconds is None:
            state.total = max(1, round(options.epochs * self.batches.per_epoch))
        recent: list[StepReport] = []
        saved = time.monotonic()
        for step, windows in self.batches.stream(state.step, self._hold):
            if state.total and step >= state.total:
                break
            begun = time.monotonic()  # features of a turn and held-out measurements do not count as time of fitting
            recent.append(self._update(step, windows))
            now = time.monotonic()
            state.step, state.seconds = step + 1, state.seconds + now - begun
            state.positions += recent[-1].positions
            if seconds and not state.total and state.step >= TIMED_UPDATES:
                state.total = state.step + max(0, int((seconds - state.seconds) / (state.seconds / state.step)))
                self._save()
            if state.step % CURVE_EVERY == 0 or state.step == state.total:
                self._record(recent, measure)
                recent = []
            if now - saved > SAVE_SECONDS:
                self._save()
                saved = now
        self._save()
        return state

    def _update(self, step: int, windows: Windows) -> StepReport:
        options = self.options
        share = step / self.state.total if self.state.total else 0.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, share, group["peak"], options.warmup)
        with matrix_products(bf16=options.bf16):
            with torch.autocast(self.device, torch.bfloat16, enabled=options.bf16):
                loss, report = unrolled_loss(self.trainee, windows.to(self.device), options)
            if not torch.isfinite(loss):
                raise TrainError(f"the loss is {float(loss)} at update {step}: lower --learning-rate")
            loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), options.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return report

    def _record(self, recent: list[StepReport], measure: Callable[[], float]) -> None:
        """Add a point to the curve, every few points with a held-out measurement."""
        state = self.state
        before = state.curve[-1]["update"] if state.curve else 0
        state.curve.append(point := _point(state, recent))
        if state.total and LOOKS * state.step // state.total > LOOKS * before // state.total:
            point["held_out"] = round(measure(), 3)
        agreement = " ".join(f"{a:.3f}" for a in point["agreement"])
        held_out = next((f"  held out {p['held_out']:.2f}" for p in reversed(state.curve) if "held_out" in p), "")
        self.progress("fit", state.step, state.total, f"loss {point['loss']:.2f}  agreement {agreement}{held_out}")

    def _hold(self, group: int) -> None:
        self.batches.features.hold(group, lambda n: self.progress("features", n, 0, "for the next turn"))

    def _save(self) -> None:
        weights = {name: p.detach() for name, p in self.drafter.named_parameters()}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        buffer = io.BytesIO()
        torch.save({"weights": weights, "optimizers": optimizers, "state": asdict(self.state)}, buffer)
        write_atomically(self.file, buffer.getvalue())

    def _load(self) -> FitState:
        if not self.file.exists():
            return FitState()
        try:
            saved = torch.load(self.file, map_location=self.device, weights_only=True)
            self.drafter.load_state_dict(saved["weights"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            return FitState(**saved["state"])
        except _LOAD_FAILURES as error:
            reason = one_line(error)[:200]
            raise TrainError(f"{self.file} is damaged ({reason}): remove the file; --resume fits again") from error


@contextmanager
def matrix_products(*, bf16: bool) -> Iterator[None]:
    """Products of float32 matrices, rounded to bfloat16 before they are multiplied if `bf16`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if bf16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _point(state: FitState, recent: list[StepReport]) -> dict[str, Any]:
    agreement = np.nan_to_num([report.agreement for report in recent]).mean(axis=0)  # nan: no position in a batch
    return {
        "update": state.step,
        "seconds": round(state.seconds, 1),
        "positions": state.positions,
        "loss": round(float(np.mean([report.loss for report in recent])), 4),
        "agreement": [round(float(a), 4) for a in agreement],
    }
