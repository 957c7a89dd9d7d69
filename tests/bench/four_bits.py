"""Four-bit formats of one target beside INT8: size, passes in turn, and three kinds of text read with each.

    python -m tests.bench.four_bits MODEL --work FOLDER --out four-bits.json

Each format is exported from MODEL by `dovetail-export target` into FOLDER.  A format is named `int4-sym-128-0.8`: with
or without --sym, the --group-size, and the --ratio of layers in 4 bits.  `-all` at its end stands for --all-layers.

The INT8 target writes the texts of the kind `chat`, sampled at temperature 1 from its whole distribution; prose and
code are this repository's own.  Every format reads the same tokens, as chains of a tree, and is compared with INT8.
--out keeps texts, scores and rounds of timed passes: a stopped run goes on, also with more formats or --rounds.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tests.bench import same_text

from dovetail.runtime import BatchEngine
from dovetail.runtime.cli.main import fail
from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.pair.layout import MANIFEST_NAME, TARGET, TARGET_WEIGHTS
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.system import machine
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.draft_tree import DraftTree

ROOT = Path(__file__).parents[2]
FILES = {"prose": ("docs/guide", "*.md"), "code": ("runtime/dovetail/runtime/loop", "*.py")}
PROMPTS = Path(__file__).with_name("own_prompts.jsonl")
CHAT = "chat"
KINDS = (*FILES, CHAT)
REFERENCE = "int8"
FORMATS = tuple(
    f"int4-{symmetry}-{group}-{ratio}" for ratio in ("1", "0.8") for symmetry in ("sym", "asym") for group in (128, 64)
)
FORMAT = re.compile(r"int4-(sym|asym)-(\d+)-(0\.\d+|1)(-all)?")
NODES = (1, 2, 4, 8, 16, 32)
WINDOW = 256  # tokens of prose and code that are read at a time
CHUNK = 64  # nodes of a pass that reads
TOGETHER = 8  # answers that are written at a time


@dataclass(frozen=True)
class Text:
    """Tokens to read. begin: the first row whose next token counts, which the rows before it are context for."""

    kind: str
    tokens: list[int]
    begin: int


@dataclass
class Score:
    """Of a format and a kind of text, by counted position. nll: of the next token. best: the preferred token."""

    nll: list[float]
    best: list[int]


@click.command()
@click.argument("model")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the exported pairs.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--format", "formats", multiple=True, default=FORMATS, help="Beside INT8.  [default: eight]")
@click.option("--tokens", type=click.IntRange(1), default=2048, show_default=True, help="Of each kind of text.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=160, show_default=True, help="Of an answer.")
@click.option("--rounds", type=click.IntRange(0), default=20, show_default=True, help="Of passes; earlier ones count.")
@click.option("--context", type=click.IntRange(1), default=256, show_default=True, help="Tokens before timed passes.")
def four_bits(
    model: str, work: Path, out: Path, formats: tuple[str, ...], tokens: int, max_new_tokens: int, rounds: int,
    context: int,
) -> None:  # fmt: skip
    """Measure what OUT does not hold yet, and print a Markdown table."""
    names = [REFERENCE, *(name for name in formats if name != REFERENCE)]
    asked = {name: weight_options(name) for name in names}  # what is no format is told before an export
    pairs = {name: exported(model, work / name, options) for name, options in asked.items()}
    setting = {"model": model, "tokens": tokens, "max_new_tokens": max_new_tokens, "context": context}
    kept = read(out, setting)
    if "texts" not in kept:
        kept["texts"] = [asdict(text) for text in texts(pairs[REFERENCE], tokens, max_new_tokens)]
        save(out, kept)
    written = [Text(**text) for text in kept["texts"]]
    for name in names:
        if name not in kept["scores"]:
            click.echo(f"reading with {name}", err=True)
            kept["scores"][name] = {kind: asdict(score) for kind, score in scores(opened(pairs[name]), written).items()}
            save(out, kept)
    if len(complete(kept["rounds"], names)) < rounds:
        targets = {name: opened(pair) for name, pair in pairs.items()}
        while (done := len(complete(kept["rounds"], names))) < rounds:
            kept["rounds"].append(timed(targets, context, seed=done))
            save(out, kept)
    sizes = {name: (pair / TARGET_WEIGHTS).stat().st_size / 2**20 for name, pair in pairs.items()}
    click.echo(table(names, sizes, kept["scores"], complete(kept["rounds"], names)))


def weight_options(name: str) -> list[str]:
    """Arguments of `dovetail-export target` for a format. Raises InputError."""
    if name == REFERENCE:
        return ["--weight-format", "int8"]
    if not (found := FORMAT.fullmatch(name)):
        raise InputError(f"format {name!r} is unknown: write {REFERENCE}, or a name such as {FORMATS[0]}")
    symmetry, group, ratio, every = found.groups()
    flags = [*(["--sym"] if symmetry == "sym" else []), *(["--all-layers"] if every else [])]
    return ["--weight-format", "int4", "--group-size", group, "--ratio", ratio, *flags]


def exported(model: str, pair: Path, options: list[str]) -> Path:
    """Return `pair`, exported first if it is not finished. Raises InputError when the export fails."""
    if not (pair / MANIFEST_NAME).exists():
        command = ["dovetail-export", "target", model, str(pair), *options, "--resume"]
        script = Path(sys.executable).with_name(command[0])
        done = subprocess.run([script, *command[1:]], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"{shlex.join(command)} ended with exit code {done.returncode}: the reason is above")
        click.echo(done.stdout, err=True, nl=False)
    return pair


def read(out: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What OUT holds. Raises InputError if that was measured elsewhere or otherwise."""
    facts = {"setting": setting, "machine": machine.describe(), "versions": machine.versions()}
    if not out.exists():
        return {**facts, "scores": {}, "rounds": []}
    kept: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if other := [name for name, fact in facts.items() if kept[name] != fact]:
        raise InputError(f"{out} was measured with another {', '.join(other)}: name another --out")
    return kept


