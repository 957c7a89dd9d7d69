"""`inspect` tells a pair's facts, and calls a pair that is not whole what it is: one line, exit code 3."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dovetail.runtime.cli.pairs import DEFAULT_PAIR
from dovetail.runtime.tree import TreeLimits


def test_json_holds_facts_sizes_and_memory(invoke, pair: Path) -> None:
    result = invoke("inspect", str(pair), "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["digests_ok"] is True
    assert facts["tree"] == asdict(TreeLimits())
    assert facts["target"]["vocab_size"] == 32 and facts["drafter"]["fusion"] == "dgf"
    # 2 layers, key and value, 2 KV heads of 4, 16 bits, 1,048,576 tokens of context
    assert facts["memory"]["target_kv_mb"] == 2 * 2 * 2 * 4 * 2
    assert set(facts["files"]) == {"target/openvino_model.bin", "target/config.json", "drafter/drafter.int8.onnx"}


def test_text_names_the_pair_and_its_tree(invoke, pair: Path) -> None:
    result = invoke("inspect", str(pair))
    assert result.exit_code == 0, result.output
    assert "tiny" in result.stdout and "width 10, depth 5, top-k 3" in result.stdout


def test_flipped_byte_is_one_line_and_exit_3(invoke, pair: Path) -> None:
    file = pair / "target/openvino_model.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    result = invoke("inspect", str(pair), "--json")
    assert result.exit_code == 3 and result.stdout == ""
    assert result.stderr.startswith("error: ") and "openvino_model.bin" in result.stderr
    assert result.stderr.count("\n") == 1


def test_folder_without_manifest_is_exit_3(invoke, tmp_path: Path) -> None:
    result = invoke("inspect", str(tmp_path))
    assert result.exit_code == 3
    assert "dovetail.json is missing" in result.stderr


def test_unknown_name_names_the_known_ones(invoke) -> None:
    result = invoke("inspect", "gpt-17")
    assert result.exit_code == 2
    assert "'gpt-17'" in result.stderr and DEFAULT_PAIR in result.stderr and result.stderr.count("\n") == 1


def test_unknown_config_leaves_the_kv_size_open(invoke, make_pair) -> None:
    result = invoke("inspect", str(make_pair(config="{}")), "--json")
    assert json.loads(result.stdout)["memory"]["target_kv_mb"] is None
