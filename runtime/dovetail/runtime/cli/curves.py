"""Show measured costs: tables and bars on the terminal, lines in a picture (needs matplotlib)."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.runtime.cli.options import check_folder, write_file
from dovetail.runtime.devices.gpus import GPUS
from dovetail.runtime.errors import InputError, install_extra
from dovetail.runtime.policy.costs import Curve
from dovetail.runtime.tune.cost_cache import Measured

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)  # sizes in tables: a line of 80 characters has no room for all
BAR = 40  # characters of the longest bar
DEVICE = {**GPUS, "cpu": "the CPU", "model": "the CPU (draft model)"}
SUFFIXES = (".png", ".svg")


def show_costs(name: str, measured: Measured) -> None:
    """Print tables and bars on stdout. name: the pair's."""
    from rich.console import Console

    console, costs = Console(highlight=False, markup=False, emoji=False), measured.costs
    show_curve(console, f"{name}: a pass of the target, ms by nodes", costs.target)
    if costs.draft and measured.key.device:
        show_curve(console, f"{name}: a call of the drafter on {DEVICE[measured.key.device]}, ms by rows", costs.draft)
    console.print(f"a change of width costs the target's next pass {costs.switch_ms:.1f} ms more")


def show_curve(console: Console, title: str, curve: Curve) -> None:
    """Print a row per context, then a bar per size at the shortest context."""
    from rich.table import Table

    shown = [index for index, size in enumerate(curve.rows) if size in SHOWN]
    table = Table("context", box=None, padding=(0, 1, 0, 0))
    for index in shown:
        table.add_column(str(curve.rows[index]), justify="right")
    for context, line in zip(curve.contexts, curve.ms, strict=True):
        table.add_row(str(context), *(milliseconds(line[index]) for index in shown))
    console.print(title)
    console.print(table)
    block = "#" if console.options.ascii_only else "█"
    for index in shown:
        ms = curve.ms[0][index]
        bar = block * max(1, round(BAR * ms / curve.ms[0][shown[-1]]))
        console.print(f"{curve.rows[index]:>7} {bar} {milliseconds(ms)}")
    console.print()


def milliseconds(ms: float) -> str:
    """Return `ms` with about three digits."""
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def check_plot(file: Path) -> None:
    """Raise InputError if `file` certainly cannot become a picture."""
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {file} has an unknown suffix: name a file that ends in {' or '.join(SUFFIXES)}")
    check_folder("--plot", file)
    try:
        from matplotlib import figure  # noqa: F401  # checks that matplotlib imports
    except ImportError as err:
        raise InputError(f"--plot needs matplotlib ({err}): {install_extra('plot')}") from None
    except ValueError as err:  # importing matplotlib reads MPLBACKEND
        raise InputError(f"--plot: matplotlib does not start ({err}): unset MPLBACKEND") from None


def plot_costs(file: Path, name: str, measured: Measured) -> None:
    """Write a picture with a panel per engine and a line per context. Raises InputError.

    Equal costs give an equal SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    costs, key, picture, kind = measured.costs, measured.key, BytesIO(), file.suffix.lower().removeprefix(".")
    where = f"{key.cpu}, {key.threads or key.usable_threads} threads, measured {measured.date[:10]}"
    with rc_context({"svg.hashsalt": "dovetail", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        figure.suptitle(f"{name}\n{where}", parse_math=False)
        panels = [("a pass of the target", "nodes in the pass", "time of a pass (ms)", costs.target)]
        if costs.draft and key.device:
            called = f"a call of the drafter on {DEVICE[key.device]}"
            panels.append((called, "rows in the call", "time of a call (ms)", costs.draft))
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, sizes, times, curve) in zip(every, panels, strict=True):
            axes.set(title=title, xlabel=sizes, ylabel=times)
            for context, line in zip(curve.contexts, curve.ms, strict=True):
                axes.plot(curve.rows, line, "o-", markersize=3, label=f"{context} tokens")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(title="context")
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_file("--plot", file, picture.getvalue())
