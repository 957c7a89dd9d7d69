"""Which recipe makes the better drafter: a table of rows on equal text, equal batches and equally many updates.

    python tests/bench/ablate.py PAIR CORPUS.npz --work FOLDER [--updates 250] [--row NAME ...]

Prints a Markdown table and keeps every finished row in FOLDER, so a stopped run goes on with the next; FOLDER is for
one corpus and one target.  Rows with another batch have as many more or fewer updates, so that all see equally many
windows.  Each row starts from the same seed.  What is compared is the acceptance length of a greedy chain of six on
held-out conversations, with the time that an update took on this machine beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.exporter.target.embedding_rows import evaluate_constant
from dovetail.exporter.target.fuse_projections import PARTS
from dovetail.exporter.train.batches import Batches
from dovetail.exporter.train.contamination import Forbidden
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.evaluate import evaluate
from dovetail.exporter.train.features import FeatureStore
from dovetail.exporter.train.loop import Fitting
from dovetail.exporter.train.plan import FitOptions, TrainPlan
from dovetail.exporter.train.run import Work
from dovetail.exporter.train.text import split
from dovetail.models.drafter import Drafter
from dovetail.runtime.pair.files import sha256_file, write_atomically
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.graph import read_model

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class Row:
    """What a recipe changes.

    share: of the training conversations.  copied: block 0 starts as this block of the target, -1 its last.
    """

    plan: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    copied: int | None = None


BLOCK_NAME = re.compile(r"layers\.(\d+)\.")
PAPER = {"unroll": 1, "regression": 10.0}
LAST = {"feature_layers": False}
ROWS = {
    "default": Row(),
    "paper: fc, no gate (w/o both)": Row(LAST | {"fusion": "fc"}, PAPER),
    "paper: DGF (w/ DGF)": Row(LAST, PAPER),
    "paper: DGF, two blocks (w/ DGF + m)": Row(LAST | {"blocks": 2}, PAPER),
    "cross-entropy alone, one step": Row(LAST, {"unroll": 1}),
    "DGF, last feature": Row(LAST),
    "fc, last feature": Row(LAST | {"fusion": "fc"}),
    "fc, three layers (EAGLE-3)": Row({"fusion": "fc"}),
    "one step": Row(fit={"unroll": 1}),
    "two steps": Row(fit={"unroll": 2}),
    "five steps": Row(fit={"unroll": 5}),
    "seven steps": Row(fit={"unroll": 7}),
    "two blocks": Row({"blocks": 2}),
    "three blocks": Row({"blocks": 3}),
    "draft vocabulary 4,096": Row({"draft_vocab": 4096}),
    "draft vocabulary 16,384": Row({"draft_vocab": 16384}),
    "draft vocabulary 32,768": Row({"draft_vocab": 32768}),
    "teacher's 8 best tokens": Row(fit={"teacher_top_k": 8}),
    "teacher's best token": Row(fit={"teacher_top_k": 1}),
    "Muon": Row(fit={"optimizer": "muon"}),
    "Muon, learning rate 3e-3": Row(fit={"optimizer": "muon", "learning_rate": 3e-3}),
    "Muon, learning rate 6e-3": Row(fit={"optimizer": "muon", "learning_rate": 6e-3}),
    "learning rate 2e-3": Row(fit={"learning_rate": 2e-3}),
    "learning rate 5e-4": Row(fit={"learning_rate": 5e-4}),
    "batch 2": Row(fit={"batch": 2}),
    "batch 8": Row(fit={"batch": 8}),
    "block copied from the target's last": Row(copied=-1),
    "half of the text": Row(share=0.5),
    "a quarter of the text": Row(share=0.25),
}


class LastFeature:
    """A store's rows without the layers read beside the last feature."""

    def __init__(self, store: FeatureStore, width: int):
        self.store, self.feature_size, self.groups = store, width, store.groups
        self.group_of, self.hold = store.group_of, store.hold

    def __getitem__(self, rows: slice) -> NDArray[np.float16]:
        return self.store[rows][:, -self.feature_size :]


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("corpus", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--work", "folder", type=click.Path(path_type=Path), required=True, help="For features and finished rows."
)
@click.option("--updates", type=click.IntRange(min=25), default=250, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch.")
@click.option("--row", "names", multiple=True, type=click.Choice(list(ROWS)), help="Only these; repeatable.")
def main(pair: Path, corpus: Path, folder: Path, updates: int, threads: int | None, names: tuple[str, ...]) -> None:
    """Fit every row and print the table."""
    if threads:
        torch.set_num_threads(threads)
    plan = TrainPlan(corpora=(corpus,), fit=FitOptions())
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(pair, read_manifest(pair), plan, folder, lambda *_: None)
    text = work.sort(split("given-0", Corpus.load(corpus)), Forbidden([]))
    stores = work.features(text)
    memory = folder / f"rows-{identity(pair, corpus, updates)}.json"
    done: dict[str, Any] = json.loads(memory.read_text()) if memory.exists() else {}
    for name in names or ROWS:
        if name not in done:
            result = fit_row(work, text, stores, ROWS[name], updates)
            done = (json.loads(memory.read_text()) if memory.exists() else {}) | {name: result}
            write_atomically(memory, json.dumps(done, indent=1).encode())
        click.echo(f"{name}: {done[name]['acceptance_length']:.3f}", err=True)
    click.echo(table({name: done[name] for name in names or ROWS}))


def identity(pair: Path, corpus: Path, updates: int) -> str:
    """What rows must share to stand in one table: target, text, number of updates."""
    parts = (sha256_file(pair / "target" / "openvino_model.bin"), sha256_file(corpus), str(updates))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def fit_row(work: Work, text: Any, stores: tuple[FeatureStore, FeatureStore], row: Row, updates: int) -> dict[str, Any]:
    """One recipe: `updates` updates on the same windows in the same order, then held-out text."""
    plan = replace(work.plan, **row.plan, fit=replace(work.plan.fit, **row.fit))
    kept = np.sort(np.random.default_rng(5).permutation(text.kept)[: round(row.share * len(text.kept))])
    trainee = replace(work, plan=plan).trainee(text)
    drafter = trainee.drafter
    assert isinstance(drafter, Drafter)
    if row.copied is not None:
        copy_block(drafter, work.pair / "target" / "openvino_model.xml", row.copied)
    width = drafter.config.feature_size
    features, held_out = stores if plan.feature_layers else (LastFeature(store, width) for store in stores)
    batches = Batches(text.corpus, features, kept, trainee, plan.fit)  # type: ignore[arg-type]  # LastFeature does what it must
    # Equal tokens: half the batch, twice the updates.
    updates = round(updates * work.plan.fit.batch / plan.fit.batch)
    batches.options = replace(plan.fit, epochs=updates / batches.per_epoch)
    scratch = Path(tempfile.mkdtemp(prefix="fit-", dir=work.folder))
    begun = time.monotonic()
    state = Fitting(trainee, batches, scratch, "cpu", show).run(None, lambda: 0.0)
    seconds = time.monotonic() - begun
    shutil.rmtree(scratch)
    found = evaluate(drafter, text.corpus.select(text.held_out), held_out)
    return {
        "acceptance_length": found.acceptance_length,
        "accepted_per_position": found.accepted_per_position,
        "parameters": sum(p.numel() for p in drafter.parameters()),
        "updates": state.step,
        "positions": state.positions,
        "seconds_per_update": seconds / state.step,
        "agreement": state.curve[-1]["agreement"] if state.curve else [],
        "held_out_positions": found.positions,
    }


def copy_block(drafter: Drafter, xml: Path, block: int) -> None:
    """Start the drafter's first block with the weights of the target's `block`, read from its graph by their names."""
    model = read_model(xml)
    last = max(int(found[1]) for node in model.get_ops() if (found := BLOCK_NAME.search(node.get_friendly_name())))
    prefix = f"layers.{block % (last + 1)}."
    ours = dict(drafter.blocks()[0].named_parameters())
    for name in [name for name in ours if name.endswith("_proj.weight")]:
        linear = prefix + name.removesuffix(".weight") + "/"
        product = next(
            node for node in model.get_ops() if node.get_type_name() == "MatMul" and linear in node.get_friendly_name()
        )
        weight = evaluate_constant(product.input_value(1), xml)
        place = [linear in part for part in product.get_friendly_name().split(PARTS)].index(True)
        ours[name].data.copy_(torch.from_numpy(np.split(weight, fused_rows(product))[place]))


def fused_rows(product: ov.Node) -> list[int]:
    """Rows of the weight of `product` at which the layers begin that it was made of, but for the first."""
    node = product
    while node.get_type_name() in ("MatMul", "Add"):
        node = next(iter(node.output(0).get_target_inputs())).get_node()
    if node.get_type_name() != "VariadicSplit":
        return []
    return np.cumsum(node.input_value(2).get_node().data)[:-1].tolist()


def show(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
    click.echo(f"  {stage} {done:.0f}/{total:.0f} {note}", err=True)


def table(rows: dict[str, Any]) -> str:
    lines = [
        "| recipe | parameters | acceptance length | i-th drafted token kept, % | s/update |",
        "|---|---:|---:|---|---:|",
    ]
    for name, row in rows.items():
        rates = ", ".join(f"{100 * rate:.0f}" for rate in row["accepted_per_position"])
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.1f} M | {row['acceptance_length']:.3f} | {rates} | "
            f"{row['seconds_per_update']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
