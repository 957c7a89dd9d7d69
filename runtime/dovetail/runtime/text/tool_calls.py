"""Split an answer, piece by piece, into content, reasoning and tool calls.

Two notations of calls are known. Hermes and Qwen write `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`. Llama 3 writes `{"name": ..., "parameters": {...}}`, after `<|python_tag|>` or
as the beginning of the answer. `ChatTemplate.answer_style` tells which notation a template uses.

A call must name one of the tools of the request. Anything else stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

Notation = Literal["hermes", "llama3"]
THINK, END_THINK = "<think>", "</think>"
OPENERS: dict[Notation, str] = {"hermes": "<tool_call>", "llama3": "<|python_tag|>"}
CALL_MARKS = (*OPENERS.values(), "</tool_call>")

_CLOSER = "</tool_call>"
_KEYS = ("name", "arguments", "parameters", "type", "function", "id")  # that may begin a call's object
_STRING = r'("(?:[^"\\]|\\.)*")'
_NAME = re.compile(r'\{(?:\s*"type"\s*:\s*"function"\s*,)?\s*"name"\s*:\s*' + _STRING, re.DOTALL)
_HEADER = re.compile(_NAME.pattern + r'\s*,\s*"(?:arguments|parameters)"\s*:\s*', re.DOTALL)
_SPACE = " \t\n\r"
_MOST_SPACE = 64  # characters of white space that may wait for a mark; a model may write spaces without end


@dataclass(frozen=True)
class AnswerStyle:
    """How a target's answers are written, as its chat template shows."""

    calls: Notation | None = None  # None: the template shows no calls in a known notation
    thinks: bool = False  # an answer may begin with <think>
    thinking: bool = False  # the prompt ends with <think>: the answer begins inside


@dataclass(frozen=True)
class Piece:
    """A part of an answer, in the order of the text.

    "call": a call begins, `text` is its function's name. "arguments": more of its JSON text.
    "broken": the call that began is not JSON; its whole text follows as content.
    """

    kind: Literal["content", "reasoning", "call", "arguments", "broken"]
    text: str = ""
    index: int = 0  # of a call


@dataclass(frozen=True)
class ToolCall:
    """A call of a function. arguments: the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """A whole answer, split."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def collect(pieces: Iterable[Piece]) -> Answer:
    """Return the answer that `pieces` make, without broken calls."""
    said, calls = {"content": "", "reasoning": ""}, dict[int, ToolCall]()
    for piece in pieces:
        if piece.kind == "call":
            calls[piece.index] = ToolCall(piece.text, "")
        elif piece.kind == "arguments":
            calls[piece.index] = ToolCall(calls[piece.index].name, calls[piece.index].arguments + piece.text)
        elif piece.kind == "broken":
            del calls[piece.index]
        else:
            said[piece.kind] += piece.text
    return Answer(said["content"], said["reasoning"], tuple(calls.values()))


@dataclass
class _Call:
    """The object of a call while it is read, character by character."""

    index: int
    lead: str  # the text before the object: white space and the opener
    text: str = ""
    depth: int = 0  # of brackets
    quoted: bool = False
    escaped: bool = False
    strings: int = 0  # finished strings
    arguments: str | None = None  # so far, once the call is released

    def read(self, character: str) -> str:
        """Take the next character. Return it as JSON has it."""
        shown = character
        if self.quoted:
            if character < " ":  # models forget to escape line breaks
                shown = json.dumps(character)[1:-1]
            if self.escaped:
                self.escaped = False
            elif character == "\\":
                self.escaped = True
            elif character == '"':
                self.quoted = False
                self.strings += 1
        elif character == '"':
            self.quoted = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
        self.text += character
        return shown


