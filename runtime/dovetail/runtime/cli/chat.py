"""`dovetail-run chat`: a conversation on the terminal, with the KV kept from turn to turn."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field

import click

from dovetail.runtime.cli.options import EngineFlags, engine_options, sampling_options, template_options
from dovetail.runtime.cli.render import Answer, stream_answer
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DovetailError
from dovetail.runtime.settings import AnswerSettings

HELP = "/reset forgets the conversation, /stats shows statistics, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


@click.command(short_help="Chat with the target on the terminal.")
@click.option("--system", metavar="TEXT", help="System message at the start of the conversation.")
@template_options
@sampling_options()
@engine_options
@click.option("--lookup-cache", type=int, default=0, show_default=True, metavar="TOKENS",
              help="Tokens of conversations before /reset that repeated text may continue.")  # fmt: skip
def chat(system: str | None, engine_flags: EngineFlags, request: AnswerSettings) -> None:
    """Chat with the target. Ctrl-C stops an answer, /help lists the commands, Ctrl-D leaves."""
    with contextlib.suppress(ImportError):  # line editing and history, if Python has them
        import readline  # noqa: F401
    ChatLoop(engine_flags.open(speculate=request.speculate), request, system).run()


@dataclass
class ChatLoop:
    """One conversation: the messages so far and the last answer."""

    engine: Engine
    request: AnswerSettings
    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Answer | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def run(self) -> None:
        click.echo(HELP, err=True)
        while True:
            try:
                if sys.stdin is None:  # stdin is closed
                    raise EOFError
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo("\n(/exit or Ctrl-D leaves)", err=True)
                continue
            if line == "/exit":
                return
            if line:
                self.run_command(line) if line.startswith("/") else self.answer(line)

    def run_command(self, command: str) -> None:
        if command == "/reset":
            self.reset()
            click.echo("(forgotten)", err=True)
        elif command == "/stats":
            click.echo(self.last.statistics() if self.last else "(no answer yet)", err=True)
        else:
            click.echo(HELP if command == "/help" else f"{command} is no command: {HELP}", err=True)

    def answer(self, line: str) -> None:
        """Stream the answer to `line`. An error changes nothing; a stopped answer is kept."""
        asked = [*self.messages, {"role": "user", "content": line}]
        try:
            self.last = said = stream_answer(self.engine, asked, self.request)
        except DovetailError as err:
            click.echo(f"error: {err}", err=True)
            return
        if said.interrupted:
            click.echo("(stopped)", err=True)
        self.messages = [*asked, {"role": "assistant", "content": said.text}]
