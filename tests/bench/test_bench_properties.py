"""What precision and groups spoil is read off a text; other engines are given what Dovetail gives its target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="a corpus is the exporter's")

from dovetail.exporter.train.corpus import Corpus
from dovetail.runtime.target.properties import FLOAT32


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
    rows = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    cells = {tuple(cell.strip() for cell in row[:2]): [cell.strip() for cell in row[2:]] for row in rows}
    assert len(rows) == len(properties.VARIANTS) + checkpoint and all(len(row) == 11 for row in rows)
    refused = {name for name, row in cells.items() if row[0] == "refused"}
    assert result.stderr.count("the target failed on the CPU") == len(refused) and all(
        name[0] == "bf16" for name in refused
    )
    assert all(all(row[3:]) for name, row in cells.items() if name not in {*refused, ("checkpoint", "")})
    far = {name: float(row[2]) for name, row in cells.items() if name not in refused}
    # Which of the others is nearer depends on the CPU: with AMX bfloat16 may be.
    assert far["f32", "0"] < min(far[name] for name in (("f32", "32"), ("bf16", "32")) if name in far)
    assert (far["f32", "0"] > 0) == checkpoint


def test_what_openvino_genai_is_given_is_what_dovetail_gives_its_target(bench_script) -> None:
    assert bench_script("peer_worker").SAME == FLOAT32