class AnswerParser:
    """Takes an answer's text piece by piece. All pieces do not depend on where the text is cut."""

    def __init__(self, style: AnswerStyle, names: Collection[str] = ()) -> None:
        """names: of the functions that may be called; without any no calls are looked for."""
        self._notation = style.calls if names else None
        self._names = frozenset(names)
        self._opener = OPENERS[self._notation] if self._notation else ""
        self._thinks = style.thinks
        self._state = self._reasoning if style.thinking else self._begin
        self._text = ""  # not yet read, or held
        self._out = list[Piece]()
        self._call: _Call | None = None
        self._begun = 0  # calls that were released
        self._expected = list[str]()  # behind the arguments, each if it comes
        self._thought = False  # some reasoning was given

    def add(self, text: str) -> list[Piece]:
        """Return the pieces that are certain with this further text."""
        self._text += text
        return self._read(end=False)

    def flush(self) -> list[Piece]:
        """Return the rest, at the end of the answer. A call without an end is broken."""
        return self._read(end=True)

    def _read(self, end: bool) -> list[Piece]:
        self._out = []
        while self._state(end):
            pass
        return _merged(self._out)

    # --- states: each reads from `_text`, and returns whether another state may go on

    def _begin(self, end: bool) -> bool:
        """Read the beginning of the answer: reasoning, a bare call, or content."""
        rest = _after_blank(self._text)
        if self._thinks and rest.startswith(THINK):
            self._text, self._state = rest[len(THINK) :], self._reasoning
            return True
        if not end and (not rest or (self._thinks and THINK.startswith(rest))):
            return False
        return self._bare(end)

    def _bare(self, end: bool) -> bool:
        rest = _after_blank(self._text)
        if not rest and not end:
            return False
        if self._notation == "llama3" and rest.startswith("{"):
            self._open(self._text[: len(self._text) - len(rest)], rest)
        else:
            self._state = self._content
        return True

    def _reasoning(self, end: bool) -> bool:
        if not self._thought:
            self._text = self._text.lstrip(_SPACE)
        place = self._text.find(END_THINK)
        keep = len(self._text) if end else _held(self._text, END_THINK)
        if said := self._text[: keep if place < 0 else _blank(self._text, place)]:
            self._thought = True
            self._out.append(Piece("reasoning", said))
        if place < 0:
            self._text = self._text[keep:]
            return False
        self._text, self._state = self._text[place + len(END_THINK) :].lstrip(_SPACE), self._after_reasoning
        return True

    def _after_reasoning(self, end: bool) -> bool:
        self._text = self._text.lstrip(_SPACE)
        return self._bare(end)

    def _content(self, end: bool) -> bool:
        place = self._text.find(self._opener) if self._opener else -1
        if place >= 0:
            begin = _blank(self._text, place)
            self._say(self._text[:begin])
            self._open(self._text[begin:place] + self._opener, self._text[place + len(self._opener) :])
            return True
        keep = len(self._text) if end or not self._opener else _held(self._text, self._opener)
        self._say(self._text[:keep])
        self._text = self._text[keep:]
        return False

    def _object(self, end: bool) -> bool:
        """Read the object of a call."""
        assert self._call
        call = self._call
        for place, character in enumerate(self._text):
            if not call.text and character in _SPACE:
                call.lead += character
            elif not call.text and character != "{":
                return self._fail(self._text[place:])
            elif (right := self._take(call, character)) is not None:
                rest = self._text[place + 1 :]
                return self._finish(rest) if right else self._fail(rest)
        self._text = ""
        return end and self._fail("")

    def _between(self, end: bool) -> bool:
        """Read what may stand behind a call's arguments, then another bare call."""
        while self._expected:
            self._text, mark = self._text.lstrip(_SPACE), self._expected[0]
            rest = self._text
            if not end and len(rest) < len(mark) and mark.startswith(rest):
                return False
            if rest.startswith(mark):
                self._text = rest[len(mark) :]
            del self._expected[0]
        self._text = self._text.lstrip(_SPACE)
        if not self._text and not end:
            return False
        if self._notation == "llama3" and self._text.startswith("{"):
            self._open("", self._text)
        else:
            self._state = self._content
        return True

    # --- steps

    def _say(self, text: str) -> None:
        if text:
            self._out.append(Piece("content", text))

    def _open(self, lead: str, rest: str) -> None:
        self._call, self._text, self._state = _Call(self._begun, lead), rest, self._object

    def _fail(self, rest: str) -> Literal[True]:
        """Make text of a call that is none."""
        assert self._call
        if self._call.arguments is not None:
            self._out.append(Piece("broken", index=self._call.index))
        self._say(self._call.lead + self._call.text)
        self._call, self._text, self._state = None, rest, self._content
        return True

    def _finish(self, rest: str) -> Literal[True]:
        assert self._call and self._notation
        self._expected = ["}"] * (self._call.depth > 0) + [_CLOSER if self._notation == "hermes" else ";"]
        self._call, self._text, self._state = None, rest, self._between
        return True

    def _take(self, call: _Call, character: str) -> bool | None:
        """Read one character of an object. Return whether it is a call, once that is known."""
        shown = call.read(character)
        if call.arguments is not None:
            return self._argue(call, shown)
        if not call.strings and not self._may_begin(call, character):
            return False
        if call.quoted:
            return None
        if call.strings <= 4 and character == '"' and (named := _NAME.fullmatch(call.text)):
            return None if _loaded(named[1]) in self._names else False
        if character == "{" and call.depth == 2 and (header := _HEADER.fullmatch(call.text[:-1])):
            self._release(call, _loaded(header[1]))
            return self._argue(call, shown)
        if self._closes(call):
            return False
        return None if call.depth else self._whole(call)

    def _may_begin(self, call: _Call, character: str) -> bool:
        """Return whether an object that has no whole string yet may be a call."""
        if call.quoted:
            key = call.text.partition('"')[2]
            return any(each.startswith(key) for each in _KEYS)
        return character in _SPACE or call.text == "{"

    def _release(self, call: _Call, name: str) -> None:
        self._out.append(Piece("call", name, call.index))
        self._begun, call.arguments = self._begun + 1, ""

    def _argue(self, call: _Call, shown: str) -> bool | None:
        """Pass on arguments. Return True at their end, False if they are not JSON."""
        assert call.arguments is not None
        call.arguments += shown
        self._out.append(Piece("arguments", shown, call.index))
        if call.depth > 1 or call.quoted:
            return False if self._closes(call) else None
        return isinstance(_loaded(call.arguments), dict)

    def _closes(self, call: _Call) -> bool:
        """Return whether the closer stands inside the object, which then has no end."""
        return self._notation == "hermes" and not call.quoted and call.text.endswith(_CLOSER)

    def _whole(self, call: _Call) -> bool:
        """Release a call whose object is complete, with its keys in any order."""
        found = _loaded(call.text)
        if isinstance(found, dict) and isinstance(found.get("function"), dict):
            found = found["function"]
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return False
        arguments = found.get("arguments", found.get("parameters", {}))
        arguments = _loaded(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            return False
        self._release(call, name)
        self._out.append(Piece("arguments", json.dumps(arguments, ensure_ascii=False), call.index))
        return True


def _loaded(text: str) -> Any:
    """Return the value of a JSON text, None if it is none. Line breaks may stand in strings."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _held(text: str, mark: str) -> int:
    """Return where the end of `text` begins that may belong to `mark`, white space before it included."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    size = next((size for size in sizes if mark.startswith(text[-size:])), 0)
    return _blank(text, len(text) - size)


def _after_blank(text: str) -> str:
    """Return `text` without the white space at its beginning, at most _MOST_SPACE characters of it."""
    return text[:_MOST_SPACE].lstrip(_SPACE) + text[_MOST_SPACE:]


def _blank(text: str, end: int) -> int:
    """Return where the white space before `end` begins, at most _MOST_SPACE characters of it."""
    begin = max(end - _MOST_SPACE, 0)
    return begin + len(text[begin:end].rstrip(_SPACE))


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Return `pieces` with neighbours of one kind joined."""
    groups = groupby(pieces, key=lambda piece: (piece.kind, piece.index))
    return [Piece(kind, "".join(piece.text for piece in group), index) for (kind, index), group in groups]
