"""Fitting a drafter: windows of conversations, unrolled steps on its own outputs, soft cross-entropy.

Axes: B conversations of a batch, T positions, D feature size, K draft vocabulary.
Source: EAGLE-3's training-time test (arXiv 2503.01840): the loss sums 0.8^j times the cross-entropy of
step j against the target's own distribution; positions whose token the drafter cannot propose are left
out; there is no feature regression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dovetail.models import Drafter
from dovetail.runtime.errors import TrainError

from .corpus import Corpus


@dataclass(frozen=True)
class FitOptions:
    """How to fit.  `epochs` sets the length; the learning rate falls linearly to zero at its end.

    unroll: steps on the drafter's own outputs, the first on the target's features.
    window: positions of one conversation seen at most.  batch: conversations per update.
    """

    epochs: float = 8.0
    unroll: int = 3
    window: int = 384
    batch: int = 4
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: float = 0.8
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("unroll", "window", "batch"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} {getattr(self, name)} is out of range: give 1 or more")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TrainError(f"{name} {value} is out of range: give a number above 0")


@dataclass(frozen=True)
class Windows:
    """One batch, padded right.

    features: [B, T, D] float32, f[t].  tokens: [B, T] x[t+1].  following: [B, T, D] f[t+1], the teacher's.
    answer: [B, T] bool, positions whose next token x[t+2] lies in the answer and in the draft vocabulary.
    start: first position that any conversation of the batch needs beyond step 0.
    """

    features: Tensor
    tokens: Tensor
    following: Tensor
    answer: Tensor
    start: int


@dataclass(frozen=True)
class StepReport:
    """loss: mean over positions and steps.  agreement: per step, how often the drafter's top token is the target's."""

    loss: float
    agreement: tuple[float, ...]
    positions: int


class _HeadLoss(torch.autograd.Function):
    """Soft cross-entropy through the frozen head without keeping [rows, K] twice.

    g: [rows, D], head: [K, D], teacher: [rows, K] probabilities -> loss [rows], top [rows] int64.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, head: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        logits = g @ head.T
        top = logits.argmax(-1)
        normaliser = torch.logsumexp(logits, -1)
        loss = normaliser - (teacher * logits).sum(-1)
        gradient = logits.sub_(normaliser.unsqueeze(-1)).exp_().sub_(teacher)
        ctx.save_for_backward(gradient, head)
        ctx.mark_non_differentiable(top)
        return loss, top

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_top: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # torch types *grads
        gradient, head = ctx.saved_tensors
        return (gradient @ head) * d_loss.unsqueeze(-1), None, None


