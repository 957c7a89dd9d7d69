"""`dovetail-run inspect`: show what a pair folder holds and whether it is complete."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dovetail.runtime.cli.curves import check_plot, plot_costs, show_costs
from dovetail.runtime.cli.options import vram_options
from dovetail.runtime.devices.gpus import GPUS
from dovetail.runtime.doctor.memory import estimate_memory
from dovetail.runtime.drafter.open import drafter_bytes, plan_gpu
from dovetail.runtime.drafter.vram import check_limit
from dovetail.runtime.errors import DeviceError, DovetailError, InputError
from dovetail.runtime.pair.check import check_pair, verify_files
from dovetail.runtime.pair.known import resolve_pair
from dovetail.runtime.pair.layout import DEVICES, TARGET_GRAPH, TARGET_WEIGHTS
from dovetail.runtime.pair.manifest import Manifest, read_manifest
from dovetail.runtime.policy.calibration import pair_calibration
from dovetail.runtime.system.machine import mib
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.layers.device import KINDS
from dovetail.runtime.target.layers.plan import Kind, plans, within
from dovetail.runtime.tune.cost_cache import Measured, properties_line, recall_default, target_properties


@click.command(short_help="Show what a pair holds and check its files.")
@click.argument("pair", required=False, metavar="[PAIR]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw the measured costs in this .png or .svg file; needs matplotlib.")  # fmt: skip
@vram_options
def inspect(pair: str | None, as_json: bool, plot: Path | None, vram: int | None, fit: bool) -> None:
    """Show the facts of PAIR (a folder or a known name) and check every file's digest.

    The plan of the drafter's GPU memory needs no GPU. inspect shows the costs that dovetail-run
    tune, or the first opening of the pair, has measured here.

    Exit code 3 if a file of the pair is missing or altered, or if its parts do not belong together.
    """
    check_limit(vram, fit, "auto")
    if plot is not None:
        check_plot(plot)
    folder = resolve_pair(pair)
    manifest = read_manifest(folder)
    check_pair(manifest)
    verify_files(folder, manifest, remember=False)
    measured = read_costs(manifest)
    facts = describe(folder, manifest, measured, _gpu_memory(folder, manifest, vram, fit))
    if plot is not None:
        if measured is None:
            command = shlex.join(["dovetail-run", "tune", str(folder)])
            raise InputError(f"--plot needs costs of this pair, measured here with default flags: run {command}")
        plot_costs(plot, manifest.name, measured)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else render(facts))
    if measured is not None and not as_json:
        click.echo()
        show_costs(manifest.name, measured)


def describe(folder: Path, manifest: Manifest, measured: Measured | None, vram: dict[str, Any]) -> dict[str, Any]:
    """Return everything about a verified pair as JSON.

    calibration: None if the drafter has no calibration file. costs: None if this machine measured
    none. vram: see _gpu_memory.
    """
    calibration = pair_calibration(folder, manifest)
    return {
        "pair": str(folder),
        "name": manifest.name,
        "format_version": manifest.format_version,
        "target": asdict(manifest.target),
        "drafter": {"kind": manifest.drafter_kind, **asdict(manifest.drafter)} if manifest.drafter else None,
        "calibration": asdict(calibration) if calibration else None,
        "costs": asdict(measured) if measured else None,
        "properties": target_properties(manifest),
        "tree": asdict(manifest.tree),
        "files": {name: entry.size for name, entry in manifest.files.items()},
        "size_mb": mib(sum(entry.size for entry in manifest.files.values())),
        "digests_ok": True,  # verify_files raises otherwise
        "memory": estimate_memory(folder, manifest),
        "vram": vram,
        "provenance": manifest.provenance,
    }


def _gpu_memory(folder: Path, manifest: Manifest, vram: int | None, fit: bool) -> dict[str, dict[str, Any]]:
    """Return the drafter's memory on each of GPUS in MiB, or {"problem": the reason why it cannot run there}.

    layers: with a limit, that of the most first layers of the target that fit beside the drafter.
    """
    found: dict[str, dict[str, Any]] = {}
    for gpu in GPUS if manifest.drafter else ():
        try:
            plan = plan_gpu(gpu, folder, manifest, vram, fit=fit)
            found[gpu] = {**plan.as_dict(), "text": str(plan)}
        except DeviceError as error:
            found[gpu] = {"problem": str(error)}
    for gpu, kind in KINDS.items() if vram is not None else ():
        found.setdefault(gpu, {})["layers"] = _layer_memory(folder, manifest, gpu, kind, vram or 0, fit)
    return found


def _layer_memory(folder: Path, manifest: Manifest, gpu: str, kind: Kind, vram: int, fit: bool) -> dict[str, Any]:
    try:
        room = vram - drafter_bytes(gpu, folder, manifest, vram, fit=fit)
        mix = FeatureMix.of_pair(folder, manifest)
        best = within(plans(folder / TARGET_GRAPH, kind, manifest.target.max_context, 1, mix), room)
    except DovetailError as error:
        return {"problem": str(error)}
    if best is None:
        return {"problem": f"no layer fits the {mib(room)} MiB beside the drafter: give a larger --vram"}
    return {**best.as_dict(), "text": str(best)}


def read_costs(manifest: Manifest) -> Measured | None:
    """Return the costs measured with default flags; CUDA's if both devices have costs."""
    if TARGET_WEIGHTS not in manifest.files:
        return None
    devices = [device for device in DEVICES if device in manifest.drafter.files] if manifest.drafter else [None]
    return next(filter(None, (recall_default(manifest, device) for device in devices)), None)


