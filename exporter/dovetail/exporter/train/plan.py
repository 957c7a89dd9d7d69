"""Options of a training run: its text, its time, and the fit of the drafter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dovetail.models.config import DEFAULT_FUSION
from dovetail.runtime.errors import TrainError
from dovetail.runtime.system.bounds import CONTEXT_MOST, LARGEST, SEED_MOST, check_number, check_whole

MINUTES_MOST = 60.0 * 24 * 366  # a year
DISK_GB_MOST = 1e6
OWN_PROMPTS_MOST = 10**6  # weeks of writing on a CPU
OPTIMIZERS = ("adamw", "muon")
FORMATS = ("dovetail", "eagle3")
# Whole-number options with their least and largest value.
_WHOLE = (
    ("unroll", 1, 64), ("window", 1, CONTEXT_MOST), ("batch", 1, 2**16), ("teacher_top_k", 0, LARGEST["vocab_size"]),
    ("seed", 0, SEED_MOST),
)  # fmt: skip


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit of `epochs`. The learning rate falls linearly to zero at the end of the fit.

    unroll: unrolled steps. The first reads the target's features, later steps the drafter's
    outputs.
    window: largest number of positions of one conversation. batch: conversations per update.
    teacher_top_k: number of the target's most probable draft tokens to learn from; 0 for all.
    regression: weight of the smooth L1 distance between output and the target's next feature.
    optimizer: "adamw", or "muon" for matrices with AdamW for other parameters.
    bf16: multiply matrices in bfloat16, which layers hand on; weights, the loss and the optimizer's
    state stay in float32.
    """

    epochs: float = 4.0
    unroll: int = 3
    window: int = 384
    batch: int = 4
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: float = 0.8
    weight_decay: float = 0.01
    clip: float = 1.0
    teacher_top_k: int = 0
    regression: float = 0.0
    optimizer: str = "adamw"
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in _WHOLE:
            check_whole(name, getattr(self, name), TrainError, "give another", least=least, most=most)
        for name, above in (("epochs", 10_000.0), ("learning_rate", 10.0), ("regression", 1e6), ("weight_decay", 1e3)):
            value = getattr(self, name)
            if value != 0 or name in ("epochs", "learning_rate"):
                check_number(name, value, TrainError, "give another", most=above)
        if self.optimizer not in OPTIMIZERS:
            raise TrainError(f"optimizer {self.optimizer!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")


UNROLL = {"dovetail": FitOptions.unroll, "eagle3": 7}  # each format's usual steps


@dataclass(frozen=True)
class TrainPlan:
    """The drafter to train, and its training text.

    format: of the checkpoint, one of FORMATS. "eagle3" has EAGLE-3's drafter and layers; it takes no
    other `fusion`, `feature_layers`, `blocks`, `intermediate_size` and `fit.regression`.
    prompts: the user's JSONL, or None. own_prompts: number of prompts that the target writes.
    openings: equally likely beginnings of the target's prompts; "" lets the target begin.
    feature_layers: read three blocks of the target and its last feature.
    intermediate_size: width of the drafter's feed-forward layers; None for the target's.
    corpora: .npz files of conversations that the same target wrote earlier.
    exclude: JSONL files of benchmark prompts that no training text may repeat.
    minutes: time for the whole run, in place of `fit.epochs`. Without text, the target writes text
    for a third of this time. disk_gb: largest size of the features on disk.
    init: a checkpoint of the same format to start from, with the same fusion, blocks and width. An EAGLE-3
    drafter keeps its draft vocabulary.
    """

    format: str = FORMATS[0]
    prompts: Path | None = None
    own_prompts: int = 0
    openings: tuple[str, ...] = ("",)
    corpora: tuple[Path, ...] = ()
    exclude: tuple[Path, ...] = ()
    max_new_tokens: int = 320
    minutes: float | None = None
    disk_gb: float = 20.0
    draft_vocab: int = 8192
    fusion: str = DEFAULT_FUSION
    feature_layers: bool = True
    blocks: int = 1
    intermediate_size: int | None = None
    init: Path | None = None
    held_out: float = 0.05
    device: str = "cpu"
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        if not (self.prompts or self.own_prompts or self.corpora or self.minutes):
            raise TrainError(
                "nothing to train on: give --minutes M, --prompts FILE.jsonl, --own-prompts N or --corpus FILE.npz"
            )
        for name, number in (("minutes", MINUTES_MOST), ("disk_gb", DISK_GB_MOST)):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, TrainError, "give another", most=number)
        for name, most in (("max_new_tokens", CONTEXT_MOST), ("draft_vocab", LARGEST["vocab_size"]), ("blocks", None)):
            check_whole(name, getattr(self, name), TrainError, "give another", most=most)
        if self.intermediate_size is not None:
            check_whole("intermediate_size", self.intermediate_size, TrainError, "give another")
        check_whole("own_prompts", self.own_prompts, TrainError, "give another", least=0, most=OWN_PROMPTS_MOST)
        if self.format not in FORMATS:
            raise TrainError(f"format {self.format!r} is unknown: choose one of {', '.join(FORMATS)}")
        if self.format == "eagle3":
            for flag, given in (
                (f"--fusion {self.fusion}", self.fusion != DEFAULT_FUSION),
                ("--last-feature", not self.feature_layers),
                (f"--blocks {self.blocks}", self.blocks != 1),
                (f"--intermediate-size {self.intermediate_size}", self.intermediate_size is not None),
                (f"--regression {self.fit.regression:g}", self.fit.regression != 0),
            ):
                if given:
                    raise TrainError(f"an EAGLE-3 drafter has no {flag}: leave it out, or give --format dovetail")
        if not self.openings:
            raise TrainError("openings are empty: give at least one; '' lets the target begin its prompts")
        if self.openings != ("",) and (self.corpora or self.prompts) and not self.own_prompts:
            raise TrainError(f"opening {self.openings[0]!r} needs prompts that the target writes: give --own-prompts N")
        if self.device == "cuda":
            import torch  # here, because --help does without torch

            if not torch.cuda.is_available():
                raise TrainError("device is cuda, but torch finds no CUDA device: use --device cpu")

    def as_dict(self) -> dict[str, Any]:
        """JSON form, for the training log and to compare with the plan of a stopped run."""
        return json.loads(json.dumps(asdict(self), default=str))
