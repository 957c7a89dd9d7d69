"""`dovetail-run`: the command group. Here every error becomes one line and an exit code.

Exit codes: 0 done, 1 other errors, 2 bad input, 3 a pair that cannot be used, 4 to 6 a build that
failed, 7 an engine or device that is missing, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import click

from dovetail.runtime.errors import INTERRUPTED, DovetailError, InputError
from dovetail.runtime.system.files import check_text
from dovetail.runtime.system.telemetry import decline_telemetry

OWN_FLAGS = ("--help", "-h", "--version")
CUT_OFF = "a file ends too early: copy or build it again"
WORD = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")  # the form of a command's name
COMMANDS = ("bench", "chat", "doctor", "generate", "inspect", "serve", "tune")  # each in the module of the same name


class DefaultGroup(click.Group):
    """A group whose first word may be left out: text that is no command is a prompt for `generate`.

    A single word that looks like a command is refused: the word may be a typing error, and an
    answer costs minutes. A command's module is imported only for its call. --help is therefore
    fast, and Ctrl-C is quiet from the start.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"{__package__}.{cmd_name}"), cmd_name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and sys.stdin and sys.stdin.isatty():
            args = ["--help"]
        elif not args or args[0] not in (*COMMANDS, *OWN_FLAGS):
            if args and WORD.fullmatch(args[0]):
                raise click.UsageError(unknown_command(args[0]), ctx)
            args = ["generate", *args]
        return super().parse_args(ctx, args)

    def main(  # type: ignore[override]  # click's overloads derive the return type from standalone_mode
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run, then exit. Every error is one line on stderr; click keeps a closed pipe quiet."""
        extra.pop("standalone_mode", None)
        replace_unknown_characters()
        try:
            for argument in sys.argv[1:] if args is None else args:
                check_text("argument", argument, InputError)
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except DovetailError as err:
            code = fail(str(err), err.exit_code)
        except click.UsageError as err:
            command = err.ctx.command_path if err.ctx else "dovetail-run"
            code = fail(f"{err.format_message()} (see {command} --help)", err.exit_code)
        except click.ClickException as err:
            code = fail(err.format_message(), err.exit_code)
        except click.Abort as err:  # click raises Abort for Ctrl-D too, which no command reads here
            code = fail(CUT_OFF, 1) if isinstance(err.__cause__, EOFError) else INTERRUPTED
        except OSError as err:  # files have errors of their own; stdout may have met a full disk
            lost = err.filename is None and err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
            what = "the output cannot be written: " if lost else f"{err.filename}: " if err.filename else ""
            code = fail(f"{what}{err.strerror or err}", 1)
            if lost:  # discard the rest of stdout, which the interpreter would write again and fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(code if isinstance(code, int) else 0)


def replace_unknown_characters() -> None:
    """Print "?" for characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def fail(message: str, exit_code: int) -> int:
    """Print `message` as one line on stderr and return the exit code."""
    click.echo("error: " + " ".join(message.split()), err=True)
    return exit_code


def unknown_command(word: str) -> str:
    """Return the message for a word that is no command."""
    near = get_close_matches(word, COMMANDS, 1)
    meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)};"
    return f"no such command {word!r}: {meant} A prompt of one word goes to dovetail-run generate, others need quotes"


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dovetail-spec", prog_name="dovetail-run")
def cli() -> None:
    """Stream text from a target on the CPU, sped up by a small drafter.

    \b
      dovetail-run "Why is the sky blue?"     answer one prompt (the command `generate`)
      cat notes.txt | dovetail-run            read the prompt from standard input
      dovetail-run chat                       chat
      dovetail-run serve                      answer OpenAI's API on a port

    The first use without --pair builds the SmolLM2-135M pair in your cache.
    """


def main() -> NoReturn:
    """Run the console script."""
    decline_telemetry()
    cli.main(prog_name="dovetail-run")


if __name__ == "__main__":
    main()
