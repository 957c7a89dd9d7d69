"""Checks that an exported drafter computes the same as torch and that a CUDA graph can capture it.

ONNX Runtime runs a script with each ONNX file on the CPU: extend, grow two tree levels, extend
again. The reference is the training code (`DraftModel.step`) instead of the exported wrapper. The
comparison therefore also finds mistakes in the wrapper's masks, positions and buffers.

Axes: n rows of a call, T tree slots, K draft vocabulary, k children per row, D feature size.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from dovetail.exporter.drafter.graph import BLOCKED
from dovetail.exporter.drafter.int8_torch import Int8Products
from dovetail.models.drafter import DraftModel
from dovetail.runtime.drafter.graph_io import NOISE
from dovetail.runtime.errors import ExportError

Array = NDArray[np.generic]
DYNAMIC_OPS = {"If", "Loop", "Scan", "Shape", "Size", "NonZero", "Range"}


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed difference between a file and torch.

    logprob: error of a child's log-probability or rank. The unit is the standard deviation of
    torch's log-probabilities over the draft vocabulary in that row, because errors grow with it.
    feature: relative L2 error of the output features of one call.
    int8: torch rounds as the INT8 file does.
    """

    logprob: float
    feature: float
    int8: bool = False

    def rounding(self) -> AbstractContextManager[object]:
        """In its context torch rounds as the file does."""
        return Int8Products() if self.int8 else nullcontext()


# Measured with random weights, H = 32 and 576, 1 and 2 blocks. float16 errs by up to 0.0021 sd and
# 0.05%, and by 0.010 sd in a DFlash drafter that was trained until its logits were sharp. INT8 errs by
# up to 0.016 sd and 0.13% from torch with the same rounding. Two drafters trained for a target of 1.5B
# err by 0.07 sd and 3.9%, but by 0.25 sd and 14% from torch in float32. A weight matrix with its rows
# reversed errs from torch in float32 by 0.27 to 4.4 sd. float16 must show smaller mistakes.
TOLERANCES = {
    "float16": Tolerance(logprob=0.03, feature=0.005),
    "int8": Tolerance(logprob=0.15, feature=0.08, int8=True),
}


@dataclass(frozen=True)
class Parity:
    """Differences between one file and torch over the script.

    top1: fraction of rows with the same first child. topk: mean overlap of the k children.
    logprob_error, feature_error: the largest errors, in the units of Tolerance; None for a graph
    that returns no features, or whose features no call reads.
    failures: one line for each call outside the tolerance.
    """

    file: str
    top1: float
    topk: float
    logprob_error: float
    feature_error: float | None
    failures: tuple[str, ...]

    def __str__(self) -> str:
        features = "" if self.feature_error is None else f", features within {self.feature_error:.2%}"
        return (
            f"{self.file}: first child {self.top1:.1%}, children {self.topk:.1%}, "
            f"log-probability within {self.logprob_error:.4f} sd{features}"
        )


@dataclass(frozen=True)
class Answer:
    """The result of one call. logprobs: [m, k] or [m, K], ids: [m, k], features: [m, D]."""

    logprobs: NDArray[np.float32]
    ids: NDArray[np.int64]
    features: NDArray[np.float32]


