"""Speculative decoding of a CPU target with a drafter: open a pair, generate text.

    from dovetail.runtime import Engine
    engine = Engine.from_pretrained("pair")
    for chunk in engine.stream("Why is the sky blue?", max_new_tokens=100):
        print(chunk.text, end="", flush=True)

Importing this package costs numpy; names are loaded when used, engines and tokenizers when a pair is opened.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accept import Verdict
    from .decode import Conversation, Request, Step
    from .engine import Chunk, Engine, GenerationResult
    from .errors import (
        ContextOverflow,
        DeviceError,
        DovetailError,
        ExportError,
        InputError,
        IntegrityError,
        ManifestError,
        MismatchError,
        PairError,
        SourceError,
        TrainError,
    )
    from .manifest import Manifest, read_manifest
    from .metrics import GenerationMetrics, Meter
    from .reading import Choice
    from .sampling import Sampler, SamplingParams
    from .scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget, ScriptedTokenizer
    from .sessions import DraftSession, TargetPass, TargetSession
    from .tokenizer import Tokenizer
    from .tree import Candidates, DraftTree, Level, TreeLimits, grow_tree

_HOME = {
    "accept": ("Verdict",),
    "decode": ("Conversation", "Request", "Step"),
    "engine": ("Chunk", "Engine", "GenerationResult"),
    "errors": (
        "ContextOverflow",
        "DeviceError",
        "DovetailError",
        "ExportError",
        "InputError",
        "IntegrityError",
        "ManifestError",
        "MismatchError",
        "PairError",
        "SourceError",
        "TrainError",
    ),
    "manifest": ("Manifest", "read_manifest"),
    "metrics": ("GenerationMetrics", "Meter"),
    "reading": ("Choice",),
    "sampling": ("Sampler", "SamplingParams"),
    "scripted": ("MarkovLogits", "ScriptedDrafter", "ScriptedTarget", "ScriptedTokenizer"),
    "sessions": ("DraftSession", "TargetPass", "TargetSession"),
    "tokenizer": ("Tokenizer",),
    "tree": ("Candidates", "DraftTree", "Level", "TreeLimits", "grow_tree"),
}
# Not `accept` and `decode`: those names are modules.
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Candidates",
    "Choice",
    "Chunk",
    "ContextOverflow",
    "Conversation",
    "DeviceError",
    "DovetailError",
    "DraftSession",
    "DraftTree",
    "Engine",
    "ExportError",
    "GenerationMetrics",
    "GenerationResult",
    "InputError",
    "IntegrityError",
    "Level",
    "Manifest",
    "ManifestError",
    "MarkovLogits",
    "Meter",
    "MismatchError",
    "PairError",
    "Request",
    "Sampler",
    "SamplingParams",
    "ScriptedDrafter",
    "ScriptedTarget",
    "ScriptedTokenizer",
    "SourceError",
    "Step",
    "TargetPass",
    "TargetSession",
    "Tokenizer",
    "TrainError",
    "TreeLimits",
    "Verdict",
    "grow_tree",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
