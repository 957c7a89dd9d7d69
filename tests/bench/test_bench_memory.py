"""The benchmark of memory: real processes of a tiny pair, and a command whose peak is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from dovetail.runtime.pair.manifest import read_manifest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**20


def test_a_pair_is_measured_alone_and_with_several_texts(
    tiny_full_pair: Path, bench_script: Callable[[str], ModuleType]
) -> None:
    result = CliRunner().invoke(bench_script("memory").main, ["pair", str(tiny_full_pair)])
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.output.splitlines()[2:]]
    assert [row[1] for row in rows] == ["1", "4"]
    for row in rows:
        peak, (anonymous, _) = float(row[3]), map(float, row[5].split(","))
        assert 50 < anonymous < peak  # Python and the engines alone
        assert float(row[7]) <= peak


def test_sizes_are_those_of_the_files_and_of_all_kv(
    tiny_full_pair: Path, bench_script: Callable[[str], ModuleType]
) -> None:
    manifest = read_manifest(tiny_full_pair)
    weights, drafter, kv = bench_script("memory").sizes(tiny_full_pair, manifest, 10)
    assert weights == (tiny_full_pair / "target/openvino_model.bin").stat().st_size
    graph = tiny_full_pair / manifest.needed_drafter.files["cpu"]
    assert drafter == sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    facts, config = manifest.needed_drafter, json.loads((tiny_full_pair / "target/config.json").read_text())
    heads, size = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    own = 2 * facts.blocks * facts.num_kv_heads * facts.head_size * 4
    assert kv == 10 * (2 * manifest.target.num_layers * heads * size * 2 + own)


def test_a_command_is_measured_by_its_stages_with_its_children(bench_script: Callable[[str], ModuleType]) -> None:
    child = f"held = bytearray({100 * MIB}); import time; time.sleep(1)"
    code = f"import subprocess, sys; print('big', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    found = bench_script("memory").watch([sys.executable, "-c", code])
    assert list(found.stages)[-1] == "big"
    assert 100 * MIB < found.hwm < 200 * MIB and found.stages["big"].anonymous > 100 * MIB
    assert found.stages["big"].seconds >= 0.9 and found.stages["start"].anonymous < 50 * MIB


def test_a_checkpoint_has_the_shape_it_is_asked_for(
    tmp_path: Path, tiny_full_pair: Path, bench_script: Callable[[str], ModuleType]
) -> None:
    torch = pytest.importorskip("torch", reason="a checkpoint is written")
    from transformers import AutoModelForCausalLM

    script = bench_script("memory")
    sizes = script.Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=300)
    script.write_checkpoint(tmp_path, sizes, tiny_full_pair / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2
    assert len({parameter.float().sum().item() for parameter in model.parameters() if parameter.dim() == 2}) == 16
