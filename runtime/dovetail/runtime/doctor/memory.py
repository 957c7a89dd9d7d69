"""Memory of a run, from sizes alone."""

from __future__ import annotations

from pathlib import Path

from dovetail.runtime.errors import PairError
from dovetail.runtime.pair.layout import DEVICES, TARGET
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.system.bounds import check_whole
from dovetail.runtime.system.files import read_json
from dovetail.runtime.system.machine import mib

TARGET_KV_BYTES = 2  # the target's KV cache is 16-bit
DRAFTER_KV_BYTES = {"cuda": 2, "cpu": 4}


def estimate_memory(folder: Path, manifest: Manifest) -> dict[str, float | None]:
    """Return the memory of a run in MiB: weights as stored, KV caches at the full context.

    target_kv_mb is None if the target's config does not give the KV heads.
    """
    weights = sum(
        entry.size for name, entry in manifest.files.items() if name.startswith(f"{TARGET}/") and name.endswith(".bin")
    )
    per_token = target_kv_bytes(folder, manifest)
    memory = {
        "target_weights_mb": mib(weights),
        "target_kv_mb": None if per_token is None else mib(per_token * manifest.target.max_context),
    }
    drafter = manifest.drafter
    if drafter is None:
        return memory
    for device in (device for device in DEVICES if device in drafter.files):
        row = drafter.blocks * 2 * drafter.num_kv_heads * drafter.head_size * DRAFTER_KV_BYTES[device]
        memory[f"drafter_{device}_weights_mb"] = mib(sum(entry.size for entry in manifest.drafter_files(device)))
        memory[f"drafter_{device}_kv_mb"] = mib(row * (drafter.tree_slots + drafter.max_context))
    return memory


def target_kv_bytes(folder: Path, manifest: Manifest) -> int | None:
    """Return the bytes of KV per token over all layers, from target/config.json, or None."""
    try:
        config = read_json(folder / TARGET / "config.json", PairError, "")
        config = config.get("text_config", config)
        heads: int = config["num_attention_heads"]
        check_whole("num_attention_heads", heads, PairError, "")
        kv_heads: int = config.get("num_key_value_heads") or heads
        head_size: int = config.get("head_dim") or manifest.target.hidden_size // heads
        check_whole("num_key_value_heads", kv_heads, PairError, "")
        check_whole("head_dim", head_size, PairError, "")
    except (OSError, KeyError, AttributeError, TypeError, PairError):
        return None
    return manifest.target.num_layers * 2 * kv_heads * head_size * TARGET_KV_BYTES
