"""Lets torch compute linear layers and lookups in INT8, as ONNX Runtime does with the file for the CPU.

A trained drafter turns small changes of its input into large ones. INT8 may therefore differ much from
float32 in the right file too. From torch with the same rounding the right file differs little. Nothing
here comes from `int8.py`, so that a mistake in its scales or values shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

BLOCK = 32  # numbers with one scale in a linear layer


class Int8Products(TorchFunctionMode):
    """Rounds weights and activations of `F.linear`, and rows of `F.embedding`, to 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        # By address and form: the weight, which keeps its address, and the weight in INT8.
        self._rounded: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return func(rounded(x, BLOCK), self._weight(weight), *bias, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        return rounded(found, found.shape[-1]) if func is F.embedding else found

    def _weight(self, weight: Tensor) -> Tensor:
        key = weight.data_ptr(), weight.shape, weight.stride()
        if key not in self._rounded:
            self._rounded[key] = weight, rounded(weight, BLOCK)
        return self._rounded[key][1]


def rounded(x: Tensor, block: int) -> Tensor:
    """Return x [..., C], rounded to 8 bits with one scale for each row and `block` numbers of it.

    One copy of x is all the memory that this takes: a head may have gigabytes.
    """
    size = x.shape[-1]
    out = x.new_zeros((*x.shape[:-1], -(-size // block) * block))
    out[..., :size] = x
    blocks = out.unflatten(-1, (-1, block))
    scales = torch.maximum(blocks.amax(-1, keepdim=True), -blocks.amin(-1, keepdim=True)) / 127
    scales.clamp_(min=torch.finfo(torch.float32).tiny)
    blocks.div_(scales).round_().mul_(scales)
    return out[..., :size]
