"""Turn a stream of token ids into text, character by complete character."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_REPLACEMENT = "\ufffd"  # decoded form of an unfinished UTF-8 sequence


class IncrementalDetokenizer:
    """Turns tokens into pieces of text, which add up, with `flush`, to `Tokenizer.decode` of all.

    A token's text depends on its neighbours: a UTF-8 character over several tokens, a leading
    space. Each piece is therefore the difference of two decodes of a short window, whose emitted
    tokens give context. Text waits while its last character may change.
    """

    def __init__(self, decode: Callable[[list[int]], str], is_hidden: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_hidden = is_hidden
        self._window: list[int] = []  # visible tokens: the last emitted ones, then the pending ones
        self._read = 0  # emitted tokens of the window
        self._context = ""  # text of the emitted tokens

    def add(self, token_id: int) -> str:
        """Return the text that this token completes, or ""."""
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
        """Return the remaining text, U+FFFD for an unfinished character, and reset the object."""
        rest = self._decode(self._window)[len(self._context) :]
        self._window, self._read, self._context = [], 0, ""
        return rest

    def _emit_before_last(self, text: str) -> str:
        """Emit the text before the last token if that token starts a new character.

        Without this step a stream of invalid bytes would wait, and be decoded again, until its end.
        """
        head, last = self._window[:-1], self._window[-1:]
        before = self._decode(head)
        if len(before) <= len(self._context) or before + self._decode(last) != text:
            return ""
        return self._emit(before, len(head))

    def _emit(self, text: str, read: int) -> str:
        """Emit the window's text up to token `read`, then move the window to the pending tokens."""
        piece = text[len(self._context) :]
        self._window, self._read = self._window[self._read :], read - self._read
        self._context = self._decode(self._window[: self._read])
        return piece


def valid_bytes(tokens: list[int], bytes_of: Mapping[int, int]) -> list[int]:
    """Return `tokens` with U+FFFD's three bytes for each malformed part of a run of byte tokens.

    `tokenizers` decodes a run as a whole: one bad byte turns every byte of the run into U+FFFD.
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
