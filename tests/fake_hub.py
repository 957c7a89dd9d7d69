"""The Hugging Face Hub's HTTP interface, as far as huggingface_hub uses it, on a port of this machine.

A repository has commits, branches and tags. Files are regular, or in LFS: then `resolve` redirects, and an upload goes
through preupload, LFS batch and commit. Accounts have tokens; a private repository hides from all but its readers, and
a gated one shows its list of files alone.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".safetensors", ".onnx", ".data", ".npz", ".pt")
TOKEN = "hf_of_the_owner"
TRUE = object()
Files = dict[str, bytes]


@dataclass
class Repository:
    """refs: commit of each branch and tag. commits: files by commit. claimed: sizes that are said, not true."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    claimed: dict[str, int] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Make `files` the content of a branch; returns the commit."""
        content = "".join(f"{name}{sha256(files[name]).hexdigest()}" for name in sorted(files))
        name = sha1(f"{self.refs.get(branch)}{content}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class FakeHub:
    """The server. fetched: names of files that were asked for in full. asked: method and path of each request.

    down: status of every answer, 0 for none. answers: content of every answer, TRUE for the truth. ignored:
    endings of paths that a .gitignore of the repository names. lost: endings of paths that a commit drops. broken: path
    of a file that cannot be read. full: no LFS object can be added.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {TOKEN}
        self.fetched: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.stored: dict[str, bytes] = {}  # LFS objects by sha256
        self.paths: dict[str, str] = {}  # of LFS objects, by sha256
        self.down = 0
        self.answers: object = TRUE
        self.ignored: tuple[str, ...] = ()
        self.lost: tuple[str, ...] = ()
        self.broken = ""
        self.full = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, files: Files, **facts: Any) -> Repository:
        repository = self.repositories[name] = Repository(**facts)
        repository.commit(files)
        return repository

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """Variables for a process that takes this server for the Hub. home: of huggingface_hub's cache."""
        roots = [str(Path(__file__).parents[1] / root) for root in ("runtime", "exporter", "models")]
        given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}  # Xet needs more servers
        tokens = {"HF_TOKEN": token} if token else {}
        return {**given, "PYTHONPATH": os.pathsep.join(roots), **own, **tokens, **more}

    def export(
        self, home: Path, *arguments: object, token: str | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run dovetail-export in a process of its own: the Hub's address is read when its library is imported."""
        command = [sys.executable, "-m", "dovetail.exporter.cli.main", *map(str, arguments)]
        environment = self.environment(home, token, **more)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Be unreachable from now on."""
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        length = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.chunks()
        else:
            self.body = self.rfile.read(int(length or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.asked.append((self.command, url.path))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.down:
            return self.fail(self.hub.down, None, "the Hub has a bad day")
        if self.hub.answers is not TRUE:
            return self.send(200, self.hub.answers)
        if self.token and self.token not in self.hub.tokens:
            return self.fail(401, None, "Invalid credentials in Authorization header")
        if parts[0] == "lfs":
            return self.lfs(parts[1])
        if parts[:2] == ["api", "validate-yaml"]:
            return self.validate(self.object()["content"])
        if parts[:3] == ["api", "repos", "create"]:
            return self.create()
        if parts[:2] == ["api", "models"]:
            return self.api(f"{parts[2]}/{parts[3]}", parts[4:])
        if parts[2:3] == ["resolve"]:
            return self.resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
        if parts[1].endswith(".git"):
            return self.batch()
        return self.fail(404, None, "no such page")

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def object(self) -> Any:
        return json.loads(self.body or b"{}")

    def repository(self, name: str) -> Repository | None:
        """The repository, if this account sees it; else the answer is given."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.token):
            self.fail(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def api(self, name: str, rest: list[str]) -> None:
        repository = self.repository(name)
        if repository is None:
            return None
        what, *more = rest or ["revision", "main"]
        if self.command == "POST" and not self.token:
            return self.fail(401, None, "a token is needed")
        if what == "branch":
            if more[0] in repository.refs:
                return self.fail(409, None, "Reference already exists")
            repository.refs[more[0]] = repository.refs["main"]
            return self.send(200, {})
        if what == "preupload":
            return self.send(200, {"files": [self.mode(file["path"]) for file in self.object()["files"]]})
        if what == "commit":
            return self.commit(name, repository, more[0])
        commit = repository.find(more[0])
        if commit is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        files = [self.sibling(path, content, repository) for path, content in repository.commits[commit].items()]
        if what == "tree":
            return self.send(200, [{"type": "file", "path": each["rfilename"], "oid": "", "size": 0} for each in files])
        return self.send(200, {"id": name, "sha": commit, "private": repository.private, "siblings": files})

    def sibling(self, path: str, content: bytes, repository: Repository) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": path}
        if "blobs" in self.query:
            size = repository.claimed.get(path, len(content))
            found |= {"size": size, "blobId": sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if path.endswith(LFS_SUFFIXES):
                found["lfs"] = {"sha256": sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        return found

    def mode(self, path: str) -> dict[str, Any]:
        ignored = "gitIgnore" not in self.object() and path.endswith(self.hub.ignored or ("\0",))
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
            "shouldIgnore": ignored,
        }

    def create(self) -> None:
        if not self.token:
            return self.fail(401, None, "a token is needed")
        wanted = self.object()
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "others":
            return self.fail(403, None, "You don't have the rights to create a model under the namespace others")
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this repo", "url": f"{self.hub.address}/{name}"})
        self.hub.add(name, {".gitattributes": b"*.bin filter=lfs\n"}, private=wanted.get("visibility") == "private")
        return self.send(200, {"url": f"{self.hub.address}/{name}"})

    def commit(self, name: str, repository: Repository, branch: str) -> None:
        if branch not in repository.refs:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        files = dict(repository.commits[repository.refs[branch]])
        for line in self.body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header" or value["path"].endswith(self.hub.lost or ("\0",)):
                continue
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                files.pop(value["path"])
        commit = repository.commit(files, branch)
        return self.send(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def batch(self) -> None:
        if not self.token:
            return self.fail(401, None, "a token is needed")
        objects: list[dict[str, Any]] = []
        for wanted in self.object()["objects"]:
            action = {} if wanted["oid"] in self.hub.stored else {
                "actions": {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}
            }  # fmt: skip
            objects.append({**wanted, **action})
        return self.send(200, {"transfer": "basic", "objects": objects})

    def lfs(self, oid: str) -> None:
        if self.command == "PUT":
            if self.hub.full:
                return self.fail(413, None, "no room for more")
            assert sha256(self.body).hexdigest() == oid
            self.hub.stored[oid] = self.body
            return self.send(200, {})
        content, part = self.hub.stored[oid], self.headers.get("Range")
        if part:  # bytes=0-99
            first, last = map(int, part.removeprefix("bytes=").split("-"))
            return self.send(206, content[first : last + 1], {"ETag": f'"{oid}"'})
        self.hub.fetched.append(self.hub.paths[oid])
        return self.send(200, content, {"ETag": f'"{oid}"'})

    def validate(self, content: str) -> None:
        if not content.startswith("---\n") or "\n---\n" not in content:
            return self.fail(400, None, "no metadata")
        return self.send(200, {"errors": [], "warnings": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return None
        commit = repository.find(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        facts = {"X-Repo-Commit": commit}
        if repository.gated and not self.token:
            return self.fail(401, "GatedRepo", "Access to this model is restricted")
        if repository.gated and self.token != TOKEN:
            return self.fail(403, "GatedRepo", "you are not in the authorized list")
        content = repository.commits[commit].get(path)
        if path == self.hub.broken:
            return self.fail(403, None, "a broken disk")
        if content is None:
            return self.fail(404, "EntryNotFound", "Entry not found", facts)
        digest = sha256(content).hexdigest()
        if path.endswith(LFS_SUFFIXES):
            self.hub.stored[digest] = content
            self.hub.paths[digest] = path
            facts |= {"X-Linked-Size": str(repository.claimed.get(path, len(content))), "X-Linked-Etag": f'"{digest}"'}
            return self.send(302, b"", {**facts, "Location": f"{self.hub.address}/lfs/{digest}"})
        if self.command == "GET":
            self.hub.fetched.append(path)
        return self.send(200, content, {**facts, "ETag": f'"{sha1(content).hexdigest()}"'})

    def fail(self, status: int, code: str | None, message: str, facts: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        self.send(status, {"error": message}, {**codes, "X-Error-Message": message, **(facts or {})})

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
