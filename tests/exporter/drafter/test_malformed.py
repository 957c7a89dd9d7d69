"""A malformed checkpoint is refused by `dovetail-export drafter` in one line, and the pair stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from safetensors.torch import load_file, save_file
from tests.models.formats import test_eagle as eagle
from tests.models.formats import test_eagle3 as eagle3
from torch import Tensor

from dovetail.exporter.cli.main import main
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.runtime.errors import SourceError

Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"
SIZES = {"vocab_size": 263}
LAYERS = {"eagle_aux_hidden_state_layer_ids": [1, 2]}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "eagle3": (
        eagle3.safeai(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]}, **SIZES),
        eagle3.weights(eagle3.FLAGS, taps=2, vocab=263),
    ),
    "speculators": (
        eagle3.speculators(layer=SIZES, **LAYERS), eagle3.weights(eagle3.ZERO, taps=2, vocab=263, embed=False)
    ),
    "eagle": (eagle.safeai(**SIZES), eagle.weights(eagle3.FLAGS, vocab=263)),
    "research": (eagle.safeai(**SIZES), eagle.weights(eagle3.FLAGS, vocab=263, gated=True)),
}  # fmt: skip


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return damage


def layer(**changes: Any) -> Damage:
    """Change the nested config of speculators."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        config(transformer_layer_config={**content["transformer_layer_config"], **changes})(folder)

    return damage


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS)

    return damage


def put(name: str, make: Callable[[Tensor], Tensor]) -> Damage:
    return tensors(lambda content: content.update({name: make(content.get(name, torch.zeros(2))).contiguous()}))


def swap(one: str, other: str) -> Damage:
    return tensors(lambda content: content.update({one: content[other], other: content[one]}))


def drop(name: str) -> Damage:
    return tensors(lambda content: content.pop(name))


def content(make: Callable[[bytes], bytes], name: str = WEIGHTS) -> Damage:
    return lambda folder: (folder / name).write_bytes(make((folder / name).read_bytes()))


def header(shape: list[int], end: int) -> bytes:
    """A safetensors file whose header says more than there is."""
    text = json.dumps({"fc.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(text)) + text


def shards(weight_map: dict[str, str], *names: str) -> Damage:
    """An index, and the same weights in files of these names."""

    def damage(folder: Path) -> None:
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        weights = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).write_bytes(weights)

    return damage


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / "pipe")
    (folder / WEIGHTS).symlink_to(folder / "pipe")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
