"""`inspect` tells a pair's facts, and calls a pair that is not whole what it is: one line, exit code 3."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from dovetail.runtime.calibration import Calibration, DepthCalibration
from dovetail.runtime.cli.pairs import DEFAULT_PAIR
from dovetail.runtime.manifest import file_entry, read_manifest, write_manifest
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


def test_a_calibration_is_a_line_per_depth(invoke, pair: Path) -> None:
    fits = [DepthCalibration(1.5, 0.2, 900, 0.04, error, (0.0, 1.0), (900,), (0.1,), (0.2,)) for error in (0.01, 0.02)]
    Calibration(10, tuple(fits)).save(pair / "drafter")
    unlisted = json.loads(invoke("inspect", str(pair), "--json").stdout)
    assert unlisted["calibration"] is None  # a file without a digest is not the pair's

    manifest, name = read_manifest(pair), "drafter/calibration.json"
    write_manifest(pair, replace(manifest, files={**manifest.files, name: file_entry(pair / name)}))
    facts = json.loads(invoke("inspect", str(pair), "--json").stdout)
    assert [depth["error_after"] for depth in facts["calibration"]["depths"]] == [0.01, 0.02]
    lines = [line for line in invoke("inspect", str(pair)).stdout.splitlines() if "calibration error" in line]
    assert [line.split()[:2] for line in lines] == [["depth", "1"], ["depth", "2"]]
    assert "0.0400, 0.0200 after the fit, over 900 candidates" in lines[1]


def test_a_calibration_that_cannot_be_read_is_exit_3(invoke, pair: Path) -> None:
    manifest, name = read_manifest(pair), "drafter/calibration.json"
    (pair / name).write_text("{")
    write_manifest(pair, replace(manifest, files={**manifest.files, name: file_entry(pair / name)}))
    result = invoke("inspect", str(pair))
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1) and "calibration.json" in result.stderr


def test_weights_without_a_digest_have_no_costs(invoke, pair: Path) -> None:
    manifest = read_manifest(pair)
    files = {name: entry for name, entry in manifest.files.items() if not name.endswith(".bin")}
    write_manifest(pair, replace(manifest, files=files))
    result = invoke("inspect", str(pair), "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["costs"] is None
