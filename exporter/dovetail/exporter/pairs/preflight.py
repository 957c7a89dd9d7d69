"""Compares a drafter's checkpoint with a target before an export reads weights.

Only configs, the names and shapes of tensors, and tokenizers are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.exporter.drafter.sources import LOG, REPORT_FILES, read_remote, resolve_checkpoint
from dovetail.exporter.hub import download, is_hub_id, is_offline
from dovetail.exporter.pairs.reference import REFERENCE_PAIRS, shipped_drafter
from dovetail.exporter.target.configuration import CONTEXT_KEYS, read_config, sizes_config
from dovetail.runtime.errors import DovetailError, SourceError
from dovetail.runtime.pair.layout import MANIFEST_NAME, TARGET, TOKENIZER
from dovetail.runtime.system.bounds import check_number
from dovetail.runtime.system.files import read_object

if TYPE_CHECKING:
    from dovetail.models.formats.registry import Checkpoint

CONFIG = "config.json"
_PROBE = [{"role": "user", "content": "What is 2 + 2?"}]


class Fit(StrEnum):
    """fits: the drafter can be exported. differs: it can, but drafts less well. refused: it cannot."""

    FITS = "fits"
    DIFFERS = "differs"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """One comparison. what: its subject. said: both values, or why there are none. remedy: of a refusal."""

    what: str
    fit: Fit
    said: str
    remedy: str = "use the target that it was trained for"


@dataclass(frozen=True)
class TargetFiles:
    """A target's config (its text part), its name, and the folder of its tokenizer."""

    config: dict[str, Any]
    name: str
    folder: Path


def preflight(target: str, drafter: str, *, revision: str | None = None, allow_pickle: bool = False) -> list[Finding]:
    """Compare everything that can be known without weights. Raises SourceError, PairError.

    target: a pair, a Hugging Face or IR folder, a GGUF file or a Hub id. drafter: a folder, a GGUF
    file, a Hub id or the name of a shipped drafter. revision: of the drafter's Hub id.
    """
    checkpoint = _checkpoint(drafter, revision, allow_pickle)
    own = (checkpoint.folder / TOKENIZER).is_file()
    with _target_files(target, tokenizer=own) as files:
        return [*_sizes(checkpoint, files), *_texts(checkpoint, files), _acceptance(checkpoint.folder)]


def _checkpoint(drafter: str, revision: str | None, allow_pickle: bool) -> Checkpoint:
    """The checkpoint at `drafter`; of a Hub id the headers, or an earlier download without the Hub."""
    from dovetail.models.formats.registry import find_checkpoint, recognised  # torch, which --help does without

    named = REFERENCE_PAIRS.get(drafter)
    if named and not Path(drafter).exists():
        return find_checkpoint(shipped_drafter(named))
    if _is_remote(drafter) and not allow_pickle:
        try:
            return recognised(read_remote(drafter, revision))
        except SourceError as error:
            try:
                kept = resolve_checkpoint(drafter, revision) if is_offline(error) else None
            except SourceError:
                kept = None
            if kept is None:
                raise
            return find_checkpoint(kept)
    return find_checkpoint(resolve_checkpoint(drafter, revision, allow_pickle), allow_pickle=allow_pickle)


def _is_remote(location: str) -> bool:
    return "/" in location and is_hub_id(location) and not Path(location).exists()


@contextmanager
def _target_files(location: str, *, tokenizer: bool) -> Iterator[TargetFiles]:
    """Yield a target's files. tokenizer: whether its tokenizer is wanted, which takes seconds from a GGUF file."""
    target = Path(location)
    if _is_remote(location):
        folder = download(location, None, lambda sizes, _: [name for name in sizes if name in (CONFIG, *REPORT_FILES)])
        if not (folder / CONFIG).is_file():
            raise SourceError(f"{location} has no {CONFIG}: give a Hub id with one, or download a GGUF file")
        yield TargetFiles(sizes_config(read_config(folder), folder / CONFIG), location, folder)
        return
    if target.is_file():
        from dovetail.exporter.target.gguf.config import gguf_config  # only GGUF files need gguf
        from dovetail.exporter.target.gguf.header import read_model
        from dovetail.exporter.target.gguf.tokenizer import write_gguf_tokenizer

        with tempfile.TemporaryDirectory() as temporary:
            header = read_model(target)
            if tokenizer:
                write_gguf_tokenizer(header.parts[0], Path(temporary))
            yield TargetFiles(gguf_config(header), target.stem, Path(temporary))
        return
    source = target / TARGET if (target / MANIFEST_NAME).is_file() else target
    if not (source / CONFIG).is_file():
        raise SourceError(f"{target} is no target: give a pair, a folder with {CONFIG} or a GGUF file")
    config = read_config(source)
    name = config.get("_name_or_path")
    found = name if isinstance(name, str) and name else target.resolve().name
    yield TargetFiles(sizes_config(config, source / CONFIG), found, source)


