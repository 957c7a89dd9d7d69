"""Copies a target's tokenizer from its source and checks the copy before the export ends.

A tokenizer that loses spaces or splits digits differently raises no error, and the model answers
nonsense. An export therefore copies the files, and checks that the copy decodes a set of texts to
themselves and gives the source's ids.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dovetail.exporter.target.sentencepiece_tokenizer import SentencePiece
from dovetail.runtime.errors import ExportError, InputError, IntegrityError, SourceError, one_line
from dovetail.runtime.text.tokenizer import Tokenizer

Encode = Callable[[str], Sequence[int]]  # text -> ids, no special tokens added

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

# Texts that every tokenizer of a language model decodes to themselves. None starts with a space,
# because some tokenizers add a space there. All accents are composed, because some normalise to
# NFC.
ROUND_TRIPS = (
    "The quick brown fox jumps over the lazy dog.",
    "two  three   four    spaces, and one at the end ",
    "lines\nof text\n\nand a blank one\n",
    "tabs\tand\r\nwindows lines",
    "digits 0 12 345 6789 3.14159 1,000,000 2024-12-31",
    "blank line before digits\n\n1. first\n    2. second",
    "naïve café, Übergröße, señor, Łódź, çà",
    "emoji 😀 👍🏽 and 中文 日本語 한국어 Русский العربية",
    "def f(x: int) -> str:\n    if x >= 0:\n        return f'{x:>4}'  # don't\n\treturn \"\"\n",
    'https://example.org/a?b=1&c=%20#d <tag/> {"k": [1, 2]} a_b $x ^~`|\\',
    "I'm, you've, we'll, IT'S",
)
# Texts that must have the source's ids, but may decode to another text.
SAME_IDS = (*ROUND_TRIPS, "", " ", "\n", "  leading spaces", "e\u0301 decomposed", "ﬁ ½ Ⅷ", "\u200bzero\u00a0width")
_RANDOM_TEXTS = 400
_TRIAL_S = 120
# A tokenizer's file can ask for any amount of memory, and `tokenizers` aborts the process when
# memory is short. The script ignores a file that it cannot parse, because the later reader names
# the reason.
_TRIAL = """
import json, os, sys
from tokenizers import Tokenizer
file, texts = sys.argv[1], json.load(sys.stdin)
try:
    import resource
    limit = 2**32 + 64 * os.path.getsize(file)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
except ImportError:  # Windows has no such limit
    pass
try:
    tokenizer = Tokenizer.from_file(file)
except Exception:
    sys.exit(0)
for text in texts:
    tokenizer.decode(tokenizer.encode(text).ids)
"""


def copy_tokenizer(source: Path, out: Path, *, trust: bool = False) -> Encode:
    """Replace the tokenizer files in `out` by the source's; return the source's `encode`.

    transformers' AutoTokenizer converts a folder that has only slow files. trust: run Python code
    that comes with the tokenizer.
    Raises SourceError if the source's tokenizer is missing, unreadable or takes too much memory.
    Raises ExportError if the copy cannot be written.
    """
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if "tokenizer.json" not in present and not set(present) & set(_SLOW_FILES):
        raise SourceError(f"{source} has no tokenizer.json or tokenizer.model: add the checkpoint's tokenizer files")
    encode = _encode_of(source) if "tokenizer.json" in present else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if name in present:
                shutil.copyfile(source / name, out / name)
            else:
                (out / name).unlink(missing_ok=True)  # remove files of another tokenizer
    except OSError as error:
        raise ExportError(f"tokenizer files cannot be copied to {out} ({error}): free the space and resume") from error
    return encode if encode is not None else _convert_slow(source, out, trust)


def probe_tokenizer(folder: Path, reference_encode: Encode | None = None) -> None:
    """Check that the tokenizer in `folder` keeps text and gives the source's ids.

    reference_encode: the source's `encode`, which adds no special tokens; None without a source.
    Raises one ExportError that names all failures.
    """
    tokenizer = Tokenizer.from_folder(folder)
    failures = [*_kept_text(tokenizer), *_special_tokens(tokenizer)]
    if reference_encode is not None:
        failures += _same_ids(tokenizer, reference_encode)
    if failures:
        raise ExportError(
            f"the tokenizer in {folder} fails {len(failures)} probes ({'; '.join(failures)}): "
            "export from the checkpoint's own tokenizer files"
        )


def _kept_text(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a failure for each text that decoding changes, as a whole or token by token."""
    for text in ROUND_TRIPS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if (decoded := tokenizer.decode(ids)) != text:
            yield f"{_shown(text)} comes back as {_shown(decoded)}"
        detokenizer = tokenizer.detokenizer()
        if (streamed := "".join(map(detokenizer.add, ids)) + detokenizer.flush()) != decoded:
            yield f"{_shown(text)} streams as {_shown(streamed)}"