class Batches:
    """Seeded batches without end, by step number: a resumed run sees what an unbroken one would have seen."""

    def __init__(
        self,
        corpus: Corpus,
        features: NDArray[np.float16],
        d2t: NDArray[np.int64],
        vocab_size: int,
        options: FitOptions,
    ):
        usable = np.flatnonzero((corpus.lengths - corpus.prompt_lengths >= 2) & (corpus.lengths >= 4))
        if len(usable) < options.batch:
            raise TrainError(
                f"{len(usable)} usable conversations are too few for a batch of {options.batch}: add prompts"
            )
        self.corpus, self.features, self.options, self.usable = corpus, features, options, usable
        self.per_epoch = len(usable) // options.batch
        self.proposable = np.zeros(vocab_size, bool)
        self.proposable[d2t] = True

    def order(self, epoch: int) -> NDArray[np.int64]:
        """[per_epoch, batch] conversations: shuffled, then grouped by like lengths so that little is padding."""
        rng = np.random.default_rng((self.options.seed, epoch))
        shuffled = rng.permutation(self.usable)[: self.per_epoch * self.options.batch]
        pool = 16 * self.options.batch
        parts = [shuffled[i : i + pool] for i in range(0, len(shuffled), pool)]
        alike = np.concatenate([part[np.argsort(self.corpus.prompt_lengths[part], kind="stable")] for part in parts])
        return rng.permutation(alike.reshape(-1, self.options.batch))

    def batch(self, rows: NDArray[np.int64]) -> Windows:
        """Pad the conversations `rows` into one batch."""
        offsets, window = self.corpus.offsets, self.options.window
        # A window keeps the answer's first part and as much of the prompt before it as fits in half of it.
        firsts = np.maximum(0, self.corpus.prompt_lengths[rows] - window // 2)
        spans = np.minimum(self.corpus.lengths[rows] - firsts, window + 1) - 1  # pairs (f[t], x[t+1])
        size = int(spans.max())
        width = self.features.shape[1]
        features = np.zeros((len(rows), size + 1, width), np.float32)
        tokens = np.zeros((len(rows), size), np.int64)
        answer = np.zeros((len(rows), size), bool)
        for i, (row, first, span) in enumerate(zip(rows, firsts, spans, strict=True)):
            at = offsets[row] + first
            features[i, : span + 1] = self.features[at : at + span + 1]
            tokens[i, :span] = self.corpus.tokens[at + 1 : at + span + 1]
            # Position t predicts x[t+2]; the target's first own token is x[prompt_length].
            own = max(0, self.corpus.prompt_lengths[row] - first - 2)
            answer[i, own : span - 1] = self.proposable[tokens[i, own + 1 : span]]
        start = int(np.argmax(answer.any(0)))
        return Windows(
            torch.from_numpy(features[:, :-1]),
            torch.from_numpy(tokens),
            torch.from_numpy(features[:, 1:]),
            torch.from_numpy(answer),
            max(0, start - self.options.unroll),
        )

    def stream(self, step: int) -> Iterator[tuple[int, Windows]]:
        """(step, batch) from `step` on, without end."""
        while True:
            epoch, index = divmod(step, self.per_epoch)
            for rows in self.order(epoch)[index:]:
                yield step, self.batch(rows)
                step += 1


def unrolled_loss(drafter: Drafter, windows: Windows, options: FitOptions) -> tuple[Tensor, StepReport]:
    """The loss to minimise (a scalar) and what to show of it."""
    start = windows.start
    answer = windows.answer[:, start:]
    with torch.no_grad():
        teacher = torch.softmax(drafter.logits(windows.following[:, start:][answer]), -1)  # [rows, K]
        truth = teacher.argmax(-1)
    caches: list[Any] = [[] for _ in drafter.layers]
    g = drafter.step(windows.features, windows.tokens, caches)
    tokens = windows.tokens[:, start:]
    own, before = g[:, start:], g[:, start - 1 : start] if start else torch.zeros_like(g[:, :1])
    total = g.new_zeros(())
    reports = []
    valid = _valid_rows(answer, options.unroll)
    for j in range(options.unroll):
        if j:
            shifted = torch.cat([before if j == 1 else torch.zeros_like(before), own[:, :-1]], 1)
            own = drafter.step(shifted, tokens, caches, start)
        losses, top = _HeadLoss.apply(own[answer], drafter.head, teacher)  # type: ignore[no-untyped-call]  # torch
        usable = valid[j]
        total = total + options.decay**j * (losses * usable).sum() / usable.sum().clamp(min=1)
        reports.append(float((top == truth)[usable].float().mean()))
    return total, StepReport(float(total.detach()), tuple(reports), int(answer.sum()))


def _valid_rows(answer: Tensor, unroll: int) -> list[Tensor]:
    """Per step j: which answer rows have j drafted ancestors inside the slice.  answer: [B, T]."""
    position = torch.arange(answer.shape[1], device=answer.device).expand_as(answer)[answer]
    return [position >= j for j in range(unroll)]


def learning_rate(step: int, share: float, options: FitOptions) -> float:
    """Linear warm-up over `options.warmup` updates, and a linear fall to zero with the share of the run done."""
    rise = min(1.0, (step + 1) / max(1, options.warmup))
    return options.learning_rate * rise * max(0.0, 1.0 - share)
