"""Targets from the Hub, against a server of this test that answers as the Hub does."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dovetail.exporter.cli.main import main
from dovetail.exporter.target.sources import resolve_source
from dovetail.runtime.errors import SourceError
from dovetail.runtime.pair.check import verify_files
from dovetail.runtime.pair.manifest import read_manifest

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub

REPO, TOKEN = "somebody/tiny", "hf_of_the_owner"
PROGRAM = """
import json, sys
from dovetail.exporter.target.sources import resolve_source
from dovetail.runtime.errors import SourceError
location, revision, pickle = (json.loads(word) for word in sys.argv[1:])
try:
    source = resolve_source(location, revision, pickle)
except SourceError as error:
    sys.exit(f"error: {error}")
print(json.dumps([source.kind, source.repo, source.revision, sorted(source.files)]))
"""
WHOLE = ["config.json", "model.safetensors"]


def resolved(
    hub: FakeHub, home: Path, location: str = REPO, revision: str | None = None, pickle: bool = False,
    token: str | None = None, **more: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, *map(json.dumps, (location, revision, pickle))]
    environment = hub.environment(home, token, **more)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of a failure."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def checkpoint(folder: Path, **config: Any) -> dict[str, bytes]:
    """Files of a checkpoint, with `config` in its config.json."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {**files, "config.json": json.dumps(json.loads(files["config.json"]) | config).encode()}


def in_shards(folder: Path) -> dict[str, bytes]:
    """Files of a checkpoint whose weights are in two files with an index."""
    from safetensors.numpy import load_file, save

    files, tensors = checkpoint(folder), load_file(folder / "model.safetensors")
    del files["model.safetensors"]
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in {*weight_map.values()}:
        own = {name: tensors[name] for name in names if weight_map[name] == shard}
        files[shard] = save(own, {"format": "pt"})
    return {**files, "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def test_a_repository_is_downloaded_with_the_best_weights_alone(hub: FakeHub, tiny_llama: Path, tmp_path: Path) -> None:
    files = checkpoint(tiny_llama)
    commit = hub.add(REPO, {**files, "pytorch_model.bin": b"others", "onnx/model.onnx": b"others"}).refs["main"]
    done = resolved(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["hf", REPO, commit, WHOLE]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*hub.fetched} <= {*files}
    hub.down = 503
    assert resolved(hub, tmp_path).stdout == done.stdout
    hub.stop()
    assert resolved(hub, tmp_path).stdout == done.stdout  # unreachable: the download is still there
    assert resolved(hub, tmp_path, HF_HUB_OFFLINE="1").stdout == done.stdout


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, tiny_llama: Path, tmp_path: Path) -> None:
    repository = hub.add(REPO, checkpoint(tiny_llama))
    first = repository.refs["v1"] = repository.refs["main"]
    second = repository.commit(checkpoint(tiny_llama, rope_theta=20000.0))
    third = repository.commit(checkpoint(tiny_llama, rope_theta=30000.0), "next/one")
    for revision, commit in ((None, second), ("v1", first), ("next/one", third), (first, first)):
        done = resolved(hub, tmp_path, revision=revision)
        assert json.loads(done.stdout)[2] == commit, done.stderr
        offline = resolved(hub, tmp_path, revision=revision, HF_HUB_OFFLINE="1")
        assert offline.stdout == done.stdout, offline.stderr
    line = error_line(resolved(hub, tmp_path, revision="v9"))
    assert "has no revision 'v9': give a branch, a tag or a commit" in line


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "mamba"),
        ({"hidden_size": -4}, "hidden_size"),
    ],
)
def test_a_checkpoint_that_cannot_be_a_target_is_refused_before_its_weights_are_read(
    hub: FakeHub, tiny_llama: Path, tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    hub.add(REPO, checkpoint(tiny_llama, **config))
    assert named in error_line(resolved(hub, tmp_path))
    assert hub.fetched == ["config.json"]


def test_a_download_larger_than_the_disk_is_refused_at_once(hub: FakeHub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint(tiny_llama), claimed={"model.safetensors": 1 << 60})
    line = error_line(resolved(hub, tmp_path))
    assert "1152921504.6 GB to download" in line and "GB free" in line
    assert hub.fetched == ["config.json"]
    hub.repositories[REPO].claimed = {}
    assert resolved(hub, tmp_path).returncode == 0
    hub.repositories[REPO].claimed = {"model.safetensors": 1 << 60}
    hub.repositories[REPO].commit({**checkpoint(tiny_llama), "README.md": b"# Another card"})
    assert resolved(hub, tmp_path).returncode == 0  # its weights are in the cache


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"a.gguf": b"GGUF", "config.json": b"{}"}, "only GGUF files"),
        ({"README.md": b"# Nothing"}, "holds no model"),
    ],
)
def test_a_repository_without_a_checkpoint_is_one_line(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes], named: str
) -> None:
    hub.add(REPO, files)
    assert named in error_line(resolved(hub, tmp_path))
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("facts", "token", "told"),
    [
        ({"private": True}, None, "set HF_TOKEN to a token of an account with access"),
        ({"gated": True}, None, "it is gated: accept its licence on {page}, and set HF_TOKEN"),
        ({"gated": True}, "hf_of_a_guest", "the account of your token has no access: accept its licence on {page}"),
        ({}, "hf_unknown", "the Hub refuses the token (Invalid credentials in Authorization header): set HF_TOKEN"),
        ({"private": True}, TOKEN, None),
        ({"gated": True}, TOKEN, None),
    ],
)
def test_a_token_comes_from_the_environment(
    hub: FakeHub, tiny_llama: Path, tmp_path: Path, facts: dict[str, bool], token: str | None, told: str | None
) -> None:
    hub.tokens.add("hf_of_a_guest")
    hub.add(REPO, checkpoint(tiny_llama), **facts)
    done = resolved(hub, tmp_path, token=token)
    if told is None:
        assert json.loads(done.stdout)[3] == WHOLE, done.stderr
    else:
        assert told.format(page=f"{hub.address}/{REPO}") in error_line(done)
        assert "model.safetensors" not in hub.fetched and (token is None or token not in done.stderr)


