"""The content of config.json decides which format a folder is; an unknown format is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")

from dovetail.models.checkpoint import CheckpointError, UnknownFormat
from dovetail.models.drafter import Drafter
from dovetail.models.formats import dovetail, registry
from dovetail.models.formats.format import Format, TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.runtime.errors import SourceError

KNOWN = ", ".join(sorted(registry.FORMATS))


@pytest.fixture
def checkpoint(tiny_drafter: Path, tmp_path: Path) -> Path:
    """`tiny_drafter` in a folder whose name says something else."""
    return shutil.copytree(tiny_drafter, tmp_path / "eagle3")


def message(error: pytest.ExceptionInfo[SourceError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_content_decides_and_not_the_name(checkpoint: Path) -> None:
    found = find_checkpoint(checkpoint)
    assert found.format is dovetail.FORMAT
    assert found.files == ("config.json", "drafter.safetensors")
    assert found.description == "Dovetail's drafter with dgf fusion"
    rows = torch.randn(found.stored.config["vocab_size"], found.stored.config["hidden_size"])
    assert isinstance(found.read(TargetParts({}, rows, rows)), Drafter)


def test_a_snapshot_of_links_is_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """The Hub's cache: names in a snapshot link to blobs that are named by digests."""
    snapshot, blobs = tmp_path / "snapshots" / "0123abcd", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "drafter.safetensors")):
        shutil.copyfile(checkpoint / name, blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    assert find_checkpoint(snapshot).description == find_checkpoint(checkpoint).description


@pytest.mark.parametrize(
    ("config", "claim"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, "LlamaForCausalLMEagle3"),
        ({"speculators_model_type": "new", "draft_vocab_size": 32000}, "speculators_model_type 'new'"),
        ({"architectures": ["M"], "feature_size": 8, "draft_vocab_size": 8}, "architectures ['M']"),
        ({"n_head": 2, "n_embd": 8}, "n_embd, n_head"),
        ({"architectures": ["\n" * 500]}, "architectures"),
        ({"k" * 10_000: 1}, "keys"),
        ({}, "nothing"),
    ],
)
def test_an_unknown_format_is_named(config: dict[str, object], claim: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownFormat) as error:
        find_checkpoint(checkpoint)
    assert isinstance(error.value, SourceError)
    assert str(checkpoint) in message(error) and claim in message(error)
    assert message(error).endswith(f"known formats are {KNOWN}") and len(message(error)) < 500


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", "[1]", '{"\\ud800": 1}'])
def test_a_config_that_cannot_be_read_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot read drafter checkpoint") as error:
        find_checkpoint(checkpoint)
    message(error)


@pytest.mark.parametrize(
    ("name", "said"), [("config.json", "config.json is missing"), ("drafter.safetensors", r"holds no \*.safetensors")]
)
def test_a_missing_file_is_named(checkpoint: Path, name: str, said: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"{said}: name the folder of a trained drafter"):
        find_checkpoint(checkpoint)


def test_an_added_format_is_known(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Format = replace(dovetail.FORMAT, name="other", matches=lambda config, shapes: "n_head" in config)
    monkeypatch.setitem(registry.FORMATS, ours.name, ours)
    assert find_checkpoint(checkpoint).format is dovetail.FORMAT
    (checkpoint / "config.json").write_text('{"n_head": 2}')
    assert find_checkpoint(checkpoint).format is ours
    (checkpoint / "config.json").write_text('{"n_tail": 2}')
    with pytest.raises(UnknownFormat, match=r"known formats are .*, other, "):
        find_checkpoint(checkpoint)
