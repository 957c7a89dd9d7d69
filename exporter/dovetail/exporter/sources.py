"""Where a target comes from: a Hub id, a Hugging Face folder, a GGUF file or an OpenVINO IR folder.

Resolving reads no weights beyond their digests, and imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dovetail.runtime.errors import SourceError
from dovetail.runtime.manifest import sha256_file

Kind = Literal["hf", "gguf", "ir"]

IR_XML = "openvino_model.xml"
GGUF_MAGIC = b"GGUF"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_WEIGHTS = ("*.bin", "*.safetensors", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.pth", "*.pt", "*.onnx*", "*.tflite")


@dataclass(frozen=True)
class Source:
    """A target's checkpoint on this machine.

    location: what the user gave. path: a folder, or the GGUF file. repo, revision: the Hub id and the
    commit it resolved to, None for local sources. files: relative name -> sha256 of what the export reads.
    """

    kind: Kind
    location: str
    path: Path
    files: dict[str, str]
    repo: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The folder with configuration and tokenizer."""
        return self.path.parent if self.kind == "gguf" else self.path

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two sources the same, as JSON; a moved checkpoint stays the same."""
        return {"kind": self.kind, "repo": self.repo, "revision": self.revision, "files": self.files}


def resolve_source(location: str, revision: str | None = None) -> Source:
    """Find out what `location` is; a Hub id is downloaded into the Hugging Face cache.

    Raises SourceError: no such path or Hub id, hub unreachable, a folder or file of no known kind.
    """
    path = Path(os.path.expanduser(location))
    if path.exists():
        if revision:
            raise SourceError(f"--revision {revision!r} needs a Hub id, but {location!r} is a local path: drop one")
        return _local(path, location)
    if path.suffix in (".gguf", ".xml") or location[:1] in "./~" or not _HUB_ID.fullmatch(location):
        raise SourceError(f"{location!r} does not exist: give a folder, a GGUF file or a Hub id")
    folder = download(location, revision)
    found = _local(folder, location)
    return Source(found.kind, location, found.path, found.files, repo=location, revision=folder.name)


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch a Hub repository as transformers would; returns its folder, named after the commit.

    Raises SourceError in one line when the hub is unreachable or refuses.
    """
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=10)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            return Path(snapshot_download(repo, revision=info.sha, ignore_patterns=_unwanted(names)))
        except (OfflineModeIsEnabled, httpx.TransportError):  # unreachable: what was downloaded before will do
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise SourceError(
            f"the Hub is unreachable and {repo!r} is not in its cache: connect, or give a local folder or GGUF file"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, ValueError) as error:
        reason = str(getattr(error, "server_message", None) or error).strip().splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        raise SourceError(f"Hub id {repo!r}{at} cannot be downloaded: {reason}") from error


def check_gguf(path: Path) -> str:
    """Check that a GGUF file is whole; returns its architecture, e.g. "llama".

    Raises SourceError: not GGUF, truncated, or without an architecture.
    """
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
        if magic != GGUF_MAGIC:
            raise SourceError(f"{path} is not a GGUF file (it starts with {magic!r}): give another file")
        reader = GGUFReader(path)
        end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
        field = reader.get_field("general.architecture")
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is a damaged or truncated GGUF file: download it again") from error
    if not end or end > path.stat().st_size:
        raise SourceError(f"{path} is a damaged or truncated GGUF file: download it again")
    if field is None:
        raise SourceError(f"{path} names no architecture: it is not a language model")
    return str(field.contents())


def _local(path: Path, location: str) -> Source:
    if path.is_file():
        if path.name == IR_XML:
            return _local(path.parent, location)
        check_gguf(path)
        return Source("gguf", location, path, {path.name: sha256_file(path)})
    if (path / IR_XML).is_file():
        return Source("ir", location, path, _digest(path, [IR_XML, "openvino_model.bin", "config.json"]))
    if (path / "config.json").is_file():
        return Source("hf", location, path, _digest(path, _weight_files(path)))
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _local(ggufs[0], location)
    if ggufs:
        raise SourceError(f"{path} holds {len(ggufs)} GGUF files: name one of them, e.g. {ggufs[0]}")
    raise SourceError(f"{path} is no checkpoint: it has neither {IR_XML}, config.json nor a GGUF file")


def _weight_files(folder: Path) -> list[str]:
    weights = sorted(p.name for p in folder.glob("*.safetensors")) or sorted(
        p.name for p in folder.glob("pytorch_model*.bin")
    )
    if not weights:
        raise SourceError(f"{folder} has a config.json but no weights (*.safetensors or pytorch_model*.bin)")
    return ["config.json", *weights, *sorted(p.name for p in folder.glob("*.py"))]


def _digest(folder: Path, names: list[str]) -> dict[str, str]:
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name} is missing: the source is incomplete, copy or download it again")
    try:
        return {name: sha256_file(folder / name) for name in names}
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from error


def _unwanted(names: list[str]) -> list[str]:
    """Which files of a repository not to download: weights of every kind but the best one, and subfolders."""
    top = [name for name in names if "/" not in name]
    for marker, kept in ((IR_XML, "*.bin"), (".safetensors", "*.safetensors"), (".bin", "*.bin")):
        if any(name.endswith(marker) for name in top):
            return [*(pattern for pattern in _HUB_WEIGHTS if pattern != kept), "*/*"]
    if any(name.endswith(".gguf") for name in top):
        raise ValueError("it holds GGUF files only: download one of them and give its path")
    return [*_HUB_WEIGHTS, "*/*"]
