"""Limits for draft trees: of their growth, and of what a target takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.runtime.errors import InputError


@dataclass(frozen=True)
class TreeLimits:
    """Limits for the growth of a tree. Source: EAGLE-2's total, depth and top-k.

    lookup: tokens of repeated text that may join the tree as a path (repeats.py); 0 is off.
    """

    width: int = 10  # nodes verified in one pass, root included; 1 drafts nothing
    depth: int = 5  # levels below the root
    top_k: int = 3  # children considered per node, and nodes expanded per level; 1 gives a chain
    lookup: int = field(default=12, metadata={"may_be_missing": True})  # older manifests lack this field

    def __post_init__(self) -> None:
        for name, low in (("width", 1), ("depth", 0), ("top_k", 1), ("lookup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InputError(f"tree {name} {value!r} is out of range: give a whole number, {low} or more")


@dataclass(frozen=True)
class LargestTree:
    """The largest tree that a target takes. A chain may be longer."""

    nodes: int
    depth: int

    def check(self, limits: TreeLimits) -> None:
        """Raise InputError for limits that let trees grow larger."""
        depth = min(max(limits.depth, limits.lookup), limits.width - 1)
        if limits.top_k > 1 and (limits.width > self.nodes or depth > self.depth):
            raise InputError(
                f"trees of {limits.width} nodes and depth {depth} are too large for layers on the GPU, which take "
                f"{self.nodes} nodes and a depth of {self.depth}: lower --width, --depth or --lookup, or give "
                "--gpu-layers 0"
            )
