"""What Dovetail's own drafter is made of, as data: `config.json` of its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dovetail.runtime.system.bounds import LARGEST, check_number, check_whole
from dovetail.runtime.system.files import read_json

FUSIONS = ("dgf", "fc")
DEFAULT_FUSION = "dgf"
_AGAIN = "correct config.json"


@dataclass(frozen=True)
class DrafterConfig:
    """The sizes of Dovetail's drafter.

    The target gives all but `fusion`, `blocks`, `draft_vocab_size` and, by choice, `intermediate_size`.
    hidden_size: H, width of the token embedding and of the blocks; the target's hidden size.
    feature_size: D, width of the target's feature (the input of its lm_head).
    feature_layers: blocks of the target (0 is the first) that the drafter reads too; () for none.
    draft_vocab_size: K, the number of tokens that the drafter can propose.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    feature_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    fusion: str = DEFAULT_FUSION
    blocks: int = 1
    feature_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.feature_layers, list | tuple):
            raise ValueError(f"feature_layers {self.feature_layers!r:.60} are no list: {_AGAIN}")
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))  # a list in JSON
        for layer in self.feature_layers:
            check_whole("feature_layers", layer, ValueError, _AGAIN, least=0, most=LARGEST["num_layers"] - 1)
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion {self.fusion!r:.60} is unknown: choose one of {', '.join(FUSIONS)}")
        for field in fields(self):
            if field.name in LARGEST:
                check_whole(field.name, getattr(self, field.name), ValueError, _AGAIN)
        check_number("rope_theta", self.rope_theta, ValueError, _AGAIN, most=1e15)
        check_number("rms_norm_eps", self.rms_norm_eps, ValueError, _AGAIN, most=1)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, RoPE turns pairs: {_AGAIN}")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} is out of range: it must lie in 1..{self.vocab_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads do not divide into {self.num_key_value_heads} "
                "key-value heads: choose a divisor"
            )
        if self.hidden_size != self.feature_size:
            raise ValueError(
                f"feature size {self.feature_size} differs from hidden size {self.hidden_size}: "
                "a drafter's output must fit the target's lm_head"
            )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DrafterConfig:
        """Build from JSON; an unknown or missing key raises ValueError."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"drafter config has unknown key {unknown[0]!r}: known are {', '.join(sorted(known))}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"drafter config is incomplete: {error}") from error

    @classmethod
    def for_target(
        cls,
        target: dict[str, Any],
        draft_vocab_size: int,
        fusion: str,
        blocks: int,
        *,
        layers: bool = False,
        intermediate_size: int | None = None,
    ) -> DrafterConfig:
        """Take widths, heads and RoPE from the target's `config.json`.

        layers: also read a low, a middle and a high block of the target, EAGLE-3's choice of three.
        intermediate_size: width of the feed-forward layers, the target's if None.
        The drafter has plain RoPE, also when the target scales its RoPE (Llama 3's, YaRN).
        """
        target = target.get("text_config", target)
        rope = target.get("rope_parameters") or target.get("rope_scaling") or {}
        rope = rope.get("full_attention", rope)  # for targets whose layers differ
        heads = target["num_attention_heads"]
        return cls(
            vocab_size=target["vocab_size"],
            draft_vocab_size=min(draft_vocab_size, target["vocab_size"]),
            hidden_size=target["hidden_size"],
            feature_size=target["hidden_size"],
            intermediate_size=intermediate_size or target["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=target.get("num_key_value_heads") or heads,
            head_dim=target.get("head_dim") or target["hidden_size"] // heads,
            max_position_embeddings=target["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or target.get("rope_theta") or 10000.0),
            rms_norm_eps=float(target.get("rms_norm_eps", 1e-5)),
            fusion=fusion,
            blocks=blocks,
            feature_layers=low_middle_high(int(target["num_hidden_layers"])) if layers else (),
        )

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> DrafterConfig:
        data = read_json(folder / "config.json", ValueError, _AGAIN)
        if not isinstance(data, dict):
            raise ValueError(f"drafter config is a {type(data).__name__}, not an object: {_AGAIN}")
        return cls.from_dict(data)


def low_middle_high(depth: int) -> tuple[int, ...]:
    """The blocks that EAGLE-3 reads (arXiv 2503.01840): one low, one middle, one high block."""
    return tuple(sorted({min(2, depth - 1), depth // 2, max(depth - 3, 0)}))
