"""The loss of one update: unrolled steps of the drafter on its own outputs, over windows.

Axes: B conversations of a batch, T positions, D feature size, K draft vocabulary.
Source: EAGLE-3's training-time test (arXiv 2503.01840). The loss sums 0.8^j times the cross-entropy
of step j against the target's own distribution. Positions whose token the drafter cannot propose do
not count. There is no feature regression. The paper's loss (arXiv 2412.18934, after EAGLE) is
`unroll=1` with `regression=10`: smooth L1 on the features plus a tenth of the cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.exporter.train.batches import Windows
from dovetail.exporter.train.drafters.trained import Trainee
from dovetail.exporter.train.features import read
from dovetail.exporter.train.plan import FitOptions


@dataclass(frozen=True)
class StepReport:
    """The report of an update. loss: mean over positions and steps.

    agreement: per step, the share of rows in which drafter and target have the same top token.
    """

    loss: float
    agreement: tuple[float, ...]
    positions: int


class _HeadLoss(torch.autograd.Function):
    """Soft cross-entropy through the head, which stores [rows, K] only once.

    g: [rows, D], head: [K, D], teacher: [rows, K] probabilities -> loss [rows], top [rows] int64.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, head: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(g.device.type, enabled=False):
            logits = g.float() @ head.T
        top = logits.argmax(-1)
        normaliser = torch.logsumexp(logits, -1)
        loss = normaliser - (teacher * logits).sum(-1)
        gradient = logits.sub_(normaliser.unsqueeze(-1)).exp_().sub_(teacher)
        ctx.save_for_backward(gradient, head, g)
        ctx.mark_non_differentiable(top)
        return loss, top

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_top: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]  # torch types *grads
        gradient, head, g = ctx.saved_tensors
        d_head = gradient.T @ (g * d_loss.unsqueeze(-1)) if ctx.needs_input_grad[1] else None
        return ((gradient @ head) * d_loss.unsqueeze(-1)).to(g.dtype), d_head, None


def unrolled_loss(trainee: Trainee, windows: Windows, options: FitOptions) -> tuple[Tensor, StepReport]:
    """The loss (a scalar) and its report."""
    drafter, start = trainee.drafter, windows.start
    answer = windows.answer[:, start:]
    following = windows.following[:, start:][answer]  # [rows, D]
    teacher, truth = _teacher(trainee.teacher, following, options.teacher_top_k)
    caches: list[Any] = [[] for _ in drafter.blocks()]
    lend = max(0, start - 1)  # the row before `start` is the first parent of step 1
    g = drafter.step(read(drafter, windows.features), windows.tokens, caches, lend=lend)
    tokens = windows.tokens[:, start:]
    own, before = g[:, start - lend :], g[:, :1] if start else torch.zeros_like(g[:, :1])
    total = g.new_zeros(())
    reports = []
    position = torch.arange(answer.shape[1], device=answer.device).expand_as(answer)[answer]
    for j in range(options.unroll):
        if j:
            shifted = torch.cat([before if j == 1 else torch.zeros_like(before), own[:, :-1]], 1)
            own = drafter.step(shifted, tokens, caches, start)
        losses, top = _HeadLoss.apply(drafter.head_input(own[answer]), drafter.head, teacher)  # type: ignore[no-untyped-call]  # torch
        if options.regression:
            distance = F.smooth_l1_loss(own[answer], following, reduction="none").mean(-1)
            losses = losses + options.regression * distance
        usable = position >= j  # rows with j drafted ancestors in the slice
        total = total + options.decay**j * (losses * usable).sum() / usable.sum().clamp(min=1)
        reports.append(float((top == truth)[usable].float().mean()) if usable.any() else float("nan"))
    return total, StepReport(float(total.detach()), tuple(reports), int(answer.sum()))


@torch.no_grad()
def _teacher(head: Tensor, following: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The target's probabilities [rows, K] and best token [rows] over the draft vocabulary."""
    with torch.autocast(following.device.type, enabled=False):
        logits = F.linear(following, head)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.softmax(logits, -1), logits.argmax(-1)