def save(out: Path, kept: dict[str, Any]) -> None:
    kept["date"], kept["command"] = datetime.now(UTC).isoformat(timespec="seconds"), shlex.join(sys.argv)
    write_atomically(out, (json.dumps(kept) + "\n").encode())


def texts(pair: Path, tokens: int, answer: int) -> list[Text]:
    """Texts with `tokens` counted positions of each kind. Raises InputError where the repository has fewer."""
    tokenizer = Tokenizer.from_folder(pair / TARGET)
    found = list[Text]()
    for kind in FILES:
        for text in windows(tokenizer, kind):
            if (left := tokens - counted(found, kind)) > 0:
                found.append(Text(kind, text.tokens[: left + 1], 0))
        if counted(found, kind) < tokens:
            raise InputError(
                f"{FILES[kind][0]} has only {counted(found, kind)} tokens: give --tokens {counted(found, kind)}"
            )
    return [*found, *answers(pair, tokens, answer)]


def windows(tokenizer: Tokenizer, kind: str, size: int = WINDOW) -> list[Text]:
    """The repository's text of this kind in windows of `size` tokens, in an order of their own."""
    folder, names = FILES[kind]
    begin = tokenizer.encode("")  # the token, if any, with which every text begins
    source = "\n".join(file.read_text("utf-8") for file in sorted((ROOT / folder).glob(names)))
    ids, step = tokenizer.encode(source, add_special_tokens=False), size - len(begin)
    cut = [ids[at : at + step] for at in range(0, len(ids), step)]
    # From everywhere in the files: one page has one subject.
    picked = [cut[at] for at in Random(0).sample(range(len(cut)), len(cut))]
    return [Text(kind, [*begin, *text], 0) for text in picked if len(text) > 1]


