"""Render chat templates: messages in, one prompt string out.

The environment is that of transformers, for which checkpoints' templates are written. `tojson`
keeps Unicode and HTML characters. `{% generation %}` blocks, which mark training targets in
transformers, render their body. `template_limits` bounds the cost of a rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser

from dovetail.runtime.errors import InputError, one_line
from dovetail.runtime.text.encoding import Message, check_messages, with_objects
from dovetail.runtime.text.template_limits import LimitedEnvironment, TemplateLimit
from dovetail.runtime.text.tool_calls import END_THINK, THINK, AnswerStyle, Notation

# Exceptions from an expression in a template that expects messages of another shape.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
_LIMITS = (TemplateLimit, RecursionError, MemoryError)
_PROBE = "dovetail"  # the probes below look for this content in the rendered text
_USER = {"role": "user", "content": _PROBE}
_TOOL: dict[str, Any] = {"type": "function", "function": {
    "name": "look_up", "description": "Looks something up.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}}  # fmt: skip
# A call of that tool as the known notations have it.
_CALL = re.compile(
    r'(<tool_call>)?\s*\{(?:"type": ?"function", ?)?"name": ?"look_up", ?"(?:arguments|parameters)": ?\{'
)


class ChatTemplate:
    """One compiled template. `variables`: special tokens that it may name (`bos_token`, ...)."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Compile `source` (Jinja). Raises InputError if the template is not valid."""
        self._source, self._variables = source, dict(variables)
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise InputError(
                f"the chat template cannot be compiled ({one_line(error)}): "
                "correct chat_template.jinja, or pass raw text"
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **kwargs: Any) -> str:
        """Return the prompt for `messages`. kwargs: for the template. Raises InputError."""
        turns = [self._as_it_takes(message) for message in with_objects(check_messages(messages))]
        return self._render(turns, add_generation_prompt=add_generation_prompt, **kwargs)

    def answer_style(self, **kwargs: Any) -> AnswerStyle:
        """Return how answers are written after a prompt with these options. kwargs: as in `render`."""
        prompt = self._probe([_USER], **kwargs)
        thinks = THINK in self._source and END_THINK in self._source
        return AnswerStyle(self._notation, thinks, thinks and prompt.rstrip().endswith(THINK))

    def _as_it_takes(self, message: Message) -> dict[str, Any]:
        """Return `message` with the content that the template reads: a text or a list of parts.

        Several texts become lines of one text.
        """
        content, takes_text = message.get("content"), self._takes_text
        if isinstance(content, str) and not takes_text:
            content = [{"type": "text", "text": content}]
        elif isinstance(content, list | tuple) and not (content and self._takes_parts):
            content = "\n".join(part["text"] for part in content)
        taken = {**message, "content": content} if "content" in message else dict(message)
        if message.get("tool_calls") and not self._takes_objects:
            taken["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        return taken

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads the text of a list of parts instead of printing the list."""
        shown = self._probe([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        return _PROBE in shown and "'type'" not in shown and '"type"' not in shown

    @cached_property
    def _takes_text(self) -> bool:
        """Whether a content may be a plain text. Some templates read only lists of parts."""
        return _PROBE in self._probe([_USER]) or not self._takes_parts

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether the arguments of a call may be an object. Some templates join texts alone."""
        return bool(self._called({"word": _PROBE})) or not self._called(json.dumps({"word": _PROBE}))

    @cached_property
    def _notation(self) -> Notation | None:
        """How the template writes a tool call, None if it shows no tools or in another notation."""
        if _TOOL["function"]["name"] not in self._probe([_USER], tools=[_TOOL]):
            return None
        shown = self._called({"word": _PROBE}) or self._called(json.dumps({"word": _PROBE}))
        if found := _CALL.search(shown):
            if found[1]:
                return "hermes"
            before = self._probe([_USER, {"role": "assistant", "content": "spoken"}]).partition("spoken")[0]
            if shown[: found.start()].rstrip() == before.rstrip():  # nothing else marks a call
                return "llama3"
        return None

    def _called(self, arguments: object) -> str:
        """Return what the template makes of a call, "" if it shows no word of the arguments."""
        function = {"name": "look_up", "arguments": arguments}
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
        }
        shown = self._probe([_USER, call])
        return shown if '"word": "dovetail"' in shown or '"word":"dovetail"' in shown else ""

    def _probe(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        try:
            return self._render(messages, add_generation_prompt=True, **kwargs)
        except InputError as error:
            if isinstance(error.__cause__, _LIMITS):
                raise
            return ""

    def _render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        variables = {"tools": None, "documents": None, **self._variables, "messages": messages, **kwargs}
        try:
            return self._environment.render(self._template, variables)
        except _LIMITS as error:
            raise InputError(
                f"the chat template is stopped ({one_line(error)}): correct chat_template.jinja, or pass raw text"
            ) from error
        except _TEMPLATE_FAILURES as error:
            raise InputError(
                f"the chat template refuses these messages ({one_line(error)}): use other roles or contents"
            ) from error


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with the text of its arguments."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_text(call["function"])}
    return {**call, "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}


class _Generation(jinja2.ext.Extension):
    """Renders the body of `{% generation %}...{% endgeneration %}`."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a mutable set

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.meter_filters()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
