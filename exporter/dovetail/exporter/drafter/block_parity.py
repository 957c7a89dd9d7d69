"""Checks that an exported DFlash drafter computes the same as its torch module.

ONNX Runtime runs a script with each ONNX file on the CPU: read context and draft, read more, go
back, read other context. The reference is the module's own forward over the whole context. The
comparison therefore also finds mistakes in the graph's masks, positions and buffers.

Axes: n context rows, P drafted tokens, K draft vocabulary, k candidates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.exporter.drafter.parity import Answer, Array, Parity, Tolerance, children_error, open_graph
from dovetail.models.dflash import DFlash
from dovetail.runtime.drafter.graph_io import NOISE

# Of each call: context rows kept from before, new context rows.
STEPS = ((0, 12), (12, 3), (9, 1), (10, 20))


def check_block_parity(drafter: DFlash, file: Path, tolerance: Tolerance, *, slots: int, seed: int = 0) -> Parity:
    """Compare `file` with torch over the script. `failures` lists differences; nothing raises."""
    rng = np.random.default_rng(seed)
    shape, config = drafter.shape, drafter.config
    columns = {int(target): draft for draft, target in enumerate(drafter.d2t.tolist())}
    noise = rng.gumbel(size=(config.positions, shape.draft_vocab_size)).astype(np.float32)
    graph = BlockRun(file, drafter, slots, noise)
    context = np.zeros((0, shape.feature_size), np.float32)
    top1, topk, worst, failures = list[bool](), list[float](), 0.0, list[str]()
    rounding = tolerance.rounding()
    for kept, new in STEPS:
        features = rng.standard_normal((new, shape.feature_size)).astype(np.float32)
        features[:, ::128] *= 15  # a target's features have such outliers: a few in hundreds of values
        context = np.concatenate([context[:kept], features])
        token = int(rng.integers(0, shape.vocab_size))
        got = graph.draft(kept, features, token)
        with rounding:
            want = _drafted(drafter, context, token, noise)
        error = children_error(got, want, columns)
        best = drafter.d2t.numpy()[np.argsort(-want.logprobs, axis=1)[:, : got.ids.shape[1]]]
        top1 += (got.ids[:, 0] == best[:, 0]).tolist()
        topk += [len(set(a) & set(b)) / len(a) for a, b in zip(got.ids.tolist(), best.tolist(), strict=True)]
        worst = max(worst, error)
        if not error <= tolerance.logprob:  # `not`, so that nan fails
            failures.append(
                f"{file.name}, block after {len(context)}: log-probability off by {error:.3f} sd (at most "
                f"{tolerance.logprob})"
            )
    return Parity(file.name, float(np.mean(top1)), float(np.mean(topk)), worst, None, tuple(failures))


@torch.no_grad()
def _drafted(drafter: DFlash, context: NDArray[np.float32], token: int, noise: NDArray[np.float32]) -> Answer:
    """Torch's answer. context: [n, D]."""
    logits = drafter(torch.from_numpy(context), torch.tensor([token])) + torch.from_numpy(noise)
    logprobs = torch.log_softmax(logits, dim=-1).numpy()
    return Answer(logprobs, np.empty((len(logprobs), 0), np.int64), context)


class BlockRun:
    """Runs a file with ONNX Runtime on the CPU; the state is plain arrays. noise: [P, K]."""

    def __init__(self, file: Path, drafter: DFlash, slots: int, noise: NDArray[np.float32], context: int = 64):
        self.session, self.dtype = open_graph(file, "features")
        self.slots, self.noise, sizes = slots, noise, drafter.shape
        shape = (slots + context, 2, sizes.num_key_value_heads, sizes.head_dim)
        self.kv: list[Array] = [np.zeros(shape, self.dtype) for _ in range(sizes.blocks)]

    def draft(self, kept: int, features: NDArray[np.float32], token: int) -> Answer:
        """Read `features` [n, D] after the first `kept` context rows, and draft after `token`."""
        end = kept + len(features)
        inputs = {
            "token": np.array([token]), "context_begin": np.array([0]), "context_end": np.array([end]),
            NOISE: self.noise, "kv_slots": self.slots + np.arange(kept, end),
            "features": features.astype(self.dtype),
        }  # fmt: skip
        state = {f"kv.{layer}": buffer for layer, buffer in enumerate(self.kv)}
        logprobs, ids, *self.kv = self.session.run(None, {**inputs, **state})
        return Answer(logprobs, ids.astype(np.int64), features)
