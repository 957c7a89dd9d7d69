"""Speculative decoding of a CPU target with a drafter: open a pair, generate text.

    from dovetail.runtime import Engine
    engine = Engine.from_pretrained("pair")
    for chunk in engine.stream("Why is the sky blue?", max_new_tokens=100):
        print(chunk.text, end="", flush=True)

Importing this package costs numpy. Names load when used, engines when a pair is opened.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.runtime.async_engine import AsyncEngine
    from dovetail.runtime.batch_engine import BatchEngine, EngineStats
    from dovetail.runtime.drafter.session import DeviceReport, Drafter
    from dovetail.runtime.engine import Engine
    from dovetail.runtime.errors import (
        ContextOverflow,
        DeviceError,
        DovetailError,
        ExportError,
        InputError,
        IntegrityError,
        ManifestError,
        MismatchError,
        PairError,
        QueueFull,
        SourceError,
        TrainError,
    )
    from dovetail.runtime.front import Chunk, GenerationResult
    from dovetail.runtime.loop.accept import Verdict
    from dovetail.runtime.loop.metrics import GenerationMetrics, Meter
    from dovetail.runtime.loop.rescore import Choice
    from dovetail.runtime.loop.sequence import Request, Sequence, Step
    from dovetail.runtime.loop.trace import RoundTrace
    from dovetail.runtime.pair.manifest import Manifest, read_manifest
    from dovetail.runtime.sampling.constraint import Constraint, Matcher
    from dovetail.runtime.sampling.logprobs import TokenLogprobs
    from dovetail.runtime.sampling.params import SamplingParams
    from dovetail.runtime.sampling.sampler import Sampler
    from dovetail.runtime.target.session import Target, TargetPass
    from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget, ScriptedTokenizer
    from dovetail.runtime.text.tokenizer import Tokenizer
    from dovetail.runtime.tree.draft_tree import DraftTree
    from dovetail.runtime.tree.growth import Candidates, Level, grow_tree
    from dovetail.runtime.tree.limits import TreeLimits

__all__ = [
    "AsyncEngine", "BatchEngine", "Candidates", "Choice", "Chunk", "Constraint", "ContextOverflow",
    "DeviceError", "DeviceReport", "DovetailError", "DraftTree", "Drafter", "Engine", "EngineStats",
    "ExportError", "GenerationMetrics", "GenerationResult", "InputError", "IntegrityError", "Level", "Manifest",
    "ManifestError", "MarkovLogits", "Matcher", "Meter", "MismatchError", "PairError", "QueueFull", "Request",
    "RoundTrace", "Sampler", "SamplingParams", "ScriptedDrafter", "ScriptedTarget", "ScriptedTokenizer",
    "Sequence", "SourceError", "Step", "Target", "TargetPass", "TokenLogprobs", "Tokenizer", "TrainError", "TreeLimits",
    "Verdict", "grow_tree", "read_manifest",
]  # fmt: skip

_HOMES = {  # of the names that are no errors
    "drafter.session": ("DeviceReport", "Drafter"),
    "async_engine": ("AsyncEngine",),
    "batch_engine": ("BatchEngine", "EngineStats"),
    "engine": ("Engine",),
    "front": ("Chunk", "GenerationResult"),
    "loop.accept": ("Verdict",),
    "loop.metrics": ("GenerationMetrics", "Meter"),
    "loop.rescore": ("Choice",),
    "loop.sequence": ("Request", "Sequence", "Step"),
    "loop.trace": ("RoundTrace",),
    "pair.manifest": ("Manifest", "read_manifest"),
    "sampling.constraint": ("Constraint", "Matcher"),
    "sampling.logprobs": ("TokenLogprobs",),
    "sampling.params": ("SamplingParams",),
    "sampling.sampler": ("Sampler",),
    "target.session": ("Target", "TargetPass"),
    "testing.scripted": ("MarkovLogits", "ScriptedDrafter", "ScriptedTarget", "ScriptedTokenizer"),
    "text.tokenizer": ("Tokenizer",),
    "tree.draft_tree": ("DraftTree",),
    "tree.growth": ("Candidates", "Level", "grow_tree"),
    "tree.limits": ("TreeLimits",),
}
_MODULE = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
