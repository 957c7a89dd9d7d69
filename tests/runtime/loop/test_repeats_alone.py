"""A pair without a drafter drafts repeated text, by itself and under a scheduler, and changes no token."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.engine import Engine
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedTarget
from dovetail.runtime.tree.limits import TreeLimits

pytestmark = pytest.mark.usefixtures("quick_costs")
PROMPT = "to be, or not to be, or not to be, or not"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize(
    "tree", [None, TreeLimits(), TreeLimits(width=6, depth=1, top_k=1, lookup=8), TreeLimits(width=24, lookup=24)]
)
def test_repeats_alone_change_no_token(tiny_pair: Path, tree: TreeLimits | None, sampling: Any) -> None:
    with Engine.from_pretrained(tiny_pair, tree=tree) as engine:
        assert engine.drafter_device is None
        drafted = engine.generate(PROMPT, 120, raw=True, **sampling)
        plain = engine.generate(PROMPT, 120, raw=True, speculate=False, **sampling)
    assert drafted.token_ids == plain.token_ids and plain.metrics.drafted == 0
    assert drafted.metrics.drafted > 0 or tree is None


@pytest.mark.parametrize("scheduled", [False, True])
def test_repeats_alone_are_accepted(scheduled: bool) -> None:
    """A greedy text of a Markov chain soon goes round in a circle."""
    limits = TreeLimits(width=16, depth=1, lookup=15)
    ms = np.array([[10.0, 10.5, 12.0]])
    costs = Costs(Curve.fit((0,), (1, 16, 64), ms), None)
    request = Request((1, 2), 200, limits=limits, scheduler=Scheduler(costs) if scheduled else None)
    sequence, meter = Sequence(ScriptedTarget(MarkovLogits(50))), Meter(clock=count().__next__)
    tokens = [token for step in decode(sequence, request, meter) for token in step.tokens]
    plain = [token for step in decode(sequence, replace(request, limits=None), Meter()) for token in step.tokens]
    assert tokens == plain and meter.metrics().acceptance_length > 4


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("tree", [None, TreeLimits()])
def test_earlier_texts_change_no_token(tiny_pair: Path, tree: TreeLimits | None, sampling: Any) -> None:
    with Engine.from_pretrained(tiny_pair, tree=tree, lookup_cache=1000) as engine:
        for prompt in (PROMPT, "to sleep", PROMPT, f"{PROMPT} to sleep"):
            drafted = engine.generate(prompt, 60, raw=True, **sampling)
            plain = engine.generate(prompt, 60, raw=True, speculate=False, **sampling)
            assert drafted.token_ids == plain.token_ids


def test_without_repeats_nothing_is_drafted(tiny_pair: Path) -> None:
    with Engine.from_pretrained(tiny_pair, tree=TreeLimits(lookup=0)) as engine:
        assert engine.generate(PROMPT, 40, raw=True).metrics.drafted == 0


def test_a_machine_is_measured_once_for_a_target_alone(tiny_pair: Path, quick_costs: Path) -> None:
    for _ in range(2):
        with Engine.from_pretrained(tiny_pair) as engine:
            assert engine.scheduler is not None
        files = list((quick_costs / "costs").iterdir())
    assert len(files) == 1 and '"draft": null' in files[0].read_text()
