"""Shows the user the steps of an export: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
import warnings
from collections.abc import Iterator

from dovetail.runtime.system.progress import Progress


@contextlib.contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """Yield a progress callback: on stderr, a bar on a terminal and plain lines elsewhere."""
    if not sys.stderr.isatty():
        stream, start = sys.stderr, time.monotonic()  # `quiet` redirects sys.stderr later
        yield lambda stage, *_: print(f"[{time.monotonic() - start:6.1f} s] {title}: {stage}", file=stream, flush=True)
        return
    from rich import progress as rich
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(bar_width=20), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with rich.Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(title, total=None)
        yield lambda stage, *_: bar.update(task, description=f"{title}: {stage}")


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Hide the output of transformers, optimum, nncf and torch, unless `verbose`."""
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
