"""Flags that the commands share, and their records. Names follow llama.cpp and optimum-cli.

The records of the embedding API check the values, so that both give the same messages.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click

from dovetail.runtime.drafter.session import DEVICES as DEVICES
from dovetail.runtime.drafter.vram import check_draft_model, check_limit, parse_size
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.pair.known import DEFAULT_PAIR, resolve_draft_model, resolve_pair
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.estimates import check_slowdown
from dovetail.runtime.sampling.constraint import Constraint, grammar_source
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.settings import AnswerSettings
from dovetail.runtime.system.bounds import THREADS_MOST, check_whole
from dovetail.runtime.target.layers.choose import check_layers, takes_layers
from dovetail.runtime.target.properties import parse_properties
from dovetail.runtime.text.prompts import read_text
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import check_lookup_cache

Record = TypeVar("Record")
Opened = TypeVar("Opened")
Command = Callable[..., Any]

SAMPLING = SamplingParams()


def announce(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
    """Say on stderr that Dovetail measures the machine. A Progress, which begins with nothing done."""
    if not done:
        click.echo("measuring this machine for this pair, once: some seconds", err=True)


@dataclass(frozen=True)
class EngineFlags:
    """Flags of Engine.from_pretrained, checked before a pair is built or loaded.

    Without a limit of the tree and without fixed_tree, a scheduler shapes every tree.
    """

    pair: str | None
    drafter_device: str
    threads: int | None
    width: int | None = None
    depth: int | None = None
    tree_top_k: int | None = None
    lookup: int | None = None
    fixed_tree: bool = False
    vram: int | None = None
    fit: bool = False
    ov_config: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    max_slowdown: float | None = None
    draft_model: str | None = None
    lookup_cache: int = 0
    gpu_layers: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_whole("threads", self.threads, InputError, "give another number, or none", most=THREADS_MOST)
        check_limit(self.vram, self.fit, self.drafter_device)
        check_layers(self.gpu_layers, self.drafter_device, self.vram)
        if not takes_layers(self.gpu_layers):  # else these flags are those of the layers
            check_draft_model(self.draft_model, self.drafter_device, self.vram)
        TreeLimits(**self.tree_values())
        check_lookup_cache(self.lookup_cache)
        if self.lookup_cache and self.lookup == 0:
            raise InputError(
                "--lookup-cache continues repeated text, and --lookup 0 drafts none: leave out one of them"
            )
        if self.max_slowdown is not None and (self.fixed_tree or self.tree_values()):
            raise InputError("--max-slowdown binds a scheduler, and a fixed tree has none: leave out one of them")

    def tree_values(self) -> dict[str, int]:
        """Return the given limits by their names in TreeLimits."""
        named = {"width": self.width, "depth": self.depth, "top_k": self.tree_top_k, "lookup": self.lookup}
        return {name: value for name, value in named.items() if value is not None}

    def open(self, *, speculate: bool = True) -> Engine:
        """Return the engine. The reference pair is built first if no pair is named or built.

        speculate: whether answers are drafted. Without drafts nothing is measured.
        """
        opener: Callable[..., Engine] = click.get_current_context().obj or Engine.from_pretrained  # obj: of tests
        pair = resolve_pair(self.pair)
        return self.open_with(opener, pair, speculate=speculate, lookup_cache=self.lookup_cache)

    def open_with(self, opener: Callable[..., Opened], pair: Path, *, speculate: bool = True, **more: Any) -> Opened:
        """Return what `opener` makes of the pair. more: its further arguments."""
        return opener(
            pair,
            drafter_device=self.drafter_device,
            vram=self.vram,
            fit=self.fit,
            threads=self.threads,
            tree=self.tree(pair, fixed=self.fixed_tree or not speculate),
            ov_config=self.ov_config,
            exact=self.exact,
            max_slowdown=Scheduler.max_slowdown if self.max_slowdown is None else self.max_slowdown,
            draft_model=None if self.draft_model is None else resolve_draft_model(self.draft_model),
            gpu_layers=self.gpu_layers,
            progress=announce,
            **more,
        )

    def tree(self, pair: Path, *, fixed: bool) -> TreeLimits | None:
        """Return the pair's tree with the given limits, None if a scheduler shapes each tree."""
        given = self.tree_values()
        return replace(read_manifest(pair).tree, **given) if given or fixed else None


