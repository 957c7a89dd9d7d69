"""What cannot become a target is a one-line error, and nothing is left of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.exporter.target.refusals import ROOTS, assert_nothing_left, message

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.cli.main import main
from dovetail.exporter.target.convert import check_tensors
from dovetail.exporter.target.export import TargetOptions, export_target
from dovetail.exporter.target.sources import resolve_source
from dovetail.runtime.errors import DovetailError, ExportError, SourceError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_truncated_weights_of_a_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut"
    shutil.copytree(tiny_llama, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SourceError) as error:
        export_target(str(source), tmp_path / "pair")
    message(error)
    assert_nothing_left(tmp_path / "pair")


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": None}, {"vocab_size": "x"}, {"vocab_size": 1.5}, {"vocab_size": []}, {"hidden_size": -1},
     {"vocab_size": float("inf")}, {"num_hidden_layers": 0}, {"num_hidden_layers": 10**9},
     {"max_position_embeddings": 1e19}, {"num_attention_heads": 0}, {"num_attention_heads": 10**7},
     {"intermediate_size": True}, {"intermediate_size": [2.5]}, {"num_key_value_heads": 0}, {"head_dim": 2.5},
     {"text_config": 3}, {"text_config": {"vocab_size": "x"}}, {"rope_scaling": "junk"}, {"rope_parameters": [1]},
     {"rope_scaling": {"rope_type": ["a"]}}, {"rope_scaling": {"rope_type": "linear", "factor": -1}},
     {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
     {"rope_parameters": {"rope_type": "dynamic", "factor": "2"}}, {"rope_scaling": {"type": "yarn"}},
     {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": "x"}},
     {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, None]}},
     {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0}}}],
)  # fmt: skip
def test_a_config_with_impossible_numbers_is_refused_at_once(plain_ir: Path, tmp_path: Path, change: dict) -> None:
    for source in (shutil.copytree(plain_ir, tmp_path / "ir"), tmp_path / "hf"):
        source.mkdir(exist_ok=True)
        config = json.loads((plain_ir / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(SourceError, match=f"{next(iter(change))}|vocab_size 'x'") as error:
            resolve_source(str(source))
        message(error)


@pytest.mark.parametrize("change", [{"vocab_size": 2**24}, {"hidden_size": 2**20}, {"num_hidden_layers": 1000}])
def test_a_config_larger_than_its_weights_is_refused_at_once(tiny_llama: Path, tmp_path: Path, change: dict) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "hf")
    resolve_source(str(source))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SourceError, match=r"[0-9,]{9,} weights or more, the files of weights have [0-9,]+") as error:
        resolve_source(str(source))
    message(error)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", '{"a": "\\ud800"}', ""])
def test_json_that_is_deep_or_no_object_is_refused(plain_ir: Path, tmp_path: Path, name: str, content: str) -> None:
    source = shutil.copytree(plain_ir, tmp_path / "ir")
    (source / name).write_text(content)
    with pytest.raises(SourceError, match=name) as error:
        resolve_source(str(source))
    message(error)


@pytest.mark.parametrize("ids", ["x", 1.5, True, -1, 2**40, [1, None]])
def test_end_of_sequence_ids_are_token_ids(plain_ir: Path, tmp_path: Path, ids: object) -> None:
    source = shutil.copytree(plain_ir, tmp_path / "ir")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(DovetailError, match="eos_token_id") as error:
        export_target(str(source), tmp_path / "pair")
    message(error)
    assert_nothing_left(tmp_path / "pair")


@pytest.mark.parametrize("content", [b"", b"\x80\x02]."])
def test_damaged_weights_are_no_interrupt(
    tiny_llama: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "bin")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)
    command = ["target", str(source), str(tmp_path / "pair"), "--allow-pickle"]
    assert main(command) in (SourceError.exit_code, ExportError.exit_code)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and "ends too early" not in last
    assert_nothing_left(tmp_path / "pair")


CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tiny_llama: Path, tmp_path: Path, where: str) -> None:
    source, marker = shutil.copytree(tiny_llama, tmp_path / "hf"), tmp_path / "ran"
    (source / "own.py").write_text(CODE.format(marker=str(marker)))
    raw = json.loads((source / where).read_text())
    if where == "config.json":
        raw |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    else:
        tokens = json.loads((source / "tokenizer.json").read_text())["model"]
        (source / "tokenizer.json").unlink()
        (source / "vocab.json").write_text(json.dumps(tokens["vocab"]))
        (source / "merges.txt").write_text("t h\n")
        raw |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (source / where).write_text(json.dumps(raw))
    command = [sys.executable, "-m", "dovetail.exporter.cli.main", "target", str(source), str(tmp_path / "pair")]
    done = subprocess.run(
        command, input="y\n" * 100, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ROOTS}
    )
    assert not marker.exists()
    assert done.returncode in (SourceError.exit_code, ExportError.exit_code)
    assert "Do you wish" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and not (tmp_path / "pair").exists()


def test_a_graph_that_cannot_be_written_asks_for_disk_space(tiny_llama: Path, tmp_path: Path) -> None:
    """No file may pass 64 KiB: OpenVINO then says as little as it does on a full disk."""
    code = "import resource, sys; from dovetail.exporter.cli.main import main"
    code += "; resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)); sys.exit(main())"
    command = [sys.executable, "-c", code, "target", str(tiny_llama), str(tmp_path / "pair"), "--weight-format", "int4"]
    environment = {**os.environ, "PYTHONPATH": ROOTS}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == ExportError.exit_code
    assert "OpenVINO cannot write the graph: free as much disk space as" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda d: (d / "x.gguf").write_bytes(b"not a gguf at all"), "not a GGUF file"),
        (lambda d: (d / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x07" * 40), "truncated GGUF"),
        (lambda d: (d / "x.gguf").write_bytes(b"GGUF"), "truncated GGUF"),
        (lambda d: (d / "x.gguf").write_bytes(b""), "not a GGUF file"),
    ],
)
def test_unreadable_gguf_is_one_line(tmp_path: Path, make: object, expected: str) -> None:
    make(tmp_path)  # type: ignore[operator]  # a lambda of the table
    with pytest.raises(SourceError, match=expected) as error:
        resolve_source(str(tmp_path / "x.gguf"))
    assert "x.gguf" in message(error)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}")
    (tmp_path / "many").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "many" / name).touch()
    for location, expected in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no checkpoint"),
        (tmp_path / "bare", "no weights"),
        (tmp_path / "many", "name one of them"),
        ("model.gguf", "does not exist"),
        ("", "'' does not exist: give a folder"),
        ("some-org/some-model", "unreachable"),
    ):
        with pytest.raises(SourceError, match=expected) as error:
            resolve_source(str(location))
        message(error)
    with pytest.raises(SourceError, match="--revision"):
        resolve_source(str(tmp_path / "bare"), revision="main")


Tensors = dict[str, "np.ndarray"]
UP = "model.layers.1.mlp.up_proj.weight"


def edited(source: Path, folder: Path, change: Callable[[Tensors], object], *, tied: bool = False) -> Path:
    """A copy of a checkpoint with other tensors."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    return folder


