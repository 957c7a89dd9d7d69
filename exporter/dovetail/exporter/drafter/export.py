"""Writes a pair's `drafter/` folder: float16 for CUDA, INT8 for the CPU, both checked.

checkpoint + target's rows -> torch module -> ONNX float16, INT8 -> parity with torch -> files
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

from dovetail.exporter.drafter import block_graph, graph
from dovetail.exporter.drafter.block_parity import check_block_parity
from dovetail.exporter.drafter.int8 import quantize
from dovetail.exporter.drafter.parity import TOLERANCES, Parity, Tolerance, check_parity, check_static
from dovetail.exporter.drafter.shrink import narrowed, workspace
from dovetail.exporter.drafter.tokenizers import compare_tokenizers
from dovetail.exporter.target.configuration import read_config, sizes_config
from dovetail.exporter.target.embedding_rows import read_embedding_and_head
from dovetail.models.checkpoint import CONFIG
from dovetail.models.dflash import DFlash
from dovetail.models.drafter import DraftBase, DraftModel
from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.models.fusion import TapMix
from dovetail.runtime.drafter.vram import LEAST_CONTEXT, plan, plan_within
from dovetail.runtime.errors import DeviceError, ExportError, PairError, SourceError
from dovetail.runtime.pair.files import sha256_file
from dovetail.runtime.pair.layout import CALIBRATION_NAME, DATA_SUFFIX, IR_GRAPH, TOKENIZER
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.policy.calibration import Calibration
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.features import FeatureMix

TREE_SLOTS = 64  # T: KV rows for tree nodes
TOP_K = 10  # children that the graph returns per row; the paper's largest
FILES = {"cuda": "drafter.fp16.onnx", "cpu": "drafter.int8.onnx"}
PRECISION = {"cuda": "float16", "cpu": "int8"}
FEATURE_MIX = "feature_mix.npz"


def export_drafter(
    checkpoint: Path, target_dir: Path, out_dir: Path, *, tree_slots: int = TREE_SLOTS, top_k: int = TOP_K,
    vram: int = 0, fit: bool = False, keep: Collection[int] = (), allow_pickle: bool = False,
    progress: Progress = silent,
) -> DrafterFacts:  # fmt: skip
    """Write both ONNX files, the config and any calibration of the checkpoint; return the facts.

    target_dir, out_dir: a pair's `target` and `drafter`. vram: the most bytes of GPU memory, 0 for
    no limit. fit: to keep to `vram`, the context and then the draft vocabulary may shrink; the
    tokens of `keep` stay. allow_pickle: see find_checkpoint. The files appear in
    `out_dir` only after every check has passed.
    Raises SourceError (checkpoint), ExportError (parity, all failures in one line; full disk; more
    than `vram`).
    """
    try:
        copied = [CONFIG, CALIBRATION_NAME] if Calibration.load(checkpoint) else [CONFIG]
    except PairError as error:
        raise SourceError(str(error)) from error
    progress("reading the target's embedding and head")
    drafter = load_drafter(checkpoint, target_dir, allow_pickle=allow_pickle)
    facts = drafter_facts(drafter, target_dir, out_dir.name, tree_slots, top_k)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out_dir) as temporary:
            scratch = Path(temporary)
            facts = _write_cuda(drafter, scratch, facts, progress)
            if vram:
                drafter, facts = _fitted(drafter, scratch, replace(facts, vram=vram), fit, keep, progress)
            _write(drafter, "cpu", scratch, facts, progress)
            if mix := drafter.mix:
                weights = mix.folded().detach().cpu().numpy()
                FeatureMix(mix.layers, weights, mix.eps, mix.tap_norm, mix.adds_last).save(scratch / FEATURE_MIX)
            for report in check_files(drafter, scratch, facts):
                progress(str(report))
            for name in copied:
                shutil.copyfile(checkpoint / name, scratch / name)
            for file in sorted(scratch.iterdir(), key=lambda file: file.suffix == ".onnx"):  # .data before .onnx
                os.replace(file, out_dir / file.name)
    except OSError as error:
        raise ExportError(f"cannot write the drafter to {out_dir}: {error.strerror or error}") from error
    return facts


def load_drafter(checkpoint: Path, target_dir: Path, *, allow_pickle: bool = False) -> DraftBase:
    """The torch module on the rows of the target's IR, float32. Raises SourceError, ExportError."""
    found = find_checkpoint(checkpoint, allow_pickle=allow_pickle)
    config = sizes_config(read_config(target_dir), target_dir / CONFIG, SourceError)
    if found.format.reads_tokens:
        texts = compare_tokenizers(checkpoint, target_dir)
        if not texts.same:
            raise SourceError(
                f"the tokenizer of {checkpoint} does not fit the target in {target_dir}: {texts.said}: {texts.remedy}"
            )
        embed = head = torch.zeros(0)
    else:
        embed, head = map(torch.from_numpy, read_embedding_and_head(target_dir / IR_GRAPH))
    try:
        return found.read(TargetParts(config, embed, head)).eval()
    except ValueError as error:  # rows of another shape than the config says
        raise SourceError(f"drafter {checkpoint} does not fit the target in {target_dir}: {error}") from error


