"""Resolves the source of a target: a Hub id, a Hugging Face folder, a GGUF file or an IR folder.

`resolve_source` reads weights only for their digests, and imports neither torch nor transformers.
It refuses an unsuitable configuration before the digests and before a download of weights.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dovetail.exporter.target.architectures import check_architecture, check_attention
from dovetail.exporter.target.configuration import check_json, check_weights, read_config
from dovetail.runtime.errors import SourceError
from dovetail.runtime.pair.files import sha256_file
from dovetail.runtime.pair.layout import IR_GRAPH, IR_WEIGHTS
from dovetail.runtime.system.files import check_text

Kind = Literal["hf", "gguf", "ir"]

CONFIG = "config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LFS_POINTER = b"version https://git-lfs"
_DEQUANTISED = ("mxfp4",)  # transformers dequantises these weights for optimum-intel
_HUB_WEIGHTS = ("*.bin", "*.safetensors", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.pth", "*.pt", "*.onnx*", "*.tflite")


@dataclass(frozen=True)
class Source:
    """A target's checkpoint on this machine.

    location: the user's argument. path: a folder, or the GGUF file.
    files: relative name -> sha256 of each file that the export reads.
    repo, revision: the Hub id and its commit; None for local sources.
    """

    kind: Kind
    location: str
    path: Path
    files: dict[str, str]
    repo: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        return self.path.parent if self.kind == "gguf" else self.path

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that identify a source, as JSON; a moved checkpoint keeps its identity."""
        return {"kind": self.kind, "repo": self.repo, "revision": self.revision, "files": self.files}


def resolve_source(location: str, revision: str | None = None) -> Source:
    """Return the source at `location`; download a Hub id into the Hugging Face cache.

    Raises SourceError: no such path or Hub id, Hub unreachable, unknown kind of folder or file, an
    architecture that cannot become a target.
    """
    check_text("source", location, SourceError)
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
    """Download a Hub repository; return its folder, named after the commit. Raises SourceError."""
    import httpx
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=10)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            if CONFIG in names and IR_GRAPH not in names:
                config = read_config(Path(hf_hub_download(repo, CONFIG, revision=info.sha)).parent)
                check_architecture(repo, config)
                _check_quantization(repo, config)
            # With the branch or tag, so that its name leads to the commit without the Hub as well.
            return Path(snapshot_download(repo, revision=revision, ignore_patterns=_unwanted(names)))
        except (OfflineModeIsEnabled, httpx.TransportError):  # without the Hub, use an earlier download
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise SourceError(
            f"the Hub is unreachable and {repo!r} is not in its cache: connect, or give a local folder or GGUF file"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, ValueError) as error:
        reason = str(getattr(error, "server_message", None) or error).strip().splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        raise SourceError(f"Hub id {repo!r}{at} cannot be downloaded: {reason}") from error


def _local(path: Path, location: str) -> Source:
    if path.is_file():
        if path.name == IR_GRAPH:
            return _local(path.parent, location)
        from dovetail.exporter.target.gguf.config import gguf_config  # only GGUF files need gguf
        from dovetail.exporter.target.gguf.header import read_model

        header = read_model(path)
        check_architecture(location, gguf_config(header))
        return Source("gguf", location, header.parts[0], _digest(path.parent, [part.name for part in header.parts]))
    config = None
    if (path / CONFIG).is_file():
        check_fetched(path / CONFIG)
        check_json(path)
        config = read_config(path)
    if (path / IR_GRAPH).is_file():
        if config is not None:
            check_attention(location, config)
        return Source("ir", location, path, _digest(path, [IR_GRAPH, IR_WEIGHTS, CONFIG]))
    if config is not None:
        names = _weight_files(path)
        check_architecture(location, config)
        _check_quantization(location, config)
        for name in names:
            check_fetched(path / name)
        check_weights(config, path, sum((path / name).stat().st_size for name in names))
        return Source("hf", location, path, _digest(path, names))
    if ggufs := sorted(path.glob("*.gguf")):
        from dovetail.exporter.target.gguf.header import name_of_split

        if len(ggufs) == 1 or len({name_of_split(gguf) or gguf for gguf in ggufs}) == 1:
            return _local(ggufs[0], location)
        raise SourceError(f"{path} holds {len(ggufs)} GGUF files: name one of them, e.g. {ggufs[0]}")
    raise SourceError(f"{path} is no checkpoint: give a folder with {IR_GRAPH}, config.json or a GGUF file")


def _weight_files(folder: Path) -> list[str]:
    def named(pattern: str) -> list[str]:
        return sorted(path.name for path in folder.glob(pattern))

    weights = named("*.safetensors") or named("pytorch_model*.bin")
    if not weights:
        raise SourceError(f"{folder} has no weights: add the *.safetensors or pytorch_model*.bin of its config.json")
    return [CONFIG, *weights, *named("*.py")]


def check_fetched(path: Path) -> None:
    """Raise SourceError if a file is missing or is a Git LFS pointer."""
    if not path.is_file():
        raise SourceError(f"{path} is missing from the source: copy or download the source again")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise SourceError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder")


def _check_quantization(location: str, config: Mapping[str, Any]) -> None:
    """Raise SourceError if config.json says that the weights are quantised for another engine."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found
    if found and method not in _DEQUANTISED:
        raise SourceError(
            f"{location} holds weights quantised with {str(method)[:40]!r}: give the model before its quantisation, "
            "which --weight-format int8 or int4 compresses"
        )


def _digest(folder: Path, names: list[str]) -> dict[str, str]:
    for name in names:
        check_text("file", name, SourceError)
    try:
        for name in names:
            check_fetched(folder / name)
        return {name: sha256_file(folder / name) for name in names}
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from error


def _unwanted(names: list[str]) -> list[str]:
    """Patterns of files that a download skips: subfolders, and weights except the best kind."""
    top = [name for name in names if "/" not in name]
    for marker, kept in ((IR_GRAPH, "*.bin"), (".safetensors", "*.safetensors"), (".bin", "*.bin")):
        if any(name.endswith(marker) for name in top):
            return [*(pattern for pattern in _HUB_WEIGHTS if pattern != kept), "*/*"]
    if any(name.endswith(".gguf") for name in top):
        raise ValueError("the repository holds only GGUF files: download one file and give its path")
    return [*_HUB_WEIGHTS, "*/*"]