def as_bin(folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(UP), f"lacks weights of its model: {UP}:"),
        (lambda t: t.pop("lm_head.weight"), "lacks weights of its model: lm_head.weight"),
        (lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k], "lacks .* and 6 more"),
        (lambda t: t.update({UP.replace("weight", "bias"): np.zeros(64, np.float32)}), "does not have: .*up_proj.bias"),
        (lambda t: t.update({UP.replace(".1.", ".2."): t[UP]}), "does not have: model.layers.2.mlp.up_proj.weight"),
        (lambda t: t.update({UP: t[UP][:60].copy()}), rf"another shape .*: {UP} \(60, 32\) for \(64, 32\)"),
    ],
)
def test_tensors_must_be_those_of_the_model(
    tiny_llama: Path, tmp_path: Path, binary: bool, change: Callable[[Tensors], object], expected: str
) -> None:
    source = edited(tiny_llama, tmp_path / "hf", change)
    with pytest.raises(SourceError, match=expected) as error:
        options = TargetOptions(allow_pickle=binary)
        export_target(str(as_bin(source) if binary else source), tmp_path / "pair", options=options)
    assert str(source) in message(error)
    assert_nothing_left(tmp_path / "pair")


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (lambda t: None, False),
        (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}), False),
        (lambda t: t.pop("lm_head.weight"), True),
        (lambda t: t.pop("model.embed_tokens.weight"), True),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}), True),
        (lambda t: None, True),  # tied by its configuration, but with a head of its own
    ],
)
def test_tied_tables_and_buffers_of_rope_are_no_difference(
    tiny_llama: Path, tmp_path: Path, binary: bool, change: Callable[[Tensors], object], tied: bool
) -> None:
    source = edited(tiny_llama, tmp_path / "hf", change, tied=tied)
    with quiet():
        check_tensors(str(source), as_bin(source) if binary else source)