Q = "midlayer.self_attn.q_proj.weight"
# what is wrong -> model, damage, part of the message
CASES: dict[str, tuple[str, Damage, str]] = {
    "truncated": ("eagle3", content(lambda data: data[:-100]), "cannot read"),
    "empty": ("eagle", content(lambda data: b""), "cannot read"),
    "a pointer of Git LFS": ("eagle", content(lambda data: LFS), "is a Git LFS pointer"),
    "a header of 4 EiB": ("eagle3", content(lambda data: struct.pack("<Q", 2**62) + data), "cannot read"),
    "a header of 90 MB": ("research", content(lambda data: struct.pack("<Q", 90_000_000) + data), "cannot read"),
    "a header that is no JSON": ("eagle3", content(lambda data: struct.pack("<Q", 8) + b"{[nonsen"), "cannot read"),
    "a shape of 2**80": ("eagle3", content(lambda data: header([2**40, 2**40], 64)), "cannot read"),
    "a tensor beyond the file": ("eagle", content(lambda data: header([2**20, 2**20], 2**42)), "cannot read"),
    "a symlink to a pipe": ("eagle3", pipe, "not a regular file"),
    "no weights": ("eagle3", lambda folder: (folder / WEIGHTS).unlink(), "holds no"),
    "a pickle": ("eagle", pickled, "--allow-pickle"),
    "two files and no index": ("eagle", lambda folder: (folder / "b.safetensors").write_bytes(b""), "2 files"),
    "an index out of the folder": ("eagle3", shards({"fc": "../../etc/passwd"}, "a.safetensors"), "etc/passwd"),
    "an index with a missing shard": ("eagle3", shards({"fc": "b.safetensors"}, "a.safetensors"), "lacks"),
    "an index of numbers": ("eagle3", shards({"fc": 3}, "a.safetensors"), "lacks 3"),  # type: ignore[dict-item]
    "a tensor in two shards": (
        "eagle3", shards({"a": "a.safetensors", "b": "b.safetensors"}, "a.safetensors", "b.safetensors"), "in two files"
    ),
    "a config that is a list": ("eagle3", content(lambda data: b"[1]", "config.json"), "holds a list"),
    "a config that is no JSON": ("eagle", content(lambda data: b"{", "config.json"), "cannot read"),
    "no config": ("research", lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "NaN": ("eagle3", put("norm.weight", lambda x: x * torch.nan), "hold"),
    "infinity": ("research", put("W_z", lambda x: x / 0), "hold"),
    "int8 weights": ("eagle3", put(Q, lambda x: x.to(torch.int8)), "is I8"),
    "an int8 embedding": ("eagle3", put("embed_tokens.weight", lambda x: x.to(torch.int8)), "is I8"),
    "an int8 head": ("eagle", put("lm_head.weight", lambda x: x.to(torch.int8)), "is I8"),
    "complex weights": ("eagle", put("fc.weight", lambda x: x.to(torch.complex64)), "is C64"),
    "scales of quantised weights": ("eagle3", put("fc.weight_scale", lambda x: x), "quantised"),
    "swapped keys": ("eagle3", swap(Q, "midlayer.self_attn.k_proj.weight"), "k_proj.weight is [32, 64]"),
    "swapped keys of the fusion": ("research", swap("W_1", "W_z"), "fusion.w1.weight is"),
    "fc too wide": ("eagle3", put("fc.weight", lambda x: torch.cat([x, x], 1)), "fc.weight is [32, 128]"),
    "fc of EAGLE too wide": ("eagle", put("fc.weight", lambda x: torch.cat([x, x], 1)), "fc.weight is [32, 128]"),
    "fc without axes": ("eagle3", put("fc.weight", lambda x: x[0, 0]), "fc.weight is []"),
    "fc of EAGLE without axes": ("eagle", put("fc.weight", lambda x: x[0, 0]), "no drafter that Dovetail reads"),
    "no last norm": ("eagle3", drop("norm.weight"), "norm.weight is missing"),
    "no hidden norm": ("eagle3", drop("midlayer.hidden_norm.weight"), "hidden_norm.weight is missing"),
    "no hidden norm of speculators": ("speculators", drop("layers.0.hidden_norm.weight"), "norm.weight is missing"),
    "a key too many": ("speculators", put("layers.7.x", lambda x: x), "layers.7.x is left over"),
    "a key too many of EAGLE": ("eagle", put("layers.0.bias", lambda x: x), "layers.0.bias is left over"),
    "no d2t": ("eagle3", drop("d2t"), "d2t is missing"),
    "d2t out of range": ("speculators", put("d2t", lambda x: x + 263), "d2t"),
    "d2t below 0": ("eagle3", put("d2t", lambda x: x - 263), "d2t"),
    "d2t with a token twice": ("eagle3", put("d2t", lambda x: -torch.arange(len(x))), "names a token twice"),
    "d2t of floats": ("eagle3", put("d2t", lambda x: x.float()), "not whole numbers"),
    "d2t too short": ("eagle3", put("d2t", lambda x: x[1:]), "d2t is [23]"),
    "d2t without axes": ("eagle3", put("d2t", lambda x: x[0]), "d2t is []"),
    "t2d of other tokens": ("speculators", put("t2d", lambda x: ~x), "mark different tokens"),
    "a layer below 0": ("eagle3", config(eagle_config={"eagle_aux_hidden_state_layer_ids": [-1, 1]}), "-1"),
    "a layer beyond the target": ("eagle3", config(eagle_config=LAYERS), "layer 2"),
    "a layer twice": ("eagle3", config(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 1]}), "twice"),
    "the embedding as a layer": ("speculators", config(eagle_aux_hidden_state_layer_ids=[0, 1]), "input of layer 0"),
    "layers that are a text": ("speculators", config(eagle_aux_hidden_state_layer_ids="12"), "no list of layers"),
    "layers of texts": ("speculators", config(eagle_aux_hidden_state_layer_ids=["1", "2"]), "'1'"),
    "layers that the target lacks by default": ("eagle3", config(eagle_config=None), "a target of 4 layers, not 2"),
    "eagle_config that is a list": ("eagle3", config(eagle_config=[1]), "no object"),
    "a layer config that is a list": ("speculators", config(transformer_layer_config=[]), "no object"),
    "heads that do not divide": ("eagle3", config(num_key_value_heads=3), "no layout"),
    "an odd head": ("eagle", config(head_dim=7), "no layout"),
    "no heads": ("research", config(num_attention_heads=0), "num_attention_heads 0"),
    "another activation": ("eagle", config(hidden_act="gelu"), "gelu"),
    "another activation of speculators": ("speculators", layer(hidden_act="gelu"), "gelu"),
    "blocks of another kind": ("speculators", layer(model_type="mamba"), "mamba"),
    "an unknown RoPE": ("eagle", config(rope_scaling={"type": "helix", "factor": 2.0}), "helix"),
    "an unknown RoPE that is a list": ("eagle3", config(rope_scaling={"type": ["linear"], "factor": 2.0}), "RoPE"),
    "an incomplete RoPE": ("eagle3", config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "incomplete"),
    "a RoPE of factor 0": ("research", config(rope_scaling={"rope_type": "linear", "factor": 0.0}), "rope_scaling"),
    "another vocabulary": ("eagle3", config(vocab_size=32000), "vocabulary of 32000"),
    "another vocabulary of EAGLE": ("eagle", config(vocab_size=32000), "vocabulary of 32000"),
    "another width": ("eagle", config(hidden_size=64), "width 64"),
    "another width of EAGLE-3": ("eagle3", config(target_hidden_size=64), "width 64"),
    "a width that is a text": ("research", config(hidden_size="32"), "hidden_size '32'"),
    "a draft vocabulary of 2**40": ("eagle3", config(draft_vocab_size=2**40), "draft_vocab_size"),
    "a width of 2**40": ("eagle", config(hidden_size=2**40), "hidden_size"),
    "2**40 layers": ("speculators", layer(num_hidden_layers=2**40), "num_hidden_layers"),
    "64 layers of 2**22": ("eagle", config(num_hidden_layers=64, intermediate_size=2**22), "does not fit its config"),
    "64 wide layers of speculators": (
        "speculators", layer(num_hidden_layers=64, intermediate_size=2**22), "does not fit its config"
    ),
    "a context of 2**40": ("research", config(max_position_embeddings=2**40), "max_position_embeddings"),
    "a sliding window": (
        "eagle3", config(sliding_window=8, use_sliding_window=True), "sliding_window 8 is not supported"
    ),
    "layer types that are a number": ("eagle", config(sliding_window=8, layer_types=3), "layer_types"),
    "a switch that is a text": ("eagle3", config(norm_output="yes"), "neither true nor false"),
    "a very long text": ("eagle3", config(hidden_act="x" * 10_000), "hidden_act"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_checkpoint_is_refused(
    case: str, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, damage, said = CASES[case]
    folder = eagle3.write(tmp_path / "drafter", *MODELS[model])
    damage(folder)
    before = digest(tiny_pair)
    code = main(["drafter", str(tiny_pair), "--checkpoint", str(folder)])
    message = capsys.readouterr().err.strip().splitlines()[-1].replace(str(tmp_path), "")
    assert code == SourceError.exit_code, message
    assert said in message and len(message) < 500
    assert digest(tiny_pair) == before and not list(tiny_pair.parent.glob(".*.build/pair/drafter"))


class Code:
    """A pickle of this object runs code when it is read without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "made",
    [
        "code",
        "code beside weights",
        "code in the old format",
        "a list",
        "a number",
        "nested",
        "no pickle",
        "cut",
        "empty",
    ],
)
def test_a_pickle_that_is_allowed_is_read_for_its_weights_alone(made: str, tiny_pair: Path, tmp_path: Path) -> None:
    settings, weights = MODELS["eagle"]
    folder, marker = eagle3.write(tmp_path / "drafter", settings, weights), tmp_path / "marker"
    (folder / WEIGHTS).unlink()
    file = folder / "pytorch_model.bin"
    if made == "code in the old format":
        file.write_bytes(pickle.dumps(Code(marker)))
    elif made in ("no pickle", "empty"):
        file.write_bytes(b"nonsense" if made == "no pickle" else b"")
    else:
        objects: dict[str, object] = {
            "code": Code(marker), "code beside weights": {**weights, "x": Code(marker)}, "a number": 3,
            "a list": list(weights.values()), "nested": {"state_dict": weights}, "cut": weights,
        }  # fmt: skip
        torch.save(objects[made], file)
    if made == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    before = digest(tiny_pair)
    with pytest.raises(SourceError) as error:
        add_drafter(folder, tiny_pair, allow_pickle=True)
    assert "\n" not in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) < 500
    assert not marker.exists() and digest(tiny_pair) == before


def test_weights_in_a_pickle_are_those_in_safetensors(tiny_pair: Path, tmp_path: Path) -> None:
    from dovetail.exporter.drafter.export import load_drafter

    folder = eagle3.write(tmp_path, *MODELS["eagle"])
    safe = load_drafter(folder, tiny_pair / "target").state_dict()
    pickled(folder)
    for name, tensor in load_drafter(folder, tiny_pair / "target", allow_pickle=True).state_dict().items():
        assert tensor.equal(safe[name])


def digest(folder: Path) -> str:
    """Of the names and contents of all files."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(file).encode() + file.read_bytes())
    return total.hexdigest()
