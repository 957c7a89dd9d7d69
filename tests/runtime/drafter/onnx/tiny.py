"""A tiny random drafter in the files that the tests open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from dovetail.exporter.drafter.graph import to_onnx
from dovetail.exporter.drafter.int8 import quantize
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest, TargetFacts
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text
TREE_SLOTS, TOP_K, MAX_CONTEXT = 16, 5, 600
CONFIG = DrafterConfig(
    vocab_size=90, draft_vocab_size=40, hidden_size=32, feature_size=32, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=MAX_CONTEXT, blocks=2,
)  # fmt: skip
LIMITS = TreeLimits(width=12, depth=4, top_k=3)


@dataclass
class Tiny:
    """The torch drafter, and a pair folder whose "cpu" file is float32 (exact) or INT8."""

    drafter: Drafter
    pair: Path

    def manifest(self, file: str, **facts: Any) -> Manifest:
        c = CONFIG
        drafter = DrafterFacts(
            c.blocks, c.hidden_size, c.feature_size, c.vocab_size, c.draft_vocab_size, c.num_key_value_heads,
            c.head_dim, TOP_K, TREE_SLOTS, MAX_CONTEXT, "t", {"cpu": file, "cuda": "absent.onnx"},
        )  # fmt: skip
        target = TargetFacts("llama", 32, 32, c.vocab_size, 2, MAX_CONTEXT, "int8", ("tap",), (1,), "t")
        return Manifest("tiny", target, replace(drafter, **facts), {})

    def open(self, file: str = "f32.onnx", texts: int = 1) -> OnnxDrafter:
        return open_drafter(self.pair, self.manifest(file), device="cpu", threads=1, texts=texts)


def exported(folder: Path) -> Tiny:
    """The tiny drafter, exported to a folder."""
    torch.manual_seed(0)
    embed = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size)
    d2t = torch.randperm(CONFIG.vocab_size)[: CONFIG.draft_vocab_size]
    drafter = Drafter(CONFIG, embed, torch.randn(CONFIG.draft_vocab_size, CONFIG.feature_size), d2t).eval()
    model = to_onnx(drafter, torch.float32, tree_slots=TREE_SLOTS, top_k=TOP_K)
    ir.save(model, folder / "f32.onnx")
    onnx.save(without_noise(onnx.load(folder / "f32.onnx")), folder / "silent.onnx")
    onnx.save(answering_every_row(without_noise(onnx.load(folder / "f32.onnx"))), folder / "older.onnx")
    quantize(model)
    ir.save(model, folder / "int8.onnx")
    return Tiny(drafter, folder)


def without_noise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without its input `noise`: zeros in its place, and no word of the draft vocabulary."""
    zeros = np.zeros((1, CONFIG.draft_vocab_size), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, "noise"))
    model.graph.input.remove(next(given for given in model.graph.input if given.name == "noise"))
    del model.metadata_props[:]
    return model


def answering_every_row(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without its inputs `queries` and `context_begin`: 0, 1, 2 .. and 0 in their place."""
    constants = {"first": np.array(0), "step": np.array(1), "axis": np.array([0])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        onnx.helper.make_node("Shape", ["input_ids"], ["shape"]),
        onnx.helper.make_node("Squeeze", ["shape", "axis"], ["end"]),
        onnx.helper.make_node("Range", ["first", "end", "step"], ["queries"]),
        onnx.helper.make_node("Sub", ["context_end", "context_end"], ["context_begin"]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    for name in ("queries", "context_begin"):
        model.graph.input.remove(next(given for given in model.graph.input if given.name == name))
    return model


def path_to(tree: DraftTree, node: int) -> list[int]:
    nodes = []
    while node > 0:
        nodes.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return nodes[::-1]


def assert_same_tree(a: DraftTree, b: DraftTree, atol: float = 1e-4) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.parents, b.parents)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol)
