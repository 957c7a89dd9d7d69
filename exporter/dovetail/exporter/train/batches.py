"""Makes seeded batches of windows from conversations; a drafter's update reads one batch.

Axes: B conversations of a batch, T positions, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.drafters.trained import Trainee
from dovetail.exporter.train.features import FeatureStore
from dovetail.exporter.train.plan import FitOptions
from dovetail.runtime.errors import TrainError


@dataclass(frozen=True)
class Windows:
    """One batch, padded right.

    features: [B, T, (L + 1) * D] float32, the L tapped blocks and f[t]. tokens: [B, T] x[t+1].
    following: [B, T, D] f[t+1], from which the teacher's logits come.
    answer: [B, T] bool, positions with x[t+2] in the answer and in the draft vocabulary.
    start: first position that any conversation of the batch needs after step 0.
    """

    features: Tensor
    tokens: Tensor
    following: Tensor
    answer: Tensor
    start: int

    def to(self, device: str) -> Windows:
        names = ("features", "tokens", "following", "answer")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class Batches:
    """Endless seeded batches by step number, so a resumed run sees the batches of an unbroken run.

    An epoch takes the store's groups in turn, and shuffles the conversations within each group.
    usable: indices of the conversations to train on.
    """

    def __init__(
        self, corpus: Corpus, features: FeatureStore, usable: NDArray[np.int64], trainee: Trainee, options: FitOptions
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
        self.last = trainee.teacher.shape[1]
        self.proposable = np.zeros(trainee.drafter.shape.vocab_size, bool)
        self.proposable[trainee.drafter.d2t.cpu().numpy()] = True

    def order(self, epoch: int) -> list[tuple[int, NDArray[np.int64]]]:
        """The batches of an epoch: a list [per_epoch] of (group, conversations [batch])."""
        rng = np.random.default_rng((self.options.seed, 6, epoch))
        batches = []
        # Every other epoch reverses the groups: it begins with the last group, whose features are
        # on disk.
        for group in list(range(len(self.members)))[:: -1 if epoch % 2 else 1]:
            batches += [(group, rows) for rows in self._shuffled(self.members[group], rng)]
        return batches

    def _shuffled(self, members: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Shuffled batches [n, batch] of similar prompt lengths, which need little padding."""
        size = self.options.batch
        shuffled = rng.permutation(members)[: len(members) // size * size]
        parts = [shuffled[i : i + 16 * size] for i in range(0, len(shuffled), 16 * size)]
        alike = [part[np.argsort(self.corpus.prompt_lengths[part], kind="stable")] for part in parts]
        return rng.permutation(np.concatenate([*alike, np.zeros(0, np.int64)]).reshape(-1, size))

    def batch(self, rows: NDArray[np.int64]) -> Windows:
        offsets, window = self.corpus.offsets, self.options.window
        # At most half of a window is the end of the prompt; the answer's beginning fills the rest.
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
        """Yield (step, batch) from `step` on, without end, after a call of hold() for a new group."""
        held: int | None = None
        while True:
            epoch, index = divmod(step, self.per_epoch)
            for group, rows in self.order(epoch)[index:]:
                if group != held:
                    hold(group)
                    held = group
                yield step, self.batch(rows)
                step += 1
