"""The benchmark scripts, on scripted sessions and made-up logs: a killed run goes on to the same figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.bench.scripts import ALPHABET, Opener, script

from dovetail.runtime.batch_engine import BatchEngine
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import InputError, PairError
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget, ScriptedTokenizer
from dovetail.runtime.text.tokenizer import Tokenizer

acceptance, curve = script("acceptance"), script("curve")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A pair folder that only has a manifest, and two tasks of 3 and 2 prompts."""
    from dovetail.runtime.pair.manifest import DrafterFacts, Manifest, TargetFacts, write_manifest

    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))
    pair, tasks = tmp_path / "pair", tmp_path / "tasks"
    pair.mkdir()
    tasks.mkdir()
    target = TargetFacts("llama", 16, 16, 32, 2, 4096, "int8", ("norm",), (0,), "0" * 64)
    drafter = DrafterFacts(1, 16, 16, 32, 8, 2, 4, 4, 64, 4096, "0" * 64, {"cpu": "drafter/x.onnx"})
    write_manifest(pair, Manifest("tiny", target, drafter, {}))
    rows = {"chat": [["One"], ["Two", "Three"], ["Four"]], "sums": [["Five"], ["Six"]]}
    for name, turns in rows.items():
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    return pair, tasks


def run(folders: tuple[Path, Path], out: Path, *flags: str, opener: Opener | None = None) -> Result:
    arguments = [*map(str, folders), "--out", str(out), "-n", "12", "--temperature", "0", "--temperature", "1", *flags]
    return CliRunner().invoke(acceptance.acceptance, arguments, obj=opener or Opener())


def steady(file: Path) -> dict[str, Any]:
    """Results without what the clock says."""
    data = json.loads(file.read_text())
    for score in data["scores"]:
        del score["tokens_per_second"]
    for rows in data["rows"].values():
        for row in rows:
            row["totals"] = {name: value for name, value in row["totals"].items() if not name.endswith("_ms")}
    return data


def test_every_task_at_every_temperature_through_one_engine(folders, tmp_path: Path) -> None:
    opener = Opener()
    result = run(folders, tmp_path / "out.json", opener=opener)
    assert result.exit_code == 0, result.output
    assert (opener.opened, opener.answers) == (1, 1 + 2 * (4 + 2))  # a warm-up; one conversation has two turns
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()]
    assert [(line[0], line[1], line[-1]) for line in lines[2:]] == [
        ("chat", "0", "3"), ("sums", "0", "2"), ("chat", "1", "3"), ("sums", "1", "2"),
        ("mean of tasks", "0", "5"), ("mean of tasks", "1", "5"),
    ]  # fmt: skip
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert all(score["acceptance_length"] > 1 and 0 < score["acceptance_per_depth"][0] <= 1 for score in scores)
    assert scores[4]["acceptance_length"] == pytest.approx(
        (scores[0]["acceptance_length"] + scores[1]["acceptance_length"]) / 2, abs=1e-3
    )


@pytest.mark.parametrize("last", [1, 2, 4, 9])
def test_a_killed_run_goes_on_to_the_same_figures(folders, tmp_path: Path, last: int) -> None:
    run(folders, tmp_path / "whole.json")
    assert run(folders, tmp_path / "out.json", opener=Opener(last=last)).exit_code == 137
    opener = Opener()
    assert run(folders, tmp_path / "out.json", opener=opener).exit_code == 0
    assert opener.answers < 14
    assert steady(tmp_path / "out.json") == steady(tmp_path / "whole.json")


def test_a_finished_run_is_only_told_and_a_limit_may_be_raised(folders, tmp_path: Path) -> None:
    run(folders, tmp_path / "out.json", "--limit", "1")
    opener = Opener()
    assert run(folders, tmp_path / "out.json", "--limit", "1", opener=opener).exit_code == 0 and opener.answers == 0
    run(folders, tmp_path / "out.json")
    run(folders, tmp_path / "whole.json")
    assert steady(tmp_path / "out.json") == steady(tmp_path / "whole.json")


