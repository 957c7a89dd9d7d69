"""`dovetail.json`: the record of a pair folder. Facts come from here, never from a file name.

The manifest is written last and atomically, so that an interrupted export never looks finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dovetail.runtime.errors import InputError, ManifestError, PairError
from dovetail.runtime.pair.files import sha256_file, write_atomically
from dovetail.runtime.pair.layout import DATA_SUFFIX, MANIFEST_NAME
from dovetail.runtime.system.bounds import BYTES_MOST, LARGEST, check_whole
from dovetail.runtime.system.files import read_json
from dovetail.runtime.tree.limits import TreeLimits

FORMAT_VERSION = 1
TREE_MOST = 2**12  # of each limit of a manifest's tree
FLOAT_MOST = 1e300
_AGAIN = "export the pair again"

Record = TypeVar("Record")
_MAY_BE_MISSING = {"may_be_missing": True}  # keys that older manifests of this format version do not have


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and digest (sha256, 64 hexadecimal digits) of one file of the pair."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ManifestError(f"size {self.size} of a file is negative: export the pair again")
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ManifestError(f"sha256 {self.sha256!r} is not 64 hexadecimal digits: export the pair again")


@dataclass(frozen=True)
class TargetFacts:
    """Facts that the runtime needs before it loads a target's weights."""

    model_type: str
    hidden_size: int  # width of the embedding
    feature_size: int  # width D of the tapped features
    vocab_size: int
    num_layers: int
    max_context: int  # tokens
    weight_format: str
    taps: tuple[str, ...]  # friendly names of the tapped nodes, in the order of the features
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: str  # digest of tokenizer.json
    gpu_layers: str = field(default="0", metadata=_MAY_BE_MISSING)  # first layers to run on a GPU, or "auto"

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.gpu_layers != "auto" and not (self.gpu_layers.isascii() and self.gpu_layers.isdigit()):
            raise ManifestError(f"target.gpu_layers {self.gpu_layers!r:.40} is no number and not auto: {_AGAIN}")
        if not self.taps:
            raise ManifestError("target.taps is empty: export the target again, a drafter needs a feature output")


@dataclass(frozen=True)
class DrafterFacts:
    """Facts that the runtime needs before it loads a drafter's weights.

    files: device ("cuda", "cpu") -> path inside the pair. feature_layers: blocks of the target that
    the drafter reads beside the last feature; files["features"] then holds their FeatureMix.
    workspace: bytes of activations of the largest call on a GPU, fixed and per pair of context.
    vram: the most bytes of GPU memory that the drafter may take, 0 for no limit. noise: whether the
    graphs take the noise of sampled answers. target_size: width of the target's blocks, if the
    drafter has another width and rows of its own; 0 if the drafter's sizes are the target's.
    positions: tokens that one call drafts, if the graphs draft blocks; 0 if they grow trees level
    by level. reads_tokens: whether the drafter reads tokens alone. Its sizes are then its own.
    """

    blocks: int
    hidden_size: int
    feature_size: int
    target_vocab_size: int
    draft_vocab_size: int
    num_kv_heads: int
    head_size: int
    top_k: int  # children that the graph returns per row
    tree_slots: int  # rows of KV for tree nodes
    max_context: int  # (feature, token) pairs
    tokenizer_sha256: str
    files: dict[str, str]
    feature_layers: tuple[int, ...] = field(default=(), metadata=_MAY_BE_MISSING)
    workspace: tuple[int, ...] = field(default=(), metadata=_MAY_BE_MISSING)
    vram: int = field(default=0, metadata=_MAY_BE_MISSING)
    noise: bool = field(default=False, metadata=_MAY_BE_MISSING)
    target_size: int = field(default=0, metadata=_MAY_BE_MISSING)
    positions: int = field(default=0, metadata=_MAY_BE_MISSING)
    reads_tokens: bool = field(default=False, metadata=_MAY_BE_MISSING)

    @property
    def reads_size(self) -> int:
        """Width of the outputs of the target that the drafter reads."""
        return self.target_size or self.feature_size

    def __post_init__(self) -> None:
        if "cpu" not in self.files:
            raise ManifestError("drafter.files has no 'cpu' entry: export the drafter again")
        if bool(self.feature_layers) != ("features" in self.files):
            raise ManifestError("drafter.feature_layers and files['features'] do not match: export the drafter again")
        if len(self.workspace) not in (0, 2):
            raise ManifestError(f"drafter.workspace {self.workspace} is no pair of sizes: export the drafter again")
        for name, value in (*(("workspace", size) for size in self.workspace), ("vram", self.vram)):
            check_whole(f"drafter.{name}", value, ManifestError, _AGAIN, least=0, most=BYTES_MOST)
        most = LARGEST["hidden_size"]
        check_whole("drafter.target_size", self.target_size, ManifestError, _AGAIN, least=0, most=most)
        if self.target_size and not self.feature_layers:
            raise ManifestError(
                f"drafter.target_size {self.target_size} without feature_layers: export the drafter again"
            )
        if self.reads_tokens and (self.feature_layers or self.positions):
            raise ManifestError("drafter.reads_tokens with feature_layers or positions: export the drafter again")
        _check_sizes(self)
        # A block has a row more than it drafts, and a call writes rows that nobody reads to one row more.
        most = max(self.tree_slots - 2, 0)
        check_whole("drafter.positions", self.positions, ManifestError, _AGAIN, least=0, most=most)


