"""An EAGLE-3 drafter: trained, written in SafeAILab's layout, read back, exported, and continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tests.models.formats.eagle3_forward import Flags, chain
from torch import Tensor

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.cli.main import main
from dovetail.exporter.drafter.export import load_drafter
from dovetail.exporter.target.export import export_target
from dovetail.exporter.train.batches import Batches
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.drafters.eagle3 import Eagle3Format
from dovetail.exporter.train.drafters.trained import Trainee
from dovetail.exporter.train.features import FeatureStore, Part
from dovetail.exporter.train.loss import unrolled_loss
from dovetail.exporter.train.optimizers import make_optimizers
from dovetail.exporter.train.plan import FitOptions, TrainPlan
from dovetail.exporter.train.run import train
from dovetail.exporter.train.writer import BatchWriter
from dovetail.models.drafter import DraftModel
from dovetail.models.eagle3 import Eagle3Drafter
from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.errors import TrainError
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.system.progress import silent
from dovetail.runtime.target.paged import PagedModel

K, V, D = 128, 263, 32
FLAGS = Flags(heads=4, groups=2, head_dim=8, eps=1e-6)
FIT = FitOptions(epochs=12, unroll=3, window=48, batch=4, warmup=2, learning_rate=3e-3)
LAYERS = (1, 3, 4)  # of 8: the outputs that are the inputs of layers 2, 4 and 5


@pytest.fixture(scope="module")
def source(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` with eight layers, enough for EAGLE-3's three."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("deep") / "llama")
    with quiet():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(1)
        config = LlamaConfig.from_pretrained(tiny_llama, num_hidden_layers=8, initializer_range=0.2)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare_pair(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pair = tmp_path_factory.mktemp("eagle3") / "pair"
    export_target(str(source), pair)
    return pair


@pytest.fixture(scope="module")
def corpus(bare_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    requests = [Request(tuple(map(int, rng.integers(0, 200, 6))), 40) for _ in range(24)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.npz"
    model = PagedModel(bare_pair / "target" / "openvino_model.xml")
    Corpus.of(BatchWriter(model, [], slots=8, max_length=64).write(requests, rng)).save(path)
    return path


def plan(corpus: Path, **changes: Any) -> TrainPlan:
    usual: dict[str, Any] = {
        "format": "eagle3", "corpora": (corpus,), "draft_vocab": K, "held_out": 0.1, "fit": FIT,
    }  # fmt: skip
    return TrainPlan(**usual | changes)


@pytest.fixture(scope="module")
def checkpoint(bare_pair: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "drafter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dovetail.exporter.train.loop.CURVE_EVERY", 10)
        train(bare_pair, out, plan(corpus), silent)
    return out


@pytest.fixture
def target(bare_pair: Path) -> TargetParts:
    torch.manual_seed(2)
    config = json.loads((bare_pair / "target" / "config.json").read_text())
    return TargetParts(config, torch.randn(V, D), torch.randn(V, D))


def test_it_learns(checkpoint: Path) -> None:
    curve = json.loads((checkpoint / "training.json").read_text())["curve"]
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert curve[-1]["agreement"][0] > curve[0]["agreement"][0]
    assert (checkpoint / "calibration.json").exists()


def test_its_files_are_those_of_safeailab(checkpoint: Path) -> None:
    config, tensors = json.loads((checkpoint / "config.json").read_text()), load_file(checkpoint / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config["draft_vocab_size"] == K and config["target_hidden_size"] == D and config["num_hidden_layers"] == 1
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # vLLM: inputs
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # SGLang: outputs
    block = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    block += ["input_layernorm", "hidden_norm", "post_attention_layernorm"]
    names = {f"{name}.weight" for name in ("fc", "norm", "lm_head", "embed_tokens", *(f"midlayer.{p}" for p in block))}
    assert tensors.keys() == names | {"d2t", "t2d"}
    assert tensors["fc.weight"].shape == (D, 3 * D) and tensors["midlayer.self_attn.q_proj.weight"].shape == (D, 2 * D)
    assert {tensors[name].dtype for name in names} == {torch.float16}


def test_its_draft_ids_are_offsets(checkpoint: Path, corpus: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    ids = torch.arange(K) + tensors["d2t"]
    assert torch.equal(torch.nonzero(tensors["t2d"]).flatten(), ids)
    assert tensors["t2d"].shape == (V,) and tensors["d2t"].max() > 0
    assert np.isin(Corpus.load(corpus).tokens, ids.numpy()).mean() > 0.9


def test_it_is_read_back_with_equal_logits(bare_pair: Path, target: TargetParts, corpus: Path, tmp_path: Path) -> None:
    made = Eagle3Format(plan(corpus), target.config, "target")
    drafter = made.make(target, torch.arange(0, 2 * K, 2)).drafter
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
        drafter.embed_tokens.copy_(drafter.embed_tokens.half())
    made.save(drafter, tmp_path, LOG)
    found = find_checkpoint(tmp_path)
    assert found.format.name == "eagle3" and found.needs(target.config).layers == LAYERS == made.layers
    back = found.read(target)
    assert isinstance(back, DraftModel)
    f, tokens = torch.randn(1, 7, 3 * D), torch.randint(0, V, (1, 7))
    with torch.no_grad():
        ours, theirs = (each.logits(each(each.read(f), tokens)) for each in (drafter, back))
    assert torch.equal(ours, theirs) and ours.std() > 0.1


def test_the_trained_checkpoint_drafts_by_the_formulas(bare_pair: Path, checkpoint: Path) -> None:
    module = load_drafter(checkpoint, bare_pair / "target")
    assert isinstance(module, DraftModel)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in
               load_file(checkpoint / "model.safetensors").items()}  # fmt: skip
    taps, tokens = torch.randn(9, 3 * D), torch.randint(0, V, (9,))
    want = chain(tensors, FLAGS, taps, tokens, 4)
    f, known = module.read(taps), tokens
    with torch.no_grad():
        for step in want:
            g = module(f[None], known[None])[0]
            logits = module.logits(g[-1])
            torch.testing.assert_close(logits, step, atol=1e-3, rtol=0)
            f, known = torch.cat([f, g[-1:]]), torch.cat([known, module.d2t[logits.argmax()][None]])


def test_the_exported_drafter_keeps_the_plain_text(
    bare_pair: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = shutil.copytree(bare_pair, tmp_path / "pair")
    assert main(["drafter", str(pair), "--checkpoint", str(checkpoint)]) == 0
    assert "an EAGLE-3 drafter" in capsys.readouterr().out
    facts = read_manifest(pair).drafter
    assert facts and facts.feature_layers == LAYERS and facts.draft_vocab_size == K
    assert main(["check", str(pair)]) == 0
    with Engine.from_pretrained(pair, drafter_device="cpu", tree=TreeLimits(4, 3, 1, lookup=0)) as engine:
        drafted, plain = (engine.generate("the cat", 48, raw=True, speculate=also) for also in (True, False))
    assert drafted.token_ids == plain.token_ids and drafted.metrics.drafted > 40


def test_its_card_says_what_hubs_read(checkpoint: Path, bare_pair: Path) -> None:
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.base_model == read_manifest(bare_pair).name and card.data.library_name == "dovetail"
    assert card.data.tags == ["eagle3", "speculative-decoding"]
    log = json.loads((checkpoint / "training.json").read_text())
    assert f"| updates | {log['updates']} |" in card.text and "unrolled steps | 3 |" in card.text


@pytest.fixture(scope="module")
def made(bare_pair: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainee, Batches]:
    """A new drafter and its batches."""
    model = PagedModel(bare_pair / "target" / "openvino_model.xml", layers=LAYERS)
    text, folder = Corpus.load(corpus), tmp_path_factory.mktemp("features")
    store = FeatureStore(folder, [Part("a", text)], model.feature_size, lambda: model, 1e9)
    store.hold(0, lambda tokens: None)
    config = json.loads((bare_pair / "target" / "config.json").read_text())
    torch.manual_seed(3)
    rows = torch.randn(V, D)
    trainee = Eagle3Format(plan(corpus), config, "target").make(TargetParts(config, rows, rows), torch.arange(0, V, 3))
    return trainee, Batches(text, store, np.arange(24), trainee, FIT)


def test_positions_it_cannot_propose_carry_no_gradient(made: tuple[Trainee, Batches]) -> None:
    """The target's feature at such a position, and whether the drafter is right there, change nothing."""
    trainee, batches = made
    windows = batches.batch(np.arange(4))
    after = windows.tokens[:, 1:]  # x[t+2]
    proposable = torch.isin(after, trainee.drafter.d2t)
    assert not windows.answer[:, :-1][~proposable].any()
    assert windows.answer[:, :-1][proposable].any() and (~windows.answer).any()
    junk = torch.where(windows.answer[..., None], windows.following, 100 * torch.randn_like(windows.following))
    assert torch.equal(gradients(trainee, windows), gradients(trainee, replace(windows, following=junk)))


