"""A drafter's rotary embedding, which is its own: often plain where the target's is scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.runtime.system.bounds import check_number

DEFAULT_THETA = 10000.0  # Llama's, which configs leave out
SCALED = ("linear", "llama3", "yarn")  # frequencies that do not depend on the length of the text
_AGAIN = "correct config.json"


@dataclass(frozen=True)
class Rope:
    """Frequencies [d / 2] float32 of a rotary embedding over heads of size d.

    scale: factor of cosine and sine, which YaRN has. text: how the config describes it.
    """

    inverse: Tensor
    scale: float = 1.0
    text: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling`, of a model's config.

        Raises ValueError: a kind whose frequencies depend on the length, a value out of range.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise ValueError(f"rope_scaling {given!r:.60} is no object: {_AGAIN}")
        if any(isinstance(value, dict) for value in given.values()):
            raise ValueError(f"RoPE by kind of layer, {given!r:.60}, is not supported: use another drafter")
        theta = given.get("rope_theta", config.get("rope_theta"))
        theta = DEFAULT_THETA if theta is None else theta
        check_number("rope_theta", theta, ValueError, _AGAIN, most=1e15)
        kind = given.get("rope_type", given.get("type", "default"))
        partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ValueError(
                f"partial_rotary_factor {partial!r:.60} is not supported: use a drafter that turns heads whole"
            )
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            return cls(1.0 / (theta**exponents), text=f"theta {theta:g}")
        if kind not in SCALED:
            raise ValueError(f"RoPE {kind!r:.60} is not supported: known are default, {', '.join(SCALED)}")
        inverse, scale = _scaled(kind, {**given, "rope_theta": float(theta)}, config, head_dim, max_positions)
        return cls(inverse, scale, f"{kind}, theta {theta:g}")

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [*positions.shape, d] float32."""
        angles = positions.float().unsqueeze(-1) * self.inverse.to(positions.device)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale


def _scaled(
    kind: str, parameters: dict[str, Any], config: Mapping[str, Any], head_dim: int, max_positions: int
) -> tuple[Tensor, float]:
    """Frequencies and scale as transformers computes them."""
    from transformers import LlamaConfig  # seconds, which drafters without scaling do not pay
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, **{key: value for key, value in parameters.items() if key != "type"}}
    original = config.get("original_max_position_embeddings")
    if original is not None:
        parameters.setdefault("original_max_position_embeddings", original)
    try:
        own = LlamaConfig(head_dim=head_dim, max_position_embeddings=max_positions, rope_parameters=parameters)
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](own, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"rope_scaling {parameters!r:.120} is incomplete ({error!r:.80}): {_AGAIN}") from error
    if inverse.shape != (head_dim // 2,) or not torch.isfinite(inverse).all():
        raise ValueError(f"rope_scaling {parameters!r:.120} gives no usable frequencies: {_AGAIN}")
    return inverse.float(), float(scale)
