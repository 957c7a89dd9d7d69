"""Every kind of source becomes the same kind of pair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.exporter.target.refusals import ROOTS, assert_nothing_left, message

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.cli.main import main
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.exporter.pairs.draft_model import export_draft_model, resolve_draft_source
from dovetail.exporter.target import export
from dovetail.exporter.target.convert import WeightOptions
from dovetail.exporter.target.export import TargetOptions, export_target
from dovetail.exporter.target.fuse_projections import fuse_projections
from dovetail.exporter.target.graph_probe import ir_logits
from dovetail.runtime.errors import DovetailError, ExportError, InputError
from dovetail.runtime.pair.check import verify_files
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.graph import read_model

pytestmark = pytest.mark.usefixtures("own_cache")


def run_outputs(xml: Path, ids: list[int]) -> dict[str, np.ndarray]:
    import openvino as ov

    compiled = ov.Core().compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})
    request, n = compiled.create_infer_request(), len(ids)
    request.infer(
        {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, n), np.int64),
            "position_ids": np.arange(n)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
    )
    return {name: request.get_tensor(name).data.copy() for name in ("logits", "features")}


def test_the_weights_are_not_in_memory_twice_when_the_graph_is_compared(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph that was fused is gone before OpenVINO packs the weights of the written one."""
    models = list[weakref.ref[Any]]()

    def fused(model: Any, **options: Any) -> int:
        models.append(weakref.ref(model))
        return fuse_projections(model, **options)

    def reference(*given: Any) -> Any:
        assert [model() for model in models] == [None]
        return ir_logits(*given)

    monkeypatch.setattr(export, "fuse_projections", fused)
    monkeypatch.setattr(export, "ir_logits", reference)
    export_target(str(tiny_pair / "target"), tmp_path / "pair")
    assert len(models) == 1


def test_exported_target_has_facts_files_and_provenance(tiny_pair: Path, tiny_llama: Path) -> None:
    manifest = check_pair_folder(tiny_pair)
    facts = manifest.target
    assert (facts.hidden_size, facts.feature_size, facts.vocab_size, facts.num_layers) == (32, 32, 263, 2)
    assert (facts.model_type, facts.max_context, facts.weight_format) == ("llama", 256, "int8")
    assert facts.eos_token_ids == (258,)
    names = {Path(name).name for name in manifest.files}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json", "tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja"} <= names  # fmt: skip
    on_disk = {p.relative_to(tiny_pair).as_posix() for p in tiny_pair.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, MANIFEST_NAME}
    source = manifest.provenance["target"]["source"]
    assert source["location"] == str(tiny_llama) and "model.safetensors" in source["files"]
    assert {"openvino", "optimum-intel", "torch"} <= set(manifest.provenance["target"]["packages"])


def test_target_computes_what_the_checkpoint_computes(tiny_llama: Path, tmp_path: Path) -> None:
    options = TargetOptions(WeightOptions("fp32"))
    export_target(str(tiny_llama), tmp_path / "pair", options=options)
    ids = [5, 99, 17, 200, 42]
    ours = run_outputs(tmp_path / "pair/target/openvino_model.xml", ids)
    with quiet():
        import torch
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
        with torch.no_grad():
            theirs = model(torch.tensor([ids]), output_hidden_states=True)
    np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), atol=2e-3)
    np.testing.assert_allclose(ours["features"], theirs.hidden_states[-1].numpy(), atol=2e-3)


@pytest.mark.parametrize("weights", [WeightOptions("fp16"), WeightOptions("int4", group_size=16, ratio=1.0, sym=True)])
def test_weight_format_is_what_the_graph_holds(tiny_llama: Path, tmp_path: Path, weights: WeightOptions) -> None:
    from dovetail.exporter.target.export import detect_weight_format

    manifest = export_target(str(tiny_llama), tmp_path / "pair", options=TargetOptions(weights))
    assert manifest.target.weight_format == weights.weight_format
    constants = {
        node.get_element_type().get_type_name()
        for node in read_model(tmp_path / "pair/target/openvino_model.xml").get_ops()
        if node.get_type_name() == "Constant"
    }
    assert {"fp16": "f16", "int4": "i4"}[weights.weight_format] in constants
    if weights.weight_format == "fp16":
        assert detect_weight_format(read_model(tmp_path / "pair/target/openvino_model.xml")) == "fp16"


def test_ir_of_plain_optimum_is_a_source_without_torch(plain_ir: Path, tiny_pair: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from dovetail.exporter.cli.main import main\n"
        f"code = main(['target', {str(plain_ir)!r}, {str(tmp_path / 'pair')!r}])\n"
        "heavy = {'torch', 'transformers', 'optimum', 'nncf'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))\n"
    )
    environment = {**os.environ, "PYTHONPATH": ROOTS}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    facts, ours = read_manifest(tmp_path / "pair").target, read_manifest(tiny_pair).target
    assert (facts.weight_format, facts.feature_size, facts.vocab_size) == ("int8", ours.feature_size, ours.vocab_size)
    check_pair_folder(tmp_path / "pair")
    ids = [1, 2, 3, 250]
    for name, values in run_outputs(tmp_path / "pair/target/openvino_model.xml", ids).items():
        np.testing.assert_allclose(values, run_outputs(tiny_pair / "target/openvino_model.xml", ids)[name], atol=1e-4)


def test_exported_target_is_itself_a_source(tiny_target: Path, tiny_pair: Path, tmp_path: Path) -> None:
    again = export_target(str(tiny_target), tmp_path / "pair")
    assert again.target == read_manifest(tiny_pair).target