def test_what_the_hub_does_not_have_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    line = error_line(resolved(hub, tmp_path, "somebody/other", "v2"))
    assert "Hub id 'somebody/other' at revision 'v2' cannot be downloaded" in line and "correct the name" in line
    line = error_line(resolved(hub, tmp_path, "somebody/other", token=TOKEN))
    assert "it does not exist" in line


@pytest.mark.parametrize(
    "answer", [{}, [], None, {"sha": "1"}, {"id": "a/b", "siblings": [{}]}, {"id": "a/b", "siblings": [1]}]
)
def test_an_answer_of_another_form_is_one_line(hub: FakeHub, tmp_path: Path, answer: object) -> None:
    hub.answers = answer
    line = error_line(resolved(hub, tmp_path / "home"))
    assert "cannot be downloaded: the Hub's answer is unusable" in line and line.endswith(": check HF_ENDPOINT")


def test_a_revision_of_a_folder_is_one_line(tiny_llama: Path) -> None:
    with pytest.raises(SourceError, match="is a local path: drop --revision, or give a Hub id"):
        resolve_source(str(tiny_llama), "main")


def test_a_cache_without_the_repository_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    line = error_line(resolved(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert f"{REPO!r} is not in the Hub's cache, and HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE" in line
    hub.stop()
    line = error_line(resolved(hub, tmp_path))
    assert f"{REPO!r} is not in the Hub's cache, and the Hub {hub.address} is unreachable: connect" in line


@pytest.mark.parametrize("lost", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_part_of_a_repository_in_the_cache_is_not_enough(
    hub: FakeHub, tiny_llama: Path, tmp_path: Path, lost: str
) -> None:
    hub.add(REPO, in_shards(tiny_llama) if "-of-" in lost else checkpoint(tiny_llama))
    assert resolved(hub, tmp_path).returncode == 0
    (link,) = tmp_path.rglob(f"snapshots/*/{lost}")
    assert link.is_symlink()
    link.resolve().unlink()
    line = error_line(resolved(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert lost in line or ("no weights" in line and "holds a part of somebody/tiny" in line)
    assert resolved(hub, tmp_path).returncode == 0  # downloads it again


def test_a_shard_that_the_index_names_must_be_there(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for name, content in in_shards(tiny_llama).items():
        (source / name).write_bytes(content)
    (source / "model-00002-of-00002.safetensors").unlink()
    assert main(["target", str(source), str(tmp_path / "pair")]) == SourceError.exit_code
    assert "model-00002-of-00002.safetensors is missing from the source" in capsys.readouterr().err


def test_a_snapshot_of_links_becomes_a_pair_of_files(hub: FakeHub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.add(REPO, in_shards(tiny_llama), private=True)
    pair = tmp_path / "pair"
    done = hub.export(tmp_path / "home", "target", REPO, pair, token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert any(path.is_symlink() for path in (tmp_path / "home").rglob("*.safetensors"))
    assert not any(path.is_symlink() for path in pair.rglob("*"))
    manifest = read_manifest(pair)
    verify_files(pair, manifest, remember=False)
    source = manifest.provenance["target"]["source"]
    assert (source["repo"], source["revision"]) == (REPO, hub.repositories[REPO].refs["main"])


class Touch:
    """Pickled, an order to make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickled(folder: Path) -> dict[str, bytes]:
    import io

    import torch
    from safetensors.torch import load_file

    stream = io.BytesIO()
    torch.save(load_file(folder / "model.safetensors"), stream)
    files = checkpoint(folder)
    del files["model.safetensors"]
    return {**files, "pytorch_model.bin": stream.getvalue()}


def test_pickled_weights_need_a_word(hub: FakeHub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.add(REPO, pickled(tiny_llama))
    line = error_line(resolved(hub, tmp_path))
    assert "pickled weights alone (pytorch_model.bin)" in line and "--allow-pickle" in line
    assert hub.fetched == ["config.json"]
    done = resolved(hub, tmp_path, pickle=True)
    assert json.loads(done.stdout)[3] == ["config.json", "pytorch_model.bin"], done.stderr


def test_a_local_pickle_is_read_as_tensors_alone(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    source, marker = shutil.copytree(tiny_llama, tmp_path / "hf"), tmp_path / "ran"
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker), protocol=2))
    command = ["target", str(source), str(tmp_path / "pair")]
    assert main(command) == SourceError.exit_code
    assert "--allow-pickle" in capsys.readouterr().err
    assert main([*command, "--allow-pickle"]) in (4, 5)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert not marker.exists() and not (tmp_path / "pair").exists()