def test_other_settings_prompts_or_files_are_refused(folders, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run(folders, out)
    other = run(folders, out, "--width", "8").exception
    assert isinstance(other, InputError) and "measured with tree" in str(other)
    (folders[1] / "sums.jsonl").write_text('{"prompt": "Seven"}\n')
    changed = run(folders, out).exception
    assert isinstance(changed, InputError) and "prompt 1 of sums@0" in str(changed)
    out.write_text("[]")
    assert isinstance(run(folders, out).exception, InputError)
    assert isinstance(run(folders, tmp_path / "missing" / "out.json").exception, InputError)
    assert isinstance(run((folders[0], tmp_path / "nowhere"), out).exception, InputError)


def test_a_pair_without_a_drafter_is_refused(folders, tmp_path: Path) -> None:
    assert isinstance(run(folders, tmp_path / "out.json", opener=Opener(drafter=False)).exception, PairError)


def training_log(folder: Path, held_out: bool) -> Path:
    minutes = {"text_and_features": 9.9, "fit": 1.2} if held_out else 1.2
    points = [
        {"update": n, "seconds": 30.0 * n, "positions": 1000 * n, "loss": 1.0, "agreement": [0.5]} for n in (1, 2)
    ]
    if held_out:
        points[1]["held_out"] = 1.7
    log = {"curve": points, "corpus": {"answer_tokens": 288}, "held_out": {"acceptance_length": 1.8},
           "positions_seen": 2500, "minutes": minutes}  # fmt: skip
    folder.mkdir()
    (folder / "training.json").write_text(json.dumps(log))
    return folder / "training.json"


def test_a_run_is_its_held_out_points_and_its_end(tmp_path: Path) -> None:
    file = training_log(tmp_path / "long", held_out=True)
    assert curve.read_curve(file, "tokens") == curve.Curve("long (288 answer tokens)", ((2000.0, 1.7),), (2500.0, 1.8))
    assert curve.read_curve(file, "minutes") == curve.Curve("long (288 answer tokens)", ((1.0, 1.7),), (1.2, 1.8))
    assert curve.read_curve(file, "corpus") == curve.Curve("long (288 answer tokens)", (), (288.0, 1.8))


@pytest.mark.parametrize("over", ["tokens", "minutes", "corpus"])
def test_several_runs_share_one_picture(tmp_path: Path, over: str) -> None:
    pytest.importorskip("matplotlib", reason="the dev extra has matplotlib")
    files = [str(training_log(tmp_path / name, held_out=name == "long")) for name in ("long", "short")]
    pictures = []
    for name in ("a.svg", "b.svg"):
        result = CliRunner().invoke(curve.curve, [*files, "-o", str(tmp_path / name), "--over", over])
        assert result.exit_code == 0, result.output
        pictures.append((tmp_path / name).read_text())
    assert "long (288" in pictures[0] and "short (288" in pictures[0] and pictures[0] == pictures[1]


def test_what_is_no_training_log_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"curve": []}')
    result = CliRunner().invoke(curve.curve, [str(tmp_path / "training.json"), "-o", str(tmp_path / "c.svg")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1) and "training.json" in result.stderr


WORKER = """
import json, sys
print("{}", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    ms = 5.0 if sys.argv[1] == "dovetail" else 10.0
    print(json.dumps({"count": 11, "tokens": asked["ids"], "first_ms": ms, "later_ms": ms, "rss_mb": 7}), flush=True)
"""


def test_peers_are_asked_in_turn_and_compared_by_prompt(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = script("peers")
    worker, prompts, out = tmp_path / "worker.py", tmp_path / "prompts.jsonl", tmp_path / "out.json"
    worker.write_text(WORKER)
    monkeypatch.setattr(peers, "WORKER", worker)
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    arguments = [str(tiny_target.parent), str(prompts), "--python", sys.executable, "--out", str(out)]
    result = CliRunner().invoke(peers.main, arguments, catch_exceptions=False)
    scores = {row["engine"]: row for row in json.loads(out.read_text())["scores"]}
    assert list(scores) == [*peers.OURS, *peers.GENAI]
    assert scores["dovetail"]["to_plain"] == 2.0 == 2 * scores["openvino-genai, plain"]["to_plain"]
    assert all(row["same_text"] == row["prompts"] == 2 for row in scores.values())
    assert "| dovetail | 2000.0 | 2.00x | 2.00x | 5 | 7 | 2 of 2 |" in result.output


def test_engines_are_told_how_long_the_prompts_are(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, worker, prompts, out = (script("peers"), *(tmp_path / name for name in ("worker.py", "prompts", "out")))
    worker.write_text(
        WORKER.replace('"rss_mb": 7', '"rss_mb": int(os.environ["PEER_CONTEXT"])').replace("json,", "json, os,")
    )
    monkeypatch.setattr(peers, "WORKER", worker)
    for text, most in (("one", 4096), ("one " * 5000, 20_000)):
        prompts.write_text(json.dumps({"prompt": text}) + "\n")
        arguments = [str(tiny_target.parent), str(prompts), "--python", sys.executable, "--out", str(out)]
        CliRunner().invoke(peers.main, [*arguments, "--engine", "dovetail"], catch_exceptions=False)
        assert most <= json.loads(out.read_text())["scores"][0]["rss_mb"] < 1.1 * most


def test_long_prompts_have_the_length_that_was_asked_for(tiny_target: Path) -> None:
    tokenizer, made = Tokenizer.from_folder(tiny_target), []
    for wanted in ("2", "1000"):
        asked = [str(tiny_target.parent), "2000", "--count", wanted]
        made.append(CliRunner().invoke(script("long_prompts").main, asked))
    rows = [json.loads(line)["prompt"] for line in made[0].output.splitlines()]
    assert len(set(rows)) == 2
    assert all(abs(len(tokenizer.encode_chat([{"role": "user", "content": row}])) - 2000) <= 16 for row in rows)
    assert made[1].exit_code == 1 and "has text for" in made[1].output.splitlines()[-1]


def test_a_peer_that_does_not_start_is_named(tmp_path: Path) -> None:
    peers = script("peers")
    with pytest.raises(InputError, match=r"'dovetail'.* to see why"):
        peers.Worker.start(sys.executable, "dovetail", tmp_path)


def test_a_gguf_at_eight_bits_keeps_metadata_and_weights(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader, GGUFWriter
    from gguf.quants import dequantize

    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_context_length(99)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("w.weight", weights)
    writer.add_tensor("norm.weight", weights[0])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    arguments = [str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf")]
    CliRunner().invoke(script("gguf_q8").main, arguments, catch_exceptions=False)
    reader = GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["llama.context_length"].contents() == 99
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    matrix = by_name["w.weight"]
    assert matrix.tensor_type.name == "Q8_0"
    assert np.abs(dequantize(matrix.data, matrix.tensor_type) - weights).max() < 0.02
    assert (by_name["norm.weight"].data == weights[0]).all()


def test_answers_are_compared_token_by_token_and_with_an_earlier_run(tmp_path: Path, monkeypatch) -> None:
    same_text, shift, seed = script("same_text"), 0, 3

    tokenizer = ScriptedTokenizer(ALPHABET, has_chat_template=True)

    def opened(pair: Path) -> Engine:
        logits = MarkovLogits(len(ALPHABET), seed=3 + shift)
        return Engine(ScriptedTarget(logits), ScriptedDrafter.copy_of(logits, noise=1.0), tokenizer)

    def opened_together(pair: Path, slots: int) -> BatchEngine:
        return BatchEngine(ScriptedTarget(MarkovLogits(len(ALPHABET), seed=seed)), None, tokenizer, slots=slots)

    def asked(out: str, *flags: str) -> Result:
        arguments = [str(tmp_path), "--prompts", str(tmp_path), "-n", "12", "--out", str(tmp_path / out), *flags]
        return CliRunner().invoke(same_text.main, arguments)

    monkeypatch.setattr(Engine, "from_pretrained", opened)
    monkeypatch.setattr(BatchEngine, "from_pretrained", opened_together)
    monkeypatch.setattr(same_text, "own_prompts", lambda: {task: ["One", "Two"] for task in same_text.TASKS})
    for task in same_text.TASKS:
        (tmp_path / f"{task}.jsonl").write_text('{"prompt": "Three"}\n')
    first = asked("first.jsonl", "--limit", "1", "--own", "1")
    assert first.exit_code == 0 and first.stdout.count("| 2 | 2 |") == 8, first.output
    rows = (tmp_path / "first.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "first.jsonl").write_text("".join(rows[:5]))  # stopped
    assert asked("first.jsonl", "--limit", "1", "--own", "1").exit_code == 0
    assert (tmp_path / "first.jsonl").read_text() == "".join(rows)
    together = asked("together.jsonl", "--limit", "1", "--own", "1", "--together", "3")
    assert together.exit_code == 0 and (tmp_path / "together.jsonl").read_text() == "".join(rows)
    again = asked("again.jsonl", "--limit", "1", "--own", "1", "--against", str(tmp_path / "first.jsonl"))
    assert again.exit_code == 0 and "equal to earlier" in again.stdout
    more = asked("more.jsonl", "--own", "2", "--against", str(tmp_path / "first.jsonl")).exception
    assert isinstance(more, InputError) and "prompt 2 of humaneval" in str(more)
    (tmp_path / "empty.jsonl").touch()
    none = asked("none.jsonl", "--limit", "1", "--own", "1", "--against", str(tmp_path / "empty.jsonl")).exception
    assert isinstance(none, InputError) and "prompt 0 of humaneval" in str(none)
    seed = 9
    wrong = asked("wrong.jsonl", "--limit", "1", "--own", "1", "--together", "3")
    assert wrong.exit_code == 1 and "| 2 | 2 |" not in wrong.stdout
    shift = 1  # another target writes another text
    other = asked("other.jsonl", "--limit", "1", "--own", "1", "--against", str(tmp_path / "first.jsonl"))
    assert other.exit_code == 1 and "| 2 | 2 |" not in other.stdout


def test_own_prompts_are_sixty_different_ones_of_each_kind() -> None:
    same_text = script("same_text")
    assert {task: len(set(texts)) for task, texts in same_text.own_prompts().items()} == dict.fromkeys(
        same_text.TASKS, 60
    )
