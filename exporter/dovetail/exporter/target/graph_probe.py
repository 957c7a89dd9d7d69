"""Checks that the exported graph computes the model when it verifies trees.

The runtime turns a target into a paged graph. If the paged graph loses a part of the attention (a
window, a sink, a bias, a scale), the text is wrong and nothing fails. An export therefore compares
logits three times before it ends:

    plain   the paged graph and a reference, one token a pass, after a prompt
    window  the same, after a prompt that is longer than the attention's window
    tree    the nodes of a token tree and each node's own path as a chain

There are two references. The checkpoint in torch shows mistakes of the conversion. The IR without
paged attention has the same weights as the paged graph.

Axes: T prompt tokens, K tokens after the prompt, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.exporter.target.architectures import context_of
from dovetail.runtime.errors import ExportError
from dovetail.runtime.system.arrays import SequenceId
from dovetail.runtime.system.page_release import releasing_pages
from dovetail.runtime.target.graph import LOGITS
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.tree.draft_tree import DraftTree

if TYPE_CHECKING:
    import openvino as ov

FloatArray = NDArray[np.float32]

_FOLLOWING = 8  # K
_PROMPT = 48  # T without a window
_LONGEST = 640  # largest T: a model of 7B takes a minute at most; longer windows stay unchecked
# Largest allowed distance of logits, as a share of their spread: for equal weights, and for INT8
# against float weights. In tiny random models float16 keys give 0.004, INT8 weights 0.08 and wrong
# attention 0.2 to 1.5. INT4 weights give 0.3 to 1.1, too much for a comparison. The median row
# counts, because a near tie may send one token to another expert.
_SAME_WEIGHTS, _INT8 = 0.05, 0.3
EXACT: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
# Two long branches and several short branches, which leave the first chain at every level.
_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 1, 7, 0, 9, 2)


def probe_tokens(config: Mapping[str, Any]) -> NDArray[np.int64]:
    """A random text [T + K]; T passes the attention's window if _LONGEST allows."""
    text = config.get("text_config") or config
    window = text.get("sliding_window") or text.get("window_size") or 0
    length = window + _PROMPT if window + _PROMPT <= _LONGEST else _PROMPT
    room = (context_of(config) or _LONGEST) - _FOLLOWING - len(_PARENTS)
    return np.random.default_rng(0).integers(0, text["vocab_size"], max(min(length, room), 1) + _FOLLOWING)


def torch_logits(checkpoint: Path, tokens: NDArray[np.int64], trust: bool) -> FloatArray:
    """Logits [K, V] after the prompt, from the checkpoint in torch at its stored precision."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype="auto", trust_remote_code=trust, local_files_only=True
    ).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0, -_FOLLOWING:]
    return np.asarray(logits.float().numpy())


def ir_logits(xml: Path, tokens: NDArray[np.int64]) -> FloatArray:
    """Logits [K, V] after the prompt, from a stateful IR without paged attention."""
    import openvino as ov

    with releasing_pages(xml.with_suffix(".bin")):
        compiled = ov.Core().compile_model(xml, "CPU", {**EXACT, "KV_CACHE_PRECISION": "f16"})
        return np.array(stateful_logits(compiled, [tokens])[-_FOLLOWING:], np.float32)


def stateful_logits(compiled: ov.CompiledModel, chunks: Sequence[NDArray[np.int64]]) -> FloatArray:
    """Logits [T, V] of the last chunk, after running the chunks through one state."""
    request, past = compiled.create_infer_request(), 0
    known = {name for port in compiled.inputs for name in port.get_names()}
    for chunk in chunks:
        inputs = {
            "input_ids": chunk[None],
            "attention_mask": np.ones((1, past + len(chunk)), np.int64),
            "position_ids": np.arange(past, past + len(chunk))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: array for name, array in inputs.items() if name in known})
        past += len(chunk)
    return np.array(request.get_tensor(LOGITS).data[0])


def probe_graph(xml: Path, tokens: NDArray[np.int64], same: FloatArray, close: FloatArray | None = None) -> None:
    """Compare the paged graph of a tapped IR with its references, and a tree with its chains.

    same: logits [K, V] of equal weights. close: logits [K, V] of the float weights before INT8.
    Raises ExportError.
    """
    target = OpenVINOTarget(PagedModel(xml, properties=EXACT), len(tokens) + len(_PARENTS))
    prompt = tokens[:-_FOLLOWING]
    seq = target.open()
    target.prefill(seq, prompt)
    rows = []
    for token in tokens[-_FOLLOWING:].tolist():
        rows.append(target.verify({seq: DraftTree.root(token)})[seq].logits[0].copy())
        target.commit(seq, np.zeros(1, np.int64))
    off = float(np.median(_difference(np.array(rows), same)))
    if not off <= _SAME_WEIGHTS:
        raise ExportError(
            f"the graph does not compute the model: after {len(prompt)} tokens its logits are off by {off:.2f} of "
            "their spread, and OpenVINO's paged attention does not fit this architecture: choose another model"
        )
    off = 0.0 if close is None else float(np.median(_difference(np.array(rows), close)))
    if not off <= _INT8:
        raise ExportError(
            f"the graph does not compute the model: after {len(prompt)} tokens its logits are off by {off:.2f} of "
            "their spread from the float weights': INT8 or the conversion changes them: try --weight-format fp16"
        )
    off = _tree_difference(target, seq, len(prompt), tokens)
    if not off <= _SAME_WEIGHTS:
        raise ExportError(
            f"the graph does not verify trees: logits of a node are off by {off:.2f} of their spread from the logits "
            "of its own path: choose another model"
        )


def _tree_difference(target: OpenVINOTarget, seq: SequenceId, length: int, tokens: NDArray[np.int64]) -> float:
    """The largest difference between a node's logits and the logits of its path as a chain."""
    target.rewind(seq, length)
    nodes = np.resize(tokens[::-1], len(_PARENTS))
    tree = DraftTree(nodes, np.array(_PARENTS), np.zeros(len(nodes), np.float32))
    logits = target.verify({seq: tree})[seq].logits.copy()
    worst = 0.0
    for path in tree.paths():
        target.rewind(seq, length)
        rows = target.verify({seq: DraftTree.chain(nodes[path])})[seq].logits
        worst = max(worst, float(_difference(logits[path], rows).max()))
    return worst


def _difference(ours: FloatArray, theirs: FloatArray) -> Any:
    """RMS of the difference divided by the standard deviation of `theirs`, per row [.., V]."""
    size = min(ours.shape[-1], theirs.shape[-1])  # a graph may pad the vocabulary
    ours, theirs = ours[..., :size], theirs[..., :size]
    return np.sqrt(np.mean((ours - theirs) ** 2, axis=-1)) / np.maximum(np.std(theirs, axis=-1), 1e-9)
