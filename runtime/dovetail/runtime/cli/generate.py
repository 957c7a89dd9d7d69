"""`dovetail-run generate`: one prompt, one streamed answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from dovetail.runtime.cli.options import (
    EngineFlags,
    GrammarFlags,
    engine_options,
    grammar_options,
    sampling_options,
    template_options,
)
from dovetail.runtime.cli.render import result_json, speaks_unicode, stream_answer
from dovetail.runtime.errors import INTERRUPTED, InputError
from dovetail.runtime.settings import AnswerSettings
from dovetail.runtime.text.encoding import Prompt
from dovetail.runtime.text.prompts import read_stream, read_text


@click.command(short_help="Answer one prompt (the default command).")
@click.argument("prompt", required=False, metavar="[PROMPT]")
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Use the prompt unchanged, without the chat template.")
@click.option("--token-ids", "as_ids", is_flag=True, help="Read the prompt as a JSON list of token ids.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@grammar_options
@template_options
@sampling_options()
@engine_options
@click.pass_context
def generate(
    ctx: click.Context,
    prompt: str | None,
    file: Path | None,
    system: str | None,
    as_ids: bool,
    as_json: bool,
    engine_flags: EngineFlags,
    grammar_flags: GrammarFlags,
    request: AnswerSettings,
) -> None:
    """Answer PROMPT. Without PROMPT, or with -, the prompt comes from standard input.

    The answer streams to stdout. A line of statistics follows on stderr. Ctrl-C stops the answer,
    with exit code 130.
    """
    text = read_prompt(prompt, file)
    if system is not None and (request.raw or as_ids):
        other = "--raw" if request.raw else "--token-ids"
        raise InputError(f"--system needs the chat template: leave out {other}, or put the system text into the prompt")
    asked: Prompt = parse_ids(text) if as_ids else text
    if system is not None:
        asked = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    engine = engine_flags.open(speculate=request.speculate)
    constraint = grammar_flags.constraint(engine)
    if as_json:
        result = engine.generate(asked, constraint=constraint, **request.keywords())
        report = result_json(result, engine, request.speculate)
        click.echo(json.dumps(report, ensure_ascii=not speaks_unicode()))
        return
    answer = stream_answer(engine, asked, request, constraint)
    click.echo(answer.statistics(), err=True)
    if answer.interrupted:
        ctx.exit(INTERRUPTED)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, the file or standard input.

    Raises InputError for no prompt, two prompts, an unreadable file or an empty prompt.
    """
    if prompt is not None and file is not None:
        raise InputError("both a prompt and --file are given: leave out the prompt or --file")
    if file is not None:
        text = read_text(file, "a text file")
    elif prompt in (None, "-"):
        if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
            raise InputError('there is no prompt: dovetail-run "Why is the sky blue?", or pipe a prompt in')
        text = read_stdin()
    else:
        text = prompt or ""
    if not text.strip():
        raise InputError("the prompt is empty: give some text")
    return text


def read_stdin() -> str:
    """Return the text of standard input, as `read_stream` reads it. Raises InputError."""
    if sys.stdin is None:  # stdin is closed
        return ""
    try:
        return read_stream(sys.stdin.buffer, "standard input")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text: convert the text first") from None


def parse_ids(text: str) -> list[int]:
    """Return token ids from a JSON list. Raises InputError."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not ids or not all(type(each) is int for each in ids):
        raise InputError(f"the prompt {text!r:.60} is no list of token ids: give e.g. --token-ids '[1, 42]'")
    return ids
