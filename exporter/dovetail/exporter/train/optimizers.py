"""The optimizers of a fit, and its learning rate.

A matrix's update in Muon is the matrix's momentum, made orthogonal. Products are in float32 or, for
CPUs that multiply bfloat16 quickly, in bfloat16. `torch.optim.Muon` has bfloat16 alone.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the
step size of Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dovetail.exporter.train.plan import FitOptions
from dovetail.models.drafter import DraftModel

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # quintic Newton-Schulz step with the largest slope at 0
STEPS = 5
ADAMW_RMS = 0.2  # RMS of AdamW's updates, so that one learning rate suits both optimizers


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with AdamW's weight decay and Nesterov's momentum.

    dtype: of the products that make an update orthogonal.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closures
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(momentum, group["momentum"]), self.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * ADAMW_RMS * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `matrix`, [N, C] float32, with singular values of 0.7 to 1.2 and the same vectors.

    dtype: of the products, float32 or bfloat16.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / x.norm().clamp(min=1e-7)).to(dtype)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


def learning_rate(step: int, share: float, peak: float, warmup: int) -> float:
    """The learning rate: a linear rise over `warmup` updates, a linear fall to zero at share 1."""
    return peak * min(1.0, (step + 1) / max(1, warmup)) * max(0.0, 1.0 - share)


def make_optimizers(drafter: DraftModel, options: FitOptions) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; each parameter group holds its highest learning rate as `peak`."""
    muon = options.optimizer == "muon"
    matrices = [p for p in drafter.parameters() if p.ndim == 2 and p is not drafter.head and muon]
    rest = [p for p in drafter.parameters() if p.ndim != 2 or p is drafter.head or not muon]
    products = torch.bfloat16 if options.bf16 else torch.float32
    peak, decay = options.learning_rate, options.weight_decay
    adamw = torch.optim.AdamW([{"params": rest, "peak": peak}], betas=(0.9, 0.95), weight_decay=decay)
    if not matrices:
        return [adamw]
    return [adamw, Muon([{"params": matrices, "peak": peak}], weight_decay=decay, dtype=products)]
