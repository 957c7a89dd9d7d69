"""INT8 rounding in torch: the values, and the memory that a large head takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.exporter.drafter.int8_torch import rounded


class Storages(TorchDispatchMode):
    """Keeps what operations make, so that the bytes of all of it can be counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        storage = found.untyped_storage()
        self.made[storage.data_ptr()] = storage
        return found


@pytest.mark.parametrize("size", [96, 90])
def test_values_have_eight_bits_and_a_scale_for_each_block(size: int) -> None:
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    x[3], before[3] = 0, 0
    out = rounded(x, 32)
    assert out.shape == x.shape and torch.equal(x, before)  # a weight is not changed
    for begin in range(0, size, 32):
        block, found = x[:, begin : begin + 32], out[:, begin : begin + 32]
        scale = block.abs().amax(1, keepdim=True) / 127
        assert ((found - block).abs() <= 0.5001 * scale).all()
        whole = found / scale.clamp(min=1e-30)
        assert (whole - whole.round()).abs().max() < 1e-3 and whole.abs().max() < 127.001


def test_rounding_a_weight_takes_the_memory_of_one_copy() -> None:
    weight = torch.ones(512, 1024)
    with Storages() as storages:
        rounded(weight, 32)
    taken = sum(storage.nbytes() for key, storage in storages.made.items() if key != weight.data_ptr())
    assert weight.nbytes <= taken < 1.5 * weight.nbytes
