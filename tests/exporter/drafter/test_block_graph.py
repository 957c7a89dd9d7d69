"""A DFlash drafter's export: graphs that match torch, in a pair that is whole and writes the target's text."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

import onnx

from dovetail.exporter.cli.main import main
from dovetail.exporter.drafter import block_graph
from dovetail.exporter.drafter.block_parity import check_block_parity
from dovetail.exporter.drafter.export import FILES, load_drafter, save
from dovetail.exporter.drafter.parity import TOLERANCES, Tolerance, check_static
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.models.dflash import DFlash
from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.runtime.drafter.vram import BUCKETS, plan_pair
from dovetail.runtime.errors import IntegrityError, ManifestError, SourceError
from dovetail.runtime.pair.manifest import parse_manifest, read_manifest

WIDTH, VOCABULARY = 32, 264


def module_of(folder: Path, dflash: Any, **settings: Any) -> DFlash:
    torch.manual_seed(1)
    target = {"hidden_size": WIDTH, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    parts = TargetParts(target, torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY, WIDTH))
    module = find_checkpoint(dflash.write(folder, dflash.Flags(**settings))).read(parts).eval()
    assert isinstance(module, DFlash)
    return module


@pytest.mark.parametrize(
    "settings",
    [
        {"causal": True, "block": 8, "taps": (1,)},
        {"sliding": (True, False), "window": 9, "draft": 50, "from_anchor": True},
        {
            "layout": "speculators",
            "sliding": (False, True),
            "window": 9,
            "own_rows": True,
            "qk_norm": False,
            "draft": 60,
        },
    ],
    ids=["causal", "windows", "speculators"],
)
def test_the_float32_graph_is_the_module(settings: dict[str, Any], dflash: Any, tmp_path: Path) -> None:
    module = module_of(tmp_path / "checkpoint", dflash, **settings)
    file = tmp_path / "graph.onnx"
    save(block_graph.to_onnx(module, torch.float32, slots=64, top_k=10), file)
    check_static(file, tokens=8, slots=64 + 256)
    report = check_block_parity(module, file, Tolerance(logprob=1e-4, feature=0), slots=64)
    assert not report.failures and report.top1 == report.topk == 1


def test_the_pair_is_whole_and_says_what_its_drafter_is(
    dflash_pair: Path, dflash: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = check_pair_folder(dflash_pair)
    facts = manifest.needed_drafter
    assert (facts.positions, facts.blocks, facts.feature_layers, facts.noise) == (5, 2, (0,), True)
    assert (facts.num_kv_heads, facts.head_size, facts.tree_slots) == (2, 16, 64)
    record = manifest.provenance["drafter"]
    assert (record["format"], record["description"]) == ("dflash", "a DFlash drafter")
    assert main(["check", str(dflash_pair)]) == 0
    assert "a DFlash drafter" in capsys.readouterr().out


@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_bucket_of_the_cuda_graph_is_static(dflash_pair: Path, bucket: int) -> None:
    check_static(dflash_pair / "drafter" / FILES["cuda"], tokens=bucket, slots=64 + 256)


def test_the_cpu_graph_is_int8_throughout(dflash_pair: Path) -> None:
    graph = onnx.load(dflash_pair / "drafter" / FILES["cpu"], load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMulNBits"] == 2 * 7 + 1 and not kinds["Gemm"]


@pytest.mark.parametrize("broken", ["layers.1.self_attn.k_proj", "layers.0.mlp.up_proj", "hidden_norm"])
def test_parity_sees_a_wrong_weight(dflash_pair: Path, tiny_dflash: Path, broken: str) -> None:
    module = load_drafter(tiny_dflash, dflash_pair / "target")
    assert isinstance(module, DFlash)
    with torch.no_grad():
        parameter = module.get_parameter(f"{broken}.weight")
        parameter.copy_(parameter.flip(0))
    file = dflash_pair / "drafter" / FILES["cuda"]
    assert check_block_parity(module, file, TOLERANCES["float16"], slots=64).failures


def test_a_fitted_copy_is_the_same_over_what_it_keeps(dflash: Any, tmp_path: Path) -> None:
    whole = module_of(tmp_path, dflash)
    kept = torch.arange(VOCABULARY) % 3 > 0
    small = whole.narrowed(kept)
    assert small.shape.draft_vocab_size == small.config.draft_vocab_size == int(kept.sum())
    features, token = torch.randn(5, WIDTH), torch.tensor([3])
    with torch.no_grad():
        torch.testing.assert_close(small(features, token), whole(features, token)[:, kept])


def test_the_plan_counts_the_buffers_of_blocks(dflash_pair: Path) -> None:
    manifest = read_manifest(dflash_pair)
    facts, planned = manifest.needed_drafter, plan_pair(manifest)
    assert planned.state == 2 * (64 + planned.context) * 2 * 2 * 16 * 2  # layers, rows, keys and values in float16
    per_bucket = [3 * 8 + n * 8 + n * WIDTH * 2 + 5 * facts.top_k * 8 for n in BUCKETS]
    assert planned.rows == sum(per_bucket) + 5 * facts.draft_vocab_size * 4


def test_another_mask_token_is_refused_and_the_pair_stays(
    tiny_pair: Path, dflash: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_pair, tmp_path / "pair")
    checkpoint = dflash.write(tmp_path / "checkpoint", dflash.Flags(vocabulary=263, depth=2, taps=(0,), mask=263))
    assert main(["drafter", str(copy), "--checkpoint", str(checkpoint)]) == SourceError.exit_code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "mask_token_id 263 is outside the target's vocabulary of 263" in said
    assert read_manifest(copy) == read_manifest(tiny_pair)


def test_a_manifest_with_another_number_of_positions_is_refused(dflash_pair: Path, tmp_path: Path) -> None:
    raw = json.loads((dflash_pair / "dovetail.json").read_text())
    raw["drafter"]["positions"] = 63
    with pytest.raises(ManifestError, match=r"drafter\.positions 63 is out of range"):
        parse_manifest(raw)
    copy = shutil.copytree(dflash_pair, tmp_path / "pair")
    raw["drafter"]["positions"] = 4
    (copy / "dovetail.json").write_text(json.dumps(raw))
    with pytest.raises(IntegrityError, match="export the drafter again"):
        check_pair_folder(copy)


def test_older_manifests_have_tree_graphs(tiny_full_pair: Path) -> None:
    raw = json.loads((tiny_full_pair / "dovetail.json").read_text())
    assert raw["drafter"].pop("positions") == 0
    assert parse_manifest(raw).needed_drafter.positions == 0
    assert np.all([name in raw["drafter"]["files"] for name in ("cuda", "cpu")])
