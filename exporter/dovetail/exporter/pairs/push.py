"""Pushes a pair to the Hub: the files of its manifest, the manifest and a model card, in one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.exporter.hub import hub_errors, is_hub_id, show_bars
from dovetail.exporter.pairs.card import CARD, MARK, write_card
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.runtime.errors import ExportError, InputError
from dovetail.runtime.pair.check import check_listed
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import Manifest, file_entry
from dovetail.runtime.system.progress import Progress, silent

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Pushed:
    """A finished push. card: whether the card was written; the user's own card stays."""

    url: str
    commit: str
    files: int
    card: bool


def push_pair(
    pair: Path, repo: str, *, private: bool = False, revision: str | None = None, progress: Progress = silent
) -> Pushed:
    """Check the pair and push it to the Hub repository `repo`, which is made if it does not exist.

    Only files of the manifest and the card are uploaded. revision: a branch, made if it does not
    exist. Raises PairError (the pair), InputError, ExportError (the Hub refuses or is unreachable).
    """
    if "/" not in repo or not is_hub_id(repo):
        raise InputError(f"{repo!r} is no Hub id: give OWNER/NAME, of letters a-z, digits, '_', and single '-' and '.'")
    manifest = check_pair_folder(pair, progress)
    check_listed(manifest)
    with hub_errors(repo, revision, ExportError, "pushed"):
        return _push(pair, manifest, repo, private, revision, progress)


def _push(pair: Path, manifest: Manifest, repo: str, private: bool, revision: str | None, progress: Progress) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi

    show_bars()
    api = HfApi(library_name="dovetail")
    progress(f"opening {repo}")
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise InputError(f"{repo} exists and is public: make it private in its settings, or leave out --private")
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
    names = [*manifest.files, MANIFEST_NAME]
    additions = [CommitOperationAdd(name, str(pair / name)) for name in names]
    written = CARD not in names and _card_is_ours(api, repo, revision)
    if written:
        additions.append(CommitOperationAdd(CARD, write_card(manifest, repo, revision).encode()))
    progress(f"uploading {len(additions)} files, {sum(each.upload_info.size for each in additions) / 1e9:.2f} GB")
    # Before the commit, because only here a .gitignore of the repository can be overruled.
    api.preupload_lfs_files(repo, additions, revision=revision, gitignore_content="", free_memory=False)
    message = f"Push the pair {' '.join(manifest.name.split())}"
    commit = api.create_commit(repo, additions, commit_message=message, revision=revision)
    progress("comparing the repository with the pair")
    _compare(api, repo, commit.oid, pair, manifest)
    return Pushed(f"{api.endpoint}/{repo}", commit.oid, len(additions), written)


def _card_is_ours(api: HfApi, repo: str, revision: str | None) -> bool:
    """Whether the repository has no card, or a card that an earlier push wrote."""
    info = api.model_info(repo, revision=revision)
    if CARD not in [sibling.rfilename for sibling in info.siblings or ()]:
        return True
    return MARK in Path(api.hf_hub_download(repo, CARD, revision=info.sha)).read_text("utf-8", "replace")


def _compare(api: HfApi, repo: str, commit: str, pair: Path, manifest: Manifest) -> None:
    """Raise ExportError unless the commit has every file of the pair, by size and digest."""
    found = {file.rfilename: file for file in api.model_info(repo, revision=commit, files_metadata=True).siblings or ()}
    for name, entry in {**manifest.files, MANIFEST_NAME: file_entry(pair / MANIFEST_NAME)}.items():
        file = found.get(name)
        if file is None or file.size != entry.size or (file.lfs and file.lfs.sha256 != entry.sha256):
            state = "lacks" if file is None else "has another"
            raise ExportError(f"{repo} {state} {name} after the push, in commit {commit[:12]}: repeat the command")
