"""What a drafter takes of a GPU is read off its graph, and --vram is kept: refused, or fitted to."""

from __future__ import annotations

import shutil
from pathlib import Path

import click.testing
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from onnx import TensorProto, ValueInfoProto, helper

from dovetail.exporter.cli import drafter as cli_drafter
from dovetail.exporter.drafter import shrink as vram_fit
from dovetail.exporter.drafter.shrink import narrowed, peak_bytes, workspace
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.models.eagle3 import BlockSizes
from dovetail.models.language import LanguageConfig, LanguageDrafter
from dovetail.models.rope import Rope
from dovetail.runtime.drafter.graph_io import CHUNK
from dovetail.runtime.drafter.open import open_cuda, open_drafter
from dovetail.runtime.drafter.vram import CONTEXT, CONTEXT_STEP, LEAST_CONTEXT, VramPlan, plan, plan_pair
from dovetail.runtime.errors import ExportError, InputError
from dovetail.runtime.pair.manifest import read_manifest

H, V, K = 32, 3000, 2500


def test_activations_are_counted_from_their_node_to_their_last_reader() -> None:
    def value(name: str, *shape: str | int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)

    nodes = [
        helper.make_node("Exp", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Exp", ["b"], ["c"]),  # a is gone
        helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    inner = [value("a", "tokens", 4), value("b", "2*tokens", "slots - 1"), value("c", "tokens", 8)]
    graph = helper.make_graph(nodes, "g", [value("x", "tokens", 4)], [value("y", "tokens", 4)], value_info=inner)
    a, b, c = 10 * 4 * 2, 20 * 6 * 2, 10 * 8 * 2
    assert peak_bytes(helper.make_model(graph), tokens=10, slots=7) == max(a + b, b + c)


def test_the_line_is_right_at_its_ends_and_above_in_between(tiny_full_pair: Path) -> None:
    import onnx

    file = tiny_full_pair / "drafter" / "drafter.fp16.onnx"
    fixed, per_pair = workspace(file, tree_slots=64)
    assert per_pair > 0
    model = onnx.load(file, load_external_data=False)
    for context in (CONTEXT_STEP, 1000, CONTEXT):
        peak = peak_bytes(model, CHUNK, 64 + context)
        assert peak <= fixed + per_pair * context
        if context != 1000:
            assert fixed + per_pair * context - peak < CONTEXT
    facts = read_manifest(tiny_full_pair).drafter
    assert facts is not None and facts.workspace == (fixed, per_pair)


def wide(seed: int = 0) -> Drafter:
    torch.manual_seed(seed)
    config = DrafterConfig(
        vocab_size=V, draft_vocab_size=K, hidden_size=H, feature_size=H, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    d2t = torch.arange(K) + (torch.arange(K) > 1000) * 400
    return Drafter(config, torch.randn(V, H), torch.randn(K, H), d2t).eval()


def test_a_narrower_drafter_is_the_same_over_what_it_keeps() -> None:
    drafter, row = wide(), 2 * H + 4
    plan_of = VramPlan(context=LEAST_CONTEXT, weights=5_000_000, state=0, rows=0, workspace=0, cuda=0)
    small = narrowed(drafter, plan_of, limit=5_000_000 - 700 * row, keep=(2899, 5))
    assert isinstance(small, Drafter)
    assert small.config.draft_vocab_size == K - 700
    assert small.d2t.tolist() == [*drafter.d2t[: K - 701].tolist(), 2899]  # 5 is among the first anyhow
    x = torch.randn(3, H)
    kept = torch.isin(drafter.d2t, small.d2t)
    torch.testing.assert_close(small.logits(x), drafter.logits(x)[:, kept])
    f, tokens = torch.randn(1, 5, H), torch.randint(0, V, (1, 5))
    torch.testing.assert_close(small(f, tokens), drafter(f, tokens))
    with pytest.raises(ExportError, match=r"does not fit .* with 1024 draft tokens either: .*larger --vram"):
        narrowed(drafter, plan_of, limit=5_000_000 - 1500 * row, keep=())


def test_a_tied_head_that_gets_narrower_takes_memory_of_its_own() -> None:
    """Its 192,000 bytes come on top of the 100,000 that are too many; a token takes 2,116 with its activations."""
    config = LanguageConfig(BlockSizes(H, 48, 4, 2, 8, 1e-6), V, V, Rope(torch.ones(4)), 128, 1)
    rows = torch.randn(V, H)
    drafter = LanguageDrafter(config, rows, rows, torch.arange(V))
    plan_of = VramPlan(context=LEAST_CONTEXT, weights=5_000_000, state=0, rows=0, workspace=0, cuda=0)
    small = narrowed(drafter, plan_of, limit=4_900_000, keep=())
    assert small.shape.draft_vocab_size == V - 138
    again = narrowed(small, plan_of, limit=4_999_000, keep=())
    assert again.shape.draft_vocab_size == V - 138 - 15  # as of any other drafter: 68 bytes


def add(pair: Path, checkpoint: Path, *flags: object) -> click.testing.Result:
    arguments = [str(pair), "--checkpoint", str(checkpoint), "--force", *map(str, flags)]
    return click.testing.CliRunner().invoke(cli_drafter.command, arguments)


@pytest.fixture
def pair(tiny_full_pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_full_pair, tmp_path / "pair"))


def test_the_command_refuses_or_fits_and_the_pair_remembers(
    pair: Path, tiny_drafter: Path, monkeypatch: pytest.MonkeyPatch, HostDevice: type
) -> None:
    monkeypatch.setattr(vram_fit, "LEAST_VOCABULARY", 16)  # the tiny drafter has 64 draft tokens
    before = (pair / "dovetail.json").read_bytes()
    facts = read_manifest(pair).drafter
    assert facts is not None
    weights = plan_pair(read_manifest(pair)).weights
    least = plan(facts, weights, min(facts.max_context, LEAST_CONTEXT)).total
    limit = least - 20 * (2 * facts.feature_size + 4)
    refused = add(pair, tiny_drafter, "--vram", limit)
    assert isinstance(refused.exception, ExportError) and "weights + " in str(refused.exception)
    assert (pair / "dovetail.json").read_bytes() == before
    fitted = add(pair, tiny_drafter, "--vram", limit, "--fit")
    assert fitted.exit_code == 0, fitted.output + str(fitted.exception)
    manifest = read_manifest(pair)
    assert manifest.drafter is not None and manifest.drafter.vram == limit
    assert 16 <= manifest.drafter.draft_vocab_size < 64
    assert plan_pair(manifest).total <= limit
    for session in (
        open_drafter(pair, manifest, device="cpu", threads=1),
        open_cuda(pair, manifest, new_device=HostDevice),
    ):
        session.pretend_length(1, 3)


def test_flags_that_make_no_sense_are_refused(pair: Path, tiny_drafter: Path) -> None:
    for flags in (("--fit",), ("--vram", "3TB")):
        assert isinstance(add(pair, tiny_drafter, *flags).exception, InputError)
