"""Memory of a pair and of an export: peaks of a whole tree of processes, sampled from outside.

    python tests/bench/memory.py pair PAIR [PAIR ...]
    python tests/bench/memory.py checkpoint FOLDER TOKENIZER
    python tests/bench/memory.py run -- dovetail-export target FOLDER OUT --weight-format int4

`pair` opens each pair in two fresh processes: one answers alone, one answers four prompts together.  The peak is the
kernel's own record (VmHWM) over opening and all answers.  It stands beside what the run cannot do without: the
target's weights as stored, the drafter's files for the CPU, and the KV of the longest text (together: of the four
longest, though shorter ones stay too, for prompts that begin alike).  Python, the engines and their buffers are in the
peak alone.  Pages of mapped files count while they are mapped.

The pair's files leave the page cache before each process starts, so that the bytes read from disk are its own.
`checkpoint` writes random bfloat16 weights in the shape of Qwen2.5-7B, one tensor at a time.
`run` prints the peaks of any command, by the stages that it reports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep
from typing import IO, Any

import click

from dovetail.runtime.doctor.memory import target_kv_bytes
from dovetail.runtime.pair.known import resolve_pair
from dovetail.runtime.pair.layout import TARGET
from dovetail.runtime.pair.manifest import Manifest, read_manifest

INTERVAL = 0.1  # seconds between samples; VmHWM misses nothing between them
STAGE = "stage: "  # begins a line of a worker that names what comes next
TEXTS = 4  # at a time
SHORT = 12  # prompts that are asked together with TEXTS long ones
LONG = 1000  # tokens
ANSWER = 64  # tokens
PROMPTS = Path(__file__).with_name("own_prompts.jsonl")
LONG_TEXT = Path(__file__).with_name("long_prompts.txt")
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
NOISE = 2**23  # numbers of a checkpoint that are drawn, and repeated
MIB = 2**20


@dataclass
class Peak:
    """The most memory of a tree of processes, in bytes. Anonymous and file pages may peak at different times."""

    total: int = 0
    anonymous: int = 0
    file: int = 0
    seconds: float = 0.0

    def add(self, anonymous: int, file: int) -> None:
        self.total = max(self.total, anonymous + file)
        self.anonymous, self.file = max(self.anonymous, anonymous), max(self.file, file)


@dataclass
class Watched:
    """What a command took. hwm: the largest VmHWM of one process, in bytes. last: its last line of JSON."""

    stages: dict[str, Peak] = field(default_factory=dict)
    hwm: int = 0
    last: dict[str, Any] = field(default_factory=dict)


@click.group()
def main() -> None:
    """Measure memory."""


@main.command()
@click.argument("pairs", metavar="PAIR...", nargs=-1, required=True)
@click.option("--warm", is_flag=True, help="Leave the pair's files in the page cache.")
def pair(pairs: tuple[str, ...], warm: bool) -> None:
    """Open each PAIR alone and with four texts, and print a table."""
    columns = (
        "target", "texts", "weights + KV + drafter, MiB", "peak RSS, MiB", "ratio", "anonymous, of files at most, MiB",
        "opened in, s", "RSS then, MiB", "read from disk: opening, all, MiB", "of files, MiB",
    )  # fmt: skip
    click.echo("| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    for name in pairs:
        folder = resolve_pair(name)
        for mode in ("alone", "together"):
            if not warm:
                evict(folder)
            found = watch([sys.executable, __file__, "worker", str(folder), mode])
            click.echo(row(folder, mode, found))


def row(folder: Path, mode: str, found: Watched) -> str:
    manifest, facts = read_manifest(folder), found.last
    weights, drafter, kv = sizes(folder, manifest, facts["tokens"])
    needed = weights + drafter + kv
    peaks = [peak for name, peak in found.stages.items() if name != "import"]
    cells = (
        folder.name, "1" if mode == "alone" else str(TEXTS),
        f"{weights / MIB:.0f} + {kv / MIB:.0f} + {drafter / MIB:.0f} = {needed / MIB:.0f}",
        f"{found.hwm / MIB:.0f}", f"{found.hwm / needed:.2f}",
        f"{max(peak.anonymous for peak in peaks) / MIB:.0f}, {max(peak.file for peak in peaks) / MIB:.0f}",
        f"{facts['open_seconds']:.1f}", f"{facts['open_rss'] / MIB:.0f}",
        f"{facts['open_read'] / MIB:.0f}, {facts['read'] / MIB:.0f}",
        f"{sum(entry.size for entry in manifest.files.values()) / MIB:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def sizes(folder: Path, manifest: Manifest, tokens: int) -> tuple[int, int, int]:
    """Return the bytes of the target's weights, of the drafter's files on the CPU, and of the KV of `tokens` tokens."""
    stored = [file for file in manifest.files if file.startswith(f"{TARGET}/") and file.endswith(".bin")]
    weights = sum(manifest.files[file].size for file in stored)
    drafter = sum(entry.size for entry in manifest.drafter_files("cpu")) if manifest.drafter else 0
    kv = (target_kv_bytes(folder, manifest) or 0) * tokens
    if facts := manifest.drafter:
        kv += facts.blocks * 2 * facts.num_kv_heads * facts.head_size * 4 * tokens
    return weights, drafter, kv


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("mode")
def worker(folder: Path, mode: str) -> None:
    """Answer, and print stages and a line of facts."""
    say("import")
    from dovetail.runtime import BatchEngine, Engine

    say("open")
    begin, read = perf_counter(), disk_bytes()
    engine: Any = (
        Engine.from_pretrained(folder, drafter_device="cpu")
        if mode == "alone"
        else BatchEngine.from_pretrained(folder, drafter_device="cpu", slots=TEXTS)
    )
    facts = {"open_seconds": perf_counter() - begin, "open_read": disk_bytes() - read, "open_rss": held("VmRSS:")}
    prompts = [str(json.loads(line)["prompt"]) for line in PROMPTS.read_text("utf-8").splitlines()]
    text = engine.tokenizer.encode(LONG_TEXT.read_text("utf-8"), add_special_tokens=False)
    size = min(LONG, engine.max_context // 2 - ANSWER)
    long = [engine.tokenizer.decode(text[at * size :][:size]) for at in range(TEXTS)]
    if mode == "alone":
        for stage, asked in (("short", prompts[:1]), ("long", long[:1]), ("others", prompts[1:])):
            say(f"prompts: {stage}")
            for prompt in asked:
                engine.generate(prompt, ANSWER, temperature=0.0)
        tokens = size + ANSWER
    else:
        say(f"prompts: {TEXTS} at a time")
        asked = [*prompts[:SHORT], *long]
        for each in asked:
            engine.submit(engine.ask(each, ANSWER, temperature=0.0))
        while not engine.idle:
            engine.step()
        tokens = TEXTS * (size + ANSWER)
    facts |= {"tokens": tokens, "read": disk_bytes() - read, "hwm": held("VmHWM:")}
    print(json.dumps(facts), flush=True)


def say(stage: str) -> None:
    print(STAGE + stage, flush=True)


def disk_bytes() -> int:
    """Return the bytes that this process had read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def held(name: str, process: int | str = "self") -> int:
    """Return a line of a process's status in bytes, 0 if it is missing."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def evict(folder: Path) -> None:
    """Let the files of a folder leave the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # changed pages would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 checkpoint; by default those of Qwen2.5-7B."""

    layers: int = 28
    hidden: int = 3584
    intermediate: int = 18944
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152064


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("tokenizer", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--layers", type=click.IntRange(1), default=Shape.layers, show_default=True)
def checkpoint(folder: Path, tokenizer: Path, layers: int) -> None:
    """Write random weights in the shape of Qwen2.5-7B to FOLDER, with the tokenizer files of another folder."""
    write_checkpoint(folder, Shape(layers), tokenizer)


def write_checkpoint(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Write one file for each of the two tables and each layer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in COPIED:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    torch.manual_seed(0)
    noise, places = (0.02 * torch.randn(NOISE)).bfloat16(), dict[str, str]()

    def random(*size: int) -> torch.Tensor:
        """Return noise that begins at another place for each tensor, because normal numbers take long."""
        noise.copy_(noise.roll(7919))
        return noise.repeat(-(-prod(size) // NOISE))[: prod(size)].reshape(size).contiguous()

    def save(tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{len({*places.values()}):05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    head = shape.hidden // shape.heads
    save({"model.embed_tokens.weight": random(shape.vocabulary, shape.hidden), "model.norm.weight": ones})
    save({"lm_head.weight": random(shape.vocabulary, shape.hidden)})
    for layer in range(shape.layers):
        tensors = {f"{norm}_layernorm.weight": ones.clone() for norm in ("input", "post_attention")}
        for name, rows in (("q", shape.hidden), ("k", shape.kv_heads * head), ("v", shape.kv_heads * head)):
            tensors |= {f"self_attn.{name}_proj.weight": random(rows, shape.hidden)}
            tensors |= {f"self_attn.{name}_proj.bias": random(rows)}
        tensors |= {"self_attn.o_proj.weight": random(shape.hidden, shape.hidden)}
        tensors |= {f"mlp.{name}_proj.weight": random(shape.intermediate, shape.hidden) for name in ("gate", "up")}
        tensors |= {"mlp.down_proj.weight": random(shape.hidden, shape.intermediate)}
        save({f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@main.command("run", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True)
def run_command(command: tuple[str, ...]) -> None:
    """Run COMMAND and print its peaks by stage."""
    found = watch([*command])
    click.echo("| stage | seconds | peak RSS, MiB | anonymous, MiB | of files, MiB |\n|---|---:|---:|---:|---:|")
    for name, peak in found.stages.items():
        cells = (f"{size / MIB:.0f}" for size in (peak.total, peak.anonymous, peak.file))
        click.echo(f"| {name} | {peak.seconds:.0f} | " + " | ".join(cells) + " |")
    click.echo(f"\nLargest VmHWM of a process: {found.hwm / MIB:.0f} MiB")


def watch(command: list[str]) -> Watched:
    """Run a command and sample its tree of processes. A line of its output begins a stage.

    Raises CalledProcessError.
    """
    found, stage = Watched(), ["start"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        readers = [Thread(target=follow, args=(stream, stage, found)) for stream in (process.stdout, process.stderr)]
        for reader in readers:
            reader.start()
        last, known = perf_counter(), {process.pid}
        while process.poll() is None:
            peak = found.stages.setdefault(stage[0], Peak())
            there = {*tree(process.pid)}
            peak.add(*sample(there & known, found))  # a process that has just been forked has its parent's memory
            known = there
            sleep(INTERVAL)
            now = perf_counter()
            peak.seconds, last = peak.seconds + now - last, now
        for reader in readers:
            reader.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found


def sample(processes: set[int], found: Watched) -> tuple[int, int]:
    """Return the bytes of anonymous and of file pages of some processes."""
    anonymous = file = 0
    for process in processes:
        with suppress(OSError):  # it has just ended
            anonymous += held("RssAnon:", process) + held("RssShmem:", process)
            file += held("RssFile:", process)
            found.hwm = max(found.hwm, held("VmHWM:", process))
    return anonymous, file


def follow(stream: IO[str], stage: list[str], found: Watched) -> None:
    """Read a command's lines: its stages, and the facts of a worker."""
    for line in stream:
        if line.startswith("{"):
            found.last = json.loads(line)
            found.hwm = max(found.hwm, int(found.last.get("hwm", 0)))
        elif text := line.strip():
            stage[0] = text.removeprefix(STAGE)


def tree(root: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


if __name__ == "__main__":
    main()
