"""Checkpoints of the research code of Dovetail's paper (arXiv 2412.18934): a gated fusion, m blocks.

The config is Llama's. The fusion's matrices are stored as (in, out), beside copies of the target's
embedding and head.
"""

from __future__ import annotations

from dovetail.models.checkpoint import Stored
from dovetail.models.eagle import EagleDrafter
from dovetail.models.formats.eagle import Eagle, names_of, settings, settled
from dovetail.models.formats.format import Config, Format, Needs, Shapes, TargetParts
from dovetail.models.formats.layout import load, needs_of
from dovetail.models.formats.reading import whole

_FUSION = {
    "W_1": "fusion.w1.weight",
    "W_2": "fusion.w2.weight",
    "W_z": "fusion.wz.weight",
    "input_layernorm.": "fusion.input_layernorm.",
}
_TRANSPOSED = tuple(_FUSION[name] for name in ("W_1", "W_2", "W_z"))


def _settle(stored: Stored, target: Config) -> Eagle:
    names = names_of(stored, _FUSION)
    shapes = {name: stored.shapes[given] for name, given in names.items()}
    blocks = whole(stored.config, "num_hidden_layers")
    return settled(settings(stored.config, shapes, target, blocks=blocks, fusion="dgf"), names, _TRANSPOSED)


def _matches(config: Config, shapes: Shapes) -> bool:
    return {"W_1", "W_2", "W_z"} <= {name.removeprefix("model.") for name in shapes}


def _describe(config: Config) -> str:
    return f"a drafter of Dovetail's research code with {config.get('num_hidden_layers')} blocks"


def _read(stored: Stored, target: TargetParts) -> EagleDrafter:
    return load(stored, _settle(stored, target.config), target)


def _needs(stored: Stored, target: Config) -> Needs:
    return needs_of(_describe(stored.config), stored, _settle(stored, target), None)


FORMAT = Format("research", _matches, _describe, _read, _needs)
