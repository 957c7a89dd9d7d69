"""A drafter's checkpoint by its Hub id or folder, against a server of this test that answers as the Hub does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dovetail.exporter.drafter.sources import resolve_checkpoint
from dovetail.runtime.errors import ExportError, SourceError

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub

REPO = "somebody/drafter"
PROGRAM = """
import json, sys
from dovetail.exporter.drafter.sources import resolve_checkpoint
from dovetail.runtime.errors import SourceError
location, revision, pickle = (json.loads(word) for word in sys.argv[1:])
try:
    folder = resolve_checkpoint(location, revision, pickle)
except SourceError as error:
    sys.exit(f"error: {error}")
print(json.dumps([folder.name, sorted(path.name for path in folder.iterdir())]))
"""
CONFIG = b'{"hidden_size": 32}'
OTHERS = {"README.md": b"# A drafter", "tokenizer.json": b"{}", "training_args.bin": b"x", "runs/log.bin": b"x"}


def resolved(
    hub: FakeHub, home: Path, revision: str | None = None, pickle: bool = False, **more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(json.dumps, (REPO, revision, pickle))]
    environment = hub.environment(home, **more)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
SHARDS = {"model.safetensors.index.json": INDEX, "model-1.safetensors": b"1", "model-2.safetensors": b"2"}


@pytest.mark.parametrize(
    ("weights", "unneeded", "pickle"),
    [
        ({"drafter.safetensors": b"w", "calibration.json": b"{}"}, {"pytorch_model.bin": b"w"}, False),
        (SHARDS, {"consolidated.safetensors": b"w"}, False),
        ({"pytorch_model.bin": b"w"}, {}, True),
        ({"model.pt": b"w"}, {}, True),
    ],
)
def test_the_files_of_a_drafter_are_downloaded_alone(
    hub: FakeHub, tmp_path: Path, weights: dict[str, bytes], unneeded: dict[str, bytes], pickle: bool
) -> None:
    others = {
        name: content for name, content in OTHERS.items() if name != "training_args.bin" or "model.pt" not in weights
    }
    repository = hub.add(REPO, {"config.json": CONFIG, **weights, **unneeded, **others})
    done = resolved(hub, tmp_path, pickle=pickle)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [repository.refs["main"], sorted(["config.json", *weights])]
    assert hub.fetched[0] == "config.json"
    hub.stop()
    assert resolved(hub, tmp_path, pickle=pickle).stdout == done.stdout


def test_a_language_model_is_downloaded_with_its_tokenizer(hub: FakeHub, tmp_path: Path) -> None:
    config = b'{"hidden_size": 32, "architectures": ["Qwen2ForCausalLM"]}'
    tokenizer = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    hub.add(REPO, {"config.json": config, "model.safetensors": b"w", **tokenizer, "merges.txt": b"a b"})
    done = resolved(hub, tmp_path)
    assert json.loads(done.stdout)[1] == sorted(["config.json", "model.safetensors", *tokenizer])


def test_a_revision_of_a_drafter(hub: FakeHub, tmp_path: Path) -> None:
    repository = hub.add(REPO, {"config.json": CONFIG, "model.safetensors": b"1"})
    repository.commit({"config.json": CONFIG, "model.safetensors": b"2"}, "v2")
    assert json.loads(resolved(hub, tmp_path, "v2").stdout)[0] == repository.refs["v2"]
    assert "has no revision 'v3'" in error_line(resolved(hub, tmp_path, "v3"))


@pytest.mark.parametrize(
    ("files", "claimed", "named"),
    [
        ({"model.safetensors": b"w"}, {}, "has no config.json"),
        ({"config.json": b"[]", "model.safetensors": b"w"}, {}, "config.json holds a list"),
        ({"config.json": b'{"hidden_size": -1}', "model.safetensors": b"w"}, {}, "hidden_size -1"),
        ({"config.json": CONFIG, "README.md": b"#"}, {}, "has no weights"),
        ({"config.json": CONFIG, "pytorch_model.bin": b"w"}, {}, "pickled weights alone (pytorch_model.bin)"),
        (
            {"config.json": CONFIG, "a.safetensors": b"w", "b.safetensors": b"w"},
            {},
            "2 files of weights (a.safetensors",
        ),
        ({"config.json": CONFIG, "model.safetensors": b"w"}, {"model.safetensors": 140 * 10**9}, "140 GB of weights"),
    ],
)
def test_a_repository_that_is_no_drafter_is_refused_before_its_weights_are_read(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes], claimed: dict[str, int], named: str
) -> None:
    hub.add(REPO, files, claimed=claimed)
    assert named in error_line(resolved(hub, tmp_path))
    assert {*hub.fetched} <= {"config.json"}


def test_a_drafter_from_the_hub_joins_its_target(
    hub: FakeHub, tiny_pair: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    from dovetail.exporter.pairs.check import check_pair_folder

    hub.add(REPO, {path.name: path.read_bytes() for path in tiny_drafter.iterdir()}, gated=True)
    pair = shutil.copytree(tiny_pair, tmp_path / "pair")
    command = ("drafter", pair, "--checkpoint", REPO, "--revision", "main")
    refused = hub.export(tmp_path / "home", *command)
    assert refused.returncode == SourceError.exit_code
    assert "set HF_TOKEN" in refused.stderr.splitlines()[-1]
    done = hub.export(tmp_path / "home", *command, token="hf_of_the_owner")
    assert done.returncode == 0, done.stderr
    assert check_pair_folder(pair).drafter


def test_without_a_finished_pair_nothing_is_downloaded(
    hub: FakeHub, tiny_pair: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    hub.add(REPO, {path.name: path.read_bytes() for path in tiny_drafter.iterdir()})
    damaged = shutil.copytree(tiny_pair, tmp_path / "damaged")
    (damaged / "target" / "openvino_model.bin").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for name, told in (
        ("nopair", "nopair holds no finished pair: export its target first"),
        ("folder", "folder is not empty and holds no pair"),
        ("damaged", "target is missing or altered"),
    ):
        done = hub.export(tmp_path / "home", "drafter", tmp_path / name, "--checkpoint", REPO)
        assert done.returncode == ExportError.exit_code and told in done.stderr.splitlines()[-1], done.stderr
    assert hub.asked == []
    assert {path.name for path in tmp_path.iterdir()} <= {"damaged", "folder", "home", "cache"}


def test_local_folders_are_taken_as_they_are(tiny_drafter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert resolve_checkpoint(str(tiny_drafter)) == tiny_drafter
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("missing") == Path("missing")  # the checkpoint's reader says that it is missing
    with pytest.raises(SourceError, match=r"--revision 'main' needs a Hub id.*: drop --revision, or give a Hub id"):
        resolve_checkpoint(str(tiny_drafter), "main")
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"w")
    with pytest.raises(SourceError, match=r"pickled weights alone \(pytorch_model.bin\)"):
        resolve_checkpoint(str(tmp_path))
    assert resolve_checkpoint(str(tmp_path), allow_pickle=True) == tmp_path
