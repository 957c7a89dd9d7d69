"""What the user sees while an export runs: a line per step, a moving bar on a terminal, no chatter."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
import warnings
from collections.abc import Iterator

from dovetail.exporter.build.stages import Progress


@contextlib.contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """A progress callback: one bar with the current step on a terminal, plain lines elsewhere (both on stderr)."""
    if not sys.stderr.isatty():
        yield _plain_lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(bar_width=20), TimeElapsedColumn())
    # The stream is bound now: `quiet` redirects sys.stderr later.
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(title, total=None)
        yield lambda text: bar.update(task, description=f"{title}: {text}")


def _plain_lines(title: str) -> Progress:
    stream, start = sys.stderr, time.monotonic()

    def line(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {title}: {text}", file=stream, flush=True)

    return line


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Keep the chatter of transformers, optimum, nncf and torch off the terminal, unless `verbose`."""
    if verbose:
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)
