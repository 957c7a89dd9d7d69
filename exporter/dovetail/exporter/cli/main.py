"""`dovetail-export`. A call imports the module of its subcommand alone, so `--help` is fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from dovetail.runtime.cli.main import CUT_OFF, fail, replace_unknown_characters
from dovetail.runtime.errors import INTERRUPTED, DovetailError, ExportError, InputError, install_extra
from dovetail.runtime.system.files import check_text
from dovetail.runtime.system.telemetry import decline_telemetry

COMMANDS = {
    "target": "Export a target LLM: a Hub id, a folder, a GGUF file or an OpenVINO IR.",
    "train": "Train a drafter for an exported target.",
    "drafter": "Add a trained drafter to an exported target.",
    "draft-model": "Export a small model once, to draft for others.",
    "pair": "Build a reference pair, from download to manifest.",
    "environment": "Make an environment with the transformers that an architecture needs.",
    "check": "Check a pair, or compare a drafter with a target before an export.",
    "push": "Push a pair to the Hugging Face Hub, with a model card.",
    "pull": "Pull a pair from the Hugging Face Hub.",
}


class LazyGroup(click.Group):
    """A group that imports a command when the user calls the command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__package__}.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dovetail-spec")
def cli() -> None:
    """Build Dovetail pairs: a target LLM for the CPU and the drafter that speeds it up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. An error is one line on stderr."""
    decline_telemetry()
    replace_unknown_characters()
    try:
        for argument in sys.argv[1:] if arguments is None else arguments:
            check_text("argument", argument, InputError)
        result = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except DovetailError as error:
        return fail(str(error), error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "dovetail-export"
        return fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except click.ClickException as error:
        return fail(error.format_message(), error.exit_code)
    except ImportError as error:
        if not error.name or error.name.startswith("dovetail"):
            raise
        return fail(f"{error.name} is not installed: {install_extra('export')}", ExportError.exit_code)
    except OSError as error:  # a full disk, a folder without rights
        what = f"{error.filename}: " if error.filename else ""
        return fail(f"{what}{error.strerror or error}: correct this and repeat the command", ExportError.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click treats the end of any file as Ctrl-D
            return fail(CUT_OFF, ExportError.exit_code)
        click.echo("interrupted: finished pairs are unchanged; if the command has --resume, that continues", err=True)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
