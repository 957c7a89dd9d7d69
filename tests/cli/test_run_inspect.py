"""`inspect` tells a pair's facts, and calls a pair that is not whole what it is: one line, exit code 3.

Costs that were measured are drawn: as bars, and with --plot in a file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dovetail.runtime.devices import webgpu
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.known import DEFAULT_PAIR
from dovetail.runtime.pair.manifest import file_entry, read_manifest, write_manifest
from dovetail.runtime.policy.calibration import Calibration, DepthCalibration
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tune.cost_cache import CostKey, Measured

COSTS = Costs(
    Curve((128, 1024), (1, 3, 8, 32), ((16.0, 17.0, 20.0, 40.0), (20.0, 21.0, 25.0, 60.0))),
    Curve((128, 1024), (1, 4, 128), ((1.5, 1.75, 15.0), (1.75, 2.5, 20.0))),
    switch_ms=8.0,
)


@pytest.fixture
def measured(pair: Path, cache: Path) -> Measured:
    """Costs of `pair` on this machine, in the cache."""
    known = Measured("tiny", CostKey.of(read_manifest(pair), "cpu", None), COSTS, 4.0, "2026-11-22T14:35:47+00:00")
    known.store()
    return known


def test_json_holds_facts_sizes_and_memory(invoke, pair: Path) -> None:
    result = invoke("inspect", str(pair), "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["digests_ok"] is True
    assert facts["tree"] == asdict(TreeLimits())
    assert facts["target"]["vocab_size"] == 32 and facts["drafter"]["kind"] is None
    # 2 layers, key and value, 2 KV heads of 4, 16 bits, 1,048,576 tokens of context
    assert facts["memory"]["target_kv_mb"] == 2 * 2 * 2 * 4 * 2
    assert set(facts["files"]) == {"target/openvino_model.bin", "target/config.json", "drafter/drafter.int8.onnx"}


def test_what_a_gpu_would_be_asked_for_is_shown_with_and_without_a_limit(invoke, tiny_full_pair: Path) -> None:
    plans = json.loads(invoke("inspect", str(tiny_full_pair), "--json").stdout)["vram"]
    said = invoke("inspect", str(tiny_full_pair)).stdout
    small = json.loads(invoke("inspect", str(tiny_full_pair), "--vram", "50MB", "--json").stdout)["vram"]
    ways = {"cuda": ("CUDA", "cuda"), "webgpu": ("WebGPU", "webgpu"), "openvino-gpu": ("OpenVINO's GPU", "opencl")}
    assert plans.keys() == small.keys() == ways.keys()
    for gpu, (name, itself) in ways.items():
        plan, parts = plans[gpu], ("weights", "state", "rows", "workspace", itself)
        assert sum(plan[f"{part}_mb"] for part in parts) == pytest.approx(plan["total_mb"], abs=0.3)
        assert re.search(rf"^drafter on {name} +{re.escape(plan['text'])}$", said, re.MULTILINE)
        assert "does not fit 47.7 MiB" in small[gpu]["problem"] and plan["text"] in small[gpu]["problem"]
    result = invoke("inspect", str(tiny_full_pair), "--vram", "big")
    assert result.exit_code == 2 and result.stderr == "error: size 'big' is unknown: give e.g. 3GB or 512MiB\n"


def test_first_layers_of_the_target_fill_what_a_limit_leaves(invoke, tiny_full_pair: Path, tiny_pair: Path) -> None:
    found = json.loads(invoke("inspect", str(tiny_full_pair), "--vram", "7GB", "--json").stdout)["vram"]
    said = invoke("inspect", str(tiny_full_pair), "--vram", "7GB").stdout
    for gpu, name in (("cuda", "CUDA"), ("webgpu", "WebGPU")):
        layers = found[gpu]["layers"]
        parts = (layers[f"{part}_mb"] for part in ("weights", "state", "workspace"))
        assert layers["layers"] == 1 and sum(parts) == pytest.approx(layers["total_mb"], abs=0.2)
        assert re.search(f"first layers on {name} +1 layer: .* = {layers['total_mb']} MiB", said)
    assert "layers" not in found["openvino-gpu"]
    small = invoke("inspect", str(tiny_full_pair), "--vram", "516MiB").stdout
    assert re.search(
        r"first layers on CUDA +not possible: no layer fits the \d\.\d MiB beside the drafter: give", small
    )
    alone = json.loads(invoke("inspect", str(tiny_pair), "--vram", "7GB", "--json").stdout)["vram"]
    assert alone["cuda"]["layers"]["layers"] == 1 and "text" not in alone["cuda"]
    assert "first layers on WebGPU" in invoke("inspect", str(tiny_pair), "--vram", "7GB").stdout
    assert "first layers" not in invoke("inspect", str(tiny_full_pair)).stdout


def test_without_the_packages_the_sum_for_webgpu_says_what_to_install(
    invoke, tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webgpu, "find_spec", lambda _: None)
    facts = json.loads(invoke("inspect", str(tiny_full_pair), "--json").stdout)
    assert "pip install" in facts["vram"]["webgpu"]["problem"] and "text" in facts["vram"]["openvino-gpu"]


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


def test_what_was_measured_is_a_line_per_context_and_bars_within_80_columns(invoke, pair: Path, measured) -> None:
    lines = invoke("inspect", str(pair)).stdout.splitlines()
    assert any(line.startswith("costs ") and "measured 2026-11-22" in line for line in lines)
    table = [line.split() for line in lines if line.startswith(("128 ", "1024 "))]
    assert table == [["128", "16.0", "20.0", "40.0"], ["1024", "20.0", "25.0", "60.0"],
                     ["128", "1.50", "1.75", "15.0"], ["1024", "1.75", "2.50", "20.0"]]  # fmt: skip
    bars = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert list(bars) == ["1", "8", "32", "4", "128"] and bars["32"] == bars["128"] == 4 * bars["1"] * 2.5
    assert max(map(len, lines[lines.index("") :])) <= 80


def test_costs_of_a_pair_s_own_layers_are_found(invoke, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all layers on the CPU hold if no GPU opens."""
    choose, manifest = "dovetail.runtime.target.layers.choose.layer_device", read_manifest(pair)
    monkeypatch.setattr(choose, lambda _: OrtDevice.cpu())
    assert "gpu layers" not in invoke("inspect", str(pair)).stdout
    write_manifest(pair, replace(manifest, target=replace(manifest.target, gpu_layers="1")))
    for layers, said in ((None, "for 4 s, below"), ((1, "cpu"), "for 4 s, first layers: 1 on cpu, below")):
        key = CostKey.of(manifest, "cpu", None, layers=layers)
        Measured("tiny", key, COSTS, 4.0, "2026-11-22T14:35:47+00:00").store()
        lines = invoke("inspect", str(pair)).stdout.splitlines()
        assert any(line.startswith("gpu layers ") and line.endswith(" 1, the pair's own number") for line in lines)
        assert any(line.startswith("costs ") and line.endswith(said) for line in lines)

    def missing(_: str) -> OrtDevice:
        raise DeviceError("no GPU")

    monkeypatch.setattr(choose, missing)
    assert "for 4 s, below" in invoke("inspect", str(pair)).stdout