@dataclass(frozen=True)
class Manifest:
    """Everything about one pair."""

    name: str
    target: TargetFacts
    drafter: DrafterFacts | None
    files: dict[str, FileEntry]  # by path inside the pair, POSIX and relative
    tree: TreeLimits = field(default_factory=TreeLimits)
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        listed = [*self.files, *(self.drafter.files.values() if self.drafter else ())]
        for path in map(PurePosixPath, listed):
            if path.is_absolute() or ".." in path.parts or set("\\\0") & set(str(path)):
                raise ManifestError(f"files: {str(path)!r} lies outside the pair: export the pair again")

    @property
    def drafter_kind(self) -> str | None:
        """The drafter, as the format of its checkpoint describes it; None in older manifests."""
        record = self.provenance.get("drafter")
        kind = record.get("description") if isinstance(record, dict) else None
        return kind if isinstance(kind, str) else None

    @property
    def needed_drafter(self) -> DrafterFacts:
        """The drafter of a pair that must have one. Raises PairError."""
        if self.drafter is None:
            raise PairError(
                f"the pair {self.name} has no drafter: add one with dovetail-export drafter, or run without speculation"
            )
        return self.drafter

    def drafter_files(self, device: str) -> list[FileEntry]:
        """Return the drafter's graph for `device`, and the file of its weights if there is one."""
        graph = self.needed_drafter.files[device]
        return [self.files[name] for name in (graph, graph + DATA_SUFFIX) if name in self.files]


def read_manifest(pair: Path) -> Manifest:
    """Read and check `pair`/dovetail.json. Raises ManifestError."""
    path = Path(pair) / MANIFEST_NAME
    try:
        raw = read_json(path, ManifestError, "export the pair again with --force, or check its permissions")
    except (FileNotFoundError, NotADirectoryError):
        remedy = ", or finish its export with --resume" if Path(pair).is_dir() else ""
        raise ManifestError(f"{path} is missing: name a pair folder{remedy}") from None
    try:
        return parse_manifest(raw)
    except ManifestError as err:
        raise ManifestError(f"{path}: {err}") from None