@pytest.mark.parametrize(
    "found",
    [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"quant_method": "fp8"},
     {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": None}, "int4"],
)  # fmt: skip
@pytest.mark.parametrize("inner", [False, True])
def test_weights_quantised_for_another_engine_are_refused_at_once(
    tiny_llama: Path, tmp_path: Path, found: object, inner: bool
) -> None:
    source = edited(tiny_llama, tmp_path / "hf", lambda tensors: None)
    config = json.loads((source / "config.json").read_text())
    quantised = {"quantization_config": found}
    config |= {"text_config": quantised} if inner else quantised
    (source / "config.json").write_text(json.dumps(config))
    method = found["quant_method"] if isinstance(found, dict) else found
    with pytest.raises(SourceError, match=f"quantised with '{method}': give the model") as error:
        resolve_source(str(source))
    assert str(source) in message(error)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        ("config.json", b'{"model_type": "lla', "config.json is not valid JSON"),
        ("config.json", b"[" * 100_000, "config.json is not valid JSON"),
        ("config.json", b"[]", "config.json holds a list, not an object"),
        ("model.safetensors", b"", "the files of weights have"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(
    tiny_llama: Path, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(tiny_llama, source)
    (source / name).write_bytes(content)
    with pytest.raises(SourceError, match=expected) as error:
        export_target(str(source), tmp_path / "pair")
    assert str(source) in message(error)
    assert_nothing_left(tmp_path / "pair")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x02}q"])
def test_damaged_bin_is_one_line(tiny_llama: Path, tmp_path: Path, content: bytes) -> None:
    source = as_bin(edited(tiny_llama, tmp_path / "hf", lambda tensors: None))
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(DovetailError, match=r"hf") as error:
        export_target(str(source), tmp_path / "pair", options=TargetOptions(allow_pickle=True))
    message(error)
    assert_nothing_left(tmp_path / "pair")


def test_a_bin_that_was_cut_is_to_be_downloaded_again(tiny_llama: Path, tmp_path: Path) -> None:
    source = as_bin(edited(tiny_llama, tmp_path / "hf", lambda tensors: None))
    weights = source / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SourceError, match=r"unreadable weights.*download them again") as error:
        export_target(str(source), tmp_path / "pair", options=TargetOptions(allow_pickle=True))
    message(error)
    assert_nothing_left(tmp_path / "pair")


def test_gguf_pointer_of_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(SourceError, match=r"m\.gguf is a Git LFS pointer.*git lfs pull") as error:
        resolve_source(str(tmp_path / "m.gguf"))
    message(error)