def check_parity(drafter: DraftModel, file: Path, tolerance: Tolerance, *, tree_slots: int, seed: int = 0) -> Parity:
    """Compare `file` with torch over the script. `failures` lists differences; nothing raises.

    The features of a drafter that reads tokens alone are not compared, because no call reads them.
    Its state is the KV, which the log-probabilities of the later calls show.
    """
    script = Script(drafter, seed)
    graph = GraphRun(file, drafter, tree_slots, script.noise)
    with tolerance.rounding():
        extended, first, second, again = (
            script.extended(0, 12), script.drafted(12, 1), script.drafted(12, 2), script.extended(19, 20),
        )  # fmt: skip
    steps = [
        ("extend", graph.extend(script.tokens[:12], script.features[:12]), extended),
        ("level 1", graph.level([1, 2], [0, 0], script.level1, 1, [[1], [2]]), first),
        ("level 2", graph.level([3, 4], [1, 2], script.level2, 2, [[1, 3], [2, 4]]), second),
        ("extend again", graph.extend(script.tokens[12:], script.features[12:], last=True), again),
    ]
    top1, topk, worst_logprob, failures = [], [], 0.0, []
    worst_feature = None if drafter.reads_tokens else 0.0
    for name, got, want in steps:
        logprob_error = children_error(got, want, script.columns)
        best = np.argsort(-want.logprobs, axis=1)[:, : got.ids.shape[1]]
        expected = drafter.d2t.numpy()[best]
        top1 += (got.ids[:, 0] == expected[:, 0]).tolist()
        topk += [len(set(a) & set(b)) / len(a) for a, b in zip(got.ids.tolist(), expected.tolist(), strict=True)]
        worst_logprob = max(worst_logprob, logprob_error)
        within = logprob_error <= tolerance.logprob  # false for nan
        said = f"log-probability off by {logprob_error:.3f} sd (at most {tolerance.logprob})"
        if worst_feature is not None:
            feature_error = float(np.linalg.norm(got.features - want.features) / np.linalg.norm(want.features))
            worst_feature = max(worst_feature, feature_error)
            within = within and feature_error <= tolerance.feature
            said += f", features by {feature_error:.2%} (at most {tolerance.feature:.1%})"
        if not within:
            failures.append(f"{file.name}, {name}: {said}")
    return Parity(file.name, float(np.mean(top1)), float(np.mean(topk)), worst_logprob, worst_feature, tuple(failures))


def children_error(got: Answer, want: Answer, columns: dict[int, int]) -> float:
    """Largest error of a child's log-probability or rank, in standard deviations of its row.

    The error of a rank is torch's log-probability at that rank less torch's value for the child.
    got.logprobs: [n, k], want.logprobs: [n, K], columns: target id -> draft id; inf for another id.
    """
    if not set(got.ids.flat) <= set(columns):
        return float("inf")
    draft_ids = np.vectorize(columns.__getitem__)(got.ids)
    true = np.take_along_axis(want.logprobs, draft_ids, axis=1)
    best = -np.sort(-want.logprobs, axis=1)[:, : got.ids.shape[1]]
    errors = np.maximum(np.abs(got.logprobs - true), best - true)  # maximum keeps nan
    return float((errors / want.logprobs.std(axis=1, keepdims=True)).max())


class Script:
    """The parity run's inputs and torch's answers: 20 pairs, and a tree of 2 + 2 nodes after 12."""

    def __init__(self, drafter: DraftModel, seed: int):
        rng = np.random.default_rng(seed)
        shape = drafter.shape
        self.drafter = drafter
        self.columns = {int(target): draft for draft, target in enumerate(drafter.d2t.tolist())}
        self.tokens = rng.integers(0, shape.vocab_size, 20)
        self.features = rng.standard_normal((20, shape.feature_size)).astype(np.float32)
        self.features[:, ::128] *= 15  # a target's features have such outliers: a few in hundreds of values
        self.noise = rng.gumbel(size=(1, shape.draft_vocab_size)).astype(np.float32)
        self.level1, self.level2 = rng.integers(0, shape.vocab_size, (2, 2))

    @torch.no_grad()
    def extended(self, start: int, end: int) -> Answer:
        """Torch's answer for pairs start..end in a causal pass over true features."""
        f, tokens = torch.from_numpy(self.features[:end])[None], torch.from_numpy(self.tokens[:end])[None]
        return self._answer(self.drafter(f, tokens)[0, start:])

    @torch.no_grad()
    def drafted(self, length: int, depth: int) -> Answer:
        """Torch's answer for both nodes of `depth` after `length` pairs, by unrolled steps."""
        rows = []
        for path in zip(self.level1.tolist(), self.level2.tolist(), strict=True):
            tokens = torch.tensor([*self.tokens[:length].tolist(), *path[:depth]])[None]
            x = torch.zeros(1, length + depth, self.drafter.shape.feature_size)
            x[0, :length] = torch.from_numpy(self.features[:length])
            caches: list = [[] for _ in self.drafter.blocks()]
            for step in range(depth + 1):
                x = self.drafter.step(x if step == 0 else x.roll(1, dims=1), tokens, caches)
            rows.append(x[0, length + depth - 1])
        return self._answer(torch.stack(rows))

    def _answer(self, features: torch.Tensor) -> Answer:
        logprobs = torch.log_softmax(self.drafter.logits(features) + torch.from_numpy(self.noise), dim=-1)
        return Answer(logprobs.numpy(), np.empty((len(features), 0), np.int64), features.numpy())


