"""What precision and groups spoil is read off a text; other engines are given what Dovetail gives its target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="a corpus is the exporter's")

from dovetail.exporter.corpus import Corpus
from dovetail.runtime.paged import FLOAT32


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_text_is_read_with_every_property(
    bench_script, tiny_full_pair: Path, tiny_llama: Path, tmp_path: Path, checkpoint: bool
) -> None:
    lengths = np.array([300, 300])
    tokens = np.random.default_rng(0).integers(1, 60, 600)
    Corpus(tokens, lengths, lengths - 10).save(tmp_path / "corpus.npz")
    properties = bench_script("properties")
    arguments = [str(tiny_full_pair), str(tmp_path / "corpus.npz"), "--windows", "2", "--samples", "1"]
    arguments += ["--checkpoint", str(tiny_llama)] if checkpoint else []
    result = CliRunner().invoke(properties.main, arguments, catch_exceptions=False)
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(properties.VARIANTS) + checkpoint and all(len(row) in (5, 11) for row in rows)
    far = {tuple(row[:2]): float(row[4]) for row in rows if row[0] != "checkpoint"}
    # Which of the others is nearer depends on the CPU: with AMX bfloat16 may be.
    assert far["f32", "0"] < min(far["f32", "32"], far["bf16", "32"]) and (far["f32", "0"] > 0) == checkpoint


def test_what_openvino_genai_is_given_is_what_dovetail_gives_its_target(bench_script) -> None:
    assert bench_script("peer_worker").SAME == FLOAT32