def test_the_head_learns_and_the_target_s_rows_do_not(made: tuple[Trainee, Batches]) -> None:
    """The gradient of the head is that of plain autograd; the teacher is the target's own distribution."""
    trainee, batches = made
    drafter, windows = trainee.drafter, batches.batch(np.arange(4))
    assert isinstance(drafter, Eagle3Drafter) and isinstance(drafter.head, torch.nn.Parameter)
    assert torch.equal(drafter.head, trainee.teacher) and not trainee.teacher.requires_grad
    gradients(trainee, windows, unroll=1)
    ours, drafter.head.grad = drafter.head.grad, None
    g = drafter(drafter.read(windows.features[..., : 3 * D]), windows.tokens)[windows.answer]
    teacher = torch.softmax(windows.following[windows.answer] @ trainee.teacher.T, -1)
    torch.nn.functional.cross_entropy(drafter.logits(g), teacher).backward()
    assert ours is not None and drafter.head.grad is not None and ours.abs().max() > 0
    torch.testing.assert_close(ours, drafter.head.grad, atol=1e-6, rtol=1e-3)


def test_muon_leaves_the_head_to_adamw(made: tuple[Trainee, Batches]) -> None:
    """A row of the head is a token's, so its update is no matrix to make orthogonal."""
    drafter = made[0].drafter
    adamw, muon = make_optimizers(drafter, replace(FIT, optimizer="muon"))
    rest, matrices = ([id(p) for group in each.param_groups for p in group["params"]] for each in (adamw, muon))
    assert id(drafter.head) in rest and id(drafter.head) not in matrices
    assert len(rest) + len(matrices) == len(list(drafter.parameters())) and len(matrices) == 8


