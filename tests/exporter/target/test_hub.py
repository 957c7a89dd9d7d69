"""Checkpoints from the Hub, against a server of this test that answers as the Hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="checkpoints are the exporter's")

REPO, COMMIT = "somebody/tiny", "c" * 40
PROGRAM = """
import json, sys
from dovetail.exporter.target.sources import resolve_source
from dovetail.runtime.errors import SourceError
try:
    source = resolve_source(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
except SourceError as error:
    sys.exit(f"error: {error}")
print(json.dumps([source.kind, source.repo, source.revision, sorted(source.files)]))
"""


class Hub:
    """A repository of `files`, and the names of those that were asked for in full."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.respond(body=False)

            def do_GET(self) -> None:
                self.respond(body=True)

            def respond(self, body: bool) -> None:
                path, known = self.path.split("?")[0], f"/{REPO}/resolve/{COMMIT}/"
                if path in (f"/api/models/{REPO}", *(f"/api/models/{REPO}/revision/{at}" for at in ("main", COMMIT))):
                    names = [{"rfilename": name} for name in hub.files]
                    return self.send(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode(), body)
                content = hub.files.get(path.removeprefix(known))
                if content is None:
                    return self.send(404, b"", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such"})
                if body:
                    hub.fetched.append(path.removeprefix(known))
                etag = f'"{sha256(content).hexdigest()[:40]}"'
                return self.send(200, content, body, {"ETag": etag, "X-Repo-Commit": COMMIT})

            def send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.server.serve_forever)
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def resolved(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """resolve_source in a process of its own: the Hub's address is read when its library is imported."""
    address = f"http://127.0.0.1:{hub.server.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def checkpoint(folder: Path, **config: Any) -> dict[str, bytes]:
    """Files of a checkpoint, with `config` in its config.json."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {**files, "config.json": json.dumps(json.loads(files["config.json"]) | config).encode()}


def test_a_repository_is_downloaded_with_the_best_weights_alone(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.files = {**checkpoint(tiny_llama), "pytorch_model.bin": b"others", "onnx/model.onnx": b"others"}
    done = resolved(hub, tmp_path, REPO)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["hf", REPO, COMMIT, ["config.json", "model.safetensors"]]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*hub.fetched} <= {*checkpoint(tiny_llama)}
    hub.server.shutdown()
    hub.server.server_close()
    kept = resolved(hub, tmp_path, REPO)  # unreachable: what was downloaded will do
    assert kept.stdout == done.stdout, kept.stderr


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "mamba"),
        ({"hidden_size": -4}, "hidden_size"),
    ],
)
def test_a_checkpoint_that_cannot_be_a_target_is_refused_before_its_weights_are_read(
    hub: Hub, tiny_llama: Path, tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    hub.files = checkpoint(tiny_llama, **config)
    done = resolved(hub, tmp_path, REPO)
    assert (done.returncode, done.stdout, hub.fetched) == (1, "", ["config.json"])
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and named in line


def test_what_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = resolved(hub, tmp_path, "somebody/other", "v2")
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0
    assert "Hub id 'somebody/other' at revision 'v2' cannot be downloaded" in done.stderr
