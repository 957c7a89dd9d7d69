"""Compares the tokenizer of a drafter's checkpoint with the target's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dovetail.models.formats.language_model import OTHERWISE
from dovetail.runtime.errors import PairError
from dovetail.runtime.pair.layout import TOKENIZER
from dovetail.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Comparison:
    """Whether each id is the same token in both. same: None if that is unknown. said: the finding."""

    same: bool | None
    said: str
    remedy: str = OTHERWISE  # for a drafter that reads tokens alone
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None  # the checkpoint's and the target's, if both can be read


def compare_tokenizers(checkpoint: Path, target: Path) -> Comparison:
    """Compare the tokenizers of two folders."""
    if not (checkpoint / TOKENIZER).is_file():
        return Comparison(None, f"the checkpoint has no {TOKENIZER} to compare")
    try:
        ours, theirs = Tokenizer.from_folder(checkpoint), Tokenizer.from_folder(target)
    except PairError as error:
        return Comparison(None, str(error).partition(": export the target")[0], "download it again")
    same = theirs.has_ids_of(ours)
    said = f"{ours.vocab_size} tokens" if same else "the same ids are other tokens"
    return Comparison(same, said, tokenizers=(ours, theirs))
