"""`--draft-model` with a model that is no pair: the exporter, in a process of its own, makes one in the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import ExportError, InputError, PairError
from dovetail.runtime.pair import known
from dovetail.runtime.pair.check import read_sound

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub

REPO = "somebody/small"


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model by the name of its fixture, that a test may change."""
    found: Path = request.getfixturevalue(request.param)
    return Path(
        shutil.copy(found, tmp_path / "small.gguf") if found.is_file() else shutil.copytree(found, tmp_path / "small")
    )


@pytest.mark.parametrize(
    ("source", "weight_format"), [("tiny_gguf", "int4"), ("tiny_llama", "int4"), ("plain_ir", "int8")],
    indirect=["source"],
)  # fmt: skip
def test_a_model_is_exported_once(
    source: Path, weight_format: str, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = known.resolve_draft_model(str(source))
    assert pair.parent == cache / "draft-models" and pair.name.startswith("small-")
    assert read_sound(pair).target.weight_format == weight_format
    told = capfd.readouterr()
    assert f"Exporting the draft model {source} to {pair}. This happens once." in told.err and not told.out
    assert "draft model: target" in told.err  # the progress
    assert known.resolve_draft_model(str(source)) == pair
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("source", ["tiny_llama"], indirect=True)
def test_another_content_is_another_draft_model(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = known.resolve_draft_model(str(source))
    (first / "target" / "openvino_model.xml").write_text("damaged")
    assert known.resolve_draft_model(str(source)) == first
    assert "This happens once" in capfd.readouterr().err
    read_sound(first)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    second = known.resolve_draft_model(str(source))
    assert second != first and read_sound(second).target.max_context == 128


def test_a_hub_id_is_exported_once_a_commit(
    hub: FakeHub, tiny_llama: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in {**hub.environment(tmp_path / "home"), "DOVETAIL_CACHE": str(cache)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    repository = hub.add(REPO, files)
    first = known.resolve_draft_model(REPO)
    assert first.name.startswith("small-") and "This happens once" in capfd.readouterr().err
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert known.resolve_draft_model(REPO) == first
        assert "This happens once" not in capfd.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    repository.commit(
        {**files, "config.json": files["config.json"].replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')}
    )
    second = known.resolve_draft_model(REPO)
    assert second != first and read_sound(second)


def test_a_model_drafts_for_a_pair(invoke: Any, tiny_pair: Path, tiny_llama: Path, cache: Path) -> None:
    flags = ("-m", str(tiny_pair), "--fixed-tree", "-n", "12", "--raw", "--temp", "0")
    plain = invoke("generate", "the quick", *flags)
    drafted = invoke("generate", "the quick", *flags, "--draft-model", str(tiny_llama))
    assert (drafted.exit_code, drafted.stdout) == (0, plain.stdout), drafted.output
    (pair,) = (cache / "draft-models").iterdir()
    with Engine.from_pretrained(tiny_pair, draft_model=pair) as engine:
        assert engine.drafter_device == "CPU (draft model)"


def test_pairs_and_known_names_are_taken_as_they_are(
    pair: Path, make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a pair needs no export"))
    assert known.resolve_draft_model(str(pair)) == pair
    cached = make_pair(known.pairs_dir() / "mine")
    assert known.resolve_draft_model("mine") == cached
    assert known.resolve_draft_model("./missing") == Path("missing")  # the manifest's reader says what is wrong
    for name in ("llama-9000", ""):
        with pytest.raises(InputError, match=f"{name!r} is unknown"):
            known.resolve_draft_model(name)


def test_without_the_exporter_one_line_says_what_to_do(
    invoke: Any, opener: Any, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_installed", lambda module: module != "torch")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    for model in (REPO, str(tmp_path / "small.gguf")):
        result = invoke("Hello", "-m", str(pair), "-md", model, obj=opener)
        assert result.exit_code == InputError.exit_code and result.stderr.count("\n") == 1
        assert f"--draft-model {model} is no pair, and its export needs torch" in result.stderr
        assert "pip install '.[export]'" in result.stderr


def test_a_failed_export_says_why(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "small.gguf"
    model.write_bytes(b"no GGUF at all")
    with pytest.raises(
        ExportError, match=r"exporting the draft model .*small.gguf failed \(exit 4\): see the reason above"
    ):
        known.resolve_draft_model(str(model))
    assert "not a GGUF file" in capfd.readouterr().err
    assert not (cache / "draft-models").exists()


def test_an_unfinished_pair_is_named(tmp_path: Path, tiny_pair: Path) -> None:
    with pytest.raises(PairError, match="no pair"):
        Engine.from_pretrained(tiny_pair, draft_model=tmp_path)