def test_resume_of_an_identical_export_changes_nothing(plain_ir: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    first = export_target(str(plain_ir), out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert export_target(str(plain_ir), out, resume=True) == first
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_resume_repairs_an_altered_file(plain_ir: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    first = export_target(str(plain_ir), out)
    weights = out / "target/openvino_model.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DovetailError) as error:
        check_pair_folder(out)
    assert "openvino_model.bin" in message(error)
    repaired = export_target(str(plain_ir), out, resume=True)
    assert repaired.target == first.target
    verify_files(out, repaired)


def test_finished_pair_is_replaced_only_by_force(plain_ir: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    export_target(str(plain_ir), out, name="first")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="--force") as error:
        export_target(str(plain_ir), out, name="second")
    message(error)
    with pytest.raises(ExportError, match="--force") as error:
        export_target(str(plain_ir), out, resume=True, options=TargetOptions(max_context=64))
    message(error)
    assert read_manifest(out).name == "first"
    export_target(str(plain_ir), out, name="second", force=True)
    assert read_manifest(out).name == "second"
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out.parent / ".pair.build").exists()


def test_folder_that_is_no_pair_is_never_touched(plain_ir: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("years of work")
    with pytest.raises(ExportError, match="name another folder") as error:
        export_target(str(plain_ir), out, force=True)
    message(error)
    assert [p.name for p in out.iterdir()] == ["chapter1.txt"]


def test_graph_without_a_tap_point_is_refused(plain_ir: Path, tmp_path: Path) -> None:
    import openvino as ov
    from openvino import opset13 as ops

    source = tmp_path / "ir"
    shutil.copytree(plain_ir, source)
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    logits = ops.unsqueeze(ops.convert(ids, "f32"), ops.constant(np.int64(2)))
    logits.output(0).get_tensor().set_names({"logits"})
    ov.save_model(ov.Model([ops.result(logits)], [ids], "no_head"), source / "openvino_model.xml")
    with pytest.raises(ExportError, match="no tap point") as error:
        export_target(str(source), tmp_path / "pair")
    message(error)
    assert_nothing_left(tmp_path / "pair")


def test_broken_tokenizer_is_refused_and_another_can_be_given(plain_ir: Path, tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "ir"
    shutil.copytree(plain_ir, source)
    raw = json.loads((source / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {"type": "Whitespace"}  # drops every space, silently
    (source / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ExportError, match="probe") as error:
        export_target(str(source), tmp_path / "pair")
    message(error)
    assert_nothing_left(tmp_path / "pair")
    export_target(str(source), tmp_path / "pair", options=TargetOptions(tokenizer=tiny_llama))
    check_pair_folder(tmp_path / "pair")


@pytest.mark.parametrize(
    "options",
    [{"weight_format": "int3"}, {"weight_format": "fp16", "ratio": 0.5}, {"weight_format": "fp32", "sym": True}],
)
def test_weight_options_check_themselves(options: dict) -> None:
    with pytest.raises(InputError) as error:
        WeightOptions(**options)
    message(error)


def test_options_that_optimum_refuses_are_input_errors(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        export_target(str(tiny_llama), tmp_path / "pair", options=TargetOptions(WeightOptions("int8", ratio=0.5)))
    message(error)
    assert_nothing_left(tmp_path / "pair")


def test_weight_options_cannot_change_an_ir(tiny_pair: Path, tmp_path: Path) -> None:
    """They are refused; the default format of a draft model is no wish."""
    ir = tiny_pair / "target"
    for weights, flag in (
        (WeightOptions("int4"), "--weight-format"),
        (WeightOptions(ratio=0.5), "--ratio"),
        (WeightOptions("int4", group_size=64), "--group-size"),
    ):
        with pytest.raises(InputError, match=f"{flag} cannot change {ir}, an OpenVINO IR.*: leave it out") as error:
            export_target(str(ir), tmp_path / "pair", options=TargetOptions(weights))
        message(error)
        assert_nothing_left(tmp_path / "pair")
    draft = export_draft_model(resolve_draft_source(str(ir), None), tmp_path / "draft", "int4")
    assert draft.target.weight_format == "int8"


def test_the_working_folder_becomes_a_pair(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its own name, although the export replaces it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["target", str(tiny_pair / "target"), "."]) == 0
    assert check_pair_folder(folder).name == "mine"


def tiny(kind: str, folder: Path, tokenizer: Path, **sizes: object) -> Path:
    """A Hugging Face folder of a random model of two layers, with the tokenizer of another."""
    with quiet():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = {
            "vocab_size": 263,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 257,
            "eos_token_id": 258,
        }
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {"n_positions": 96}),
        ("opt", {"max_position_embeddings": 96, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gptj", {"n_positions": 96, "rotary_dim": 4}),
    ],
)
def test_context_ends_where_a_table_of_positions_ends(
    tiny_llama: Path, tmp_path: Path, kind: str, sizes: dict[str, int]
) -> None:
    source = tiny(kind, tmp_path / "hf", tiny_llama, **sizes)
    with pytest.raises(InputError, match=r"--max-context 4096 .* give 96 or less") as error:
        export_target(str(source), tmp_path / "pair", options=TargetOptions(max_context=4096))
    message(error)
    assert not (tmp_path / "pair").exists()
    manifest = export_target(str(source), tmp_path / "pair", resume=True)
    assert manifest.target.max_context == 96
