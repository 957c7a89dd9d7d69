"""The study of a drafter's noise counts hits by row, and takes the target's own draws."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch", reason="drafters are torch modules")

from dovetail.runtime.sampling.params import SamplingParams


def test_a_drafter_that_knows_the_target_hits_with_all_of_the_noise(bench_script: Callable[[str], ModuleType]) -> None:
    study = bench_script("noise")
    logits = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    ids, sampling = np.arange(64), SamplingParams(temperature=1.0)
    found = study.hits(logits, logits, ids, sampling)
    assert found.shape == (40, len(study.SHARES))
    assert (found[:, study.SHARES.index(1.0)] == 1).all() and found[:, study.SHARES.index(0.0)].mean() < 0.5
    assert study.hits(logits[:, ::-1], logits, ids, sampling).mean(0)[-1] < 1


def test_rows_are_by_surety_and_the_last_takes_the_best_of_each(bench_script: Callable[[str], ModuleType]) -> None:
    study = bench_script("noise")
    sure, unsure = [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1]
    found = np.zeros((3, len(study.SHARES)))
    found[0, 0] = found[1:, -1] = 1.0
    *_, low, high, every = study.table(np.array([sure, unsure, unsure], np.float32), found).splitlines()
    assert low.startswith("| 20 to 40% | 2 |") and low.endswith("| 1 |")
    assert high.startswith("| 80 to 100% | 1 |") and high.endswith("| 0 |")
    assert every.startswith("| all | 3 | 33.3% |") and every.endswith("| 100.0% with each row's best |")
