"""Training: the target's own text goes in, a drafter that follows it comes out, interrupted or not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dovetail.exporter.cli.main import main
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.exporter.target.export import export_target
from dovetail.exporter.train.contamination import Forbidden
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.plan import FitOptions, TrainPlan
from dovetail.exporter.train.run import train
from dovetail.exporter.train.text import TextWriter
from dovetail.exporter.train.writer import BatchWriter, bare_prefix
from dovetail.models.config import DrafterConfig
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import TrainError
from dovetail.runtime.pair.manifest import file_entry, read_manifest, write_manifest
from dovetail.runtime.system.progress import silent
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.limits import TreeLimits

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # ties are not decided by rounding


def plan(corpus: Path, **changes: Any) -> TrainPlan:
    fit = FitOptions(epochs=4, unroll=2, window=48, batch=4, warmup=2, learning_rate=3e-3)
    return TrainPlan(corpora=(corpus,), draft_vocab=128, held_out=0.1, fit=fit, **changes)


def test_training_learns_and_says_so(
    tiny_pair: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.train.loop.CURVE_EVERY", 10)
    long = replace(plan(corpus_file), fit=FitOptions(epochs=16, unroll=2, window=48, warmup=2, learning_rate=3e-3))
    result = train(tiny_pair, tmp_path / "out", long, silent)
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    assert log["held_out"]["acceptance_length"] == result.acceptance_length
    assert log["updates"] == 16 * (23 // 4)
    assert len([point for point in log["curve"] if "held_out" in point]) >= 4
    assert log["curve"][-1]["held_out"] == round(result.acceptance_length, 3)
    assert (tmp_path / "out" / "calibration.json").exists()
    first, last = log["curve"][0], log["curve"][-1]
    assert last["loss"] < 0.9 * first["loss"]
    assert all(late > early for late, early in zip(last["agreement"], first["agreement"], strict=True))
    assert load_file(tmp_path / "out" / "drafter.safetensors")["d2t"].shape == (128,)


@pytest.mark.parametrize("interrupted", ["features", "fit"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny_pair: Path, corpus_file: Path, tmp_path: Path, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.train.loop.CURVE_EVERY", 5)
    monkeypatch.setattr("dovetail.exporter.train.loop.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("dovetail.exporter.train.features.PASS_TOKENS", 200)
    train(tiny_pair, tmp_path / "whole", plan(corpus_file), silent)

    def interrupt(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
        if stage == interrupted and done > total / 4:
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_pair, broken, plan(corpus_file), interrupt)
    assert not (broken / "drafter.safetensors").exists()
    with pytest.raises(TrainError, match="--resume"):
        train(tiny_pair, broken, plan(corpus_file), silent)
    with pytest.raises(TrainError, match="other options"):
        train(tiny_pair, broken, plan(corpus_file, fusion="fc"), silent, resume=True)
    train(tiny_pair, broken, plan(corpus_file), silent, resume=True)
    whole, resumed = (load_file(tmp_path / name / "drafter.safetensors") for name in ("whole", "broken"))
    assert all((whole[key] == resumed[key]).all() for key in whole)
    with pytest.raises(TrainError, match="already holds a trained drafter"):
        train(tiny_pair, broken, plan(corpus_file), silent, resume=True)


def test_the_target_writes_its_own_training_text(tiny_pair: Path, tmp_path: Path) -> None:
    """Prompts alone go in; the answers are the target's."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=8, draft_vocab=64, fit=fit)
    train(tiny_pair, tmp_path / "out", made, silent)
    corpus = Corpus.load(tmp_path / "out" / "work" / "text" / "answers-0000.npz")
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    assert len(corpus) == 12
    starts = corpus.offsets
    texts = {tokenizer.decode(list(corpus.tokens[starts[i] : starts[i] + corpus.prompt_lengths[i]])) for i in range(12)}
    assert len(texts) == 12 and all("say" in text for text in texts)
    assert tokenizer.decode(list(bare_prefix(tokenizer)), skip_special_tokens=False).endswith("user\n")


def test_text_interrupted_goes_on_to_the_same_text(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.train.text.PART_PROMPTS", 6)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(16)))
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=8, draft_vocab=64, fit=fit)

    def interrupt(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
        if stage == "answers" and done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_pair, tmp_path / "broken", made, interrupt)
    train(tiny_pair, tmp_path / "broken", made, silent, resume=True)
    train(tiny_pair, tmp_path / "whole", made, silent)
    whole, broken = (load_file(tmp_path / name / "drafter.safetensors") for name in ("whole", "broken"))
    assert all((whole[key] == broken[key]).all() for key in whole)