def drafter_facts(drafter: DraftBase, target_dir: Path, folder: str, tree_slots: int, top_k: int) -> DrafterFacts:
    """What the manifest says about this drafter. folder: of the pair. Raises SourceError."""
    shape, layers = drafter.shape, drafter.mix.layers if drafter.mix else ()
    try:
        tokenizer_sha256 = sha256_file(target_dir / TOKENIZER)
    except OSError as error:
        raise SourceError(
            f"cannot read {target_dir / TOKENIZER} ({error.strerror}): export the target again"
        ) from error
    files = FILES | ({"features": FEATURE_MIX} if layers else {})
    return DrafterFacts(
        blocks=shape.blocks,
        hidden_size=shape.hidden_size,
        feature_size=shape.feature_size,
        target_vocab_size=shape.vocab_size,
        draft_vocab_size=shape.draft_vocab_size,
        num_kv_heads=shape.num_key_value_heads,
        head_size=shape.head_dim,
        top_k=min(top_k, shape.draft_vocab_size),
        tree_slots=tree_slots,
        positions=drafter.config.positions if isinstance(drafter, DFlash) else 0,
        max_context=shape.max_context,
        tokenizer_sha256=tokenizer_sha256,
        files={name: f"{folder}/{file}" for name, file in files.items()},
        feature_layers=layers,
        noise=True,
        target_size=drafter.mix.target_size if isinstance(drafter.mix, TapMix) else 0,
        reads_tokens=drafter.reads_tokens,
    )


def check_files(drafter: DraftBase, folder: Path, facts: DrafterFacts) -> list[Parity]:
    """Compare every file with torch and check CUDA's capture. Raises ExportError with all failures."""
    check_static(folder / FILES["cuda"], tokens=8, slots=facts.tree_slots + 256)
    reports = [
        _parity(drafter, folder / name, TOLERANCES[PRECISION[device]], facts.tree_slots)
        for device, name in FILES.items()
    ]
    if failures := [line for report in reports for line in report.failures]:
        raise ExportError("the exported drafter differs from torch: " + "; ".join(failures))
    return reports


def _parity(drafter: DraftBase, file: Path, tolerance: Tolerance, slots: int) -> Parity:
    if isinstance(drafter, DFlash):
        return check_block_parity(drafter, file, tolerance, slots=slots)
    assert isinstance(drafter, DraftModel)
    return check_parity(drafter, file, tolerance, tree_slots=slots)


def _to_onnx(drafter: DraftBase, dtype: torch.dtype, facts: DrafterFacts) -> ir.Model:
    if isinstance(drafter, DFlash):
        return block_graph.to_onnx(drafter, dtype, slots=facts.tree_slots, top_k=facts.top_k)
    assert isinstance(drafter, DraftModel)
    return graph.to_onnx(drafter, dtype, tree_slots=facts.tree_slots, top_k=facts.top_k)


def _write(drafter: DraftBase, device: str, folder: Path, facts: DrafterFacts, progress: Progress) -> None:
    """Write the graph of a device."""
    progress(f"exporting {FILES[device]}")
    model = _to_onnx(drafter, torch.float16 if device == "cuda" else torch.float32, facts)
    if device == "cpu":
        quantize(model)  # rows and head have different layouts
    else:
        graph.share_rows(model)
    save(model, folder / FILES[device])


def _write_cuda(drafter: DraftBase, folder: Path, facts: DrafterFacts, progress: Progress) -> DrafterFacts:
    """Write CUDA's graph; return the facts with its workspace."""
    _write(drafter, "cuda", folder, facts, progress)
    return replace(facts, workspace=workspace(folder / FILES["cuda"], facts.tree_slots))


def _fitted(
    drafter: DraftBase, folder: Path, facts: DrafterFacts, fit: bool, keep: Collection[int], progress: Progress
) -> tuple[DraftBase, DrafterFacts]:
    """The drafter in `folder` if it keeps to facts.vram; with `fit`, a narrower one that does."""
    while True:
        try:
            plan_within(facts, _weights(folder), facts.vram, fit=fit)
            return drafter, facts
        except DeviceError as error:
            if not fit:
                raise ExportError(str(error)) from None
        least = plan(facts, _weights(folder), min(facts.max_context, LEAST_CONTEXT))
        drafter = narrowed(drafter, least, facts.vram, keep)
        size = drafter.shape.draft_vocab_size
        progress(f"keeping {size} of {facts.draft_vocab_size} draft tokens, to fit the limit of VRAM")
        facts = replace(facts, draft_vocab_size=size, top_k=min(facts.top_k, size))
        facts = _write_cuda(drafter, folder, facts, progress)


def _weights(folder: Path) -> int:
    """Bytes of the CUDA graph and its weights, as the manifest counts them."""
    return sum(file.stat().st_size for file in folder.glob(f"{FILES['cuda']}*"))


def save(model: ir.Model, file: Path) -> None:
    """Write a graph, and its weights in a `.data` file beside it.

    ONNX Runtime maps such a file, so only the embedding rows that a run looks up come into memory.
    Protobuf's limit of 2 GiB does not count for the file.
    """
    ir.save(model, file, external_data=f"{file.name}{DATA_SUFFIX}")
