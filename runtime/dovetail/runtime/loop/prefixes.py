"""Prompts that new prompts may begin as: the running texts', and those of ended texts while there is memory."""

from __future__ import annotations

from collections.abc import Sequence as Many

from dovetail.runtime.loop.sequence import Sequence
from dovetail.runtime.system.arrays import common_prefix

LEAST = 32  # tokens of a prefix that is worth sharing: a block of KV


class Prefixes:
    """Ended texts with their prompts' KV, the last used at the end. on: whether any are kept and shared."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.kept: list[Sequence] = []

    def best(self, prompt: Many[int], running: Many[Sequence]) -> tuple[Sequence | None, int]:
        """Return the text with the longest common prefix, None for a short one, and its length.

        The prompt's last token is not part of it, because its logits are needed.
        """
        if not self.on:
            return None, 0
        lengths = [(_common(text.tokens[: text.shareable], prompt), text) for text in (*self.kept, *running)]
        length, found = max(lengths, key=lambda pair: pair[0], default=(0, None))
        if length < LEAST or found is None:
            return None, 0
        if found in self.kept:
            self.kept.remove(found)
            self.kept.append(found)
        return found, length

    def is_being_read(self, prompt: Many[int], running: Many[Sequence]) -> bool:
        """Whether a running text is reading a prefix that the prompt can share after that."""
        if not self.on:
            return False
        _, now = self.best(prompt, running)
        least = now + 2 * LEAST
        return any(text.unread and _common(text.tokens[: text.prompted], prompt) >= least for text in running)

    def keep(self, text: Sequence) -> None:
        """Keep an ended text's prompt, in place of kept ones that are no longer than its prefix. Close it if off."""
        if not self.on or text.shareable < LEAST:
            text.close()
            return
        tokens = text.tokens[: text.shareable]
        for old in [old for old in self.kept if common_prefix(old.tokens, tokens) >= old.length]:
            self.kept.remove(old)
            old.close()
        text.park()
        self.kept.append(text)

    def evict(self) -> bool:
        """Free the text that was used longest ago. Return whether there was one."""
        if self.kept:
            self.kept.pop(0).close()
            return True
        return False

    def clear(self) -> None:
        while self.evict():
            pass


def _common(tokens: Many[int], prompt: Many[int]) -> int:
    return common_prefix(tokens, prompt[:-1])
