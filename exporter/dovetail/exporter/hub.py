"""The Hugging Face Hub: downloads into its cache, and its errors in one line each.

huggingface_hub finds the Hub (HF_ENDPOINT), the token (HF_TOKEN, else `hf auth login`) and the
cache (HF_HOME) in the environment.
"""

from __future__ import annotations

import glob
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.runtime.errors import DovetailError, SourceError, one_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TIMEOUT_S = 10
_ASCII = re.compile(r"[\w./-]+", re.ASCII)

Choose = Callable[[Mapping[str, int], Callable[[str], Path]], list[str]]


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a Hub id, such as `organisation/model`, by huggingface_hub's own rule."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in an __all__

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return bool(_ASCII.fullmatch(text))  # the library takes letters that the Hub refuses


def download(repo: str, revision: str | None, choose: Choose) -> Path:
    """Download files of a Hub repository into the cache; return their folder, named after the commit.

    choose: returns the names of the files. It receives the size of each file of the repository in
    bytes, and a function that fetches a file. Without the Hub, `choose` sees an earlier download.
    Raises SourceError, and what `choose` raises.
    """
    import httpx
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    show_bars()
    with hub_errors(repo, revision):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
            sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
            names = choose(sizes, lambda name: Path(hf_hub_download(repo, name, revision=info.sha)))
            wanted = [*map(glob.escape, names)]
            files = snapshot_download(repo, revision=info.sha, allow_patterns=wanted, dry_run=True)
            size = sum(file.file_size for file in files if file.will_download)
            check_room(repo, size, Path(constants.HF_HUB_CACHE))
            # With the branch or tag, so that its name leads to the commit without the Hub as well.
            return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        except (OfflineModeIsEnabled, httpx.TransportError, LocalEntryNotFoundError, HfHubHTTPError) as error:
            answer = _answer(error)
            if answer and answer.response.status_code < 500:
                raise
            problem = error
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        kept = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        try:
            choose({name: path.stat().st_size for name, path in kept.items()}, folder.joinpath)
        except SourceError as error:
            raise SourceError(f"{error} (the cache holds a part of {repo}, {_without_hub()})") from problem
        return folder


def show_bars() -> None:
    """Let huggingface_hub draw its bars on a terminal alone."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def check_room(repo: str, size: int, folder: Path) -> None:
    """Raise SourceError if the disk of `folder`, which may not exist yet, has less than `size` bytes free."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if size > (free := shutil.disk_usage(existing).free):
        raise SourceError(
            f"{repo} has {size / 1e9:.1f} GB to download, the disk of {folder} has {free / 1e9:.1f} GB free: "
            "free some space, or name another disk"
        )


@contextmanager
def hub_errors(
    repo: str, revision: str | None = None, failure: type[DovetailError] = SourceError, what: str = "downloaded"
) -> Iterator[None]:
    """Turn errors of huggingface_hub into `failure`, in one line that says what to do."""
    import httpx
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    named = f"Hub id {repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        yield
    except (OfflineModeIsEnabled, httpx.TransportError) as error:
        raise failure(f"{named} cannot be {what}: {_without_hub()}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, RuntimeError, ConnectionError, TimeoutError) as error:
        if answer := _answer(error):
            raise failure(f"{named} cannot be {what}: {_refusal(repo, revision, answer)}") from error
        if isinstance(error, LocalEntryNotFoundError):
            raise failure(f"{named} is not in the Hub's cache, and {_without_hub()}") from error
        reason = one_line(error.__cause__ or error)  # a transfer, by threads or by hf_xet
        raise failure(f"{named} cannot be {what}: {reason:.300}: repeat the command, which goes on") from error
    except HFValidationError as error:
        raise failure(f"{named} cannot be {what}: {one_line(error)}: correct the name") from error
    except ValueError as error:  # an answer that is no JSON, or that refuses what was sent
        reason = one_line(error)
        raise failure(f"{named} cannot be {what}: the Hub answers {reason:.300!r}: check HF_ENDPOINT") from error
    except (LookupError, TypeError, AttributeError) as error:  # JSON without the fields of the Hub
        reason = f"{type(error).__name__} {one_line(error):.300}"
        raise failure(
            f"{named} cannot be {what}: the Hub's answer is unusable ({reason}): check HF_ENDPOINT"
        ) from error


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's own answer, if `error` is one or follows from one."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((one for one in (error, error.__cause__) if isinstance(one, HfHubHTTPError)), None)


def is_offline(error: BaseException) -> bool:
    """Whether a download failed with `error` because there is no Hub, so that the cache is what is left."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error.__cause__, OfflineModeIsEnabled | httpx.TransportError)


def _without_hub() -> str:
    """Why there is no Hub, and what to do."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE, or give a file or folder"
    return f"the Hub {constants.ENDPOINT} is unreachable: connect, or give a file or folder"


def _refusal(repo: str, revision: str | None, error: HfHubHTTPError) -> str:
    """Why the Hub refuses a request, and what to do."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, token = f"{constants.ENDPOINT}/{repo}", get_token()
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}: give a branch, a tag or a commit"
    if isinstance(error, GatedRepoError):
        if token:
            return f"it is gated, and the account of your token has no access: accept its licence on {page}"
        return f"it is gated: accept its licence on {page}, and set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        if token:
            return "it does not exist, or the account of your token has no access: correct the name, or set HF_TOKEN"
        return (
            f"it is private or gated, or does not exist: set HF_TOKEN to a token of an account with access "
            f"(a gated model has a licence to accept on {page}), or correct the name"
        )
    status, reason = error.response.status_code, one_line(Exception(error.server_message or error))
    if status == 401:
        remedy = "set HF_TOKEN to a valid token" if token else "set HF_TOKEN to a token of an account with access"
        return f"the Hub refuses {'the token' if token else 'a request without a token'} ({reason}): {remedy}"
    if status == 403:
        return f"the account of your token may not ({reason}): set HF_TOKEN to a token with this right"
    return f"the Hub answers {status} ({reason:.200}): repeat the command later"
