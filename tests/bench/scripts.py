"""The benchmark scripts as modules, and engines of scripted sessions for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from dovetail.runtime.engine import Engine
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget, ScriptedTokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.\n "
LOGITS = MarkovLogits(len(ALPHABET), seed=3)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Opener:
    """Stands in for Engine.from_pretrained; counts the answers, and is killed before number `last` + 1."""

    def __init__(self, drafter: bool = True, last: int = 10**6) -> None:
        self.drafter, self.last, self.answers, self.opened = drafter, last, 0, 0

    def __call__(self, pair: Path, /, **options: Any) -> Engine:
        self.opened += 1
        opener = self

        class Counting(Engine):
            def generate(self, *args: Any, **kwargs: Any) -> Any:
                opener.answers += 1
                if opener.answers > opener.last:
                    raise SystemExit(137)
                return super().generate(*args, **kwargs)

        drafter = ScriptedDrafter.copy_of(LOGITS, noise=1.0) if self.drafter else None
        tokenizer = ScriptedTokenizer(ALPHABET, has_chat_template=True)
        return Counting(ScriptedTarget(LOGITS), drafter, tokenizer, tree=options["tree"])
