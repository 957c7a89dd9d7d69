"""A device for first layers that fails on demand, and what the tests of engines share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import Array
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.tree.limits import TreeLimits

TREE = TreeLimits(12, 4, 3, lookup=0)

PROMPT = "the quick brown fox"


class Device(OrtDevice):
    """The CPU, which fails from its n-th download on."""

    def __init__(self, fail_at: int = 0) -> None:
        made = OrtDevice.cpu()
        super().__init__(made.key, "a GPU", made.provider, compressed=False)
        self.fail_at, self.downloads, self.allocated = fail_at, 0, 0

    def allocate(self, session: Any, spec: Any) -> Any:
        self.allocated += int(np.prod(spec[0])) * np.dtype(spec[1]).itemsize
        return super().allocate(session, spec)

    def download(self, to: Mapping[str, Array], sources: Mapping[str, Any]) -> None:
        self.downloads += 1
        if 0 < self.fail_at <= self.downloads:
            raise DeviceError("cudaStreamSynchronize: an illegal memory access was encountered (code 700)")
        super().download(to, sources)


def text(engine: Engine, prompt: Any, tokens: int, **options: Any) -> tuple[int, ...]:
    engine.reset()
    return engine.generate(prompt, tokens, raw=True, **options).token_ids