def render(facts: dict[str, Any]) -> str:
    """Return the facts for display, one a line."""
    target, drafter, costs, tree = facts["target"], facts["drafter"], facts["costs"], facts["tree"]
    rows = [
        ("pair", f"{facts['name']} ({facts['pair']}), format {facts['format_version']}"),
        ("target", f"{target['model_type']}, {target['weight_format']}, {target['num_layers']} layers, "
                   f"hidden {target['hidden_size']}"),
        ("sizes", f"vocabulary {target['vocab_size']}, context {target['max_context']} tokens"),
        ("feature", f"{target['feature_size']} wide, from {', '.join(target['taps'])}"),
        ("OpenVINO", properties_line(facts["properties"])),
        ("drafter", _drafter_line(drafter) if drafter else "none: repeated text alone is drafted"),
        *_calibration_rows(facts["calibration"]),
        *([("gpu layers", f"{target['gpu_layers']}, the pair's own number")] if target["gpu_layers"] != "0" else ()),
        *([("costs", _costs_line(costs))] if costs else ()),
        ("tree", f"width {tree['width']}, depth {tree['depth']}, top-k {tree['top_k']}, lookup {tree['lookup']}"),
        ("files", f"{len(facts['files'])}, {facts['size_mb']} MiB, all digests correct"),
        *((name.removesuffix("_mb").replace("_", " "), "unknown" if size is None else f"{size} MiB")
          for name, size in facts["memory"].items()),
        *_gpu_rows(facts["vram"]),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _gpu_rows(vram: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the rows for the drafter on each GPU, then those for the target's first layers beside it."""
    parts = [("drafter", gpu, plan) for gpu, plan in vram.items() if {"text", "problem"} & plan.keys()]
    parts += [("first layers", gpu, plan["layers"]) for gpu, plan in vram.items() if "layers" in plan]
    return [
        (f"{what} on {GPUS[gpu]}", plan.get("text") or f"not possible: {plan['problem']}") for what, gpu, plan in parts
    ]


def _drafter_line(drafter: dict[str, Any]) -> str:
    devices = ", ".join(device for device in DEVICES if device in drafter["files"])
    layers = ", ".join(map(str, drafter["feature_layers"])) or "none"
    read = "tokens alone" if drafter["reads_tokens"] else f"layers {layers}"
    told = "" if drafter["noise"] else ", drafts sampled answers less well without noise: export the drafter again"
    kind = f"{drafter['kind']}, " if drafter["kind"] else ""
    return (f"{kind}{drafter['blocks']} block(s), hidden {drafter['hidden_size']}, "
            f"reads {read}, draft vocabulary {drafter['draft_vocab_size']}, for {devices}{told}")  # fmt: skip


def _costs_line(costs: dict[str, Any]) -> str:
    layers = costs["key"]["layers"]
    elsewhere = f", first layers: {layers}" if layers else ""
    return f"measured {costs['date'][:10]} for {costs['seconds']:.0f} s{elsewhere}, below"


def _calibration_rows(calibration: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [
        (f"depth {number}", f"calibration error {fit['error_before']:.4f}, {fit['error_after']:.4f} after the fit, "
                            f"over {fit['candidates']} candidates")
        for number, fit in enumerate(calibration["depths"] if calibration else (), 1)
    ]  # fmt: skip
