"""A drafter format from outside: one registry entry, and its checkpoint runs like any other.

The format differs from Dovetail's in everything that a format may decide: the layout of its config,
the names of its tensors, how feature and embedding are combined (with a bias), its layer, its RoPE,
a head and a norm of its own, and draft ids as offsets.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.exporter.cli.main import main
from dovetail.exporter.drafter import shrink
from dovetail.exporter.drafter.export import load_drafter
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.exporter.train.plan import TrainPlan
from dovetail.exporter.train.run import train
from dovetail.models.checkpoint import Stored, load_exactly, read_safetensors
from dovetail.models.drafter import DraftModel, DraftShape
from dovetail.models.formats import registry
from dovetail.models.formats.format import Config, Format, Needs, TargetParts
from dovetail.models.layers import DraftLayer, RMSNorm, rope_table, rotate
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.drafter.vram import LEAST_CONTEXT, plan, plan_pair
from dovetail.runtime.errors import SourceError, TrainError
from dovetail.runtime.pair.manifest import read_manifest

SIZES = {"width": 32, "vocabulary": 263, "draft": 48, "heads": 2, "head": 16, "theta": 500.0}
TREE = TreeLimits(width=8, depth=4, top_k=3, lookup=0)


class PebbleLayer(nn.Module):
    """Attention alone, with a norm of queries and keys and no feed-forward."""

    def __init__(self, width: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads, self.head = heads, head
        self.q, self.k, self.v = (nn.Linear(width, heads * head, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head, width)
        self.qk_norm = RMSNorm(head, 1e-6)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(self.qk_norm(self.q(x).unflatten(-1, (self.heads, self.head))), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (project(x).unflatten(-1, (self.heads, self.head)) for project in (self.k, self.v))
        return rotate(self.qk_norm(k), cos, sin), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        out: Tensor = x + self.o(attended.flatten(-2))
        return out


class Pebble(DraftModel):
    """One layer over a projection of feature and embedding; the head is its own, behind a norm."""

    def __init__(self, sizes: Mapping[str, Any], embed_tokens: Tensor, head: Tensor, d2t: Tensor) -> None:
        width, heads, size = sizes["width"], sizes["heads"], sizes["head"]
        shape = DraftShape(sizes["vocabulary"], sizes["draft"], width, width, 1, heads, heads, size, 200)
        super().__init__(shape, embed_tokens, head, d2t)
        self.theta, self.size = sizes["theta"], size
        self.down = nn.Linear(2 * width, width)
        self.layer = PebbleLayer(width, heads, size)
        self.norm = RMSNorm(width, 1e-6)

    def combine(self, f: Tensor, e: Tensor) -> Tensor:
        out: Tensor = self.down(torch.cat([e, f], dim=-1))
        return out

    def blocks(self) -> Sequence[DraftLayer]:
        return [self.layer]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(self.theta, self.size, positions)

    def logits(self, g: Tensor) -> Tensor:
        return super().logits(self.norm(g))


def read(stored: Stored, target: TargetParts) -> Pebble:
    sizes, tensors = stored.config["pebble"], stored.tensors()
    d2t, head = tensors.pop("offsets").long(), tensors.pop("lm_head.weight").float()
    assert target.config["hidden_size"] == sizes["width"]
    module = Pebble(sizes, target.embed_tokens, head, torch.arange(len(d2t)) + d2t)
    load_exactly(module, tensors, stored.folder)
    return module


def needs(stored: Stored, target: Config) -> Needs:
    sizes = stored.config["pebble"]
    return Needs("a pebble", sizes["width"], sizes["vocabulary"], sizes["draft"])


PEBBLE = Format(
    name="pebble",
    matches=lambda config, shapes: config.get("architectures") == ["PebbleForDrafting"],
    describe=lambda config: f"a pebble with {config['pebble']['heads']} heads",
    read=read,
    needs=needs,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    width, draft = SIZES["width"], SIZES["draft"]
    ids = torch.randperm(SIZES["vocabulary"])[:draft].sort().values
    module = Pebble(SIZES, torch.zeros(SIZES["vocabulary"], width), torch.zeros(draft, width), ids)
    tensors = {name: parameter.detach().half() for name, parameter in module.named_parameters()}
    tensors["lm_head.weight"] = torch.randn(draft, width).half()
    tensors["offsets"] = ids - torch.arange(len(ids))
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["PebbleForDrafting"], "model_type": "llama", "pebble": SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, PEBBLE.name, PEBBLE)


@pytest.fixture(scope="module")
def pair(tiny_pair: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pair` with the drafter, added by the command line."""
    folder = shutil.copytree(tiny_pair, tmp_path_factory.mktemp("pairs") / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FORMATS, PEBBLE.name, PEBBLE)
        assert main(["drafter", str(folder), "--checkpoint", str(checkpoint)]) == 0
    return folder


