"""`dovetail-run generate`: one prompt, one streamed answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .options import EngineFlags, RequestFlags, engine_options, sampling_options
from .report import result_json
from .streaming import stream_answer

INTERRUPTED = 130


@click.command(short_help="Answer one prompt (the default command).")
@click.argument("prompt", required=False, metavar="[PROMPT]")
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@sampling_options()
@engine_options
@click.pass_context
def generate(
    ctx: click.Context,
    prompt: str | None,
    file: Path | None,
    system: str | None,
    as_json: bool,
    engine_flags: EngineFlags,
    request: RequestFlags,
) -> None:
    """Answer PROMPT; without one, or with -, the prompt comes from standard input.

    The answer streams to stdout, a line of statistics follows on stderr. Ctrl-C stops it with exit code 130.
    """
    text = read_prompt(prompt, file)
    if system is not None and request.raw:
        raise InputError("--system needs the chat template: leave out --raw, or write it into the prompt")
    asked = text if system is None else chat_messages(system, text)
    engine = engine_flags.open(speculate=request.speculate)
    if as_json:
        result = engine.generate(asked, **request.keywords())
        drafter = (engine.drafter_device, engine.drafter_note) if request.speculate else (None, None)
        click.echo(json.dumps(result_json(result, engine.target_device, *drafter), ensure_ascii=False))
        return
    answer = stream_answer(engine, asked, request)
    click.echo(answer.statistics(), err=True)
    if answer.interrupted:
        ctx.exit(INTERRUPTED)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, the file or standard input. Raises InputError: none, two, unreadable, empty."""
    if prompt is not None and file is not None:
        raise InputError("both a prompt and --file are given: leave one out")
    if file is not None:
        text = read_text(file)
    elif prompt in (None, "-"):
        if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
            raise InputError('there is no prompt: dovetail-run "Why is the sky blue?", or pipe one in')
        text = read_stdin()
    else:
        text = prompt or ""
    if not text.strip():
        raise InputError("the prompt is empty: give some text")
    return text


def read_text(file: Path) -> str:
    """The text of `file` (UTF-8), one final line break dropped. Raises InputError."""
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as err:
        raise InputError(f"{file} cannot be read ({err.strerror}): name a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text: name a text file") from None


def read_stdin() -> str:
    """Standard input as UTF-8, one final line break dropped. Raises InputError."""
    if sys.stdin is None:  # closed
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text: convert it first") from None


def chat_messages(system: str, text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]