def answers(pair: Path, tokens: int, most: int) -> list[Text]:
    """What INT8 answers to PROMPTS, over and over with new seeds, until there are `tokens` tokens of answers.

    Sampled from the whole distribution: another format's surplus of nll is then its divergence from INT8.
    """
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()]
    tokenizer, found = Tokenizer.from_folder(pair / TARGET), list[Text]()
    with BatchEngine.from_pretrained(pair, slots=TOGETHER) as engine:
        for seed in count():
            asked = [list(tokenizer.encode_chat([{"role": "user", "content": prompt}])) for prompt in prompts]
            written = same_text.answers(engine, [(ids, {"temperature": 1.0, "seed": seed}) for ids in asked], most)
            for prompt, answer in zip(asked, written, strict=True):
                if (left := tokens - counted(found, CHAT)) <= 0:
                    return found
                if answer:
                    found.append(Text(CHAT, [*prompt, *answer[:left]], len(prompt) - 1))
    raise AssertionError  # count() has no end


def counted(found: list[Text], kind: str) -> int:
    return sum(len(text.tokens) - 1 - text.begin for text in found if text.kind == kind)


def opened(pair: Path) -> OpenVINOTarget:
    return OpenVINOTarget.load(pair, read_manifest(pair))


def scores(target: OpenVINOTarget, written: list[Text]) -> dict[str, Score]:
    """Read every text as generation does: chains of up to CHUNK nodes, each committed."""
    found = {kind: Score([], []) for kind in KINDS}
    for text in written:
        seq, score = target.open(), found[text.kind]
        ids, following = np.array(text.tokens[:-1]), np.array(text.tokens[1:])
        for at in range(0, len(ids), CHUNK):
            chain = DraftTree.chain(ids[at : at + CHUNK])
            logits = target.verify({seq: chain})[seq].logits
            rows = np.arange(max(text.begin - at, 0), len(chain))
            score.best += logits[rows].argmax(1).tolist()
            score.nll += nll(logits[rows], following[at + rows]).tolist()
            target.commit(seq, np.arange(len(chain)))
        target.close(seq)
    return found


def nll(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p of tokens [N] under logits [N, V]."""
    most = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - most).sum(1, dtype=np.float64))
    return total + most[:, 0] - logits[np.arange(len(tokens)), tokens].astype(np.float64)


def timed(
    targets: dict[str, OpenVINOTarget], context: int, sizes: Sequence[int] = NODES, *, seed: int
) -> dict[str, list[float]]:
    """ms by target, of a pass of each size in nodes: all in shuffled order; of two in a row the second counts."""
    points = [(name, at) for name in targets for at in range(len(sizes))]
    texts = {name: target.open() for name, target in targets.items()}
    times = {name: [0.0] * len(sizes) for name in targets}
    for name, at in Random(seed).sample(points, len(points)):
        for _ in range(2):
            targets[name].pretend_length(texts[name], context)
            times[name][at] = targets[name].time_pass(texts[name], sizes[at])
    for name, target in targets.items():
        target.close(texts[name])
    return times


def complete(rounds: list[dict[str, list[float]]], names: list[str]) -> list[dict[str, list[float]]]:
    """The rounds in which all of these formats took turns."""
    return [each for each in rounds if set(names) <= set(each)]


def table(
    names: list[str], sizes: dict[str, float], scores: dict[str, Any], rounds: list[dict[str, list[float]]]
) -> str:
    """Medians over rounds; the share of positions with INT8's best token, and the perplexity, by kind of text."""
    heads = ["format", "weights, MiB", "plain, tok/s", *map(str, NODES), *(f"{kind}: same best" for kind in KINDS)]
    heads += [f"{kind}: perplexity" for kind in KINDS]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name in names:
        passes = [median(each[name][at] for each in rounds) if rounds else float("nan") for at in range(len(NODES))]
        same = [np.mean(np.equal(scores[name][kind]["best"], scores[REFERENCE][kind]["best"])) for kind in KINDS]
        perplexity = [np.exp(np.mean(scores[name][kind]["nll"])) for kind in KINDS]
        cells = [name, f"{sizes[name]:.0f}", f"{1e3 / passes[0]:.1f}", *(f"{ms:.1f}" for ms in passes)]
        cells += [*(f"{share:.1%}" for share in same), *(f"{value:.3f}" for value in perplexity)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    try:
        four_bits()
    except DovetailError as err:
        sys.exit(fail(str(err), err.exit_code))


if __name__ == "__main__":
    main()
