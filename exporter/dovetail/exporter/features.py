"""The target's features of a corpus, written once to disk in float16.

Axes: T tokens of the corpus, D feature size.  2 * T * D bytes: 300 MB for 260,000 tokens of SmolLM2.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import TrainError
from dovetail.runtime.paged import BLOCK, Batch, PagedModel

from .corpus import Corpus

PASS_TOKENS = 1024  # tokens per pass: past this the CPU gains nothing


def feature_bytes(corpus: Corpus, feature_size: int) -> int:
    """Disk that `write_features` takes."""
    return 2 * len(corpus.tokens) * feature_size


def write_features(
    model: PagedModel, corpus: Corpus, path: Path, progress: Callable[[int], None]
) -> NDArray[np.float16]:
    """Compute f for every token of every conversation, from the model that will verify.

    Returns a read-only memory map [T, D] float16.  Resumable: `path`.progress says how many conversations
    are done.  Raises TrainError when the disk has no room, before anything is written.
    """
    shape = (len(corpus.tokens), model.feature_size)
    mark = path.with_name(path.name + ".progress")
    done = int(json.loads(mark.read_text())) if mark.exists() and path.exists() else 0
    if not done:
        need, free = feature_bytes(corpus, model.feature_size), shutil.disk_usage(path.parent).free
        if need > free:
            raise TrainError(
                f"features need {need / 1e6:.0f} MB in {path.parent}, {free / 1e6:.0f} MB are free: "
                "make room or train on fewer prompts"
            )
    out = np.memmap(path, np.float16, "r+" if done else "w+", shape=shape)
    offsets = corpus.offsets
    while done < len(corpus):
        group = _group(corpus, done)
        out[offsets[done] : offsets[group]] = _features(model, corpus, done, group)
        done = group
        out.flush()
        temporary = mark.with_name(mark.name + ".tmp")
        temporary.write_text(json.dumps(done))
        os.replace(temporary, mark)
        progress(int(offsets[done]))
    return np.memmap(path, np.float16, "r", shape=shape)


def _group(corpus: Corpus, first: int) -> int:
    """The end of a run of conversations that fill one pass."""
    last, total = first, 0
    while last < len(corpus) and (last == first or total + corpus.lengths[last] <= PASS_TOKENS):
        total += int(corpus.lengths[last])
        last += 1
    return last


def _features(model: PagedModel, corpus: Corpus, first: int, last: int) -> NDArray[np.float32]:
    lengths = corpus.lengths[first:last]
    begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    needed = -(-lengths // BLOCK)
    model.reserve(int(needed.sum()))
    offsets = corpus.offsets
    _, features = model.run(
        Batch(
            tokens=corpus.tokens[offsets[first] : offsets[last]],
            positions=np.concatenate([np.arange(n) for n in lengths]).astype(np.int64),
            past=np.zeros(last - first, np.int32),
            begins=begins,
            blocks=np.arange(int(needed.sum()), dtype=np.int32),
            block_begins=np.concatenate([[0], np.cumsum(needed)]).astype(np.int32),
            wanted=np.array([begins[-1] - 1], np.int64),
        )
    )
    return features
