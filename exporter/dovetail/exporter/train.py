"""`dovetail-export train`: prompts -> answers -> features -> fit -> held-out evaluation -> checkpoint.

Everything is learned from the INT8 target that will verify: its answers, its features, its distribution.
Each stage leaves its result in `OUT/work/`: a stopped run goes on with the block of answers, the pass of
features or the minute of fitting in which it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.models import Drafter, DrafterConfig, save_checkpoint
from dovetail.runtime.errors import TrainError
from dovetail.runtime.manifest import Manifest, read_manifest, verify_files, write_atomically
from dovetail.runtime.paged import PagedModel
from dovetail.runtime.tokenizer import Tokenizer

from .corpus import Corpus, draft_vocabulary
from .evaluate import HeldOut, chain_acceptance
from .features import feature_bytes, write_features
from .fit import Batches, FitOptions, StepReport, Windows, learning_rate, unrolled_loss
from .synth import BatchWriter, answer_requests, read_prompts, write_prompts
from .target_weights import read_embedding_and_head

ANSWER_BLOCK = 256  # prompts whose answers are saved together
CURVE_EVERY = 25  # updates per point of the learning curve
SAVE_SECONDS = 60.0

# progress(stage, done, total, note)
Progress = Callable[[str, float, float, str], None]


@dataclass(frozen=True)
class TrainPlan:
    """What to train, on what.

    prompts: JSONL of the user's, or None.  own_prompts: how many the target writes itself.
    corpora: .npz files of conversations that the same target wrote earlier.
    minutes: time for fitting; overrides `fit.epochs` as the length of the run.
    """

    prompts: Path | None = None
    own_prompts: int = 0
    corpora: tuple[Path, ...] = ()
    max_new_tokens: int = 320
    minutes: float | None = None
    draft_vocab: int = 8192
    fusion: str = "dgf"
    blocks: int = 1
    held_out: float = 0.05
    device: str = "cpu"
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        if not (self.prompts or self.own_prompts or self.corpora):
            raise TrainError("nothing to train on: give --prompts FILE.jsonl, --own-prompts N or --corpus FILE.npz")
        if self.minutes is not None and not self.minutes > 0:
            raise TrainError(f"minutes {self.minutes} is out of range: give a number above 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise TrainError("device cuda was asked for, but torch finds no CUDA device: use --device cpu")

    def as_dict(self) -> dict[str, Any]:
        """JSON form, for the training log and to tell whether a stopped run was this one."""
        plan = asdict(self) | {"prompts": str(self.prompts) if self.prompts else None}
        return plan | {"corpora": [str(path) for path in self.corpora]}


@dataclass
class FitState:
    """Where fitting stands; what `state.pt` holds."""

    step: int = 0
    seconds: float = 0.0
    positions: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


def train(pair: Path, out: Path, plan: TrainPlan, progress: Progress, *, resume: bool = False) -> HeldOut:
    """Train a drafter for the target of `pair` and leave a checkpoint, with its log, in `out`."""
    manifest = read_manifest(pair)
    verify_files(pair, manifest)
    prompts = read_prompts(plan.prompts) if plan.prompts else []
    given = [Corpus.load(path) for path in plan.corpora]
    work = out / "work"
    _claim(out, work, plan.as_dict() | {"target": manifest.files["target/openvino_model.bin"].sha256}, resume)
    model = PagedModel(pair / "target" / "openvino_model.xml")
    corpus = _corpus(work, pair, manifest, model, (given, prompts), plan, progress)
    total = len(corpus.tokens)
    size = feature_bytes(corpus, model.feature_size) / 1e6
    features = write_features(
        model, corpus, work / "features.f16", lambda n: progress("features", n, total, f"{size:.0f} MB on disk")
    )
    del model  # its KV blocks and weights are not needed while fitting
    drafter = build_drafter(pair, corpus, plan, manifest).to(plan.device)
    held, kept = _split(corpus, plan)
    state = _fit(drafter, corpus.select(kept), _rows(features, corpus, kept), plan, work, progress)
    result = chain_acceptance(drafter, corpus.select(held), _rows(features, corpus, held))
    log = {
        "plan": plan.as_dict(),
        "corpus": {"conversations": len(corpus), "tokens": total, "answer_tokens": corpus.answer_tokens},
        "parameters": sum(p.numel() for p in drafter.parameters()),
        "updates": state.step,
        "positions_seen": state.positions,
        "minutes": round(state.seconds / 60, 2),
        "held_out": asdict(result),
        "curve": state.curve,
    }
    write_atomically(out / "training.json", (json.dumps(log, indent=1) + "\n").encode())
    save_checkpoint(drafter, out)  # last: a folder with weights is a finished one
    return result


def build_drafter(pair: Path, corpus: Corpus, plan: TrainPlan, manifest: Manifest) -> Drafter:
    """A fresh drafter on the target's own embedding and head rows, seeded."""
    embedding, head = read_embedding_and_head(pair / "target" / "openvino_model.xml")
    target = json.loads((pair / "target" / "config.json").read_text())
    d2t = draft_vocabulary(corpus, min(plan.draft_vocab, len(head)), manifest.target.vocab_size)
    try:
        config = DrafterConfig.for_target(target, len(d2t), plan.fusion, plan.blocks)
    except (KeyError, ValueError) as error:
        raise TrainError(f"cannot shape a drafter after this target: {error}") from error
    torch.manual_seed(plan.fit.seed)
    return Drafter(config, torch.from_numpy(embedding), torch.from_numpy(head[d2t]), torch.from_numpy(d2t))


