"""DFlash drafts and texts of Dovetail against those of optimum-intel and openvino-genai, on a tiny random target.

    python tests/bench/dflash_peers.py --optimum ENV/bin/optimum-cli --genai PEERS/bin/python

ENV has optimum-intel, diffusers and einops; PEERS has openvino-genai.  The script writes a Qwen3 target and DFlash
checkpoints in z-lab's layout.  One drafter is taught the target's own answers, so that the target accepts its tokens.
Both sides export every checkpoint, and draft after the same random contexts.  Then both engines write answers.
Fails if a draft in float32 differs, or a text from plain decoding.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional as F

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.drafter import block_graph
from dovetail.exporter.drafter.export import load_drafter, save
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.exporter.target.convert import WeightOptions
from dovetail.exporter.target.export import TargetOptions, export_target
from dovetail.models.dflash import DFlash
from dovetail.models.formats.layout import flat_parameters
from dovetail.runtime.drafter.open import open_cuda, open_drafter
from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.engine import Engine
from dovetail.runtime.pair.manifest import Manifest, read_manifest
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.limits import TreeLimits

FloatArray = NDArray[np.float32]
VOCABULARY, WIDTH, DEPTH, END = 264, 32, 4, 263
CONTEXTS, PROMPTS, TOKENS = 20, 6, 60
TIE = 1e-3  # logits
SEQ = 1
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@dataclass(frozen=True)
class Case:
    """A checkpoint.  flags: see dflash_reference.Flags.  alike: whether both sides read its config alike."""

    name: str
    flags: dict[str, Any]
    alike: bool = True
    taught: bool = False


CASES = (
    Case("a window, `causal` false", {"sliding": (True, False), "window": 9, "causal": False, "block": 6}),
    Case("a window, `causal` not set", {"sliding": (True, False), "window": 9, "block": 6}, alike=False),
    Case(
        "full attention, taught", {"block": 8, "taps": (2, 0, 1)}, taught=True
    ),  # last, so that the texts follow the table
)


@dataclass(frozen=True)
class Context:
    """taps: [n, taps x H], outputs of target layers side by side.  token: the known token after them."""

    taps: FloatArray
    token: int


@dataclass
class Agreement:
    """Drafted tokens against the peer's logits, where tokens within TIE of the best are as good as the best."""

    positions: int = 0
    equal: int = 0
    margin: float = 0.0  # by how much the peer prefers its own token, at worst
    worst: float = 0.0  # largest difference of a logit, where there are logits

    def add(self, tokens: Sequence[int], peer: FloatArray) -> None:
        """tokens: [P].  peer: [P, V]."""
        margins = peer.max(axis=1) - peer[np.arange(len(peer)), tokens]
        self.positions, self.equal = self.positions + len(peer), self.equal + int((margins <= TIE).sum())
        self.margin = max(self.margin, float(margins.max()))

    def add_logits(self, ours: FloatArray, peer: FloatArray) -> None:
        self.add(ours.argmax(axis=1).tolist(), peer)
        self.worst = max(self.worst, float(np.abs(ours - peer).max()))

    @property
    def same(self) -> bool:
        return self.positions > 0 and self.equal == self.positions and self.worst < TIE

    def __str__(self) -> str:
        return f"{self.equal} of {self.positions}" + (f" ({self.margin:.2f})" if self.equal < self.positions else "")


