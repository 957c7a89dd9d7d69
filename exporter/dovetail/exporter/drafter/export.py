"""A drafter checkpoint to the pair's `drafter/` folder: float16 for CUDA, INT8 for the CPU, both checked.

checkpoint + target's rows -> torch module -> ONNX float16 and INT8 -> parity with torch -> files in place
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from dovetail.exporter.build.stages import Progress, silent
from dovetail.exporter.drafter.graph import to_onnx
from dovetail.exporter.drafter.int8 import quantize
from dovetail.exporter.drafter.parity import TOLERANCES, Parity, check_parity, check_static
from dovetail.exporter.drafter.shrink import narrowed, workspace
from dovetail.exporter.target.embedding_rows import read_embedding_and_head
from dovetail.models.checkpoint import CheckpointError, load_checkpoint
from dovetail.models.drafter import Drafter
from dovetail.runtime.drafter.vram import LEAST_CONTEXT, plan, plan_within
from dovetail.runtime.errors import DeviceError, ExportError, PairError, SourceError
from dovetail.runtime.pair.manifest import DATA_SUFFIX, DrafterFacts, sha256_file
from dovetail.runtime.policy.calibration import CALIBRATION_NAME, Calibration
from dovetail.runtime.target.features import FeatureMix

TREE_SLOTS = 64  # T: KV rows for tree nodes
TOP_K = 10  # children returned per row; the paper's largest
FILES = {"cuda": "drafter.fp16.onnx", "cpu": "drafter.int8.onnx"}
PRECISION = {"cuda": "float16", "cpu": "int8"}
FEATURE_MIX = "feature_mix.npz"
CONFIG = "config.json"


def export_drafter(
    checkpoint: Path,
    target_dir: Path,
    out_dir: Path,
    *,
    tree_slots: int = TREE_SLOTS,
    top_k: int = TOP_K,
    vram: int = 0,
    fit: bool = False,
    keep: Collection[int] = (),
    progress: Progress = silent,
) -> DrafterFacts:
    """Write both ONNX files, the config and, where the checkpoint has one, the calibration; returns the facts.

    out_dir: a pair's `drafter` folder.  target_dir: the pair's `target` folder, whose rows and tokenizer the
    drafter shares.  vram: bytes of GPU memory to keep to, 0 for no limit; fit: its context and then its draft
    vocabulary may shrink to that, the tokens of `keep` stay.  progress is told each stage, and the parity of each
    file.  The files appear only after every check has passed.
    Raises SourceError (checkpoint), ExportError (parity, all failures in one line; full disk; more than `vram`).
    """
    copied = [CONFIG, CALIBRATION_NAME] if read_calibration(Path(checkpoint)) else [CONFIG]
    progress("reading the target's embedding and head")
    drafter = load_drafter(Path(checkpoint), Path(target_dir))
    facts = drafter_facts(drafter, Path(target_dir), Path(out_dir).name, tree_slots, top_k)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out_dir) as scratch:
            facts = _write_files(drafter, Path(scratch), facts, progress)
            if vram:
                drafter, facts = _fitted(drafter, Path(scratch), replace(facts, vram=vram), fit, keep, progress)
            if drafter.mix:
                feature_mix(drafter).save(Path(scratch) / FEATURE_MIX)
            for report in check_files(drafter, Path(scratch), facts):
                progress(str(report))
            for name in copied:
                shutil.copyfile(Path(checkpoint) / name, Path(scratch) / name)
            for file in sorted(Path(scratch).iterdir(), key=lambda file: file.suffix == ".onnx"):  # .data before .onnx
                os.replace(file, out_dir / file.name)
    except OSError as error:
        raise ExportError(f"cannot write the drafter to {out_dir}: {error.strerror or error}") from error
    return facts


def load_drafter(checkpoint: Path, target_dir: Path) -> Drafter:
    """The torch module on the rows of the target's IR, float32.  Raises SourceError, ExportError."""
    embed, head = read_embedding_and_head(target_dir / "openvino_model.xml")
    try:
        return load_checkpoint(checkpoint, torch.from_numpy(embed), torch.from_numpy(head)).eval()
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    except ValueError as error:  # embedding of another shape than the config says
        raise SourceError(f"drafter {checkpoint} does not fit the target in {target_dir}: {error}") from error


