"""`tune` measures a pair, keeps what it found where an engine looks for it, and shows it; `inspect` shows it after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dovetail.runtime.cli import tune
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import parse_record, read_manifest, write_manifest
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.tune.cost_cache import CHOOSABLE, Chosen, CostKey, recall
from dovetail.runtime.tune.properties import Compared, Property

FLAGS = ("--seconds", "0.05", "--drafter-device", "cpu")


@pytest.fixture
def real_pair(tiny_full_pair: Path) -> Path:
    """A pair that both engines can load."""
    pytest.importorskip("torch", reason="a pair is exported")
    return tiny_full_pair


def test_json_is_what_the_cache_holds(invoke, real_pair: Path) -> None:
    result = invoke("tune", str(real_pair), *FLAGS, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    known = recall(CostKey.of(read_manifest(real_pair), "cpu", None))
    assert known is not None
    assert json.loads(json.dumps(asdict(known))) == {name: report[name] for name in asdict(known)}
    assert parse_record(Costs, report["costs"], "costs").target.contexts == (
        128,
    )  # the tiny target has room for 256 tokens
    assert "measuring" in result.stderr


def test_threads_have_costs_of_their_own(invoke, real_pair: Path, cache: Path) -> None:
    for flags in ((), ("-t", "1")):
        assert invoke("tune", str(real_pair), *FLAGS, *flags).exit_code == 0
    assert len(list((cache / "costs").iterdir())) == 2


def test_text_is_tables_and_bars_within_the_line(invoke, real_pair: Path) -> None:
    result = invoke("tune", str(real_pair), *FLAGS)
    lines = result.stdout.splitlines()
    assert "a pass of the target" in lines[0] and any("a call of the drafter on the CPU" in line for line in lines)
    assert any(line.startswith("128 ") for line in lines) and "█" in result.stdout
    assert "kept in" in lines[-1] and max(map(len, lines[:-2])) <= 80


def test_inspect_shows_what_was_measured_and_nothing_before(invoke, real_pair: Path, tmp_path: Path) -> None:
    assert "a pass of the target" not in invoke("inspect", str(real_pair)).stdout
    assert json.loads(invoke("inspect", str(real_pair), "--json").stdout)["costs"] is None
    bars, kept = invoke("tune", str(real_pair), *FLAGS).stdout.split("OpenVINO: ")
    assert kept and bars in invoke("inspect", str(real_pair), "--plot", str(tmp_path / "costs.svg")).stdout
    assert "128 tokens" in (tmp_path / "costs.svg").read_text()
    report = json.loads(invoke("tune", str(real_pair), *FLAGS, "--json").stdout)
    found = json.loads(invoke("inspect", str(real_pair), "--json").stdout)
    assert {**found["costs"], "properties": found["properties"]} == report


def test_the_chosen_group_size_is_what_costs_are_measured_with(invoke, real_pair: Path, monkeypatch) -> None:
    best, compared = Chosen({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}, 1.25), list[Compared]()

    def choose(rows: Sequence[Compared]) -> Chosen:
        compared.extend(rows)
        return best

    monkeypatch.setattr(tune, "choose", choose)
    text = invoke("tune", str(real_pair), *FLAGS).stdout
    assert (
        "DYNAMIC_QUANTIZATION_GROUP_SIZE=128" in text and f"tune chose them on {best.date[:10]}: passes 1.25x" in text
    )
    assert {row.name for row in compared} <= set(CHOOSABLE) and len(compared) > 1
    known = recall(CostKey.of(read_manifest(real_pair), "cpu", None))
    assert known is not None and known.key.ov_config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "128"
    line = next(line for line in invoke("doctor", str(real_pair)).stdout.splitlines() if line.startswith("properties"))
    assert "DYNAMIC_QUANTIZATION_GROUP_SIZE=128" in line and "1.25x" in line


def test_nothing_is_chosen_beside_what_was_asked_for(invoke, real_pair: Path, cache: Path) -> None:
    given = ("--ov-config", "DYNAMIC_QUANTIZATION_GROUP_SIZE=32")
    report = json.loads(invoke("tune", str(real_pair), *FLAGS, *given, "--json").stdout)
    assert report["properties"]["set"]["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "32" and not report["properties"]["chosen"]
    assert (cache / "costs").exists() and not (cache / "properties").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--seconds", "0"), "seconds 0"),
        (("--seconds", "nan"), "seconds nan"),
        (("-t", "0"), "threads 0"),
        (("--drafter-device", "tpu"), "tpu"),
        (("--width", "8"), "--width"),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_read(invoke, tmp_path: Path, flags, named: str) -> None:
    result = invoke("tune", str(tmp_path), *flags)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1) and named in result.stderr


def test_a_target_alone_is_tuned_and_shown(invoke, tiny_pair: Path, cache: Path, tmp_path: Path) -> None:
    result = invoke("tune", str(tiny_pair), "--seconds", "0.05")
    assert result.exit_code == 0, result.stderr
    assert "a pass of the target" in result.stdout and "drafter" not in result.stdout
    shown = invoke("inspect", str(tiny_pair), "--plot", str(tmp_path / "costs.svg"))
    assert shown.exit_code == 0 and "repeated text alone is drafted" in shown.stdout
    assert "a pass of the target" in shown.stdout and "rows in the call" not in (tmp_path / "costs.svg").read_text()
    said = invoke("doctor", str(tiny_pair))
    assert "as measured here" in said.stdout and "faster than plain decoding above" in said.stdout


def test_a_draft_model_is_tuned(invoke, tiny_pair: Path, cache: Path) -> None:
    result = invoke("tune", str(tiny_pair), "--seconds", "0.05", "--draft-model", str(tiny_pair), "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["key"]["device"] == "model" and measured["costs"]["draft"]["rows"][0] == 1


def test_a_cache_that_cannot_be_written_is_one_line(invoke, real_pair: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "costs").write_text("a file where the folder should be")
    result = invoke("tune", str(real_pair), *FLAGS, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "DOVETAIL_CACHE" in result.stderr.splitlines()[-1]


@pytest.fixture
def few(monkeypatch) -> None:
    """Two candidates: one that changes nothing and one that OpenVINO does not know."""
    tried = [Property("ENABLE_CPU_PINNING", "NO"), Property("NO_SUCH_PROPERTY", "1")]
    monkeypatch.setattr(tune, "candidates", lambda *_: tried)


@pytest.mark.usefixtures("few")
def test_properties_are_a_table_and_the_choice_is_kept(invoke, tiny_pair: Path, cache: Path) -> None:
    result = invoke("tune", str(tiny_pair), "--properties", "--seconds", "0.05")  # a pair without a drafter
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    pinning = rows["ENABLE_CPU_PINNING=NO"]
    assert len(pinning) == 5 and pinning[-2:] == ["100.0%", "yes"] and all(cell.endswith("x") for cell in pinning[:-2])
    assert rows["NO_SUCH_PROPERTY=1"] == ["refused"] and "Unsupported property NO_SUCH_PROPERTY" in result.stdout
    assert "kept for later openings: the defaults" in result.stdout and "--ov-config NAME=VALUE" in result.stdout
    assert len([*(cache / "properties").iterdir()]) == 1
    assert "may change the text" in " ".join(result.stdout.split())
    assert "comparing" in result.stderr and not (cache / "costs").exists()


@pytest.mark.usefixtures("few")
def test_properties_are_json_beside_what_was_given(invoke, tiny_pair: Path) -> None:
    given = ("--ov-config", "DYNAMIC_QUANTIZATION_GROUP_SIZE=64", "-t", "1")
    result = invoke("tune", str(tiny_pair), "--properties", "--seconds", "0.05", *given, "--json")
    report = json.loads(result.stdout)
    assert report["ov_config"] == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"} and report["threads"] == 1
    pinning, unknown = report["properties"]
    assert list(pinning["speedups"]) == ["1", "8", "16"] and pinning["same"] == 1.0
    assert unknown["same"] is None and "NO_SUCH_PROPERTY" in unknown["problem"]


@pytest.mark.usefixtures("few")
def test_a_table_that_keeps_nothing_needs_no_cache(invoke, tiny_pair: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "properties").write_text("a file where the folder should be")
    flags = ("--properties", "--seconds", "0.05")
    assert invoke("tune", str(tiny_pair), *flags).exit_code == 2
    given = invoke("tune", str(tiny_pair), *flags, "--ov-config", "DYNAMIC_QUANTIZATION_GROUP_SIZE=64")
    assert given.exit_code == 0 and "ENABLE_CPU_PINNING=NO" in given.stdout


def test_a_refused_property_that_was_given_is_one_line(invoke, tiny_pair: Path) -> None:
    result = invoke("tune", str(tiny_pair), "--properties", "--ov-config", "NO_SUCH_PROPERTY=1")
    assert (result.exit_code, result.stdout) == (7, "")
    assert "NO_SUCH_PROPERTY" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


@pytest.mark.parametrize(("times", "cell"), [((0.9, 1.1, 1.2), "~1.10x"), ((1.05, 1.1, 1.2), "1.10x")])
def test_a_speedup_that_is_not_told_from_none_is_marked(times: tuple[float, float, float], cell: str) -> None:
    assert tune.times(*times) == cell


def test_properties_are_compared_without_first_layers_elsewhere(invoke, real_pair: Path) -> None:
    result = invoke("tune", str(real_pair), "--properties", "--gpu-layers", "1")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "without --gpu-layers 1: leave out one of them" in result.stderr


def test_the_pair_s_own_layers_need_no_gpu_that_opens(
    invoke, real_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise DeviceError("a call of the target's first layers failed: out of memory: give fewer --gpu-layers")

    device, manifest = OrtDevice.cpu(), read_manifest(real_pair)
    monkeypatch.setattr(device, "allocate", full)
    monkeypatch.setattr("dovetail.runtime.load.layer_device", lambda _: device)
    for name in ("target", "drafter"):
        (tmp_path / name).symlink_to(real_pair / name)
    write_manifest(tmp_path, replace(manifest, target=replace(manifest.target, gpu_layers="1")))
    tune = ("tune", str(tmp_path), "--seconds", "0.05", "--json")
    result = invoke(*tune)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["key"]["layers"] is None
    assert "all layers of the target run on the CPU: a call" in caplog.text
    assert invoke(*tune, "--gpu-layers", "1").exit_code == DeviceError.exit_code
