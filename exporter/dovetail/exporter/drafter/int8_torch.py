"""Lets torch compute linear layers and lookups in INT8, as ONNX Runtime does with the file for the CPU.

A trained drafter turns small changes of its input into large ones. INT8 may therefore differ much from
float32 in the right file too. From torch with the same rounding the right file differs little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dovetail.exporter.drafter.int8 import BLOCK, block_quantize
from dovetail.runtime.target.features import quantize_rows


class Int8Products(TorchFunctionMode):
    """Rounds weights and activations of `F.linear`, and rows of `F.embedding`, as `int8.quantize` does."""

    def __init__(self) -> None:
        super().__init__()
        self._rounded: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}  # by address and shape: as it is, INT8

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return func(rounded(x), self._weight(weight), *bias, **(kwargs or {}))
        if func is F.embedding:
            ids, table = args[:2]
            values, scales = quantize_rows(table[ids.flatten()].numpy())
            return torch.from_numpy(values * scales).reshape(*ids.shape, -1)
        return func(*args, **(kwargs or {}))

    def _weight(self, weight: Tensor) -> Tensor:
        key = weight.data_ptr(), weight.shape
        if key not in self._rounded:
            values, scales = block_quantize(weight.detach().numpy(), BLOCK)
            whole = (values.astype(np.float32) - 128) * scales[..., None]
            self._rounded[key] = weight, torch.from_numpy(whole.reshape(len(values), -1)[:, : weight.shape[1]])
        return self._rounded[key][1]


def rounded(x: Tensor) -> Tensor:
    """Return x [..., C], rounded to 8 bits with one scale for each row and block of BLOCK."""
    size = x.shape[-1]
    blocks = F.pad(x, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return ((blocks / scales).round() * scales).flatten(-2)[..., :size]
