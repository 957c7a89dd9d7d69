"""Encode special tokens that messages spell out as ordinary text.

A user who writes `<|im_end|>` must not end the turn. The template renders the conversation once as
given, and once with marks in place of the special tokens in messages, which shows the template's
own ones. A second tokenizer, in which every special token has a secret name, then encodes the whole
text at once, because a text's neighbours affect its ids.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import cached_property
from typing import Any

from dovetail.runtime.errors import InputError

_PRIVATE = range(0xF0000, 0xFFFFE)  # code points that texts should not hold


class PlainText:
    """Finds one tokenizer's special tokens in messages and encodes them there as ordinary text."""

    def __init__(self, backend: Any) -> None:
        """backend: a `tokenizers.Tokenizer`."""
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added: dict[str, int] = {entry.content: token for token, entry in added.items()}
        self._special = [entry.content for entry in added.values() if entry.special and entry.content]
        normalized = any(entry.special and entry.normalized for entry in added.values())
        self._normalizer = backend.normalizer if normalized else None
        self._pattern = _any_of(self._special)
        self._begins = {token[:end] for token in self._special for end in range(1, len(token))}
        self._ends = {token[start:] for token in self._special for start in range(1, len(token))}
        self._longest = max(map(len, self._special), default=0)

    def needed(self, said: object) -> bool:
        """Return whether a text in `said` (messages, tools) has all or part of a special token."""
        return bool(self._special) and any(self._suspicious(text) for text in _texts(said))

    def encode(self, render: Callable[[Any], str], said: Any) -> list[int]:
        """Return token ids of `render(said)`; special tokens in the texts of `said` become text.

        Raises InputError if the template does not print the special tokens unchanged.
        """
        whole = render(said)
        seen = set(whole).union(*_texts(said))
        free = _free(seen)
        tag, marks = next(free), dict[str, str]()  # piece of a special token -> its mark

        def mark(piece: str) -> str:
            if piece not in marks:
                marks[piece] = next(free)
            return marks[piece]

        rendered = render(_mapped(said, lambda text: self._marked(text, mark)))
        if _restored(rendered, marks) != whole:  # the template looks for a special token, so the token itself must stay
            rendered = render(_mapped(said, lambda text: self._marked(text, lambda piece: piece + tag)))
            for piece in sorted(marks, key=len, reverse=True):
                rendered = rendered.replace(piece + tag, marks[piece])
            rendered = rendered.replace(tag, "")  # the template removed the token and left the tag
        if _restored(rendered, marks) == whole:
            return self._encode_marked(rendered, marks)
        if shown := [piece for piece in marks if piece in self._special]:
            raise InputError(
                f"the chat template does not print {', '.join(map(repr, shown))} as a message spells it: "
                "change the message, or let messages hold special tokens (parse_special=True, --parse-special)"
            )
        return list(self._backend.encode(whole, add_special_tokens=False).ids)

    def _suspicious(self, text: str) -> bool:
        forms = [text] if self._normalizer is None else [text, self._normalizer.normalize_str(text)]
        return any(self._pattern.search(each) or any(self._edges(each)) for each in forms)

    def _edges(self, text: str) -> tuple[int, int]:
        """Return how many characters at start and end of `text` could be part of a special token.

        A neighbour's text could complete the token. Spaces at the edges do not count. The longest
        possible parts are marked.
        """
        core = text.strip()
        counts = range(min(self._longest - 1, len(core)), 0, -1)
        first = next((count for count in counts if core[:count] in self._ends), 0)
        last = next((count for count in counts if core[-count:] in self._begins), 0)
        return first, last

    def _marked(self, text: str, mark: Callable[[str], str]) -> str:
        """Return `text` with `mark(piece)` for each special token and for parts at the edges."""
        parts, done = list[str](), 0
        for found in self._pattern.finditer(text):
            parts += [text[done : found.start()], mark(found[0])]
            done = found.end()
        parts.append(text[done:])
        first, _ = self._edges(parts[0])
        at = len(parts[0]) - len(parts[0].lstrip())
        if first:
            parts[0] = parts[0][:at] + mark(parts[0][at : at + first]) + parts[0][at + first :]
        _, last = self._edges(parts[-1])
        at = len(parts[-1].rstrip())
        if last:
            parts[-1] = parts[-1][: at - last] + mark(parts[-1][at - last : at]) + parts[-1][at:]
        return "".join(parts)

    def _encode_marked(self, rendered: str, marks: Mapping[str, str]) -> list[int]:
        """Return token ids of a text that spells out only the template's own special tokens."""
        tokenizer, names, ids = self._secret
        own = _any_of(self._added).sub(lambda found: names.get(found[0], found[0]), rendered)
        encoded = tokenizer.encode(_restored(own, marks), add_special_tokens=False).ids
        return [ids.get(token, token) for token in encoded]

    @cached_property
    def _secret(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """A tokenizer that knows special tokens by secret names; the names; the ids that differ."""
        content = json.loads(self._backend.to_str())
        word = secrets.token_hex(8)
        names = {token: f"\U0010fffd{word}-{number}\U0010fffd" for number, token in enumerate(self._special)}
        for entry in content["added_tokens"]:
            entry["content"] = names.get(entry["content"], entry["content"])
        content["model"]["vocab"] = _renamed(content["model"], names)
        content["post_processor"] = None
        tokenizer = type(self._backend).from_str(json.dumps(content))
        ids = {tokenizer.token_to_id(names.get(token, token)): number for token, number in self._added.items()}
        return tokenizer, names, ids


def _renamed(model: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """Return the vocabulary with special tokens renamed: ordinary text must not match them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of ids
        return [[names.get(piece, piece), score] for piece, score in vocabulary]
    kept = {model.get("unk_token")}  # the model itself uses these names, as it does products of merges
    if names.keys() & vocabulary.keys():
        kept |= {"".join(merge) for merge in model.get("merges") or ()}
    return {token if token in kept else names.get(token, token): number for token, number in vocabulary.items()}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for the leftmost of `tokens`, then the longest, like a tokenizer's."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _free(seen: Set[str]) -> Iterator[str]:
    """Yield private characters that are not in `seen`. Raises InputError when none is left."""
    for character in map(chr, _PRIVATE):
        if character not in seen:
            yield character
    raise InputError("the messages hold every private character of Unicode: remove some of them")


def _restored(text: str, marks: Mapping[str, str]) -> str:
    return text.translate({ord(mark): piece for piece, mark in marks.items()})


def _texts(said: object) -> Iterator[str]:
    """Yield every text in messages or tools, names of fields included."""
    if isinstance(said, str):
        yield said
    elif isinstance(said, Mapping):
        for key, value in said.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(said, list | tuple):
        for each in said:
            yield from _texts(each)


def _mapped(said: Any, change: Callable[[str], str]) -> Any:
    if isinstance(said, str):
        return change(said)
    if isinstance(said, Mapping):
        return {_mapped(key, change): _mapped(value, change) for key, value in said.items()}
    if isinstance(said, list | tuple):
        return [_mapped(each, change) for each in said]
    return said