def test_bars_need_no_unicode(pair: Path, measured) -> None:
    command = (sys.executable, "-m", "dovetail.runtime.cli.main", "inspect", str(pair))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "####" in done.stdout


def test_a_name_is_no_markup(invoke, pair: Path, measured) -> None:
    write_manifest(pair, replace(read_manifest(pair), name="[red]tiny[/blue]"))
    assert "[red]tiny[/blue]: a pass of the target" in invoke("inspect", str(pair)).stdout


def test_a_plot_says_what_was_measured_where_and_when(invoke, pair: Path, measured, tmp_path: Path) -> None:
    write_manifest(pair, replace(read_manifest(pair), name="tiny $x$ & <co>"))
    pictures = [tmp_path / name for name in ("a.svg", "b.SVG")]
    for file in pictures:
        result = invoke("inspect", str(pair), "--plot", str(file))
        assert (result.exit_code, result.stderr) == (0, "") and result.stdout == invoke("inspect", str(pair)).stdout
    told = {text for text in ElementTree.parse(pictures[0]).getroot().itertext() if text.strip()}
    assert told >= {"nodes in the pass", "rows in the call", "time of a pass (ms)", "time of a call (ms)"}
    assert told >= {"128 tokens", "1024 tokens", "a call of the drafter on the CPU"}  # a line per context
    (title,) = (text for text in told if "tiny $x$ & <co>" in text)
    (where,) = (text for text in told if "2026-11-22" in text)
    assert measured.key.cpu in where and title
    assert pictures[0].read_bytes() == pictures[1].read_bytes()  # the same costs give the same picture


def test_a_plot_is_a_png_where_its_name_says_so_and_leaves_json_alone(invoke, pair, measured, tmp_path: Path) -> None:
    from matplotlib.image import imread

    result = invoke("inspect", str(pair), "--json", "--plot", str(tmp_path / "costs.png"))
    assert result.exit_code == 0 and json.loads(result.stdout)["costs"] == json.loads(json.dumps(asdict(measured)))
    pixels = imread(tmp_path / "costs.png")
    assert pixels.shape[1] > pixels.shape[0] > 300 and pixels.std() > 0


@pytest.mark.parametrize(("file", "said"), [("costs.pdf", ".png or .svg"), ("costs", ".png or .svg"),
                                            ("missing/costs.svg", "make the folder first")])  # fmt: skip
def test_a_plot_that_cannot_be_is_one_line_before_anything_is_read(invoke, tmp_path: Path, file: str, said) -> None:
    result = invoke("inspect", str(tmp_path / "no-pair"), "--plot", str(tmp_path / file))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert file in result.stderr and said in result.stderr


def test_a_plot_without_matplotlib_names_the_extra(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # "not installed" to import
    result = invoke("inspect", str(tmp_path / "no-pair"), "--plot", str(tmp_path / "costs.svg"))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "pip install '.[plot]'" in result.stderr


def test_only_a_plot_imports_matplotlib(pair: Path, measured) -> None:
    code = "import sys\nfrom dovetail.runtime.cli.main import cli\ntry: cli.main()\nfinally: print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(pair)], capture_output=True, text=True)
    assert done.returncode == 0 and "'rich'" in done.stdout and "matplotlib" not in done.stdout


def test_a_plot_of_nothing_says_how_to_measure(invoke, make_pair, tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "a pair")
    result = invoke("inspect", str(pair), "--plot", str(tmp_path / "costs.svg"))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert shlex.join(["dovetail-run", "tune", str(pair)]) in result.stderr and not (tmp_path / "costs.svg").exists()


def test_a_plot_that_cannot_be_written_is_one_line_and_leaves_nothing(invoke, pair, measured, tmp_path: Path) -> None:
    (tmp_path / "plots" / "costs.svg").mkdir(parents=True)
    result = invoke("inspect", str(pair), "--plot", str(tmp_path / "plots" / "costs.svg"))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1) and "costs.svg" in result.stderr
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["costs.svg"]