def read_calibration(checkpoint: Path) -> Calibration | None:
    """The checkpoint's calibration; None for a drafter that was trained without.  Raises SourceError."""
    try:
        return Calibration.load(checkpoint)
    except PairError as error:
        raise SourceError(str(error)) from error


def feature_mix(drafter: Drafter) -> FeatureMix:
    """What the target's graph adds to its last feature for this drafter."""
    assert drafter.mix is not None
    weight = drafter.mix.proj.weight.detach().cpu().numpy()
    return FeatureMix(drafter.config.feature_layers, weight, drafter.config.rms_norm_eps)


def drafter_facts(drafter: Drafter, target_dir: Path, folder: str, tree_slots: int, top_k: int) -> DrafterFacts:
    """What the manifest says about this drafter; files lie in `folder` of the pair.  Raises SourceError."""
    config = drafter.config
    tokenizer = target_dir / "tokenizer.json"
    try:
        tokenizer_sha256 = sha256_file(tokenizer)
    except OSError as error:
        raise SourceError(f"cannot read {tokenizer} ({error.strerror}): export the target again") from error
    files = FILES | ({"features": FEATURE_MIX} if config.feature_layers else {})
    return DrafterFacts(
        fusion=config.fusion,
        blocks=config.blocks,
        hidden_size=config.hidden_size,
        feature_size=config.feature_size,
        target_vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        top_k=min(top_k, config.draft_vocab_size),
        tree_slots=tree_slots,
        max_context=config.max_position_embeddings,
        tokenizer_sha256=tokenizer_sha256,
        files={name: f"{folder}/{file}" for name, file in files.items()},
        feature_layers=config.feature_layers,
        noise=True,
    )


def check_files(drafter: Drafter, folder: Path, facts: DrafterFacts) -> list[Parity]:
    """Compare every file in `folder` with torch, and see that the CUDA file can be captured.

    Raises ExportError with all failures of all files.
    """
    check_static(folder / FILES["cuda"], tokens=8, slots=facts.tree_slots + 256)
    reports = [
        check_parity(drafter, folder / name, TOLERANCES[PRECISION[device]], tree_slots=facts.tree_slots)
        for device, name in FILES.items()
    ]
    if failures := [line for report in reports for line in report.failures]:
        raise ExportError("the exported drafter differs from torch: " + "; ".join(failures))
    return reports


def _write_files(drafter: Drafter, folder: Path, facts: DrafterFacts, progress: Progress) -> DrafterFacts:
    """Both graphs; returns the facts with what the one for CUDA takes there."""
    for device, dtype in (("cuda", torch.float16), ("cpu", torch.float32)):
        progress(f"exporting {FILES[device]}")
        model = to_onnx(drafter, dtype, tree_slots=facts.tree_slots, top_k=facts.top_k)
        if device == "cpu":
            quantize(model)
        save(model, folder / FILES[device])
    return replace(facts, workspace=workspace(folder / FILES["cuda"], facts.tree_slots))


def _fitted(
    drafter: Drafter, folder: Path, facts: DrafterFacts, fit: bool, keep: Collection[int], progress: Progress
) -> tuple[Drafter, DrafterFacts]:
    """The drafter in `folder` if it keeps to facts.vram, else, with `fit`, a narrower one in its place."""
    while True:
        try:
            plan_within(facts, _weights(folder), facts.vram, fit=fit)
            return drafter, facts
        except DeviceError as error:
            if not fit:
                raise ExportError(str(error)) from None
        least = plan(facts, _weights(folder), min(facts.max_context, LEAST_CONTEXT))
        drafter = narrowed(drafter, least, facts.vram, keep)
        size = drafter.config.draft_vocab_size
        progress(f"keeping {size} of {facts.draft_vocab_size} draft tokens, to fit the limit of VRAM")
        facts = replace(facts, draft_vocab_size=size, top_k=min(facts.top_k, size))
        facts = _write_files(drafter, folder, facts, progress)


def _weights(folder: Path) -> int:
    """Bytes of the graph for CUDA, as the manifest counts them."""
    return sum(file.stat().st_size for file in folder.glob(f"{FILES['cuda']}*"))


def save(model: ir.Model, file: Path) -> None:
    """Write a graph, and its weights in a `.data` file beside it.

    Weights in a file of their own are mapped when the graph is loaded: of an embedding only the rows that are looked
    up come into memory, and protobuf's limit of 2 GiB does not count.
    """
    ir.save(model, file, external_data=f"{file.name}{DATA_SUFFIX}")