def open_graph(file: Path, port: str) -> tuple[ort.InferenceSession, type[np.floating]]:
    """A session on the CPU, and the dtype of its activations, which the input `port` has."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    half = "float16" in next(each.type for each in session.get_inputs() if each.name == port)
    return session, np.float16 if half else np.float32


class GraphRun:
    """Runs a file with ONNX Runtime on the CPU; the state is plain arrays. noise: [1, K]."""

    def __init__(self, file: Path, drafter: DraftModel, tree_slots: int, noise: NDArray[np.float32], context: int = 64):
        self.session, self.dtype = open_graph(file, "bank")
        sizes = drafter.shape
        self.tree_slots, self.noise, self.length = tree_slots, noise, 0
        self.bank: Array = np.zeros((tree_slots + 1, sizes.feature_size), self.dtype)
        shape = (tree_slots + context, 2, sizes.num_key_value_heads, sizes.head_dim)
        self.kv: list[Array] = [np.zeros(shape, self.dtype) for _ in range(sizes.blocks)]

    def extend(self, tokens: NDArray[np.int64], features: NDArray[np.float32], last: bool = False) -> Answer:
        """Append pairs, each with a bank row of its own; return children of all, or of the last."""
        n, slots = len(tokens), self.tree_slots
        positions = np.arange(self.length, self.length + n)
        self.length += n
        answer = self._run(
            input_ids=tokens, position_ids=positions, features=features, feature_rows=slots + 1 + np.arange(n),
            kv_slots=slots + positions, bank_slots=1 + np.arange(n), context_begin=np.zeros(n, np.int64),
            context_end=positions + 1, tree_mask=np.full((n, slots), BLOCKED),
            queries=np.arange(n - 1 if last else 0, n),
        )  # fmt: skip
        self.bank[0] = self.bank[n]  # the last pair's output is the root's feature
        return answer

    def level(
        self, rows: list[int], parents: list[int], tokens: NDArray[np.int64], depth: int, attend: list[list[int]]
    ) -> Answer:
        """Run the tree nodes `rows`; the bank rows of `parents` are their features."""
        n, nodes = len(rows), np.array(rows)
        mask = np.full((n, self.tree_slots), BLOCKED)
        for row, seen in enumerate(attend):
            mask[row, seen] = 0
        return self._run(
            input_ids=tokens, position_ids=np.full(n, self.length - 1 + depth),
            features=np.zeros((n, self.bank.shape[1])), feature_rows=np.array(parents), kv_slots=nodes,
            bank_slots=nodes, context_begin=np.zeros(n, np.int64),
            context_end=np.full(n, self.length), tree_mask=mask, queries=np.arange(n),
        )  # fmt: skip

    def _run(self, **inputs: Array) -> Answer:
        floats = {name: inputs[name].astype(self.dtype) for name in ("features", "tree_mask")}
        state = {"bank": self.bank, **{f"kv.{layer}": buffer for layer, buffer in enumerate(self.kv)}}
        logprobs, ids, self.bank, *self.kv = self.session.run(None, {**inputs, **floats, NOISE: self.noise, **state})
        features = self.bank[inputs["bank_slots"][inputs["queries"]]]
        return Answer(logprobs, ids.astype(np.int64), features.astype(np.float32))


def check_static(file: Path, tokens: int, slots: int) -> None:
    """Check that, with all dimensions fixed, no shape and no control flow depends on data.

    A CUDA graph replays fixed addresses and shapes. Raises ExportError naming the first bad node.
    """
    model = folded(file, tokens, slots)
    if dynamic := [node for node in model.graph.node if node.op_type in DYNAMIC_OPS]:
        raise ExportError(f"{file.name} cannot be captured: {dynamic[0].op_type} {dynamic[0].name!r} depends on data")
    shapes = {value.name: value.type.tensor_type.shape for value in (*model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        for name in filter(None, node.output):
            if name not in shapes or not all(dim.HasField("dim_value") for dim in shapes[name].dim):
                raise ExportError(
                    f"{file.name} cannot be captured: the shape of {name!r} ({node.op_type}) is not fixed"
                )


def folded(file: Path, tokens: int, slots: int) -> onnx.ModelProto:
    """The graph with all dimensions fixed (m = n), constants folded and all shapes inferred."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        for name in ("tokens", "queries"):
            options.add_free_dimension_override_by_name(name, tokens)
        options.add_free_dimension_override_by_name("slots", slots)
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