def _claim(out: Path, work: Path, plan: dict[str, Any], resume: bool) -> None:
    """Own `out` for this plan and target: never overwrite a finished drafter, never mix in another plan's work."""
    if (out / "drafter.safetensors").exists():
        raise TrainError(f"{out} already holds a trained drafter: give another folder")
    mine = work / "plan.json"
    if mine.exists():
        if not resume:
            raise TrainError(f"{work} holds an unfinished run: add --resume to go on, or give another folder")
        if json.loads(mine.read_text()) != json.loads(json.dumps(plan)):
            raise TrainError(
                f"{work} was started with other options or for another target (see its plan.json): repeat them or "
                "give another folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(mine, json.dumps(plan, indent=1).encode())


def _corpus(
    work: Path,
    pair: Path,
    manifest: Manifest,
    model: PagedModel,
    given: tuple[list[Corpus], list[str]],
    plan: TrainPlan,
    progress: Progress,
) -> Corpus:
    """Conversations given, and answers to the prompts given or self-written; cached as corpus.npz."""
    path = work / "corpus.npz"
    if path.exists():
        return Corpus.load(path)
    corpora, prompts = given
    corpus = sum(corpora, Corpus.of([]))
    if prompts or plan.own_prompts:
        tokenizer = Tokenizer.from_folder(pair / "target")
        writer = BatchWriter(model, manifest.target.eos_token_ids)
        prompts = prompts + _own_prompts(work, tokenizer, writer, plan, progress)
        corpus = corpus + _answers(work, tokenizer, writer, prompts, plan, progress)
    if len(corpus) < 2:
        raise TrainError(f"{len(corpus)} conversations are too few to train on and to hold out: add prompts")
    corpus.save(path)
    return corpus


def _own_prompts(
    work: Path, tokenizer: Tokenizer, writer: BatchWriter, plan: TrainPlan, progress: Progress
) -> list[str]:
    """Prompts that the target writes, as many as the plan says; cached as prompts.json."""
    if not plan.own_prompts:
        return []
    path = work / "prompts.json"
    if path.exists():
        cached: list[str] = json.loads(path.read_text())
        return cached
    wanted, rng = plan.own_prompts, np.random.default_rng((plan.fit.seed, 2))
    own = write_prompts(writer, tokenizer, wanted, rng, lambda n: progress("prompts", n, wanted, ""))
    if len(own) < wanted:
        progress("prompts", len(own), wanted, f"only {len(own)} were usable")
    write_atomically(path, json.dumps(own).encode())
    return own


def _answers(
    work: Path, tokenizer: Tokenizer, writer: BatchWriter, prompts: list[str], plan: TrainPlan, progress: Progress
) -> Corpus:
    """The target's answers, written in blocks, each cached as answers-N.npz and seeded by itself."""
    corpus = Corpus.of([])
    for start in range(0, len(prompts), ANSWER_BLOCK):
        part = work / f"answers-{start}.npz"
        if not part.exists():
            rng = np.random.default_rng((plan.fit.seed, 3, start))
            block = prompts[start : start + ANSWER_BLOCK]
            written = []
            for conversation in writer.write(answer_requests(tokenizer, block, rng, plan.max_new_tokens), rng):
                written.append(conversation)
                progress("answers", start + len(written), len(prompts), "")
            Corpus.of(written).save(part)
            if lost := len(block) - len(written):
                note = f"{lost} left out: a prompt fills {writer.max_length} tokens by itself"
                progress("answers", start + len(block), len(prompts), note)
        corpus = corpus + Corpus.load(part)
    return corpus


def _split(corpus: Corpus, plan: TrainPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(held out, trained on), seeded, at least one conversation each."""
    order = np.random.default_rng((plan.fit.seed, 1)).permutation(len(corpus))
    held = max(1, round(plan.held_out * len(corpus)))
    return np.sort(order[:held]), np.sort(order[held:])


def _rows(features: NDArray[np.float16], corpus: Corpus, chosen: NDArray[np.int64]) -> NDArray[np.float16]:
    """Feature rows of the chosen conversations, in memory, in their order."""
    offsets = corpus.offsets
    return np.concatenate([features[offsets[i] : offsets[i + 1]] for i in chosen])


def _fit(
    drafter: Drafter, corpus: Corpus, features: NDArray[np.float16], plan: TrainPlan, work: Path, progress: Progress
) -> FitState:
    """Update until the plan's time or epochs are used up; saves its state every minute."""
    options = plan.fit
    batches = Batches(corpus, features, drafter.d2t.cpu().numpy(), drafter.config.vocab_size, options)
    optimizer = torch.optim.AdamW(drafter.parameters(), betas=(0.9, 0.95), weight_decay=options.weight_decay)
    state = _load_state(work, drafter, optimizer, plan.device)
    total = options.epochs * batches.per_epoch
    recent: list[StepReport] = []
    saved = started = time.monotonic()
    before = state.seconds
    for step, windows in batches.stream(state.step):
        share = state.seconds / (60 * plan.minutes) if plan.minutes else step / total
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, share, options)
        loss, report = unrolled_loss(drafter, _to(windows, plan.device), options)
        if not torch.isfinite(loss):
            raise TrainError(f"the loss is {float(loss)} at update {step}: lower --learning-rate")
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(report)
        now = time.monotonic()
        state.step, state.seconds = step + 1, before + now - started
        state.positions += report.positions
        if state.step % CURVE_EVERY == 0:
            state.curve.append(_point(state, recent))
            recent = []
            agreement = " ".join(f"{a:.3f}" for a in state.curve[-1]["agreement"])
            progress("fit", 100 * share, 100, f"loss {state.curve[-1]['loss']:.2f}  agreement {agreement}")
        if now - saved > SAVE_SECONDS:
            _save_state(work, drafter, optimizer, state)
            saved = now
    _save_state(work, drafter, optimizer, state)
    return state


def _point(state: FitState, recent: list[StepReport]) -> dict[str, Any]:
    """One point of the learning curve: means since the last one."""
    agreement = np.mean([report.agreement for report in recent], axis=0)
    return {
        "update": state.step,
        "seconds": round(state.seconds, 1),
        "positions": state.positions,
        "loss": round(float(np.mean([report.loss for report in recent])), 4),
        "agreement": [round(float(a), 4) for a in agreement],
    }


def _to(windows: Windows, device: str) -> Windows:
    return Windows(
        windows.features.to(device),
        windows.tokens.to(device),
        windows.following.to(device),
        windows.answer.to(device),
        windows.start,
    )


def _save_state(work: Path, drafter: Drafter, optimizer: torch.optim.Optimizer, state: FitState) -> None:
    temporary = work / "state.pt.tmp"
    weights = {name: p.detach() for name, p in drafter.named_parameters()}
    torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "state": asdict(state)}, temporary)
    os.replace(temporary, work / "state.pt")


def _load_state(work: Path, drafter: Drafter, optimizer: torch.optim.Optimizer, device: str) -> FitState:
    path = work / "state.pt"
    if not path.exists():
        return FitState()
    saved = torch.load(path, map_location=device, weights_only=True)
    drafter.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    return FitState(**saved["state"])
