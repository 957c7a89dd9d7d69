"""Resolves the source of a target: a Hub id, a Hugging Face folder, a GGUF file or an IR folder.

`resolve_source` reads weights only for their digests, and imports neither torch nor transformers.
It refuses an unsuitable configuration before the digests and before a download of weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from dovetail.exporter.hub import download, is_hub_id
from dovetail.exporter.target.architectures import check_architecture, check_attention
from dovetail.exporter.target.configuration import check_json, check_weights, read_config
from dovetail.runtime.errors import SourceError
from dovetail.runtime.pair.files import sha256_file
from dovetail.runtime.pair.layout import IR_GRAPH, IR_WEIGHTS
from dovetail.runtime.system.files import check_text, read_bytes, read_object

Kind = Literal["hf", "gguf", "ir"]

CONFIG = "config.json"
_LFS_POINTER = b"version https://git-lfs"
_DEQUANTISED = ("mxfp4",)  # transformers dequantises these weights for optimum-intel
# In the metadata of a card. No YAML is parsed, because a stranger's card must not stop an export.
_LICENSE = re.compile(r"\A---\s*\n(?:(?!---).*\n)*?license:[ \t]*[\"']?([\w.+-]{1,60})[\"']?[ \t]*\r?\n")
_SAFE, _PICKLED = "*.safetensors", "pytorch_model*.bin"
_INDEX = ".index.json"  # of weights in several files: names the file of each tensor
_HUB_WEIGHTS = ("*.bin", "*.safetensors", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.pth", "*.pt", "*.onnx*", "*.tflite")


@dataclass(frozen=True)
class Source:
    """A target's checkpoint on this machine.

    location: the user's argument. path: a folder, or the GGUF file.
    files: relative name -> sha256 of each file that the export reads.
    repo, revision: the Hub id and its commit; None for local sources. license: as the model's card
    or the GGUF file says, if one does.
    """

    kind: Kind
    location: str
    path: Path
    files: dict[str, str]
    repo: str | None = None
    revision: str | None = None
    license: str | None = None

    @property
    def folder(self) -> Path:
        return self.path.parent if self.kind == "gguf" else self.path

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that identify a source, as JSON; a moved checkpoint keeps its identity."""
        return {"kind": self.kind, "repo": self.repo, "revision": self.revision, "files": self.files}


def resolve_source(location: str, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """Return the source at `location`; download a Hub id into the Hugging Face cache.

    allow_pickle: take pickled weights where there are no safetensors. Raises SourceError: no such
    path or Hub id, Hub unreachable, unknown kind of folder or file, an architecture that cannot
    become a target, pickled weights alone.
    """
    check_text("source", location, SourceError)
    if path := local_path(location, revision):
        return _local(path, location, allow_pickle)
    if location.endswith((".gguf", ".xml")):
        raise SourceError(f"{location!r} does not exist: give a folder, a GGUF file or a Hub id")

    def choose(sizes: Mapping[str, int], fetch: Callable[[str], Path]) -> list[str]:
        return _needed(location, [name for name in sizes if "/" not in name], fetch, allow_pickle)

    folder = download(location, revision, choose)
    found = _local(folder, location, allow_pickle)
    return replace(found, repo=location, revision=folder.name)


def local_path(location: str, revision: str | None) -> Path | None:
    """The file or folder at `location`; None for a Hub id. Raises SourceError if it is neither."""
    path = Path(os.path.expanduser(location))
    if location and path.exists():  # Path("") is the working folder
        if revision:
            raise SourceError(
                f"--revision {revision!r} needs a Hub id, but {location!r} is a local path: drop --revision, or give a "
                "Hub id"
            )
        return path
    if not is_hub_id(location):
        raise SourceError(f"{location!r} does not exist: give a folder, a GGUF file or a Hub id")
    return None


def choose_weights(
    location: str, names: Collection[str], allow_pickle: bool, pickled: Collection[str] = (_PICKLED,)
) -> list[str]:
    """Return the names of a checkpoint's weights: safetensors, or else allowed pickles.

    pickled: patterns of pickled weights, of which the first that matches counts. Raises SourceError.
    """
    for pattern in (_SAFE, *pickled):
        weights = sorted(name for name in names if fnmatch(name, pattern))
        if weights and pattern != _SAFE and not allow_pickle:
            raise SourceError(
                f"{location} has pickled weights alone ({weights[0]}), which may run code when they are read: give a "
                "checkpoint with *.safetensors, or --allow-pickle to read nothing but tensors from the pickle"
            )
        if weights:
            return weights
    raise SourceError(f"{location} has no weights: add the *.safetensors of its config.json")


def check_shards(folder: Path, weights: Collection[str]) -> None:
    """Raise SourceError if an index of weights names a file that is not among `weights`."""
    for index in sorted(folder.glob(f"*{_INDEX}")):
        single = index.name.removesuffix(_INDEX)
        listed = read_object(index, SourceError, "copy or download it again").get("weight_map")
        if single in weights or Path(single).suffix not in {Path(name).suffix for name in weights}:
            continue  # the index of other weights
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise SourceError(f"{index} has no object weight_map of file names: copy or download it again")
        if missing := sorted({*listed.values()} - {*weights}):
            raise SourceError(f"{folder / missing[0]} is missing from the source: copy or download the source again")


def _needed(repo: str, names: list[str], fetch: Callable[[str], Path], allow_pickle: bool) -> list[str]:
    """Names of the files of a Hub repository that an export needs. Raises SourceError."""
    if IR_GRAPH in names:
        weights = [name for name in (IR_GRAPH, IR_WEIGHTS) if name in names]
    elif any(name.endswith(".gguf") for name in names) and not any(
        fnmatch(name, pattern) for name in names for pattern in (_SAFE, _PICKLED)
    ):
        raise SourceError(f"{repo} holds only GGUF files: download one file and give its path")
    elif CONFIG in names:
        config = read_config(fetch(CONFIG).parent)
        check_architecture(repo, config)
        _check_quantization(repo, config)
        weights = choose_weights(repo, names, allow_pickle)
    else:
        raise SourceError(f"{repo} holds no model: give a repository with config.json and *.safetensors")
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in _HUB_WEIGHTS)]
    return sorted({*weights, *others})