def _sizes(checkpoint: Checkpoint, target: TargetFiles) -> Iterator[Finding]:
    """What the drafter needs of the target's shape. The first refusal of the format ends it."""
    from dovetail.models.formats.reading import target_sizes

    config = target.config
    try:
        needs = checkpoint.needs(config)
        width, depth, vocab = target_sizes(config)
    except (DovetailError, ValueError) as error:
        remedy = "give another model" if checkpoint.format.reads_tokens else "correct the checkpoint"
        yield Finding("settings", Fit.REFUSED, str(error), remedy)
        return
    yield Finding("drafter", Fit.FITS, needs.kind)
    sizes = [("vocabulary", needs.vocab_size, vocab)]
    if needs.target_size:
        sizes.insert(0, ("width of layers", needs.target_size, width))
    for what, ours, theirs in sizes:
        same = ours == theirs
        yield Finding(what, Fit.FITS if same else Fit.REFUSED, f"{ours}" if same else f"{ours} and {theirs}")
    fits = max(needs.layers, default=0) < depth
    read = f"outputs of {', '.join(map(str, needs.layers))}" if needs.layers else "the last feature"
    said = "reads none, but tokens alone" if checkpoint.format.reads_tokens else f"reads {read} of {depth}"
    yield Finding("layers", Fit.FITS if fits else Fit.REFUSED, said)
    share = f"{needs.draft_vocab_size} of {needs.vocab_size} tokens"
    yield Finding("draft vocabulary", Fit.FITS, share)
    if needs.rope:
        yield Finding("RoPE", Fit.FITS, f"the drafter's own: {needs.rope}")
    longest = next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    if needs.max_context and longest:
        shorter = needs.max_context < longest
        rest = ": of longer texts the drafter reads the end alone" if shorter else ""
        said = f"{needs.max_context} and {longest} tokens{rest}"
        yield Finding("context", Fit.DIFFERS if shorter else Fit.FITS, said)
    if needs.target:
        same = needs.target.rstrip("/").rpartition("/")[2].lower() == target.name.rstrip("/").rpartition("/")[2].lower()
        said = f"trained for {needs.target}" + ("" if same else f", this is {target.name}")
        yield Finding("target", Fit.FITS if same else Fit.UNKNOWN, said)
    for choice in needs.choices:
        yield Finding("setting", Fit.FITS, choice)


def _texts(checkpoint: Checkpoint, target: TargetFiles) -> Iterator[Finding]:
    """Tokenizer and chat template of the checkpoint's folder, where it has them."""
    from dovetail.exporter.drafter.tokenizers import compare_tokenizers  # torch, which --help does without

    needed, found = checkpoint.format.reads_tokens, compare_tokenizers(checkpoint.folder, target.folder)
    fits = {True: Fit.FITS, False: Fit.REFUSED, None: Fit.REFUSED if needed else Fit.UNKNOWN}
    yield Finding("tokenizer", fits[found.same], found.said, found.remedy if needed else Finding.remedy)
    if not found.tokenizers:
        return
    ours, theirs = found.tokenizers
    if not (ours.has_chat_template and theirs.has_chat_template):
        return
    texts = []
    for whose, each in (("drafter", ours), ("target", theirs)):
        try:
            texts.append(each.apply_chat_template(_PROBE, add_generation_prompt=True))
        except DovetailError as error:
            yield Finding("chat template", Fit.UNKNOWN, f"the {whose}'s cannot be used: {error}")
            return
    same = texts[0] == texts[1]
    said = "the same" if same else f"{texts[0]!r:.60} and {texts[1]!r:.60}: answers may be drafted less well"
    yield Finding("chat template", Fit.FITS if same else Fit.DIFFERS, said)


def _acceptance(folder: Path) -> Finding:
    """The acceptance length that the checkpoint's training measured."""
    try:
        held_out = read_object(folder / LOG, SourceError, "remove it").get("held_out")
        length = held_out.get("acceptance_length") if isinstance(held_out, dict) else None
        check_number("acceptance_length", length, SourceError, "remove it", most=1000)
    except SourceError:
        said = "the checkpoint does not say: measure it with dovetail-run bench"
        return Finding("acceptance", Fit.UNKNOWN, said)
    return Finding("acceptance", Fit.FITS, f"{length:.2f} tokens a pass on its held-out text")
