"""`dovetail-export train`: text -> features -> fit -> evaluate -> checkpoint.

Each stage leaves its result in `OUT/work/`. A stopped run continues with its last part of text,
pass of features or minute of fitting, and ends with the weights of an unbroken run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.exporter.build.lock import lock_file
from dovetail.exporter.target.configuration import read_config, sizes_config
from dovetail.exporter.target.embedding_rows import read_embedding_and_head
from dovetail.exporter.train.batches import Batches
from dovetail.exporter.train.contamination import Forbidden
from dovetail.exporter.train.corpus import Corpus, draft_vocabulary
from dovetail.exporter.train.drafters.eagle3 import Eagle3Format
from dovetail.exporter.train.drafters.own import OwnFormat
from dovetail.exporter.train.drafters.trained import TrainedFormat, Trainee
from dovetail.exporter.train.evaluate import HeldOut, evaluate
from dovetail.exporter.train.features import FeatureStore, Part, check_room
from dovetail.exporter.train.loop import Fitting
from dovetail.exporter.train.plan import TrainPlan
from dovetail.exporter.train.text import DAMAGED, SECONDS_MOST, TextWriter, read_work, split
from dovetail.exporter.train.writer import BatchWriter
from dovetail.models.checkpoint import CONFIG
from dovetail.models.formats.format import Config, TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.runtime.errors import TrainError
from dovetail.runtime.pair.check import verify_files
from dovetail.runtime.pair.files import sha256_file, write_atomically
from dovetail.runtime.pair.layout import TARGET, TARGET_GRAPH, TARGET_WEIGHTS
from dovetail.runtime.pair.manifest import Manifest, read_manifest
from dovetail.runtime.system.bounds import check_number
from dovetail.runtime.system.files import check_text, read_object
from dovetail.runtime.system.machine import usable_cores
from dovetail.runtime.system.progress import Progress
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.text.prompts import read_prompts
from dovetail.runtime.text.tokenizer import Tokenizer

TEXT_SHARE = 1 / 3  # share of a run's minutes for text; the fit then sees the text two or three times
FIT_SHARE = 1 / 3  # smallest share of a run's minutes for the fit
BOOK_SECONDS = 5.0
HELD_OUT_MOST = 200  # conversations
GLANCED = 40  # held-out conversations that a measurement during the fit reads
TRAINED: dict[str, type[OwnFormat] | type[Eagle3Format]] = {"dovetail": OwnFormat, "eagle3": Eagle3Format}


@dataclass(frozen=True)
class Text:
    """All conversations of a run in the order of their parts, and their use.

    kept: indices of the conversations to train on. held_out: indices to evaluate with, shuffled.
    repeated: number left out because they share 13 words with an excluded prompt.
    doubled: number left out because an earlier conversation has the same prompt.
    """

    parts: list[Part]
    corpus: Corpus
    kept: NDArray[np.int64]
    held_out: NDArray[np.int64]
    repeated: int
    doubled: int

    def describe(self, plan: TrainPlan) -> dict[str, Any]:
        training = self.corpus.select(self.kept)
        return {
            "conversations": len(self.corpus),
            "tokens": len(self.corpus.tokens),
            "answer_tokens": self.corpus.answer_tokens,
            "trained_on": {"conversations": len(training), "answer_tokens": training.answer_tokens},
            "held_out_conversations": len(self.held_out),
            "excluded": [str(path) for path in plan.exclude],
            "left_out_for_overlap": self.repeated,
            "left_out_as_doubles": self.doubled,
        }


def train(pair: Path, out: Path, plan: TrainPlan, progress: Progress, *, resume: bool = False) -> HeldOut:
    """Train a drafter for the target of `pair`; write a checkpoint and a log to `out`."""
    check_text("folder", str(out), TrainError)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # torch ignores a container's CPU quota
    manifest = read_manifest(pair)
    verify_files(pair, manifest)
    work = Work(pair, manifest, plan, out / "work", progress)
    forbidden = Forbidden(turn for file in plan.exclude for c in read_prompts(file) for turn in c.turns)
    prompts = [c.turns[0] for c in read_prompts(plan.prompts)] if plan.prompts else []
    given = [part for i, path in enumerate(plan.corpora) for part in split(f"given-{i}", Corpus.load(path))]
    format = work.format  # raises before the long stages
    for part in given:
        draft_vocabulary(part.corpus, 1, manifest.target.vocab_size)
    claim = partial(_claim, out, work.folder, format.files, plan.as_dict() | work.inputs(), resume)
    claim()  # a refusal leaves nothing behind
    with _alone(work.folder):
        claim(begin=True)  # another run may have begun or ended meanwhile
        work.progress = clock = Clock(work.folder / "seconds.json", progress)
        try:
            text = work.sort(given + work.write(prompts), forbidden)
            trainee = work.trainee(text).to(plan.device)
            features, held_out = work.features(text)
        finally:
            clock.book()
        held_corpus = text.corpus.select(text.held_out)
        drafter = trainee.drafter
        batches = Batches(text.corpus, features, text.kept, trainee, plan.fit)
        fitting = Fitting(trainee, batches, work.folder, plan.device, progress)
        seconds = max(60 * plan.minutes - clock.seconds, 60 * plan.minutes * FIT_SHARE) if plan.minutes else None
        glance = held_corpus.select(np.arange(min(GLANCED, len(held_corpus))))  # the store's first rows
        state = fitting.run(seconds, lambda: evaluate(drafter, glance, held_out).acceptance_length)
        progress("evaluate", 0, 1, "")
        result = evaluate(drafter, held_corpus, held_out)
        progress("evaluate", 1, 1, "")
        log = {
            "plan": plan.as_dict(),
            "corpus": text.describe(plan),
            "parameters": sum(p.numel() for p in drafter.parameters()),
            "updates": state.step,
            "positions_seen": state.positions,
            "minutes": {"text_and_features": round(clock.seconds / 60, 2), "fit": round(state.seconds / 60, 2)},
            "held_out": {name: value for name, value in asdict(result).items() if name != "calibration"},
            "curve": state.curve,
        }
        write_atomically(out / "training.json", (json.dumps(log, indent=1) + "\n").encode())
        result.calibration.save(out)
        format.save(drafter, out, log)  # last, because weights mark a finished folder
        return result


@dataclass
class Work:
    """The work folder of one run: text in `text/`, features in `features/` and `held-out/`."""

    pair: Path
    manifest: Manifest
    plan: TrainPlan
    folder: Path
    progress: Progress

    def inputs(self) -> dict[str, Any]:
        plan = self.plan
        files = [*plan.corpora, *plan.exclude, *([plan.prompts] if plan.prompts else [])]
        if plan.init:
            files += [plan.init / name for name in find_checkpoint(plan.init).files[1:]]
        target = self.manifest.files[TARGET_WEIGHTS].sha256
        try:
            return {"target": target, "digests": {str(file): sha256_file(file) for file in files}}
        except OSError as error:
            raise TrainError(f"cannot read {error.filename} ({error.strerror}): check the path") from error

    def open_model(self) -> PagedModel:
        return PagedModel(self.pair / TARGET_GRAPH, layers=self.format.layers)

    @cached_property
    def config(self) -> Config:
        """The text part of the target's config. Raises TrainError."""
        folder = self.pair / TARGET
        return sizes_config(read_config(folder, TrainError), folder / CONFIG, TrainError)

    @cached_property
    def format(self) -> TrainedFormat:
        """Raises TrainError for a target or an initial checkpoint that the plan's drafter cannot have."""
        source = self.manifest.provenance.get("target", {}).get("source", {})
        return TRAINED[self.plan.format](self.plan, self.config, source.get("repo") or self.manifest.name)

    def trainee(self, text: Text) -> Trainee:
        """The drafter on the target's embedding and head rows, seeded or with `plan.init`'s weights."""
        embedding, head = (torch.from_numpy(rows) for rows in read_embedding_and_head(self.pair / TARGET_GRAPH))
        vocabulary = min(self.plan.draft_vocab, len(head))
        d2t = draft_vocabulary(text.corpus.select(text.kept), vocabulary, self.manifest.target.vocab_size)
        return self.format.make(TargetParts(self.config, embedding, head), torch.from_numpy(d2t))

    def open_writer(self) -> BatchWriter:
        return BatchWriter(self.open_model(), {*self.manifest.target.eos_token_ids, *self.tokenizer.eos_token_ids})

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.pair / TARGET)

    def write(self, prompts: list[str]) -> list[Part]:
        """Parts with answers to `prompts` and to the target's own prompts, as `plan` asks."""
        plan = self.plan
        for name in ("text", "features"):
            (self.folder / name).mkdir(exist_ok=True)
        writer = TextWriter(
            self.folder / "text", self.folder / "features", plan.disk_gb * 1e9, self.tokenizer, self.open_writer,
            plan.fit.seed, plan.max_new_tokens, self.progress,
        )  # fmt: skip
        seconds = 60 * plan.minutes * TEXT_SHARE if plan.minutes else None
        parts = writer.answers(prompts, seconds)
        if plan.own_prompts or (seconds and not plan.corpora and not prompts):
            parts += writer.own(plan.own_prompts or None, plan.openings, seconds)
        return parts

    def sort(self, parts: list[Part], forbidden: Forbidden) -> Text:
        """Leave out repeats and doubles, and hold out some of the other conversations, seeded."""
        plan = self.plan
        corpus = Corpus.join([part.corpus for part in parts])
        repeats, doubles = self._repeats(corpus, forbidden), corpus.doubles()
        usable = np.flatnonzero(~repeats & ~doubles)
        if len(usable) < 2:
            raise TrainError(f"{len(usable)} conversations are too few to train on and to hold out: add prompts")
        order = np.random.default_rng((plan.fit.seed, 5)).permutation(usable)
        held = min(HELD_OUT_MOST, max(1, round(plan.held_out * len(usable))))
        return Text(parts, corpus, np.sort(order[held:]), order[:held], int(repeats.sum()), int(doubles.sum()))

    def _repeats(self, corpus: Corpus, forbidden: Forbidden) -> NDArray[np.bool_]:
        """Which conversations share a run of words with an excluded prompt."""
        out = np.zeros(len(corpus), bool)
        if forbidden:
            tokenizer, starts = self.tokenizer, corpus.offsets
            for i in range(len(corpus)):
                out[i] = forbidden.touches(tokenizer.decode(corpus.tokens[starts[i] : starts[i + 1]].tolist()))
            self.progress("overlap", len(corpus), len(corpus), f"{int(out.sum())} left out")
        return out

    def features(self, text: Text) -> tuple[FeatureStore, FeatureStore]:
        """Stores for (all parts, held-out conversations), computed as far as the disk allows."""
        size = self.manifest.target.feature_size * (len(self.format.layers) + 1)
        held = [Part("held-out", text.corpus.select(text.held_out))]
        held_out = FeatureStore(self.folder / "held-out", held, size, self.open_model, float("inf"))
        features = FeatureStore(self.folder / "features", text.parts, size, self.open_model, self.plan.disk_gb * 1e9)
        note = f"{features.bytes / 1e6:.0f} MB on disk"
        if len(features.groups) > 1:
            note = f"{features.bytes / 1e9:.1f} GB in {len(features.groups)} turns of {self.plan.disk_gb:g} GB each"
        check_room([features, held_out])
        total = len(text.corpus.tokens)
        held_out.hold(0, lambda n: self.progress("held out", n, len(held[0].corpus.tokens), ""))
        if len(features.groups) == 1:  # else the fit asks for each group
            features.hold(0, lambda n: self.progress("features", n, total, note))
        return features, held_out


