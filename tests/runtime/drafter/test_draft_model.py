"""A pair opened with another pair's target as its drafter: OpenVINO on both sides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import InputError, MismatchError, PairError
from dovetail.runtime.pair.manifest import FileEntry, file_entry, read_manifest, write_manifest
from dovetail.runtime.tree.limits import TreeLimits

pytestmark = pytest.mark.usefixtures("quick_costs")
PROMPT = "the quick brown fox"


@pytest.fixture
def altered(tiny_pair: Path, tmp_path: Path) -> Path:
    """`tiny_pair` with two tokens of its vocabulary in each other's place."""
    pair = tmp_path / "altered"
    shutil.copytree(tiny_pair, pair)
    file = pair / "target" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    manifest = read_manifest(pair)
    entry: FileEntry = file_entry(file)
    facts = {**vars(manifest.target), "tokenizer_sha256": entry.sha256}
    files = {**manifest.files, "target/tokenizer.json": entry}
    write_manifest(pair, type(manifest)(manifest.name, type(manifest.target)(**facts), None, files))
    return pair


@pytest.mark.parametrize("tree", [None, TreeLimits(width=10, depth=4, top_k=2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pair_drafts_for_itself(tiny_pair: Path, tree: TreeLimits | None, temperature: float) -> None:
    with Engine.from_pretrained(tiny_pair, draft_model=tiny_pair, tree=tree) as engine:
        assert engine.drafter_device == "CPU (draft model)" and engine.drafter_note == "draft model tiny"
        drafted = engine.generate(PROMPT, 80, raw=True, temperature=temperature, seed=2)
        plain = engine.generate(PROMPT, 80, raw=True, temperature=temperature, seed=2, speculate=False)
    assert drafted.token_ids == plain.token_ids
    if tree:  # a tiny target is as quick as its drafter: a scheduler drafts little
        assert drafted.metrics.acceptance_length > (4 if temperature == 0 else 1.5)


def test_costs_are_kept_for_the_two_models(tiny_pair: Path, quick_costs: Path) -> None:
    for _ in range(2):
        Engine.from_pretrained(tiny_pair, draft_model=tiny_pair).close()
    keys = [json.loads(file.read_text())["key"] for file in (quick_costs / "costs").iterdir()]
    assert [key["drafter"] == f"{key['target']}, 256 tokens" for key in keys if key["device"] == "model"] == [True]


def test_another_vocabulary_is_refused_by_its_first_difference(tiny_pair: Path, altered: Path) -> None:
    with pytest.raises(MismatchError, match=r"the draft model's token \d+ is 'b', the target's 'a'") as told:
        Engine.from_pretrained(tiny_pair, draft_model=altered)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("flags", [{"drafter_device": "cuda"}, {"vram": "1GB"}, {"vram": "1GB", "fit": True}])
def test_flags_of_a_gpu_are_refused(tiny_pair: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a draft model runs on the CPU"):
        Engine.from_pretrained(tiny_pair, draft_model=tiny_pair, **flags)
    with pytest.raises(PairError, match="has no drafter"):
        Engine.from_pretrained(tiny_pair, **flags)


def test_a_draft_model_that_is_no_pair_is_named(tiny_pair: Path, tmp_path: Path) -> None:
    for given in (tmp_path / "none", str(tmp_path), "somebody/model"):
        with pytest.raises(
            PairError, match=f"{given} is no pair: give the folder that dovetail-export draft-model"
        ) as told:
            Engine.from_pretrained(tiny_pair, draft_model=given)
        assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="draft model 3 is no path: give the folder of a pair"):
        Engine.from_pretrained(tiny_pair, draft_model=3)  # type: ignore[arg-type]  # what is tested
