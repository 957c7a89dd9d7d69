"""What one update of a drafter sees and minimises: windows of conversations, unrolled steps on its own outputs.

Axes: B conversations of a batch, T positions, D feature size, K draft vocabulary.
Source: EAGLE-3's training-time test (arXiv 2503.01840): the loss sums 0.8^j times the cross-entropy of
step j against the target's own distribution; positions whose token the drafter cannot propose are left
out; there is no feature regression.  The paper's loss (arXiv 2412.18934, after EAGLE) is `unroll=1` with
`regression=10`: smooth L1 on the features plus a tenth of the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dovetail.models import Drafter
from dovetail.runtime.bounds import CONTEXT_MOST, LARGEST, SEED_MOST, check_number, check_whole
from dovetail.runtime.errors import TrainError

from .corpus import Corpus
from .features import FeatureStore
from .muon import Muon

OPTIMIZERS = ("adamw", "muon")
# Options, their least and their largest value.
_WHOLE = (
    ("unroll", 1, 64), ("window", 1, CONTEXT_MOST), ("batch", 1, 2**16), ("teacher_top_k", 0, LARGEST["vocab_size"]),
    ("seed", 0, SEED_MOST),
)  # fmt: skip


@dataclass(frozen=True)
class FitOptions:
    """How to fit.  `epochs` sets the length; the learning rate falls linearly to zero at its end.

    unroll: steps on the drafter's own outputs, the first on the target's features.
    window: positions of one conversation seen at most.  batch: conversations per update.
    teacher_top_k: learn from the target's k most probable tokens alone, renormalised; 0 from all it can propose.
    regression: weight of the smooth L1 distance between output and the target's next feature.
    optimizer: "adamw", or "muon" for matrices with AdamW for the rest.
    """

    epochs: float = 4.0
    unroll: int = 3
    window: int = 384
    batch: int = 4
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: float = 0.8
    weight_decay: float = 0.01
    clip: float = 1.0
    teacher_top_k: int = 0
    regression: float = 0.0
    optimizer: str = "adamw"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in _WHOLE:
            check_whole(name, getattr(self, name), TrainError, "give another", least=least, most=most)
        for name, above in (("epochs", 10_000.0), ("learning_rate", 10.0), ("regression", 1e6), ("weight_decay", 1e3)):
            value = getattr(self, name)
            if value != 0 or name in ("epochs", "learning_rate"):
                check_number(name, value, TrainError, "give another", most=above)
        if self.optimizer not in OPTIMIZERS:
            raise TrainError(f"optimizer {self.optimizer!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True)
class Windows:
    """One batch, padded right.

    features: [B, T, (L + 1) * D] float32, f[t] and the L layers read beside it.  tokens: [B, T] x[t+1].
    following: [B, T, D] f[t+1], the teacher's.
    answer: [B, T] bool, positions whose next token x[t+2] lies in the answer and in the draft vocabulary.
    start: first position that any conversation of the batch needs beyond step 0.
    """

    features: Tensor
    tokens: Tensor
    following: Tensor
    answer: Tensor
    start: int

    def to(self, device: str) -> Windows:
        """The same on `device`."""
        features, tokens, following, answer = (
            tensor.to(device) for tensor in (self.features, self.tokens, self.following, self.answer)
        )
        return Windows(features, tokens, following, answer, self.start)


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
    """Seeded batches without end, by step number: a resumed run sees what an unbroken one would have seen.

    An epoch takes the store's groups one after the other, each shuffled within itself.
    usable: indices of the conversations to train on.
    """

    def __init__(
        self,
        corpus: Corpus,
        features: FeatureStore,
        usable: NDArray[np.int64],
        drafter: Drafter,
        options: FitOptions,
    ):
        long_enough = (corpus.lengths - corpus.prompt_lengths >= 2) & (corpus.lengths >= 4)
        usable = usable[long_enough[usable]]
        groups = np.array([features.group_of(int(row)) for row in corpus.offsets[usable]], np.int64)
        self.members = [usable[groups == group] for group in range(len(features.groups))]
        self.per_epoch = sum(len(members) // options.batch for members in self.members)
        if not self.per_epoch:
            raise TrainError(
                f"{len(usable)} usable conversations are too few for a batch of {options.batch}: add prompts"
            )
        self.corpus, self.features, self.options = corpus, features, options
        self.last = drafter.config.feature_size
        self.proposable = np.zeros(drafter.config.vocab_size, bool)
        self.proposable[drafter.d2t.cpu().numpy()] = True

    def order(self, epoch: int) -> list[tuple[int, NDArray[np.int64]]]:
        """per_epoch times (group, [batch] conversations)."""
        rng = np.random.default_rng((self.options.seed, 6, epoch))
        batches = []
        # There and back: an epoch begins with the group that ended the last one, whose features are there.
        for group in list(range(len(self.members)))[:: -1 if epoch % 2 else 1]:
            batches += [(group, rows) for rows in self._shuffled(self.members[group], rng)]
        return batches

    def _shuffled(self, members: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """[n, batch]: shuffled, then grouped by like prompt lengths so that little is padding."""
        size = self.options.batch
        shuffled = rng.permutation(members)[: len(members) // size * size]
        parts = [shuffled[i : i + 16 * size] for i in range(0, len(shuffled), 16 * size)]
        alike = [part[np.argsort(self.corpus.prompt_lengths[part], kind="stable")] for part in parts]
        return rng.permutation(np.concatenate([*alike, np.zeros(0, np.int64)]).reshape(-1, size))

    def batch(self, rows: NDArray[np.int64]) -> Windows:
        """Pad the conversations `rows` into one batch."""
        offsets, window = self.corpus.offsets, self.options.window
        # A window keeps the answer's first part and as much of the prompt before it as fits in half of it.
        firsts = np.maximum(0, self.corpus.prompt_lengths[rows] - window // 2)
        spans = np.minimum(self.corpus.lengths[rows] - firsts, window + 1) - 1  # pairs (f[t], x[t+1])
        size = int(spans.max())
        width = self.features.feature_size
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
            torch.from_numpy(features[:, 1:, -self.last :]),
            torch.from_numpy(answer),
            max(0, start - self.options.unroll),
        )

    def stream(self, step: int, hold: Callable[[int], None]) -> Iterator[tuple[int, Windows]]:
        """(step, batch) from `step` on, without end.  hold(group) is called before the features of a group are read."""
        held: int | None = None
        while True:
            epoch, index = divmod(step, self.per_epoch)
            for group, rows in self.order(epoch)[index:]:
                if group != held:
                    hold(group)
                    held = group
                yield step, self.batch(rows)
                step += 1


def unrolled_loss(drafter: Drafter, windows: Windows, options: FitOptions) -> tuple[Tensor, StepReport]:
    """The loss to minimise (a scalar) and what to show of it."""
    start = windows.start
    answer = windows.answer[:, start:]
    following = windows.following[:, start:][answer]  # [rows, D]
    teacher, truth = _teacher(drafter, following, options.teacher_top_k)
    caches: list[Any] = [[] for _ in drafter.layers]
    lend = max(0, start - 1)  # the row before `start` is the first parent of step 1
    g = drafter.step(drafter.read(windows.features), windows.tokens, caches, lend=lend)
    tokens = windows.tokens[:, start:]
    own, before = g[:, start - lend :], g[:, :1] if start else torch.zeros_like(g[:, :1])
    total = g.new_zeros(())
    reports = []
    valid = _valid_rows(answer, options.unroll)
    for j in range(options.unroll):
        if j:
            shifted = torch.cat([before if j == 1 else torch.zeros_like(before), own[:, :-1]], 1)
            own = drafter.step(shifted, tokens, caches, start)
        losses, top = _HeadLoss.apply(own[answer], drafter.head, teacher)  # type: ignore[no-untyped-call]  # torch
        if options.regression:
            distance = F.smooth_l1_loss(own[answer], following, reduction="none").mean(-1)
            losses = losses + options.regression * distance
        usable = valid[j]
        total = total + options.decay**j * (losses * usable).sum() / usable.sum().clamp(min=1)
        reports.append(float((top == truth)[usable].float().mean()) if usable.any() else float("nan"))
    return total, StepReport(float(total.detach()), tuple(reports), int(answer.sum()))


@torch.no_grad()
def _teacher(drafter: Drafter, following: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The target's probabilities over the draft vocabulary [rows, K], and its best token there [rows]."""
    logits = drafter.logits(following)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.softmax(logits, -1), logits.argmax(-1)


def _valid_rows(answer: Tensor, unroll: int) -> list[Tensor]:
    """Per step j: which answer rows have j drafted ancestors inside the slice.  answer: [B, T]."""
    position = torch.arange(answer.shape[1], device=answer.device).expand_as(answer)[answer]
    return [position >= j for j in range(unroll)]


def learning_rate(step: int, share: float, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` updates, and a linear fall to zero with the share of the run done."""
    return peak * min(1.0, (step + 1) / max(1, warmup)) * max(0.0, 1.0 - share)


def make_optimizers(drafter: Drafter, options: FitOptions) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; each parameter group says its highest learning rate as `peak`."""
    muon = options.optimizer == "muon"
    matrices = [p for p in drafter.parameters() if p.ndim == 2 and muon]
    rest = [p for p in drafter.parameters() if p.ndim != 2 or not muon]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": rest, "peak": options.learning_rate}], betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
    ]
    if matrices:
        group = {"params": matrices, "peak": options.learning_rate}
        made.append(Muon([group], weight_decay=options.weight_decay))
    return made