def gradients(trainee: Trainee, windows: Any, unroll: int = 3) -> Tensor:
    trainee.drafter.zero_grad(set_to_none=True)
    loss, _ = unrolled_loss(trainee, windows, replace(FIT, unroll=unroll))
    loss.backward()  # type: ignore[no-untyped-call]  # torch
    return torch.cat(
        [parameter.grad.flatten() for parameter in trainee.drafter.parameters() if parameter.grad is not None]
    )


def test_an_interrupted_run_goes_on_to_the_same_weights(
    bare_pair: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.train.loop.CURVE_EVERY", 5)
    monkeypatch.setattr("dovetail.exporter.train.loop.SAVE_SECONDS", 0.0)
    short = plan(corpus, fit=replace(FIT, epochs=4))
    train(bare_pair, tmp_path / "whole", short, silent)

    def interrupt(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
        if stage == "fit" and done > total / 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(bare_pair, tmp_path / "broken", short, interrupt)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    train(bare_pair, tmp_path / "broken", short, silent, resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all((whole[key] == resumed[key]).all() for key in whole)
    with pytest.raises(TrainError, match="already holds a trained drafter"):
        train(bare_pair, tmp_path / "broken", short, silent, resume=True)


def speculators(folder: Path, checkpoint: Path) -> Path:
    """`checkpoint` in the layout of the speculators library."""
    config = json.loads((checkpoint / "config.json").read_text())
    layer = {name: config[name] for name in config if not name.startswith(("eagle", "arch", "draft"))}
    written = {
        "speculators_model_type": "eagle3", "draft_vocab_size": K, "transformer_layer_config": layer,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5], "norm_before_residual": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written))
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(
        {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("other", [False, True], ids=["its own", "another project's"])
def test_training_goes_on_in_the_checkpoint_s_layout(
    bare_pair: Path, corpus: Path, checkpoint: Path, tmp_path: Path, other: bool
) -> None:
    """A smaller --draft-vocab does not change the tokens that the head knows."""
    initial = speculators(tmp_path / "speculators", checkpoint) if other else checkpoint
    go_on = plan(corpus, init=initial, draft_vocab=64, fit=replace(FIT, epochs=0.2, learning_rate=1e-4))
    train(bare_pair, tmp_path / "out", go_on, silent)
    first, second = (json.loads((p / "training.json").read_text())["curve"][0] for p in (checkpoint, tmp_path / "out"))
    assert second["loss"] < first["loss"]
    before, after = (load_file(folder / "model.safetensors") for folder in (initial, tmp_path / "out"))
    assert before.keys() == after.keys() and torch.equal(before["d2t"], after["d2t"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert torch.equal(before["embed_tokens.weight"], after["embed_tokens.weight"])
    found = find_checkpoint(tmp_path / "out")
    assert found.format.name == ("speculators-eagle3" if other else "eagle3")
    config = {**json.loads((initial / "config.json").read_text()), "torch_dtype": "float16"}
    assert found.stored.config == config


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, name: change(tensors[name])}, folder / "model.safetensors")

    return damage


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "fc.weight"}, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "ids beyond the vocabulary": (changed("d2t", lambda d2t: d2t + V), "d2t .* does not map"),
    "other marks": (changed("t2d", lambda t2d: ~t2d), "d2t and t2d .* mark different tokens"),
    "no numbers": (changed("norm.weight", lambda w: w * torch.nan), "holds values that are no numbers"),
    "another shape": (changed("norm.weight", lambda w: w[:-1].clone()), "norm.weight is "),
    "a tensor missing": (without_a_tensor, "is no drafter that Dovetail reads"),
    "weights cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "cannot read"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_the_run(
    bare_pair: Path, corpus: Path, checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    spoil, said = DAMAGES[damage]
    spoil(copy := shutil.copytree(checkpoint, tmp_path / "copy"))
    with pytest.raises(TrainError, match=f"cannot start from .*{said}") as caught:
        train(bare_pair, tmp_path / "out", plan(corpus, init=copy), silent)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_checkpoint_of_the_other_format_is_refused(
    tiny_pair: Path, bare_pair: Path, corpus: Path, checkpoint: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    for format, initial in (("eagle3", tiny_drafter), ("dovetail", checkpoint)):
        with pytest.raises(TrainError, match=r"cannot start from .*its format is .*--format"):
            train(bare_pair, tmp_path / "out", plan(corpus, format=format, init=initial), silent)
    with pytest.raises(TrainError, match="it has 2 layers, EAGLE-3 needs 7"):
        train(tiny_pair, tmp_path / "out", plan(corpus), silent)
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_user_is_not_overwritten(bare_pair: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(TrainError, match=r"already holds README\.md: give another folder"):
        train(bare_pair, tmp_path, plan(corpus), silent)
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"fusion": "fc"}, "--fusion fc"), ({"feature_layers": False}, "--last-feature"), ({"blocks": 2}, "--blocks 2"),
     ({"intermediate_size": 8}, "--intermediate-size 8"),
     ({"fit": replace(FIT, regression=1.0)}, "--regression 1"), ({"format": "medusa"}, "format 'medusa' is unknown")],
)  # fmt: skip
def test_options_of_the_other_format_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainError, match=said):
        plan(Path("corpus.npz"), **changes)


def test_the_command_trains_seven_steps(bare_pair: Path, corpus: Path, tmp_path: Path) -> None:
    flags = ["--corpus", str(corpus), "--window", "48", "--epochs", "0.3", "--draft-vocab", str(K)]
    command = ["train", "--target", str(bare_pair), "-o", str(tmp_path / "out"), "--format", "eagle3", *flags]
    assert main(command) == 0
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    assert log["plan"]["fit"]["unroll"] == 7 and len(log["curve"][-1]["agreement"]) == 7
    assert find_checkpoint(tmp_path / "out").format.name == "eagle3"


LOG: dict[str, Any] = {
    "plan": {"init": None, "fit": {"batch": 4, "unroll": 3, "optimizer": "adamw", "learning_rate": 1e-3, "decay": 0.8}},
    "corpus": {"trained_on": {"answer_tokens": 10}},
    "held_out": {"acceptance_length": 1.5, "accepted_per_position": [0.3, 0.2]},
    "parameters": 10, "updates": 3, "minutes": {"fit": 0.1},
}  # fmt: skip
