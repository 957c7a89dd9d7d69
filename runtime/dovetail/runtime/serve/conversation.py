"""A conversation as both chat routes have it: messages, tools, and the form of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dovetail.runtime.serve.failures import ApiError
from dovetail.runtime.serve.openai import Choice, Function, Message, NamedFunction
from dovetail.runtime.text.tool_calls import AnswerParser, AnswerStyle, Piece

TAKEN = frozenset({"add_generation_prompt", "messages", "parse_special", "self", "tools"})  # no template options
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Reader(Protocol):
    """Splits the text of one answer into pieces."""

    def add(self, text: str) -> list[Piece]: ...
    def flush(self) -> list[Piece]: ...


@dataclass(frozen=True)
class Conversation:
    """Messages, the functions that the model may call, and the form of its answer. Raises ApiError."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Function] = ()
    choice: Choice | NamedFunction | None = None  # None: "auto" with tools
    parallel: bool = True  # whether an answer may call more than once
    schema: Mapping[str, Any] | None = None  # of the answer's JSON
    schema_field: str = "response_format"  # the request's field that has it
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := TAKEN & self.template.keys():
            raise ApiError(400, f"chat_template_kwargs cannot set {min(taken)!r}: leave it out",
                           param="chat_template_kwargs")  # fmt: skip
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "two tools have the same name: rename one of them", param="tools")
        if self.choice not in (None, "none") and not names:
            raise ApiError(400, "tool_choice needs tools: give some, or leave it out", param="tool_choice")
        if isinstance(self.choice, NamedFunction) and self.choice.name not in names:
            raise ApiError(400, f"tool_choice names {self.choice.name!r}, which is none of the tools: name one of them",
                           param="tool_choice")  # fmt: skip
        if self.schema is not None and self.callable:
            raise ApiError(400, "a format of the answer cannot be held with tools: set tool_choice to none",
                           param=self.schema_field)  # fmt: skip

    @property
    def callable(self) -> Sequence[Function]:
        """The functions that this answer may call."""
        return () if self.choice == "none" else self.tools

    @property
    def forced(self) -> bool:
        """Whether the answer is a call, as `constraint` writes it."""
        return self.choice == "required" or isinstance(self.choice, NamedFunction)

    def template_options(self) -> dict[str, Any]:
        tools = [{"type": "function", "function": _described(tool)} for tool in self.callable]
        return {**self.template, **({"tools": tools} if tools else {})}

    def constraint(self) -> Mapping[str, Any] | None:
        """Return the JSON schema of the whole answer, as vLLM has it, None if any text will do.

        A named function: its arguments. "required": a list of names and parameters.
        """
        if not self.forced:
            return self.schema
        if isinstance(self.choice, NamedFunction):
            return next(_parameters(tool) for tool in self.tools if tool.name == self.choice.name)
        shared: dict[str, dict[str, Any]] = {}
        calls = []
        for tool in self.tools:
            parameters = dict(_parameters(tool))
            for key in ("$defs", "definitions"):  # references begin at the root of the whole schema
                _share(parameters.pop(key, None), shared.setdefault(key, {}))
            calls.append({
                "type": "object", "properties": {"name": {"const": tool.name}, "parameters": parameters},
                "required": ["name", "parameters"], "additionalProperties": False,
            })  # fmt: skip
        most = {} if self.parallel else {"maxItems": 1}
        return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, **shared}

    def reader(self, style: AnswerStyle) -> Reader:
        """Return a reader of one answer. style: of the target. Raises ApiError."""
        if isinstance(self.choice, NamedFunction):
            return OneCall(self.choice.name)
        if self.forced:
            return ListedCalls()
        if self.callable and style.calls is None:
            raise ApiError(400, "the model's chat template writes no calls of tools that this server can read: "
                           "set tool_choice to required, or to a function", param="tools")  # fmt: skip
        if self.schema is not None:  # the whole answer is JSON
            return AnswerParser(AnswerStyle())
        return AnswerParser(style, [tool.name for tool in self.callable])


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates expect them: no nulls, and no role of OpenAI's own."""
    found = []
    for message in messages:
        said = message.model_dump(exclude_none=True)
        if said["role"] == "developer":
            said["role"] = "system"
        if not said.get("tool_calls"):
            said.pop("tool_calls", None)
        elif "content" not in said:
            said["content"] = ""
        found.append(said)
    return found


@dataclass
class OneCall:
    """Reads an answer that is the arguments of one function."""

    name: str
    _begun: bool = False

    def add(self, text: str) -> list[Piece]:
        pieces = [] if self._begun else [Piece("call", self.name)]
        self._begun = True
        return [*pieces, Piece("arguments", text)] if text else pieces

    def flush(self) -> list[Piece]:
        return []


@dataclass
class ListedCalls:
    """Reads an answer that is a JSON list of {"name", "parameters"}. A call comes when it is whole."""

    _text: str = ""
    _found: int = 0

    def add(self, text: str) -> list[Piece]:
        self._text += text
        pieces = []
        while (begin := self._text.find("{")) >= 0:
            try:
                call, end = json.JSONDecoder().raw_decode(self._text, begin)
            except ValueError:  # not whole yet
                break
            self._text = self._text[end:]
            arguments = json.dumps(call["parameters"], ensure_ascii=False)
            pieces += [Piece("call", call["name"], self._found), Piece("arguments", arguments, self._found)]
            self._found += 1
        return pieces

    def flush(self) -> list[Piece]:
        """Return a call that was cut off as text."""
        return [Piece("content", self._text)] if "{" in self._text else []


def _share(definitions: Any, shared: dict[str, Any]) -> None:
    """Add a tool's definitions to those of all tools. Raises ApiError."""
    for name, one in definitions.items() if isinstance(definitions, dict) else ():
        if shared.setdefault(name, one) != one:
            raise ApiError(400, f"two tools define {name!r:.60} differently: rename one of them", param="tools")


def _described(tool: Function) -> dict[str, Any]:
    """Return a function as chat templates expect it. Some need a description and parameters."""
    return {"name": tool.name, "description": tool.description or "", "parameters": _parameters(tool)}


def _parameters(tool: Function) -> Mapping[str, Any]:
    return tool.parameters or {"type": "object", "properties": {}}
