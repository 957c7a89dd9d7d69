"""Learning curves of training runs in one picture, from their training.json; matplotlib draws them.

python tests/bench/curve.py runs/a/training.json runs/b/training.json -o curve.svg --over minutes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

Point = tuple[float, float]  # what it cost, acceptance length
AXES = {
    "tokens": "answer tokens trained on (repeats counted)",
    "minutes": "minutes of fitting",
    "corpus": "answer tokens in the corpus",
}


@dataclass(frozen=True)
class Curve:
    """One run. line: the held-out figures while it learned; end: that of the finished drafter."""

    name: str
    line: tuple[Point, ...]
    end: Point


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="TRAINING.json...")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Picture: .svg, .png or .pdf.")
@click.option("--over", type=click.Choice(list(AXES)), default="tokens", show_default=True,
              help="What lies across; corpus draws one line through the finished runs.")  # fmt: skip
def curve(files: tuple[Path, ...], out: Path, over: str) -> None:
    """Draw the held-out acceptance length of each run; a dot is the finished drafter."""
    draw([read_curve(file, over) for file in files], out, over)


def read_curve(file: Path, over: str) -> Curve:
    """A run's curve over `over`; click's error for a file that is no training log."""
    try:
        log = json.loads(file.read_text(encoding="utf-8"))
        size = int(log["corpus"]["answer_tokens"])
        final = float(log["held_out"]["acceptance_length"])
        minutes = log["minutes"]["fit"] if isinstance(log["minutes"], dict) else log["minutes"]  # logs of 0.1: a number
        ends = {"tokens": float(log["positions_seen"]), "minutes": float(minutes), "corpus": float(size)}
        points = () if over == "corpus" else [point for point in log["curve"] if point.get("held_out") is not None]
        line = tuple((_cost(point, over), float(point["held_out"])) for point in points)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise click.ClickException(f"{file} is no training.json ({type(err).__name__}: {err})") from None
    return Curve(f"{file.resolve().parent.name} ({size:,} answer tokens)", line, (ends[over], final))


def draw(curves: list[Curve], out: Path, over: str) -> None:
    """Write the picture; the same curves give the same SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "dovetail", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        if over == "corpus":
            axes.plot(*zip(*sorted(run.end for run in curves), strict=True), color="0.7", zorder=1)
        for run in curves:
            (line,) = axes.plot(*(zip(*run.line, strict=True) if run.line else ((), ())), linewidth=1.5)
            axes.plot(*run.end, "o", color=line.get_color(), label=run.name)
        axes.set(xlabel=AXES[over], ylabel="held-out acceptance length")
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
        except (OSError, ValueError) as err:  # no such folder; a format that is unknown
            raise click.ClickException(f"--out {out} cannot be written ({err})") from None
        finally:
            pyplot.close(figure)


def _cost(point: dict[str, Any], over: str) -> float:
    return float(point["seconds"]) / 60 if over == "minutes" else float(point["positions"])


if __name__ == "__main__":
    curve()