def test_a_prompt_too_long_to_answer_is_told_of(tiny_pair: Path, tmp_path: Path) -> None:
    prompts, told = tmp_path / "prompts.jsonl", []
    rows = [{"prompt": f"say {i}"} for i in range(8)] + [{"prompt": "x" * 1000}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=8, draft_vocab=64, fit=fit)
    train(tiny_pair, tmp_path / "out", made, lambda stage, done=0, total=0, note="": told.append(note))
    assert len(Corpus.load(tmp_path / "out" / "work" / "text" / "answers-0000.npz")) == 8
    assert any(note.startswith("1 left out") for note in told)


def test_text_that_repeats_a_benchmark_is_left_out(tiny_pair: Path, tmp_path: Path) -> None:
    """Thirteen words in a row, whatever the layout; the run says how many conversations it cost."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    forbidden = Forbidden([words, "a prompt of just seven words here"])
    assert forbidden.touches(f"Begin: {words.upper().replace(' ', ', ')}.")
    assert forbidden.touches("x a prompt, of just -- seven words here y")
    assert not forbidden.touches(words.replace("seven", "sept"))
    assert not Forbidden(["hi there"]).touches("hi there")
    for text in (  # scripts without spaces between words
        "\u8bf7\u7528\u4e2d\u6587\u5199\u4e00\u7bc7\u5173\u4e8e\u6d77\u6d0b\u7684\u6587\u7ae0",
        "\u6771\u4eac\u306e\u6b74\u53f2\u306b\u3064\u3044\u3066\u6559\u3048\u3066\u304f\u3060\u3055\u3044",
        "\u0e40\u0e02\u0e35\u0e22\u0e19\u0e1a\u0e17\u0e04\u0e27\u0e32\u0e21\u0e40\u0e01\u0e35\u0e48\u0e22\u0e27\u0e01\u0e31\u0e1a\u0e17\u0e30\u0e40\u0e25",
    ):
        assert Forbidden([text]).touches(f"One {text}, two")
        half = len(text) // 2
        assert not Forbidden([text]).touches(f"One {text[:half]}x{text[half:]}, two")
    prompts, benchmark = tmp_path / "prompts.jsonl", tmp_path / "bench.jsonl"
    rows = [f"say {i}" for i in range(11)] + [f"please {words}"]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    benchmark.write_text(json.dumps({"turns": ["hello", words]}) + "\n")
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, exclude=(benchmark,), max_new_tokens=8, draft_vocab=64, fit=fit)
    train(tiny_pair, tmp_path / "out", made, silent)
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    assert log["corpus"]["left_out_for_overlap"] == 1
    assert log["corpus"]["trained_on"]["conversations"] + log["corpus"]["held_out_conversations"] == 11


def test_minutes_are_all_that_is_needed(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target writes text for a third of the time; fitting fixes its number of updates early and keeps it."""
    monkeypatch.setattr("dovetail.exporter.train.text.PART_PROMPTS", 8)
    monkeypatch.setattr("dovetail.exporter.train.run.BatchWriter", BatchWriterThatStops)
    made = TrainPlan(minutes=0.05, max_new_tokens=24, draft_vocab=64, fit=FitOptions(unroll=1, window=64, batch=2))
    told: list[tuple[str, float, float, str]] = []
    train(tiny_pair, tmp_path / "out", made, lambda *progress: told.append(progress))
    assert {"prompts", "answers", "features", "fit", "evaluate"} <= {stage for stage, *_ in told}
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    prompts = next(done for stage, done, *_ in reversed(told) if stage == "answers")
    lost = sum(int(note.split()[0]) for *_, note in told if "left out" in note)  # they fill the context by themselves
    assert log["updates"] >= 20 and log["corpus"]["conversations"] + lost == prompts >= 8


class BatchWriterThatStops(BatchWriter):
    """A random model seldom ends a text by itself: more tokens count as the end."""

    def __init__(self, model: PagedModel, stop: Any, **options: Any):
        super().__init__(model, [*stop, *range(0, 258, 20)], slots=8, max_length=128, **options)


@pytest.mark.parametrize(
    "options",
    [
        FitOptions(unroll=2, teacher_top_k=4),
        FitOptions(unroll=1, regression=10.0),
        FitOptions(unroll=2, optimizer="muon", learning_rate=1e-2),
        FitOptions(unroll=2, optimizer="muon", learning_rate=1e-2, bf16=True),
    ],
    ids=["top-k teacher", "the paper's loss", "muon", "muon in bfloat16"],
)
def test_every_recipe_learns(tiny_pair: Path, corpus_file: Path, tmp_path: Path, options: FitOptions) -> None:
    fit = replace(options, epochs=16, window=48, warmup=2, learning_rate=max(3e-3, options.learning_rate))
    train(tiny_pair, tmp_path / "out", replace(plan(corpus_file), fit=fit), silent)
    curve = json.loads((tmp_path / "out" / "training.json").read_text())["curve"]
    assert curve[-1]["agreement"][0] > 1.3 * curve[0]["agreement"][0]


