"""Compare the DFlash module with the torch forward of the speculators library, which is not in the lock.

By hand, in an environment that has both: python tests/models/compare_dflash.py
It prints the largest difference of a logit for each kind of checkpoint and fails above 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint

reference: Any = import_module("dflash_reference")  # beside this script
CONTEXT, TOKEN = 20, 7
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"block": 8, "taps": (2, 0, 1)},
    {"block": 8, "taps": (2, 0, 1), "seed": 3},
    {"from_anchor": True, "block": 3},
    {"draft": 50, "own_rows": True},
    {"draft": 50, "own_rows": True, "from_anchor": True},
    {"sliding": (True, False), "window": 6},
    {"sliding": (True, True), "window": 6, "two_ways": True},
    {"theta": 1e6, "taps": (1,)},
)


def theirs(flags: Any, taps: torch.Tensor, embed: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits [P, K] of speculators' model. taps: [n, taps x H]."""
    package = import_module("speculators.models.dflash")
    config = package.DFlashSpeculatorConfig(**reference.config_of(flags))
    config.transformer_layer_config._attn_implementation = "eager"
    model = package.DFlashDraftModel(config)
    ids = torch.from_numpy(reference.ids_of(flags))
    given = {"embed_tokens.weight": embed, "lm_head.weight": head[ids], **reference.tensors_of(flags)}
    rest = {name: value for name, value in model.state_dict().items() if name not in given}
    model.load_state_dict({**rest, **given})
    length = CONTEXT + 2 * flags.block
    tokens, mask = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, length)
    tokens[0, CONTEXT], mask[0, CONTEXT] = TOKEN, 1  # the one anchor
    after = torch.randn(length - CONTEXT, taps.shape[1])  # nobody may see these
    with torch.no_grad():
        _, logits, *_ = model.eval()._backbone_forward(
            torch.cat([taps, after])[None], tokens, mask, torch.zeros(1, length, flags.hidden),
            torch.zeros(1, length, dtype=torch.long), max_anchors=1,
        )  # fmt: skip
    found: torch.Tensor = logits[0] if flags.from_anchor else logits[0, 1:]
    return found


def main() -> int:
    worst = 0.0
    torch.manual_seed(1)
    embed, head = torch.randn(264, 32), torch.randn(264, 32)
    for settings in SETTINGS:
        flags = reference.Flags(layout="speculators", **settings)
        taps = torch.randn(CONTEXT, len(flags.taps) * flags.hidden)
        with tempfile.TemporaryDirectory() as folder:
            target = {"hidden_size": flags.hidden, "num_hidden_layers": flags.depth, "vocab_size": flags.vocabulary}
            checkpoint = find_checkpoint(reference.write(Path(folder), flags))
            module: Any = checkpoint.read(TargetParts(target, embed, head)).eval()
        with torch.no_grad():
            ours = module(module.mix(taps), torch.tensor([TOKEN]))
        difference = float((ours - theirs(flags, taps, embed, head)).abs().max())
        print(f"{settings or 'plain'}: {difference:.1e} of {float(ours.abs().max()):.1f}")
        worst = max(worst, difference)
    return int(not worst < 1e-4)


if __name__ == "__main__":
    sys.exit(main())