@dataclass(frozen=True)
class GrammarFlags:
    """The grammar of an answer, read and checked before a pair is built or loaded."""

    json_schema: str | None
    json_schema_file: Path | None
    grammar_file: Path | None
    regex: str | None

    def __post_init__(self) -> None:
        given = [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} give two grammars of one answer: leave out one of them")
        if given:
            grammar_source(**self.texts)

    @cached_property
    def texts(self) -> dict[str, str]:
        """Return the arguments of `Engine.constraint`, none without a grammar."""
        texts = {"json_schema": self.json_schema, "regex": self.regex}
        for name, file in (("json_schema", self.json_schema_file), ("grammar", self.grammar_file)):
            if file is not None:
                texts[name] = read_text(file, "a text file")
        return {name: text for name, text in texts.items() if text is not None}

    def constraint(self, engine: Engine) -> Constraint | None:
        return engine.constraint(**self.texts) if self.texts else None


def template_options(command: Command) -> Command:
    """Flags of AnswerSettings about the chat template. `sampling_options` makes the record."""
    return _apply(
        command,
        click.option("--chat-template-kwargs", "template_options", callback=_parse_object, metavar="JSON",
                     help="Options of the chat template: '{\"enable_thinking\": false}'."),
        click.option("--parse-special", is_flag=True,
                     help="Let special tokens that messages spell out act as such.  [default: they are text]"),
    )  # fmt: skip


def grammar_options(command: Command) -> Command:
    """Flags of GrammarFlags, which the command gets as `grammar_flags`."""
    return _apply(
        _bundled(command, GrammarFlags, "grammar_flags"),
        click.option("-j", "--json-schema", metavar="SCHEMA",
                     help="JSON schema of the answer; '{\"type\": \"object\"}' is any JSON object."),
        click.option("-jf", "--json-schema-file", type=click.Path(path_type=Path), help="File with a JSON schema."),
        click.option("--grammar-file", type=click.Path(path_type=Path),
                     help="File with a grammar of the answer, in llguidance's variant of Lark."),
        click.option("--regex", metavar="REGEX", help="Regular expression of the whole answer."),
    )  # fmt: skip


def _parse_object(_context: click.Context, _option: click.Parameter, given: str | None) -> dict[str, Any]:
    try:
        value = json.loads(given) if given is not None else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        remedy = """give e.g. '{"enable_thinking": false}'"""
        raise InputError(f"--chat-template-kwargs {given!r:.60} is no JSON object: {remedy}")
    return value


def check_folder(flag: str, file: Path) -> None:
    """Raise InputError if the folder of a file to write does not exist."""
    if not file.parent.is_dir():
        raise InputError(f"{flag} {file} has no folder {file.parent}: make the folder first")


def write_file(flag: str, file: Path, content: bytes) -> None:
    """Write the file atomically. Raises InputError."""
    try:
        write_atomically(file, content)
    except OSError as err:
        raise InputError(f"{flag} {file} cannot be written ({err.strerror}): name another file") from None


def device_options(command: Command) -> Command:
    """Flags of both engines. The command gets these, and its other flags of EngineFlags, as `engine_flags`."""
    return _apply(
        _bundled(command, EngineFlags, "engine_flags"),
        click.option("-t", "--threads", type=int, help="CPU threads of each engine.  [default: one per usable core]"),
        click.option("--drafter-device", type=click.Choice(DEVICES), default="auto", show_default=True,
                     help="Where the drafter runs; auto takes a GPU that is quicker than the CPU."),
        vram_options,
        click.option("-ngl", "--gpu-layers", metavar="K|auto",
                     help="First layers of the target that run on the GPU through ONNX Runtime; auto takes as many as "
                     "--vram has room for beside the drafter.  [default: what the pair says, usually 0]"),
        click.option("--ov-config", multiple=True, metavar="NAME=VALUE", callback=_parse_properties,
                     help="Property of OpenVINO's CPU plugin for the target; repeatable."),
        click.option("--exact/--no-exact", default=True, show_default=True,
                     help="The same text with and without drafting; without it plain passes use OpenVINO's quicker "
                     "kernel for single rows, which rounds otherwise."),
        click.option("-md", "--draft-model", metavar="PATH|NAME|HUB_ID",
                     help="Small model that drafts on the CPU; its tokenizer may differ: a pair, or a Hub id, GGUF "
                     "file or folder, which is exported once."),
    )  # fmt: skip


def vram_options(command: Command) -> Command:
    """Flags of GPU memory: vram in bytes, fit."""
    return _apply(
        command,
        click.option("--vram", callback=read_size, metavar="SIZE",
                     help="GPU memory for the drafter and the --gpu-layers, e.g. 3GB.  [default: what the pair says]"),
        click.option("--fit", is_flag=True, help="Shorten the drafter's context on the GPU to fit --vram."),
    )  # fmt: skip


def read_size(_context: click.Context, _option: click.Parameter, given: str | None) -> int | None:
    """Return the bytes of a size such as 3GB. Raises InputError."""
    return None if given is None else parse_size(given)


