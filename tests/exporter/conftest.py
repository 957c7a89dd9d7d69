"""The tiny target compiled, and conversations that it wrote: what a drafter is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.writer import BatchWriter
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.target.paged import PagedModel


@pytest.fixture(scope="session")
def model(tiny_target: Path) -> PagedModel:
    return PagedModel(tiny_target / "openvino_model.xml")


@pytest.fixture(scope="session")
def corpus_file(model: PagedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 greedy conversations of the tiny target."""
    rng = np.random.default_rng(0)
    requests = [Request(tuple(map(int, rng.integers(0, 200, 6))), 40) for _ in range(24)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.npz"
    Corpus.of(BatchWriter(model, [], slots=8, max_length=64).write(requests, rng)).save(path)
    return path
