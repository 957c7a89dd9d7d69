"""Stores the target's features of a training corpus on disk in float16, within a disk budget.

Axes: T tokens of the corpus, D feature size. 2 * T * D bytes: 300 MB for 260,000 tokens of SmolLM2.

If the features of all parts of a corpus fit into the budget, the target computes them once. If
not, parts form groups that fit. The fit takes one group after the other, and the target computes a
group's features again for each of its turns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dovetail.exporter.train.corpus import Corpus
from dovetail.models.drafter import DraftModel
from dovetail.models.fusion import TapMix
from dovetail.runtime.errors import TrainError
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel

FLOAT16_MAX = float(np.finfo(np.float16).max)
OpenModel = Callable[[], PagedModel]
PASS_TOKENS = 1024  # tokens per pass; longer passes are no faster on the CPU


@dataclass(frozen=True)
class Part:
    """Some of a run's conversations, with their features in one file `name`.f16."""

    name: str
    corpus: Corpus


def feature_bytes(corpus: Corpus, feature_size: int) -> int:
    """Bytes of disk that the features of `corpus` take."""
    return 2 * len(corpus.tokens) * feature_size


class FeatureStore:
    """Rows [T, D] float16 of all parts in order; one group of parts at a time is on disk.

    folder: holds one file per part, `NAME.f16`. open_model: opens the target for missing features.
    budget_bytes: disk for the files. Raises TrainError if one part alone exceeds the budget.
    """

    def __init__(
        self, folder: Path, parts: Sequence[Part], feature_size: int, open_model: OpenModel, budget_bytes: float
    ):
        self.folder, self.feature_size, self.open_model = folder, feature_size, open_model
        self.parts = [part for part in parts if len(part.corpus)]
        sizes = [feature_bytes(part.corpus, feature_size) for part in self.parts]
        self.starts = np.concatenate([[0], np.cumsum([len(part.corpus.tokens) for part in self.parts])])
        self.groups = _groups(sizes, budget_bytes)
        self.bytes = sum(sizes)
        self._rows: dict[int, NDArray[np.float16]] = {}  # by part of the held group
        self._held: int | None = None
        self.largest = max((sum(sizes[part] for part in group) for group in self.groups), default=0)
        folder.mkdir(parents=True, exist_ok=True)

    def hold(self, group: int, progress: Callable[[int], None]) -> None:
        """Bring one group's features to disk and remove the others; can resume within a part.

        progress: called with the number of finished tokens of the group.
        """
        if group == self._held:
            return
        self._held = None
        wanted = self.groups[group]
        for index, part in enumerate(self.parts):
            if index not in wanted:
                self._rows.pop(index, None)
                (self.folder / f"{part.name}.f16").unlink(missing_ok=True)
        model: PagedModel | None = None
        done = 0
        for index in wanted:
            corpus, file = self.parts[index].corpus, self.folder / f"{self.parts[index].name}.f16"
            if not file.exists() or file.stat().st_size != feature_bytes(corpus, self.feature_size):
                model = model or self.open_model()
                for tokens in write_features(model, corpus, file):
                    progress(done + tokens)
            if index not in self._rows:
                self._rows[index] = np.memmap(file, np.float16, "r", shape=(len(corpus.tokens), self.feature_size))
            done += len(corpus.tokens)
            progress(done)
        self._held = group

    def __getitem__(self, rows: slice) -> NDArray[np.float16]:
        """Rows of one conversation. The store must hold the group of the conversation's part."""
        part = self._part_of(rows.start)
        start = int(self.starts[part])
        return self._rows[part][rows.start - start : rows.stop - start]

    def group_of(self, row: int) -> int:
        part = self._part_of(row)
        return next(index for index, group in enumerate(self.groups) if part in group)

    def _part_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1


def read(drafter: DraftModel, rows: Tensor) -> Tensor:
    """The drafter's feature f from a store's rows: outputs of tapped blocks, then the last feature."""
    mix = drafter.mix
    return drafter.read(rows[..., : len(mix.layers) * mix.target_size] if isinstance(mix, TapMix) else rows)


def check_room(stores: Sequence[FeatureStore]) -> None:
    """Raise TrainError if the disk lacks room for each store's largest group; files there count."""
    needed = sum(store.largest for store in stores)
    present = sum(file.stat().st_size for store in stores for file in store.folder.glob("*.f16"))
    free = shutil.disk_usage(stores[0].folder).free
    if needed > free + present:
        raise TrainError(
            f"features need {needed / 1e6:.0f} MB in {stores[0].folder.parent}, {(free + present) / 1e6:.0f} MB are "
            "free: make room, or give a smaller --disk, and --resume"
        )


def _groups(sizes: Sequence[int], budget_bytes: float) -> list[list[int]]:
    """Groups of parts in order; a new group begins when the budget is full."""
    groups: list[list[int]] = []
    room = 0.0
    for part, size in enumerate(sizes):
        if size > budget_bytes:
            raise TrainError(
                f"features of one part need {size / 1e9:.3f} GB, --disk allows {budget_bytes / 1e9:.3f}: "
                f"give --disk {size / 1e9 + 0.001:.3f} or more, and --resume"
            )
        if not groups or size > room:
            groups.append([])
            room = budget_bytes
        groups[-1].append(part)
        room -= size
    return groups


def write_features(model: PagedModel, corpus: Corpus, file: Path) -> Iterator[int]:
    """Compute f for every token with the model that verifies; yield the number of finished tokens.

    A resumed call keeps the whole passes in `file`. The other passes are then the same as without
    an interruption, with the same rounding. Raises OSError, for a full disk as well.
    """
    offsets = corpus.offsets
    size = 2 * model.feature_size  # bytes of a token
    present = file.stat().st_size // size if file.exists() else 0
    done = 0
    while done < len(corpus) and offsets[last := _pass_end(corpus, done)] <= present:
        done = last
    with file.open("ab") as out:
        out.truncate(int(offsets[done]) * size)
        while done < len(corpus):
            last = _pass_end(corpus, done)
            out.write(to_float16(_features(model, corpus, done, last)).tobytes())
            out.flush()
            os.fsync(out.fileno())
            done = last
            yield int(offsets[done])


def to_float16(features: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round to float16 and clip to its range, because some blocks have a few very large values."""
    return features.clip(-FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def _pass_end(corpus: Corpus, first: int) -> int:
    """The end of the conversations from `first` on that fill one pass."""
    last, total = first, 0
    while last < len(corpus) and (last == first or total + corpus.lengths[last] <= PASS_TOKENS):
        total += int(corpus.lengths[last])
        last += 1
    return last


def _features(model: PagedModel, corpus: Corpus, first: int, last: int) -> NDArray[np.float32]:
    """The features of a run of conversations, which share one pass."""
    longest, offsets = int(corpus.lengths[first:last].max()), corpus.offsets
    target = OpenVINOTarget(model, longest, exact=False, sequences=last - first)
    texts = {target.open(): corpus.tokens[offsets[i] : offsets[i + 1]] for i in range(first, last)}
    passes = target.verify({}, texts)
    for seq in texts:
        target.close(seq)
    return np.concatenate([passes[seq].features for seq in texts])