def _parse_properties(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    return parse_properties("--ov-config", given)


def _parse_bias(
    _context: click.Context, _option: click.Parameter, given: Sequence[str]
) -> tuple[tuple[int, float], ...]:
    found = dict[int, float]()
    for one in given:
        token, _, value = one.partition("=")
        try:
            found[int(token)] = float(value)
        except ValueError:
            raise InputError(f"--logit-bias {one!r:.60} is no token id with a value: give e.g. 42=-100") from None
    return tuple(found.items())


def _parse_share(_context: click.Context, _option: click.Parameter, given: str | None) -> float | None:
    if given is None:
        return None
    try:
        share = float(given.removesuffix("%")) / (100 if given.endswith("%") else 1)
        check_slowdown(share)
        if share == 1 and not given.endswith("%"):  # 1% or 100%?
            raise ValueError
    except (ValueError, InputError):
        raise InputError(f"--max-slowdown {given!r} is no share of the time: give e.g. 2% or 0.02") from None
    return share


def engine_options(command: Command) -> Command:
    """Flags of EngineFlags, which the command gets as `engine_flags`."""
    pair_default = f"Pair folder, or a known name.  [default: {DEFAULT_PAIR}]"
    return _apply(
        command,
        click.option("-m", "--pair", metavar="PATH|NAME", help=pair_default),
        device_options,
        click.option("--max-slowdown", metavar="SHARE", callback=_parse_share,
                     help="Time that drafts may lose against plain decoding in the long run, e.g. 2% or 0.02.  "
                     f"[default: {Scheduler.max_slowdown:.0%}]"),
        click.option("--fixed-tree", is_flag=True, help="The same limits for every tree: the pair's, or those given.  "
                     "[default: each tree as it pays here]"),
        click.option("--width", type=int, help="Nodes verified in one pass, root included; 1 drafts nothing; "
                     "fixes the tree."),
        click.option("--depth", type=int, help="Tree levels below the root; fixes the tree."),
        click.option("--tree-top-k", type=int, help="Children per tree node, 1 drafts a chain; fixes the tree."),
        click.option("--lookup", type=int, help="Tokens of repeated text in a tree, 0 is off; fixes the tree."),
    )  # fmt: skip


def sampling_options(*, max_new_tokens: int = 256, speculate: bool = True) -> Callable[[Command], Command]:
    """Flags of AnswerSettings, which the command gets as `request`. max_new_tokens: default of -n.

    speculate: whether the command has --speculate/--no-speculate.
    """
    shared = [
        click.option("-n", "--max-new-tokens", "--n-predict", type=int, default=max_new_tokens, show_default=True,
                     help="Tokens to generate at most."),
        click.option("--temperature", "--temp", type=float, default=SAMPLING.temperature, show_default=True,
                     help="0 is greedy."),
        click.option("--top-k", type=int, default=SAMPLING.top_k, show_default=True, help="0 is off."),
        click.option("--top-p", type=float, default=SAMPLING.top_p, show_default=True, help="1 is off."),
        click.option("--min-p", type=float, default=SAMPLING.min_p, show_default=True, help="0 is off."),
        click.option("--repetition-penalty", "--repeat-penalty", type=float, default=SAMPLING.repetition_penalty,
                     show_default=True, help="1 is off."),
        click.option("--presence-penalty", type=float, default=SAMPLING.presence_penalty, show_default=True,
                     help="Lowers the logits of tokens that the answer has, from -2 to 2; 0 is off."),
        click.option("--frequency-penalty", type=float, default=SAMPLING.frequency_penalty, show_default=True,
                     help="Lowers them as often as the answer has the token, from -2 to 2; 0 is off."),
        click.option("--logit-bias", multiple=True, metavar="ID=VALUE", callback=_parse_bias,
                     help="Added to the logit of a token id, from -100 to 100; repeatable."),
        click.option("-s", "--seed", type=int, help="Same seed, same text.  [default: random]"),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
    ]  # fmt: skip
    if speculate:
        words = "Draft and verify trees, or decode plainly."
        shared.append(click.option("--speculate/--no-speculate", default=True, show_default=True, help=words))
    return lambda command: _apply(_bundled(command, AnswerSettings, "request"), *shared)


def _apply(command: Command, *options: Callable[[Command], Command]) -> Command:
    """Decorate `command` so that --help lists the options in this order."""
    return functools.reduce(lambda done, option: option(done), reversed(options), command)


def _bundled(command: Command, record: Callable[..., Record], name: str) -> Command:
    """Return `command` with the flags that are fields of the dataclass `record` as one argument."""
    names: Sequence[str] = [each.name for each in fields(record)]  # type: ignore[arg-type]  # a dataclass, always

    @functools.wraps(command)
    def bundled(*args: Any, **flags: Any) -> Any:
        values = {flag: flags.pop(flag) for flag in names if flag in flags}
        return command(*args, **{name: record(**values)}, **flags)

    return bundled