def _local(path: Path, location: str, allow_pickle: bool) -> Source:
    if path.is_file():
        if path.name == IR_GRAPH:
            return _local(path.parent, location, allow_pickle)
        from dovetail.exporter.target.gguf.config import gguf_config  # only GGUF files need gguf
        from dovetail.exporter.target.gguf.header import read_model

        header = read_model(path)
        check_architecture(location, gguf_config(header))
        license = header.metadata.get("general.license")
        return Source(
            "gguf", location, header.parts[0], _digest(path.parent, [part.name for part in header.parts]),
            license=license if isinstance(license, str) else None,
        )  # fmt: skip
    config = None
    if (path / CONFIG).is_file():
        check_fetched(path / CONFIG)
        check_json(path)
        config = read_config(path)
    if (path / IR_GRAPH).is_file():
        if config is not None:
            check_attention(location, config)
        return Source("ir", location, path, _digest(path, [IR_GRAPH, IR_WEIGHTS, CONFIG]), license=_license(path))
    if config is not None:
        names = _weight_files(path, allow_pickle)
        check_architecture(location, config)
        _check_quantization(location, config)
        for name in names:
            check_fetched(path / name)
        check_weights(config, path, sum((path / name).stat().st_size for name in names))
        return Source("hf", location, path, _digest(path, names), license=_license(path))
    if ggufs := sorted(path.glob("*.gguf")):
        from dovetail.exporter.target.gguf.header import name_of_split

        if len(ggufs) == 1 or len({name_of_split(gguf) or gguf for gguf in ggufs}) == 1:
            return _local(ggufs[0], location, allow_pickle)
        raise SourceError(f"{path} holds {len(ggufs)} GGUF files: name one of them, e.g. {ggufs[0]}")
    raise SourceError(f"{path} is no checkpoint: give a folder with {IR_GRAPH}, config.json or a GGUF file")


def _license(folder: Path) -> str | None:
    """The licence that a model's card names in its metadata; None without a card."""
    try:
        found = _LICENSE.match(read_bytes(folder / "README.md").decode("utf-8", "replace"))
    except (OSError, ValueError):  # no card, or one that is no text: an export does without
        return None
    return found[1] if found else None


def _weight_files(folder: Path, allow_pickle: bool) -> list[str]:
    names = sorted(path.name for path in folder.iterdir())
    weights = choose_weights(str(folder), names, allow_pickle)
    check_shards(folder, weights)
    return [CONFIG, *weights, *(name for name in names if name.endswith(".py"))]


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