def _special_tokens(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield failures of special tokens (each is one token), end ids and the chat template."""
    for name, token in tokenizer.special_tokens.items():
        if len(ids := tokenizer.encode(token, add_special_tokens=False)) != 1:
            yield f"{name} {token!r} is encoded as {len(ids)} tokens"
    for token_id in tokenizer.eos_token_ids:
        if not tokenizer.decode([token_id], skip_special_tokens=False):
            yield f"end-of-sequence id {token_id} is no token"
    if tokenizer.has_chat_template:
        try:
            tokenizer.encode_chat([{"role": "user", "content": "Hello  there,\n12 + 30?"}])
        except InputError as error:
            yield f"a user turn cannot be rendered: {error}"


def _same_ids(tokenizer: Tokenizer, reference_encode: Encode) -> Iterator[str]:
    texts = [*SAME_IDS, *(f"{token}user\nHi{token}" for token in tokenizer.special_tokens.values())]
    for text in texts:
        ids, expected = tokenizer.encode(text, add_special_tokens=False), list(reference_encode(text))
        if ids != expected:
            pairs = enumerate(zip(ids, expected, strict=False))
            at = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(ids), len(expected)))
            yield f"{_shown(text)} has ids {ids[at : at + 3]} at {at}, the source {expected[at : at + 3]}"
    rng, vocabulary = random.Random(0), range(tokenizer.vocab_size)
    texts = [tokenizer.decode(rng.choices(vocabulary, k=rng.randint(1, 12))) for _ in range(_RANDOM_TEXTS)]
    others = [t for t in texts if tokenizer.encode(t, add_special_tokens=False) != list(reference_encode(t))]
    if others:
        yield f"{len(others)} of {len(texts)} texts of random tokens have other ids than in the source"


def try_limited(file: Path) -> None:
    """Encode the probes in a process with limited memory and time. Raises SourceError."""
    texts = json.dumps([*SAME_IDS, "".join(SAME_IDS) * 50])
    command = [sys.executable, "-c", _TRIAL, str(file)]
    try:
        done = subprocess.run(command, input=texts, capture_output=True, text=True, timeout=_TRIAL_S, check=False)
    except subprocess.TimeoutExpired:
        raise SourceError(f"{file} takes more than {_TRIAL_S} s for a few texts: fetch the checkpoint again") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SourceError(f"{file} fails on ordinary texts ({reason}): fetch the checkpoint again")


def _encode_of(folder: Path) -> Encode:
    try_limited(folder / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except IntegrityError as error:
        raise SourceError(str(error).replace("export the target again", "fetch the checkpoint again")) from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _convert_slow(source: Path, out: Path, trust: bool) -> Encode:
    """Write tokenizer.json through transformers, which reads slow formats; return `encode`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    model = SentencePiece.of_folder(source)
    try:
        slow = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)  # None asks on the terminal
        slow.save_pretrained(out)
    except (
        OSError, ValueError, ImportError, LookupError, AttributeError, TypeError, RuntimeError, EOFError,
        ArithmeticError, StrictDataclassError,
    ) as error:  # fmt: skip
        raise SourceError(
            f"the tokenizer in {source} cannot be converted ({one_line(error)}): add its tokenizer.json"
        ) from error
    if not (out / "tokenizer.json").is_file():
        raise SourceError(f"the tokenizer in {source} has no fast form: add its tokenizer.json")
    if model is not None:
        model.correct(out / "tokenizer.json")
        return model.encode
    return lambda text: list(slow(text, add_special_tokens=False)["input_ids"])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 48 else text[:45] + "...")