class Clock:
    """A Progress that stores the seconds of the stages before the fit, over all starts of a run."""

    def __init__(self, file: Path, progress: Progress):
        self.file, self.progress, self._mark = file, progress, time.monotonic()
        self.seconds = read_work(file) if file.exists() else 0.0
        if self.seconds != 0:
            check_number(str(file), self.seconds, TrainError, DAMAGED, most=SECONDS_MOST)

    def __call__(self, stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
        if time.monotonic() - self._mark > BOOK_SECONDS:
            self.book()
        self.progress(stage, done, total, note)

    def book(self) -> None:
        """Add the time since the last call, and store the sum."""
        now = time.monotonic()
        self.seconds, self._mark = self.seconds + now - self._mark, now
        write_atomically(self.file, json.dumps(self.seconds).encode())


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Make the work folder and keep other runs out of it. Raises TrainError while another run is in it."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_file(work / "lock")
    except BlockingIOError:
        raise TrainError(f"another run is writing to {work}: wait for it to finish, or stop it") from None
    with lock or nullcontext():
        yield


def _claim(
    out: Path, work: Path, files: tuple[str, ...], plan: dict[str, Any], resume: bool, begin: bool = False
) -> None:
    """Check that `out` may be this plan's folder. Raises TrainError for a finished drafter or other plan.

    files: what the finished run writes, weights first. begin: marks the folder.
    """
    mine = work / "plan.json"
    if (out / files[0]).exists():
        raise TrainError(f"{out} already holds a trained drafter: give another folder")
    if others := [name for name in files if (out / name).exists() and not mine.exists()]:
        raise TrainError(f"{out} already holds {others[0]}: give another folder")
    if mine.exists():
        if not resume:
            raise TrainError(f"{work} holds an unfinished run: add --resume to continue, or give another folder")
        # A resumed run may use another device and another amount of disk.
        theirs, ours = (
            {name: value for name, value in one.items() if name not in ("disk_gb", "device")}
            for one in (read_object(mine, TrainError, DAMAGED), plan)
        )
        if theirs != ours:
            raise TrainError(
                f"{work} was started with other options or for another target (see its plan.json): repeat them or "
                "give another folder"
            )
    elif begin:
        write_atomically(mine, json.dumps(plan, indent=1).encode())
