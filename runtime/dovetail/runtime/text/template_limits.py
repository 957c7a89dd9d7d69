"""A Jinja sandbox with a budget for each rendering: chat templates are programs from a checkpoint.

Loop iterations, calls, filters, operators and outputs pay for the characters and items that they
handle, before they do the work. Payments also read the thread's processor clock, which stands still
while other programs run. The limits hold in every thread and on every platform. Worst case: a
rendering ends some seconds after MAX_SECONDS and holds some hundred MB until then.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from threading import Lock
from time import thread_time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0  # processor time of a rendering
MAX_SOURCE = 2**18  # characters of a template; checkpoints' templates have fewer than 2**16
_FREE = 2**26  # characters that every rendering may handle
_SHARE = 64  # further characters for each character of its messages
_ITEM = 16  # price of a list item or a step, in characters
_NODE = 128  # price of a value in a deep search of a list, which takes longer
_CLOCK = 2**14  # characters between two readings of the clock
_MAX_NUMBER = 10_000  # largest width, count or number of bits in one operation

_LISTS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_CONTAINERS = (*_LISTS, Mapping)
# Filters that select or arrange items without building text.
_LIST_FILTERS = {
    "attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject",
    "rejectattr", "reverse", "safe", "select", "selectattr",
}  # fmt: skip
# Methods whose arguments do not show their cost, or that return bytes. Templates need none of them.
_REFUSED = {"encode", "maketrans", "to_bytes", "translate"}
# Width and precision of a printf conversion.
_WIDE = re.compile(r"%(\([^)]*\))?[-#0 +]*(\*|\d{5,}|\d*\.(\*|\d{5,}))")


class TemplateLimit(jinja2.TemplateError):
    """A template exceeds its budget."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Renders templates one at a time, through `render` only."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        # The optimizer would compute constants during compilation, outside the budget.
        super().__init__(optimized=False, finalize=_finalize, **options)
        self._left, self._look, self._end, self._running = 0, 0, 0.0, Lock()
        del self.globals["lipsum"]

    def meter_filters(self) -> None:
        """Make every filter pay. Call this after the last filter is added."""
        self.filters = {name: self._metered(name, each) for name, each in self.filters.items()}

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Return the text of `template`. Raises TemplateLimit and errors of the expressions."""
        with self._running:
            self._left = self._look = _FREE + _SHARE * _size(dict(variables), _FREE)
            self._end = thread_time() + MAX_SECONDS
            return template.render(variables)

    def pay(self, units: int) -> None:
        self._left -= units
        if self._left < 0:
            raise TemplateLimit("too much text")
        if self._left < self._look:
            self._look = self._left - _CLOCK
            if thread_time() > self._end:
                raise TemplateLimit(f"more than {MAX_SECONDS:g} seconds")

    def weigh(self, *values: Any) -> int:
        """Return the characters of all `values`, lists included; stops above what is left."""
        return sum(len(value) if isinstance(value, str) else _size(value, self._left) for value in values)

    def weighed(self, value: Any) -> Any:
        """Pay for `value` and return it. Compiled templates call this in comparisons."""
        self.pay(_ITEM if isinstance(value, str) else self.weigh(value))
        return value

    def concat_values(self, *values: Any) -> str:
        """Return the result of the template operator `~`."""
        self.pay(self.weigh(*values))
        return "".join(map(str, values))

    # --- hooks of the sandbox

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TemplateLimit(f"{len(source)} characters, more than {MAX_SOURCE}")
        metered: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return metered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _REFUSED and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.pay(_ITEM + _shallow(left) + _shallow(right))
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(value, int):
                _check_number(left.bit_length() + right.bit_length())
            elif isinstance(times, int):
                self.pay(_ITEM + self.weigh(value) * max(times, 0))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_number(left.bit_length() * right)
        elif isinstance(left, str):
            self.pay(self._printf_cost(left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__function, "__self__", None)
        if isinstance(owner, str):
            args = tuple(list(each) if isinstance(each, Iterator) else each for each in args)
            __self.pay(__self._method_cost(__function.__name__, owner, *args, **kwargs))
        result = super().call(__context, __function, *args, **kwargs)
        __self.pay(_ITEM + _shallow(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def metered(*args: Any, **kwargs: Any) -> str:
            fields = list(string.Formatter().parse(value.__self__))
            for _, _, spec, _ in fields:
                if spec and ("{" in spec or re.search(r"\d{5}", spec)):
                    raise TemplateLimit(f"the format {spec!r:.40} is too wide")
            self.pay(len(value.__self__) + len(fields) * self.weigh(args, kwargs))
            return formatted(*args, **kwargs)

        return metered

    # --- prices

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passed = int(hasattr(function, "jinja_pass_arg"))  # the first argument is the context or the environment

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            value, rest = args[passed], args[passed + 1 :]
            if name in _LIST_FILTERS:
                self.pay(_ITEM + _shallow(value))
            else:
                value = list(value) if isinstance(value, Iterator) else value
                self.pay(self._filter_cost(name, value, *rest, **kwargs))
            result = function(*args[:passed], value, *rest, **kwargs)
            self.pay(_shallow(result))
            return result

        return metered

    def _filter_cost(self, name: str, value: Any, *args: Any, **kwargs: Any) -> int:
        given = [*args, *kwargs.values()]
        if name == "join":
            return self.weigh(value) + _shallow(value) * self.weigh(*given)
        if name == "format":
            return self._printf_cost(str(value), tuple(given))
        if name == "sum":
            return self.weigh(value) * (1 + _shallow(value) // _ITEM)
        numbers = self._numbers(given)
        if name == "tojson":
            return self.weigh(value) * (1 + numbers) + self.weigh(*given)
        if name in ("batch", "slice"):
            return self.weigh(value) + _ITEM * numbers
        return self._method_cost(name, value, *given)

    def _method_cost(self, name: str, value: Any, *args: Any, **kwargs: Any) -> int:
        """Return the price of a string method, or of the filter of that name."""
        given = [*args, *kwargs.values()]
        paid = self.weigh(value, *given)
        text = value if isinstance(value, str) else ""
        if name == "replace" and len(given) > 1:
            return paid + text.count(str(given[0])) * len(str(given[1]))
        if name == "join":
            return paid + len(text) * _shallow(given[0])
        return paid + self._numbers(given) * (1 + text.count("\t" if name == "expandtabs" else "\n"))

    def _numbers(self, values: list[Any]) -> int:
        """Return the sum of the whole numbers in `values`. Raises TemplateLimit for a large one."""
        numbers = [abs(each) for each in values if isinstance(each, int)]
        for number in numbers:
            _check_number(number)
        return sum(numbers)

    def _printf_cost(self, layout: str, values: Any) -> int:
        if _WIDE.search(layout):
            raise TemplateLimit(f"the format {layout!r:.40} is too wide")
        return len(layout) + layout.count("%") * self.weigh(values)


class _Metering(NodeTransformer):
    """Adds payments to loops, comparisons and `~`, which the sandbox does not intercept."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("pay", nodes.Const(_ITEM + literal), at=node), lineno=node.lineno))
        if node.test is not None:
            node.test = _call("weighed", node.test, at=node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("weighed", node.expr, at=node)
        for operand in node.ops:
            operand.expr = _call("weighed", operand.expr, at=node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concat_values", *node.nodes, at=node)


def _call(method: str, *arguments: Any, at: nodes.Node) -> nodes.Call:
    """Return a call of the environment's method."""
    function = nodes.EnvironmentAttribute(method, lineno=at.lineno)
    return nodes.Call(function, list(arguments), [], None, None, lineno=at.lineno)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    environment = context.environment
    assert isinstance(environment, LimitedEnvironment)
    environment.pay(environment.weigh(value))
    return value


def _check_number(number: int) -> None:
    if number > _MAX_NUMBER:
        raise TemplateLimit("a number is too large")


def _shallow(value: Any) -> int:
    """Return the characters of a text; each item of a list counts _ITEM."""
    if isinstance(value, str):
        return len(value)
    return _ITEM * len(value) if isinstance(value, _CONTAINERS) else _ITEM


def _size(value: Any, most: int) -> int:
    """Return the characters of a value and its content; slightly above `most` if there are more."""
    total, waiting = 0, [value]
    while waiting and total <= most:
        each = waiting.pop()
        total += _NODE + _shallow(each)
        if isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, _LISTS):
            waiting += each
        elif isinstance(each, int):
            total += each.bit_length()
    return total
