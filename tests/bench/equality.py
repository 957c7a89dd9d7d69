"""Whether a pair's greedy text is that of its checkpoint in transformers, and speculation changes no token.

    python tests/bench/equality.py PAIR CHECKPOINT --tokens 64

CHECKPOINT is the folder or the GGUF file that PAIR was exported from, with --weight-format fp32: other weights are
not those of the checkpoint.  Activations are float32 on both sides, keys and values float16 in the pair.  Eight
prompts are completed as they stand, without a chat template.  Where two texts part, the margin says by how much
transformers prefers its own token there, in logits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.target.gguf.header import read_model
from dovetail.exporter.target.gguf.weights import write_checkpoint
from dovetail.runtime import Engine, Tokenizer, TreeLimits

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
TREE = TreeLimits(width=12, depth=5, top_k=3, lookup=8)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at 100 degrees Celsius. Ice melts at",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,",
    "Die Katze sitzt auf dem Dach und",
    "Question: What is a prime number?\nAnswer:",
    "Red is a color. Blue is a color. Green is a color. Yellow is",
)


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--tokens", default=64, show_default=True)
def main(pair: Path, checkpoint: Path, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if checkpoint.is_file():
            write_checkpoint(read_model(checkpoint), Path(scratch))
            checkpoint = Path(scratch)
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    parted, changed, rounds, made = 0, 0, 0, 0
    tokenizer = Tokenizer.from_folder(pair / "target")
    with Engine.from_pretrained(pair, tree=TREE, ov_config=EXACT) as engine:
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt)
            plain = list(engine.generate(prompt, tokens, raw=True, speculate=False).token_ids)
            drafted = engine.generate(prompt, tokens, raw=True)
            with torch.no_grad():
                rows = model(torch.tensor([[*ids, *plain[:-1]]])).logits[0, len(ids) - 1 :].numpy()
            margin = rows.max(axis=1) - rows[np.arange(len(plain)), plain]
            differs = np.flatnonzero(margin > 0)
            parted += bool(len(differs))
            changed += list(drafted.token_ids) != plain
            rounds, made = rounds + drafted.metrics.rounds, made + len(plain)
            where = f"parts at token {differs[0]}, margin {margin[differs[0]]:.4f}" if len(differs) else "equal"
            click.echo(f"{where}; {prompt!r} -> {tokenizer.decode(plain)[:60]!r}")
    click.echo(f"{len(PROMPTS) - parted} of {len(PROMPTS)} texts of {tokens} tokens equal transformers' greedy text")
    click.echo(f"{len(PROMPTS) - changed} of {len(PROMPTS)} equal with speculation: {made} tokens in {rounds} rounds")


if __name__ == "__main__":
    main()
