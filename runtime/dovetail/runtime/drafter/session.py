"""The drafter's protocol: a session that proposes draft trees.

Axes: T new tokens, K candidates, D feature size. Positions: see target/session.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.devices.gpus import GPUS
from dovetail.runtime.devices.work import CPU_ALONE, Work
from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

DEVICES = ("auto", "cpu", *GPUS)  # what a user may ask for

DRAFTING = Work(
    name="the drafter",
    again="export the drafter again",
    off=CPU_ALONE,
    without="generate without speculation",
    less="shorten the drafter's context on a GPU with --vram SIZE --fit",
)
KEPT = 256  # pairs of a text that are kept for a drafter: as many as it is trained on at once

# For sampled tokens: (depth, ids [K]) -> [K] float32 to add to a drafter's logits of tokens `ids`,
# `depth` levels below the last known token (see Sampler.ahead).
DraftNoise = Callable[[int, NDArray[np.integer[Any]]], FloatArray]


@dataclass(frozen=True)
class DeviceReport:
    """Facts about a drafter's device."""

    note: str = ""  # why the drafter runs there
    bus_bytes: int = 0  # moved so far between host and device, both ways; 0 on CPUs


@runtime_checkable
class ReadsTokens(Protocol):
    """The mark of a Drafter that reads a whole text by its tokens alone.

    Its features are empty, and its first `extend` of a text begins with x[0].
    """

    reads_tokens_alone: bool


class Moved(DeviceError):
    """The drafter's device failed. The drafter now runs on another device and holds no pairs."""


@runtime_checkable
class Drafter(Protocol):
    """A drafter with its own KV of the target's sequences.

    It holds a sequence from the first `extend` until a `rewind` to 0.
    """

    device: str  # e.g. "CPU (int8)", "CUDA (fp16)"
    capacity: int  # context pairs of a sequence
    top_k: int  # children that it offers for a node

    @property
    def report(self) -> DeviceReport:
        """Facts about the device."""

    def length(self, seq: SequenceId) -> int:
        """Return how many pairs the drafter holds; 0 for an unknown sequence."""

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        """Append pairs: features[i] = f[t], tokens[i] = x[t+1]. tokens: [T], features: [T, D].

        noise: for nodes below the last token, None without sampling. A session may ignore it.
        """

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        """Return a tree below the last token of `extend`. judge: see grow_tree."""

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """Forget everything after the first `keep` pairs."""

    def close(self) -> None:
        """Free the device's memory. No further call is possible."""


class Ask(NamedTuple):
    """What to draft for one text; see Drafter.propose."""

    limits: TreeLimits
    judge: Judge | None


@runtime_checkable
class DraftsTogether(Protocol):
    """A Drafter whose calls can run rows of many texts, without noise."""

    def extend_all(self, pairs: Mapping[SequenceId, tuple[TokenArray, FloatArray]]) -> None:
        """Append pairs of each text, as `extend` does."""

    def propose_all(self, asks: Mapping[SequenceId, Ask]) -> dict[SequenceId, DraftTree]:
        """Return a tree for each text, as `propose` does."""


def check_device(device: str) -> None:
    """Raise InputError unless the drafter's device is one of DEVICES."""
    if device not in DEVICES:
        raise InputError(f"drafter device {device!r} is unknown: give {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")


def check_keep(keep: int, held: int) -> None:
    """Raise InputError for a rewind to more pairs than are held."""
    if not 0 <= keep <= held:
        raise InputError(f"cannot keep {keep} pairs of {held}: give 0 to {held}")
