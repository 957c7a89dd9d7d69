"""Checks of a pair: its parts belong together, and every file is there and unaltered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dovetail.runtime.errors import IntegrityError, MismatchError
from dovetail.runtime.pair.files import sha256_file
from dovetail.runtime.pair.layout import MANIFEST_NAME, PARTS, TARGET_FILES
from dovetail.runtime.pair.manifest import FileEntry, Manifest, read_manifest
from dovetail.runtime.system.files import check_regular
from dovetail.runtime.tree.limits import TreeLimits


def read_sound(pair: Path, tree: TreeLimits | None = None) -> Manifest:
    """Return the manifest of a checked pair. tree: limits in place of its own. Raises PairError."""
    manifest = read_manifest(pair)
    check_pair(manifest if tree is None else replace(manifest, tree=tree))
    check_listed(manifest)
    verify_files(pair, manifest)
    return manifest


def check_listed(manifest: Manifest) -> None:
    """Raise IntegrityError unless the files that every target has are listed."""
    for relative in TARGET_FILES:
        if relative not in manifest.files:
            raise IntegrityError(f"{relative} has no digest in {MANIFEST_NAME}: export the pair again")


def check_pair(manifest: Manifest) -> None:
    """Raise MismatchError if drafter and target do not belong together."""
    drafter, target, tree = manifest.drafter, manifest.target, manifest.tree
    if drafter is None:
        return
    sizes: tuple[tuple[str, object, object], ...] = (
        ("hidden size", drafter.target_size or drafter.hidden_size, target.hidden_size),
        ("feature size", drafter.reads_size, target.feature_size),
    )
    pairs: tuple[tuple[str, object, object], ...] = (
        *(() if drafter.reads_tokens else sizes),
        ("vocabulary", drafter.target_vocab_size, target.vocab_size),
        ("tokenizer", drafter.tokenizer_sha256[:12], target.tokenizer_sha256[:12]),
    )
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise MismatchError(
                f"the drafter's {what} {ours} is not the target's {theirs}: use the drafter trained for this target"
            )
    if max(drafter.feature_layers, default=0) >= target.num_layers:
        raise MismatchError(
            f"the drafter reads layer {max(drafter.feature_layers)} of a target that has {target.num_layers}: use the "
            "drafter trained for this target"
        )
    if drafter.draft_vocab_size > target.vocab_size:
        raise MismatchError(
            f"draft vocabulary {drafter.draft_vocab_size} exceeds the target's {target.vocab_size}: train it again"
        )
    if tree.top_k > drafter.top_k:
        raise MismatchError(f"tree top_k {tree.top_k} exceeds the drafter's {drafter.top_k}: lower it")
    if tree.width > drafter.tree_slots:
        raise MismatchError(f"tree width {tree.width} exceeds the drafter's {drafter.tree_slots} slots: lower it")


def verify_files(pair: Path, manifest: Manifest, *, remember: bool = True) -> None:
    """Raise IntegrityError unless every listed file is unaltered. remember: see sha256_file."""
    for relative in manifest.drafter.files.values() if manifest.drafter else ():
        if relative not in manifest.files:
            raise IntegrityError(f"{relative} has no digest in {MANIFEST_NAME}: export the drafter again")
    for relative, entry in manifest.files.items():
        _verify_file(Path(pair) / relative, entry, remember)
    for file in (file for part in PARTS for file in (Path(pair) / part).glob("*")):  # some are read without a digest
        try:
            check_regular(file)
        except FileNotFoundError:  # a link to nowhere
            continue
        except OSError as err:
            raise IntegrityError(f"{file} cannot be read ({err.strerror}): remove it") from None


def _verify_file(path: Path, entry: FileEntry, remember: bool) -> None:
    remedy = "export it again, with --resume where the command has it"
    try:
        check_regular(path)
        size = path.stat().st_size
        if size != entry.size:
            state = "truncated" if size < entry.size else "too long"
            raise IntegrityError(f"{path} is {state} ({size} bytes, {entry.size} expected): {remedy}")
        if sha256_file(path, remember=remember) != entry.sha256:
            raise IntegrityError(f"{path} was altered (its sha256 is not the manifest's): {remedy}")
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing: {remedy}") from None
    except OSError as err:
        raise IntegrityError(f"{path} cannot be read ({err.strerror}): {remedy}") from None
