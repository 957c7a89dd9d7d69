"""A small language model as the drafter of a pair: command line, graphs, sessions on both devices, text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from dovetail.exporter.cli.main import main
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.pair.manifest import read_manifest

TREE = TreeLimits(width=10, depth=4, top_k=2, lookup=0)
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def pair(tiny_pair: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pair` with a copy of its own target as the drafter, added by the command line."""
    pair = shutil.copytree(tiny_pair, tmp_path_factory.mktemp("language") / "tiny")
    assert main(["drafter", str(pair), "--checkpoint", str(tiny_llama)]) == 0
    return pair


def test_the_pair_passes_its_check(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(pair)]) == 0
    assert "a language model (LlamaForCausalLM)" in capsys.readouterr().out
    facts = read_manifest(pair).needed_drafter
    assert facts.reads_tokens and facts.blocks == 2 and not facts.feature_layers


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_its_text_is_that_of_plain_decoding(pair: Path, sampling: dict[str, Any]) -> None:
    with Engine.from_pretrained(pair, drafter_device="cpu", tree=TREE) as engine:
        drafted = engine.generate(PROMPT, max_new_tokens=80, raw=True, **sampling)
        plain = engine.generate(PROMPT, max_new_tokens=80, raw=True, speculate=False, **sampling)
    print(drafted.metrics)
    assert drafted.token_ids == plain.token_ids
    assert drafted.metrics.acceptance_length > 4