def test_the_pair_is_whole_and_says_what_its_drafter_is(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = check_pair_folder(pair)
    facts = manifest.drafter
    assert facts is not None
    assert (facts.blocks, facts.num_kv_heads, facts.head_size, facts.draft_vocab_size) == (1, 2, 16, 48)
    assert (facts.max_context, facts.feature_layers) == (200, ())
    record = manifest.provenance["drafter"]
    assert (record["format"], record["description"]) == ("pebble", "a pebble with 2 heads")
    assert set(record["files"]) == {"config.json", "model.safetensors"}
    assert main(["check", str(pair)]) == 0
    assert "a pebble with 2 heads" in capsys.readouterr().out


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_its_text_is_that_of_plain_decoding(pair: Path, sampling: dict[str, Any]) -> None:
    with Engine.from_pretrained(pair, drafter_device="cpu", tree=TREE) as engine:
        drafted = engine.generate("the cat", max_new_tokens=60, raw=True, **sampling)
        plain = engine.generate("the cat", max_new_tokens=60, raw=True, speculate=False, **sampling)
    assert drafted.token_ids == plain.token_ids
    assert drafted.metrics.drafted > 60 and plain.metrics.drafted == 0


def test_a_fitted_copy_is_the_same_over_what_it_keeps(pair: Path, checkpoint: Path) -> None:
    whole = load_drafter(checkpoint, pair / "target")
    assert isinstance(whole, DraftModel)
    kept = torch.arange(48) % 3 > 0
    small = whole.narrowed(kept)
    assert small.shape.draft_vocab_size == 32 and small.d2t.equal(whole.d2t[kept])
    f, tokens = torch.randn(1, 5, 32), torch.randint(0, 263, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(small.logits(small(f, tokens)), whole.logits(whole(f, tokens))[..., kept])
    assert whole.shape.draft_vocab_size == 48 and len(whole.head) == 48


def test_the_command_fits_it_to_a_limit(
    pair: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrink, "LEAST_VOCABULARY", 16)
    copy = shutil.copytree(pair, tmp_path / "pair")
    facts, weights = read_manifest(copy).drafter, plan_pair(read_manifest(copy)).weights
    assert facts is not None
    limit = plan(facts, weights, min(facts.max_context, LEAST_CONTEXT)).total - 10 * (2 * facts.feature_size + 4)
    flags = ["--vram", str(limit), "--fit", "--force"]
    assert main(["drafter", str(copy), "--checkpoint", str(checkpoint), *flags]) == 0
    fitted = read_manifest(copy).drafter
    assert fitted is not None and fitted.draft_vocab_size < 48


def test_without_its_entry_the_format_is_refused(
    tiny_pair: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(registry.FORMATS, PEBBLE.name)
    copy = shutil.copytree(tiny_pair, tmp_path / "pair")
    assert main(["drafter", str(copy), "--checkpoint", str(checkpoint)]) == SourceError.exit_code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(checkpoint) in said and "PebbleForDrafting" in said and "known formats are dflash, dovetail, " in said
    assert read_manifest(copy) == read_manifest(tiny_pair)


def test_weights_of_another_layout_are_refused(pair: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = read_safetensors(other, "model.safetensors")
    save_file({**tensors, "midlayer.q": torch.zeros(2)}, other / "model.safetensors")
    with pytest.raises(SourceError, match=r"midlayer\.q is left over"):
        load_drafter(other, pair / "target")


def test_training_goes_on_from_its_own_format_alone(tiny_pair: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="its format is pebble: give a drafter in Dovetail's format"):
        train(tiny_pair, tmp_path / "out", TrainPlan(minutes=1, init=checkpoint), lambda *_: None)
    assert not (tmp_path / "out").exists()
