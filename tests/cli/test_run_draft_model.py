"""`--draft-model` with a model that is no pair: the exporter, in a process of its own, makes one in the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.exporter.cli import main as export_cli
from dovetail.exporter.hub import is_hub_id
from dovetail.exporter.pairs.draft_model import check_no_drafter
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import ExportError, InputError, PairError, SourceError
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


def test_an_ir_keeps_its_weight_format(plain_ir: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_cli.main(["draft-model", str(plain_ir), "--weight-format", "fp16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --weight-format cannot change {plain_ir}") and error.count("\n") == 1
    assert not (cache / "draft-models").exists()


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
    for name in ("./missing", "/nowhere/at/all", "a/b/c", "me/x--y"):
        with pytest.raises(InputError, match=f"draft model {name!r} does not exist: correct the path, or give OWNER/"):
            known.resolve_draft_model(name)
    for name in ("llama-9000", ""):
        with pytest.raises(InputError) as told:
            known.resolve_draft_model(name)
        line = str(told.value)
        assert f"draft model {name!r} is unknown: name one of the pairs" in line and "mine" in line
        assert "give a model by its path or as OWNER/NAME" in line


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


def refused(invoke: Any, opener: Any, pair: Path, model: object, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the only line on stderr, of the command and of the exporter's process."""
    result = invoke("Hello", "-m", str(pair), "-md", str(model), obj=opener)
    (line,) = (result.stderr + capfd.readouterr().err).splitlines()
    assert opener.calls == [] and line.startswith("error: ")
    return result.exit_code, line


def test_a_failed_export_is_one_line_and_one_code(
    invoke: Any, opener: Any, pair: Path, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "small.gguf"
    model.write_bytes(b"no GGUF at all")
    code, line = refused(invoke, opener, pair, model, capfd)
    assert code == SourceError.exit_code and "not a GGUF file" in line
    assert not (cache / "draft-models").exists()


def test_an_exporter_that_a_signal_ends_is_one_line(
    invoke: Any, opener: Any, pair: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(known, "_EXPORTER", killed)
    code, line = refused(invoke, opener, pair, tiny_llama, capfd)
    assert code == ExportError.exit_code and "was ended by signal 9: free some memory" in line


@pytest.fixture
def eagle3(tmp_path: Path) -> Path:
    """An EAGLE-3 checkpoint in the layout of its authors, which passes for a Llama by its config."""
    import torch
    from safetensors.torch import save_file

    hidden, heads, vocabulary, draft = 32, 4, 96, 64
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads,
        "rms_norm_eps": 1e-6, "vocab_size": vocabulary, "draft_vocab_size": draft, "max_position_embeddings": 512,
    }  # fmt: skip
    shapes = {
        "fc": (hidden, 3 * hidden), "norm": (hidden,), "lm_head": (draft, hidden),
        "midlayer.hidden_norm": (hidden,), "midlayer.input_layernorm": (hidden,),
        "midlayer.post_attention_layernorm": (hidden,), "midlayer.mlp.gate_proj": (64, hidden),
        "midlayer.mlp.up_proj": (64, hidden), "midlayer.mlp.down_proj": (hidden, 64),
        "midlayer.self_attn.o_proj": (hidden, hidden), "embed_tokens": (vocabulary, hidden),
        **{f"midlayer.self_attn.{name}_proj": (hidden, 2 * hidden) for name in "qkv"},
    }  # fmt: skip
    folder = tmp_path / "e3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    maps = {"d2t": torch.zeros(draft, dtype=torch.int64), "t2d": torch.arange(vocabulary) < draft}
    save_file({**tensors, **maps}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["eagle3", "tiny_drafter"])
def test_a_drafter_is_sent_to_its_command(
    kind: str, request: pytest.FixtureRequest, invoke: Any, opener: Any, pair: Path, cache: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = request.getfixturevalue(kind)
    code, line = refused(invoke, opener, pair, folder, capfd)
    assert code == SourceError.exit_code and f"{folder} is a drafter (" in line
    assert f"dovetail-export drafter PAIR --checkpoint {folder}" in line
    assert not (cache / "draft-models").exists()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"ptd_token_id": 7}, "a P-EAGLE drafter"), ({"medusa_num_heads": 5}, "a Medusa drafter")],
)
def test_a_drafter_that_dovetail_does_not_read_is_named(
    settings: dict[str, int], kind: str, eagle3: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((eagle3 / "config.json").read_text())
    (eagle3 / "config.json").write_text(json.dumps(config | settings))
    assert export_cli.main(["draft-model", str(eagle3)]) == SourceError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{eagle3} is {kind}, which Dovetail does not read: " in line and "use an EAGLE-3 drafter" in line
    assert not (cache / "draft-models").exists()


@pytest.mark.parametrize("settings", [{"pard_token": 7}, {"num_nextn_predict_layers": 1}])
def test_a_whole_model_drafts_whatever_else_its_config_names(
    settings: dict[str, int], tiny_llama: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "small"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    check_no_drafter(str(model), None, model)


def test_a_drafter_on_the_hub_is_sent_to_its_command(
    hub: FakeHub, eagle3: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    for folder in (eagle3, tiny_drafter):
        hub.add("somebody/drafter", {path.name: path.read_bytes() for path in folder.iterdir()})
        done = hub.export(tmp_path / folder.name, "draft-model", "somebody/drafter", DOVETAIL_CACHE=str(tmp_path / "c"))
        (line,) = done.stderr.splitlines()
        assert done.returncode == SourceError.exit_code and "error: somebody/drafter is a drafter (" in line
        assert "dovetail-export drafter PAIR --checkpoint somebody/drafter" in line


def test_both_rules_for_a_hub_id_agree() -> None:
    right = ("a/b", "me/x.y", "me/x_y", "_me/_x", "Me-1/X-2.0", "me/" + "x" * 96, "me/9", "me/x.gitx")
    wrong = (
        "me/x--y", "me/x..y", "m--e/x", "mé/x", "me/é", "me/x.git", "me/" + "x" * 97, "me/-x", "me/x-", ".me/x",
        "./x", "../x", "~/x", "me/x/y", "/x", "me/", "me/x\n", "me /x", "", "/", "me\\x",
    )  # fmt: skip
    for name in (*right, *wrong):
        assert known.is_hub_id(name) == is_hub_id(name) == (name in right), name
    assert is_hub_id("gpt2") and not known.is_hub_id("gpt2")  # the runtime's names are those of pairs


def test_an_unfinished_pair_is_named(tmp_path: Path, tiny_pair: Path) -> None:
    with pytest.raises(PairError, match="no pair"):
        Engine.from_pretrained(tiny_pair, draft_model=tmp_path)
