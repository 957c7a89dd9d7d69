"""What runners share: the noise of sampled answers, and calls padded to a few numbers of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from dovetail.runtime.drafter.graph_io import BlockRows, Rows, noise_spec
from dovetail.runtime.drafter.vram import bucket_of
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.system.arrays import Array
from dovetail.runtime.tree.growth import Candidates


class HasRows(Protocol):
    """The buffers of one number of rows."""

    @property
    def rows(self) -> Rows | BlockRows: ...


Bucket = TypeVar("Bucket", bound=HasRows)


class Noise:
    """The graph's input for noise, as an array on the host. It is zero for calls without noise."""

    def __init__(self, facts: DrafterFacts, array: Array | None = None):
        """array: of zeros, to use as the input."""
        self.array = np.zeros(*noise_spec(facts)) if array is None else array
        self._noisy = False

    def write(self, noise: Array | None, send: Callable[[Array], None] | None = None) -> None:
        """Set the input for the next call. noise: see Runner. send: copies a changed array to the device."""
        if noise is None and not self._noisy:
            return
        self._noisy = True  # assume noise until all is written: an interrupt may come in between
        self.array[:] = 0 if noise is None else noise
        if send:
            send(self.array)
        self._noisy = noise is not None


class BucketRunner(ABC, Generic[Bucket]):
    """A Runner with all KV on a device, and with buffers for a few numbers of rows. Calls are padded to them."""

    many_texts: bool
    _facts: DrafterFacts
    _noise: Noise | None
    _buckets: dict[int, Bucket]

    def rows(self, n: int) -> Any:
        return self._buckets[bucket_of(n)].rows

    def run(
        self, n: int, context: int, noise: Array | None, *, upload_features: bool, answers: int | None = None
    ) -> Candidates:
        """The mask limits each row, so `context` needs no binding. Not after `close`."""
        bucket = self._buckets[bucket_of(n)]
        bucket.rows.pad(n, self._facts.tree_slots)
        if self._noise:
            self._noise.write(noise, self._send_noise)
        self._call(bucket, upload_features=upload_features)
        found = self._facts.positions or n
        return Candidates(bucket.rows.top_logprobs[:found], bucket.rows.top_ids[:found])

    def touch(self, context: int) -> None:
        """Do nothing: the device's memory exists from the start."""

    @abstractmethod
    def _call(self, bucket: Bucket, *, upload_features: bool) -> None:
        """Run the graph on a bucket's inputs, and fetch its outputs. Raises DeviceError."""

    def _send_noise(self, noise: Array) -> None:
        """Copy the noise to the device, if it has a copy of its own. Raises DeviceError."""