def parse_manifest(raw: object) -> Manifest:
    """Return a Manifest from decoded JSON. Raises ManifestError, which names the key."""
    data = _mapping(raw, "the manifest")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"format_version {version!r:.60} is not {FORMAT_VERSION}: "
            "export the pair again with this version of Dovetail, or install the one that wrote it"
        )
    try:
        manifest = parse_record(Manifest, data, "")
    except InputError as err:  # from TreeLimits
        raise ManifestError(str(err)) from None
    for name, value in asdict(manifest.tree).items():
        check_whole(f"tree.{name}", value, ManifestError, _AGAIN, least=0, most=TREE_MOST)
    for name, stage in _mapping(manifest.provenance.get("stages", {}), "provenance.stages").items():
        for key in ("inputs", "facts"):  # from which an export goes on
            _mapping(_mapping(stage, f"stage {name}").get(key, {}), f"{key} of stage {name}")
    return manifest


def write_manifest(pair: Path, manifest: Manifest) -> None:
    """Write `pair`/dovetail.json whole or not at all. Raises OSError (full disk, permissions)."""
    data = {"format_version": manifest.format_version, **asdict(manifest)}  # the version comes first
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_atomically(Path(pair) / MANIFEST_NAME, text.encode("utf-8"))


def file_entry(path: Path) -> FileEntry:
    """Size and digest of `path`, for a manifest. Raises OSError."""
    return FileEntry(size=path.stat().st_size, sha256=sha256_file(path))


def _check_sizes(record: TargetFacts | DrafterFacts) -> None:
    """Check the whole numbers that every manifest has: they are sizes, and LARGEST has their bounds."""
    hints = get_type_hints(type(record))
    for each in fields(record):
        if hints[each.name] is int and not each.metadata:
            check_whole(f"{type(record).__name__}.{each.name}", getattr(record, each.name), ManifestError, _AGAIN)


def _mapping(raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise ManifestError(f"{where} is a {type(raw).__name__}, not an object: export the pair again")
    return raw


_RETIRED: dict[type, set[str]] = {DrafterFacts: {"fusion"}}  # keys of older manifests, which nothing reads


def parse_record(record: type[Record], raw: object, where: str, remedy: str = _AGAIN) -> Record:
    """Return a dataclass from JSON. Raises ManifestError for another key or type."""
    data = _mapping(raw, where)
    prefix = f"{where}." if where else ""
    known = {f.name: f for f in fields(record)}  # type: ignore[arg-type]  # a dataclass, always
    for key in data:
        if key not in known and key not in _RETIRED.get(record, ()):
            raise ManifestError(f"unknown key {prefix + key!r}: remove it, or use the Dovetail that wrote it")
    for name, entry in known.items():
        if name not in data and not entry.metadata.get("may_be_missing"):
            raise ManifestError(f"key {prefix + name!r} is missing: {remedy}")
    hints = get_type_hints(record)
    return record(**{key: _value(hints[key], data[key], prefix + key, remedy) for key in known if key in data})


def _value(hint: Any, raw: object, where: str, remedy: str) -> Any:
    """Return `raw` as `hint`: a number, text or record, a tuple or dict of these, or None."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return raw
    if isinstance(hint, type) and is_dataclass(hint):
        return parse_record(hint, raw, where, remedy)
    if origin is UnionType:  # with None
        return None if raw is None else _value(args[0], raw, where, remedy)
    if origin is tuple and isinstance(raw, list):
        return tuple(_value(args[0], item, f"{where}[{i}]", remedy) for i, item in enumerate(raw))
    if origin in (dict, Mapping) and isinstance(raw, dict):
        return {key: _value(args[1], item, f"{where}[{key}]", remedy) for key, item in raw.items()}
    if hint is float and isinstance(raw, int | float) and not isinstance(raw, bool) and abs(raw) <= FLOAT_MOST:
        return float(raw)
    if hint in (str, int, bool) and type(raw) is hint:
        if isinstance(raw, str) and "\0" in raw:
            raise ManifestError(f"{where} {raw!r:.80} holds a NUL: {remedy}")
        return raw
    kinds = {
        str: "a text", int: "a whole number", float: "a finite number", bool: "true or false", tuple: "a list",
    }  # fmt: skip
    raise ManifestError(f"{where} is {raw!r:.80}, not {kinds.get(origin or hint, 'an object')}: {remedy}")
