"""Upper bounds for numbers in a configuration, a manifest or a flag, checked before any work."""

from __future__ import annotations

CONTEXT_MOST = 2**27  # tokens
THREADS_MOST = 2**12
BYTES_MOST = 2**50
TOKEN_MOST = 2**31 - 1  # a token id
SEED_MOST = 2**63 - 1

# Every bound is far above the value of any published model.
LARGEST = {
    "vocab_size": 2**24,
    "target_vocab_size": 2**24,
    "draft_vocab_size": 2**24,
    "hidden_size": 2**20,
    "feature_size": 2**20,
    "intermediate_size": 2**22,
    "num_layers": 1024,
    "blocks": 64,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**14,
    "head_size": 2**14,
    "max_position_embeddings": CONTEXT_MOST,
    "max_context": CONTEXT_MOST,
    "top_k": 2**12,
    "tree_slots": 2**12,
}


def check_whole(
    name: str, value: object, failure: type[Exception], remedy: str, *, least: int = 1, most: int | None = None
) -> None:
    """Raise `failure` unless `value` is a whole number. most: default LARGEST of the name."""
    most = LARGEST[name.rpartition(".")[2]] if most is None else most
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise failure(f"{name} {value!r:.60} is out of range, not a whole number from {least} to {most}: {remedy}")


def check_number(name: str, value: object, failure: type[Exception], remedy: str, *, most: float) -> None:
    """Raise `failure` unless `value` is a finite number above 0 and at most `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= most:  # type: ignore[operator]  # a number by now
        raise failure(f"{name} {value!r:.60} is out of range, not a number above 0 and at most {most:g}: {remedy}")


def check_token_ids(name: str, value: object, failure: type[Exception], remedy: str) -> tuple[int, ...]:
    """Return token ids from one id, from a list or from null. Raises `failure`."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        check_whole(name, token, failure, remedy, least=0, most=TOKEN_MOST)
    return tuple(ids)