def test_bfloat16_gives_nearly_the_same_loss(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    curves = []
    for bf16 in (False, True):
        fit = FitOptions(epochs=1, unroll=2, window=48, batch=4, warmup=2, bf16=bf16)
        train(tiny_pair, tmp_path / str(bf16), replace(plan(corpus_file), fit=fit), silent)
        curves.append(json.loads((tmp_path / str(bf16) / "training.json").read_text())["curve"][-1]["loss"])
    assert curves[0] != curves[1] == pytest.approx(curves[0], rel=0.01)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_drafter_has_the_width_that_was_asked_for(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    """Its feed-forward layers, also in the pair; a later run must ask for the same."""
    pair, narrow = shutil.copytree(tiny_pair, tmp_path / "pair"), plan(corpus_file, intermediate_size=40)
    brief = FitOptions(epochs=0.2, unroll=1, window=48)
    train(pair, tmp_path / "first", replace(narrow, fit=brief), silent)
    assert DrafterConfig.load(tmp_path / "first").intermediate_size == 40
    train(pair, tmp_path / "second", replace(narrow, fit=brief, init=tmp_path / "first"), silent)
    add_drafter(tmp_path / "second", pair)
    with Engine.from_pretrained(pair, drafter_device="cpu", tree=TreeLimits(4, 3, 1, lookup=0)) as engine:
        assert engine.generate("a", 8, raw=True).metrics.drafted > 0
    with pytest.raises(TrainError, match=r"its intermediate-size is 40, not .*: give --intermediate-size 40"):
        train(pair, tmp_path / "third", plan(corpus_file, init=tmp_path / "first"), silent)
    with pytest.raises(TrainError, match="intermediate_size 0 is out of range"):
        plan(corpus_file, intermediate_size=0)


def test_a_drafter_goes_on_from_another(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    train(tiny_pair, tmp_path / "first", plan(corpus_file), silent)
    go_on = replace(
        plan(corpus_file, init=tmp_path / "first"), fit=FitOptions(epochs=0.2, window=48, batch=4, unroll=2)
    )
    train(tiny_pair, tmp_path / "second", go_on, silent)
    first, second = (json.loads((tmp_path / n / "training.json").read_text())["curve"] for n in ("first", "second"))
    assert second[0]["loss"] < first[0]["loss"]
    with pytest.raises(TrainError, match="cannot"):
        train(tiny_pair, tmp_path / "third", plan(corpus_file, init=tmp_path), silent)
    with pytest.raises(TrainError, match="give --fusion dgf"):
        train(tiny_pair, tmp_path / "third", plan(corpus_file, init=tmp_path / "first", fusion="fc"), silent)
    with pytest.raises(TrainError, match="leave out --last-feature"):
        train(tiny_pair, tmp_path / "third", plan(corpus_file, init=tmp_path / "first", feature_layers=False), silent)


def test_a_target_with_scaled_rope_gets_a_drafter(tiny_llama: Path, tmp_path: Path) -> None:
    """Llama 3.1's: trained, exported with parity to torch, and in a pair whose speculation keeps the plain text."""
    source, pair = shutil.copytree(tiny_llama, tmp_path / "llama3"), tmp_path / "pair"
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 1e4, **scaling}
    (source / "config.json").write_text(json.dumps(config))
    export_target(str(source), pair)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    fit = FitOptions(epochs=2, unroll=2, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=40, draft_vocab=64, fit=fit)
    assert train(pair, tmp_path / "out", made, silent).positions > 0
    add_drafter(tmp_path / "out", pair)
    limits = TreeLimits(width=4, depth=3, top_k=1, lookup=0)
    with Engine.from_pretrained(pair, drafter_device="cpu", tree=limits, ov_config=EXACT) as engine:
        drafted, plain = (engine.generate("a", 64, raw=True, speculate=also) for also in (True, False))
    assert drafted.token_ids == plain.token_ids and drafted.metrics.drafted > 0


def test_two_runs_cannot_share_a_work_folder(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    """The second one would append to the first one's features."""
    made = replace(plan(corpus_file), fit=FitOptions(epochs=0.2, unroll=1, window=48))
    refused: list[str] = []

    def meanwhile(*_: object) -> None:
        with pytest.raises(TrainError, match=r"another run is writing to .*work: wait for it") as caught:
            train(tiny_pair, tmp_path / "out", made, silent, resume=True)
        refused.append(str(caught.value))

    train(tiny_pair, tmp_path / "out", made, lambda *_: None if refused else meanwhile())
    assert len(refused) == 1


def test_a_smaller_disk_is_no_other_run(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    """The remedy of a disk that is too small can be followed: the text stays."""
    with pytest.raises(TrainError, match="--disk"):
        train(tiny_pair, tmp_path / "out", plan(corpus_file, disk_gb=1e-6), silent)
    train(tiny_pair, tmp_path / "out", plan(corpus_file), silent, resume=True)


def test_the_same_prompt_is_never_held_out_and_trained_on(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.npz"
    shutil.copyfile(corpus_file, twice)
    made = replace(plan(corpus_file), corpora=(corpus_file, twice), fit=FitOptions(epochs=0.2, unroll=1, window=48))
    train(tiny_pair, tmp_path / "out", made, silent)
    log = json.loads((tmp_path / "out" / "training.json").read_text())["corpus"]
    assert log["left_out_as_doubles"] == 24
    assert log["trained_on"]["conversations"] + log["held_out_conversations"] == 24


@pytest.mark.parametrize(
    ("file", "content"),
    [("state.pt", b""), ("state.pt", b"PK\x03\x04"), ("state.pt", b"\x80\x02]."), ("seconds.json", b""),
     ("seconds.json", b"null"), ("seconds.json", b"1e400"), ("plan.json", b""), ("plan.json", b"[" * 100_000),
     ("plan.json", b"[]")],
)  # fmt: skip
def test_a_damaged_work_folder_is_one_line_and_no_interrupt(
    tiny_pair: Path, corpus_file: Path, tmp_path: Path, file: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--corpus", str(corpus_file), "--window", "48", "--unroll", "1", "--epochs", "1", "--draft-vocab", "128"]
    command = ["train", "--target", str(tiny_pair), "-o", str(tmp_path / "out"), *flags]
    assert main(command) == 0
    (tmp_path / "out" / "drafter.safetensors").unlink()
    (tmp_path / "out" / "work" / file).write_bytes(content)
    capsys.readouterr()
    assert main([*command, "--resume"]) == TrainError.exit_code
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and file in last and "remove" in last


@pytest.mark.parametrize("content", [b"", b"{}", b"[3]", b'[{"prompts": 1e400, "seconds": 1}]', b'[{"prompts": 1}]'])
def test_a_damaged_record_of_parts_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.json").write_bytes(content)

    def unused() -> BatchWriter:
        raise AssertionError("the record is read first")

    writer = TextWriter(tmp_path, tmp_path, 0.0, None, unused, 0, 8, silent)  # type: ignore[arg-type]  # no tokenizer
    with pytest.raises(TrainError, match=r"remove the work folder") as caught:
        writer.own(4, ("",), 10.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["[" * 100_000, "[]", '{"hidden_size": null}', '{"text_config": 3}', "{}"])
def test_a_target_that_no_drafter_fits_is_one_line(tiny_pair: Path, tmp_path: Path, config: str) -> None:
    pair = shutil.copytree(tiny_pair, tmp_path / "pair")
    file = pair / "target" / "config.json"
    file.write_text(config)
    manifest = read_manifest(pair)
    write_manifest(pair, replace(manifest, files={**manifest.files, "target/config.json": file_entry(file)}))
    with pytest.raises(TrainError) as caught:
        train(pair, tmp_path / "out", TrainPlan(own_prompts=1), silent)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_bad_plans_and_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to train on"):
        TrainPlan()
    with pytest.raises(TrainError, match="minutes 0"):
        TrainPlan(own_prompts=1, minutes=0)
    with pytest.raises(TrainError, match="unroll 0"):
        FitOptions(unroll=0)
    with pytest.raises(TrainError, match="epochs nan"):
        FitOptions(epochs=float("nan"))
    with pytest.raises(TrainError, match="optimizer 'sgd'"):
        FitOptions(optimizer="sgd")
    with pytest.raises(TrainError, match="disk_gb 0"):
        TrainPlan(own_prompts=1, disk_gb=0)
    with pytest.raises(TrainError, match="minutes inf"):
        TrainPlan(minutes=float("inf"))
    with pytest.raises(TrainError, match="--own-prompts"):
        TrainPlan(prompts=tmp_path / "prompts.jsonl", openings=("Write",))
