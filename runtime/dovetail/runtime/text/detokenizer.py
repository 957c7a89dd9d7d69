"""Token ids to text, as they come: letters when they are complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class IncrementalDetokenizer:
    """Token by token to text; the pieces, `flush` included, concatenate to `Tokenizer.decode` of all tokens.

    A token's text depends on its neighbours (a UTF-8 character over several tokens, a leading space), so each piece
    is the difference of two decodes of a short window: its first `_read` tokens were emitted and give context, the
    others are pending. Text is held back while its last character may still change.
    """

    def __init__(self, decode: Callable[[list[int]], str], is_hidden: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_hidden = is_hidden
        self._window: list[int] = []  # visible tokens: those just emitted, then the pending ones
        self._read = 0  # tokens of the window already emitted
        self._context = ""  # their text

    def add(self, token_id: int) -> str:
        """The text that this token completes, "" while there is none."""
        token = int(token_id)
        if self._is_hidden(token):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._context):
            return ""
        if text.endswith(_REPLACEMENT):
            return self._emit_before_last(text)
        return self._emit(text, len(self._window))

    def flush(self) -> str:
        """What is left, an unfinished character as U+FFFD; the detokenizer is as new afterwards."""
        rest = self._decode(self._window)[len(self._context) :]
        self._window, self._read, self._context = [], 0, ""
        return rest

    def _emit_before_last(self, text: str) -> str:
        """Let go of what precedes the last token where that token continues no character.

        Without this a stream of invalid bytes would be held back, and decoded again, until its end.
        """
        head, last = self._window[:-1], self._window[-1:]
        before = self._decode(head)
        if len(before) <= len(self._context) or before + self._decode(last) != text:
            return ""
        return self._emit(before, len(head))

    def _emit(self, text: str, read: int) -> str:
        """Emit the window's text up to token `read` and slide the window to what was pending."""
        piece = text[len(self._context) :]
        self._window, self._read = self._window[self._read :], read - self._read
        self._context = self._decode(self._window[: self._read])
        return piece


def _valid_bytes(tokens: list[int], bytes_of: Mapping[int, int]) -> list[int]:
    """`tokens` with each malformed part of a run of byte tokens replaced by the three bytes of U+FFFD.

    `tokenizers` decodes a run as a whole: one bad byte makes U+FFFD of every byte of it.
    """
    ids, valid, run = {byte: token for token, byte in bytes_of.items()}, list[int](), bytearray()
    for token in (*tokens, None):
        byte = None if token is None else bytes_of.get(token)
        if byte is not None:
            run.append(byte)
            continue
        valid += [ids[each] for each in run.decode(errors="replace").encode()]
        run.clear()
        if token is not None:
            valid.append(token)
    return valid
