"""Tensors of a checkpoint and the module that they make, alike for all formats of other projects.

Axes: V target vocabulary, K draft vocabulary, d drafter width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dovetail.models.checkpoint import (
    CheckpointError,
    Stored,
    as_float,
    check_draft_ids,
    check_shapes,
    load_exactly,
)
from dovetail.models.drafter import DraftBase
from dovetail.models.eagle3 import BlockSizes
from dovetail.models.formats.format import Config, Needs, TargetParts
from dovetail.models.formats.reading import ANOTHER, check_vocabulary, target_sizes
from dovetail.models.rope import Rope

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_ROWS = (_EMBEDDING, _HEAD, "d2t", "t2d")  # vocabulary, outside the module's parameters


class Settings(Protocol):
    """What the configs of all drafters say. target_size: width of the layers `taps` that it reads."""

    @property
    def block(self) -> BlockSizes: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def draft_vocab_size(self) -> int: ...
    @property
    def target_size(self) -> int: ...
    @property
    def taps(self) -> tuple[int, ...]: ...
    @property
    def rope(self) -> Rope: ...
    @property
    def max_position_embeddings(self) -> int: ...


S = TypeVar("S", bound=Settings)
M = TypeVar("M", bound=DraftBase)


@dataclass(frozen=True)
class Settled(Generic[S, M]):
    """A checkpoint's settings and tensors.

    build: the module of embed_tokens [V, d], head [K, d] and d2t [K]. names: the checkpoint's name
    of each tensor, by its name in the module. choices: how each ambiguous setting was decided.
    transposed: names, in the module, of matrices that the checkpoint stores as (in, out).
    """

    config: S
    build: Callable[[S, Tensor, Tensor, Tensor], M]
    names: Mapping[str, str]
    choices: tuple[str, ...] = ()
    transposed: Collection[str] = ()


def check_layout(stored: Stored, settled: Settled[S, M]) -> None:
    """Raise CheckpointError unless the tensors' names and shapes are those of the settings' drafter."""
    config, shapes = settled.config, {name: stored.shapes[given] for name, given in settled.names.items()}
    size, vocab, draft = config.block.hidden_size, config.vocab_size, config.draft_vocab_size
    rows = {_EMBEDDING: (vocab, size), _HEAD: (draft, size), "d2t": (draft,), "t2d": (vocab,)}
    required = {"d2t"} if draft != vocab else set()
    if size != config.target_size:  # rows of the target have another width
        required |= {_EMBEDDING, _HEAD}
    expected = {name: shape for name, shape in rows.items() if name in shapes or name in required}
    with torch.device("meta"):  # shapes alone: a config may ask for more than there is memory
        module = settled.build(config, torch.zeros(vocab, size), torch.zeros(draft, size), torch.zeros(draft))
    expected |= {name: tuple(value.shape) for name, value in flat_parameters(module).items()}
    expected |= {name: expected[name][::-1] for name in settled.transposed}
    check_shapes(expected, shapes, stored.folder)


def flat_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters but the head by the checkpoints' names, where the mix's stand beside the layers'."""
    return {name.removeprefix("mix."): value for name, value in module.named_parameters() if name != "head"}


def load(stored: Stored, settled: Settled[S, M], target: TargetParts) -> M:
    """The module with the checkpoint's weights. Raises CheckpointError, ValueError (another target)."""
    config = settled.config
    _check_target(config, target.config)
    check_layout(stored, settled)
    raw = stored.tensors()
    tensors = {name: raw[given] for name, given in settled.names.items()}
    embed, head, d2t, t2d = (tensors.pop(name, None) for name in _ROWS)
    ids = _draft_ids(d2t, t2d, config.draft_vocab_size, config.vocab_size, stored)
    rows = target.lm_head if d2t is None else target.lm_head[ids].contiguous()
    module = settled.build(
        config,
        target.embed_tokens if embed is None else as_float("embed_tokens", embed, stored.folder),
        rows if head is None else as_float("lm_head", head, stored.folder),
        ids,
    )
    for name in settled.transposed:
        tensors[name] = tensors[name].T
    full = {name.removeprefix("mix."): name for name, _ in module.named_parameters()}
    load_exactly(module, {full.get(name, name): value for name, value in tensors.items()}, stored.folder)
    return module


def needs_of(kind: str, stored: Stored, settled: Settled[S, M], target: str | None) -> Needs:
    """What settled settings ask of a target. target: its name, if it is known. Raises CheckpointError."""
    check_layout(stored, settled)
    config = settled.config
    return Needs(
        kind=kind,
        target_size=config.target_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        layers=config.taps,
        max_context=config.max_position_embeddings,
        rope=config.rope.text,
        target=target,
        choices=settled.choices,
    )


def _check_target(config: Settings, target: Config) -> None:
    """Raise ValueError unless the target has the drafter's vocabulary, width and layers."""
    width, depth, _ = target_sizes(target)
    check_vocabulary(config.vocab_size, target)
    if config.target_size != width:
        raise ValueError(f"it reads features of width {config.target_size}, the target's is {width} wide: {ANOTHER}")
    if beyond := [tap for tap in config.taps if tap >= depth]:
        raise ValueError(f"it reads layer {beyond[0]} of a target that has {depth}: {ANOTHER}")


def _draft_ids(d2t: Tensor | None, t2d: Tensor | None, size: int, vocab: int, stored: Stored) -> Tensor:
    """Target ids [K] int64 from the offsets `d2t` [K]; without offsets all ids. Raises CheckpointError.

    The target id of draft token i is i + d2t[i]. `t2d` [V] must mark the same tokens.
    """
    if d2t is None:
        return torch.arange(size)
    if d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise CheckpointError(f"d2t in {stored.folder} is {d2t.dtype}, not whole numbers: use another checkpoint")
    ids = torch.arange(len(d2t)) + d2t.long()
    check_draft_ids(ids, size, vocab, stored.folder)
    if len(ids.unique()) < size:
        raise CheckpointError(f"d2t in {stored.folder} names a token twice: use another checkpoint")
    if t2d is not None and not torch.equal(torch.nonzero(t2d.bool()).flatten(), ids.sort().values):
        raise CheckpointError(f"d2t and t2d in {stored.folder} mark different tokens: use another checkpoint")
    return ids