@dataclass
class Peer:
    """A drafter as optimum-cli exports it: block embeddings and taps in, hidden states of the drafted tokens out."""

    request: ov.InferRequest
    embed: FloatArray  # [V, H]
    head: FloatArray  # [V, H]
    block: int
    mask: int
    masks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.masks = [self.mask] * (self.block - 1)

    @classmethod
    def load(cls, folder: Path, target: Any) -> Peer:
        config = json.loads((folder / "config.json").read_text())
        model = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", FLOAT32)
        embed, head = (layer.weight.detach().numpy() for layer in (target.model.embed_tokens, target.lm_head))
        return cls(
            model.create_infer_request(), embed, head, config["block_size"], config["dflash_config"]["mask_token_id"]
        )

    def logits(self, context: Context) -> FloatArray:
        """[P, V]"""
        length = len(context.taps) + self.block
        self.request.reset_state()
        found = self.request.infer(
            {
                "inputs_embeds": self.embed[[context.token, *self.masks]][None],
                "hidden_states": context.taps[None],
                "position_ids": np.arange(length)[None],
                "attention_mask": np.ones((1, length), np.int64),
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        hidden: FloatArray = found["last_hidden_state"][0]
        return hidden @ self.head.T


def beside(name: str) -> ModuleType:
    """Import a file of the tests by its path from tests/."""
    path = Path(__file__).resolve().parents[1] / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_target(folder: Path) -> Any:
    """Write a random Qwen3 with a byte-level tokenizer, and return it."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Tokens
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<|{number}|>" for number in range(len(pieces), VOCABULARY)]
    tokens = Tokens(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken(filler, special=True) for filler in fillers])
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=fillers[-1]).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=END,
        bos_token_id=END, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def taps_of(target: Any, ids: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
    """Outputs of the target's layers for `ids`: [n, layers x H]."""
    with torch.no_grad():
        states = target(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return torch.cat([states[layer + 1][0] for layer in layers], dim=-1)  # state 0 is the embedding


def answers(target: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Random prompts and the target's greedy answers, by transformers."""
    rng = np.random.default_rng(5)
    for _ in range(PROMPTS):
        prompt = rng.integers(0, 94, 12).tolist()  # visible ASCII, which decodes to itself
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = target.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, pad_token_id=END
            )
        yield prompt, out[0, len(prompt) :].tolist()


def teach(drafter: DFlash, target: Any, steps: int = 150, rows: int = 6) -> None:
    """Fit the drafter to the target's answers."""
    texts = [(prompt, prompt + answer) for prompt, answer in answers(target)]
    known = [(torch.tensor(ids), taps_of(target, ids, drafter.config.taps)) for _, ids in texts]
    ahead = drafter.config.positions
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        loss = torch.zeros(())
        for _ in range(rows):
            ids, taps = known[rng.integers(len(known))]
            place = int(rng.integers(12, len(ids) - ahead))
            logits = drafter(drafter.mix(taps[:place]), ids[place : place + 1])
            loss = loss + F.cross_entropy(logits, ids[place + 1 : place + 1 + ahead], label_smoothing=0.1) / rows
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def contexts(target: Any, layers: Sequence[int]) -> list[Context]:
    rng = np.random.default_rng(9)
    texts = [rng.integers(0, VOCABULARY, rng.integers(2, 90)).tolist() for _ in range(CONTEXTS)]
    return [Context(taps_of(target, ids[:-1], layers).numpy(), ids[-1]) for ids in texts]


def drafted(session: Drafter, features: FloatArray, token: int, ahead: int) -> list[int]:
    """The best token of each position.  A draft before the second half of the context must not matter."""
    half, tokens = len(features) // 2, np.full(len(features), token)
    chain = TreeLimits(width=ahead + 1, depth=ahead, top_k=1, lookup=0)
    for begin, end in ((0, half), (half, len(features))):
        session.extend(SEQ, tokens[begin:end], features[begin:end])
        if end > begin:
            tree = session.propose(SEQ, chain)
    session.rewind(SEQ, 0)
    return tree.tokens[1:].tolist()


def in_float32(pair: Path, module: DFlash) -> Manifest:
    """Add a float32 graph to the pair's drafter; the manifest then names it for the CPU."""
    manifest = read_manifest(pair)
    facts = manifest.needed_drafter
    save(
        block_graph.to_onnx(module, torch.float32, slots=facts.tree_slots, top_k=facts.top_k),
        pair / "drafter" / "f32.onnx",
    )
    return replace(manifest, drafter=replace(facts, files={**facts.files, "cpu": "drafter/f32.onnx"}))


def compare(peer: Peer, module: DFlash, sessions: dict[str, Drafter], asked: list[Context]) -> dict[str, Agreement]:
    """Agreement of the torch module, and of each session, with the peer."""
    found = {name: Agreement() for name in ("torch", *sessions)}
    for context in asked:
        want = peer.logits(context)
        with torch.no_grad():
            features = module.mix(torch.from_numpy(context.taps))
            ours = module(features, torch.tensor([context.token])).numpy()
        found["torch"].add_logits(ours, want)
        for name, session in sessions.items():
            found[name].add(drafted(session, features.numpy(), context.token, len(want)), want)
    return found


def optimum(command: str, model: Path, out: Path) -> None:
    arguments = ["--task", "text-generation-with-past", "--weight-format", "fp32", "--trust-remote-code"]
    run = [command, "export", "openvino", "-m", str(model), *arguments, str(out)]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"optimum-cli fails: {done.stderr.strip().splitlines()[-1]}")


def texts(pair: Path, exact: Manifest, target: Any, genai: str, folders: tuple[Path, Path]) -> bool:
    """Print how often each engine's text is the plain text, and its passes.  folders: optimum's target and drafter."""
    peers, ahead = beside("bench/peers.py"), exact.needed_drafter.positions
    chain = TreeLimits(width=ahead + 1, depth=ahead, top_k=1, lookup=0)
    loaded, tokenizer = OpenVINOTarget.load(pair, exact, ov_config=FLOAT32), Tokenizer.from_folder(pair / "target")
    writer = Engine(loaded, open_drafter(pair, exact, device="cpu"), tokenizer, tree=chain)
    same = {name: 0 for name in ("transformers", "Dovetail", "openvino-genai")}
    passes = {"Dovetail": 0, "openvino-genai": 0}
    count = 0
    with peers.Worker.start(genai, "openvino-genai, DFlash", *folders) as worker:
        for prompt, answer in answers(target):
            text = tokenizer.decode(prompt)
            if list(tokenizer.encode(text)) != prompt:
                raise click.ClickException(f"the tokenizer reads {prompt} as {list(tokenizer.encode(text))}")
            plain = list(writer.generate(text, TOKENS, raw=True, speculate=False).token_ids)
            writer.reset()
            ours = writer.generate(text, TOKENS, raw=True)
            writer.reset()
            theirs = worker.ask(prompt, TOKENS)
            same["transformers"] += answer == plain
            same["Dovetail"] += list(ours.token_ids) == plain
            same["openvino-genai"] += theirs["tokens"] == plain
            passes["Dovetail"] += ours.metrics.rounds
            passes["openvino-genai"] += theirs["rounds"]
            count += len(plain)
    click.echo(
        f"\n{count} tokens of {PROMPTS} answers\n\n| engine | equal to plain decoding | passes |\n|---|---:|---:|"
    )
    for name, number in same.items():
        click.echo(f"| {name} | {number} of {PROMPTS} | {passes.get(name, count - PROMPTS)} |")
    return same["Dovetail"] == same["openvino-genai"] == PROMPTS  # transformers keeps keys and values in float32


@click.command()
@click.option("--optimum", "command", required=True, help="optimum-cli of an environment with diffusers and einops.")
@click.option("--genai", help="Python of an environment with openvino-genai; without it no texts are compared.")
def main(command: str, genai: str | None) -> None:
    torch.set_num_threads(1)  # the models are tiny
    reference, devices = beside("models/dflash_reference.py"), beside("conftest.py")
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        with quiet():
            target = write_target(work / "target")
        export_target(
            str(work / "target"), work / "bare", options=TargetOptions(weights=WeightOptions(weight_format="fp32"))
        )
        optimum(command, work / "target", work / "ir" / "target")
        click.echo("| checkpoint | largest difference of a logit | torch | float32 | float16 | INT8 |")
        click.echo("|---|---:|---:|---:|---:|---:|")
        for number, case in enumerate(CASES):
            folder = work / str(number)
            flags = reference.Flags(vocabulary=VOCABULARY, hidden=WIDTH, depth=DEPTH, **case.flags)
            checkpoint = reference.write(folder / "checkpoint", flags)
            if case.taught:
                module = load_drafter(checkpoint, work / "bare" / "target")
                assert isinstance(module, DFlash)
                teach(module, target)
                save_file(
                    {name: value.detach().contiguous() for name, value in flat_parameters(module).items()},
                    checkpoint / "model.safetensors",
                )
            optimum(command, checkpoint, folder / "ir" / "target")
            pair = folder / "pair"
            shutil.copytree(work / "bare", pair)
            add_drafter(checkpoint, pair)
            module = load_drafter(checkpoint, pair / "target")
            assert isinstance(module, DFlash)
            manifest, exact = read_manifest(pair), in_float32(pair, module)
            sessions: dict[str, Drafter] = {
                "float32": open_drafter(pair, exact, device="cpu"),
                "float16": open_cuda(pair, manifest, new_device=devices.HostDevice),
                "int8": open_drafter(pair, manifest, device="cpu"),
            }
            peer = Peer.load(folder / "ir" / "target", target)
            found = compare(peer, module, sessions, contexts(target, flags.taps))
            click.echo(f"| {case.name} | {found['torch'].worst:.1e} | {' | '.join(map(str, found.values()))} |")
            if [found[name].same for name in ("torch", "float32")] != [case.alike] * 2:
                failures.append(f"drafts of {case.name} are {'not ' if case.alike else ''}the same")
            if case.taught and genai and not texts(pair, exact, target, genai, (work / "ir", folder / "ir")):
                failures.append("a text is not the plain text")
    if failures:
        raise click.ClickException("; ".join(failures))


if __name__ == "__main__":
    main()
