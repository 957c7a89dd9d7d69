"""`dovetail-export`: exit codes, one line per error, and an interrupted export that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dovetail.exporter.cli import main as export_cli
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import read_manifest

ROOTS = os.pathsep.join(str(Path(__file__).parents[2] / root) for root in ("runtime", "exporter", "models"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", ROOTS)


def huge(flag: str) -> tuple[str, str]:
    return flag, "99999999999999999999"


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dovetail.exporter.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that is no progress."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_help_names_every_command_without_loading_any() -> None:
    script = (
        "import sys; from dovetail.exporter.cli.main import main; code = main(['--help']); "
        "heavy = {'torch', 'openvino', 'numpy', 'rich'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("target", "train", "drafter", "pair", "check"):
        assert name in done.stdout


def test_options_are_those_of_optimum_cli(capsys: pytest.CaptureFixture[str]) -> None:
    for command, flags in {
        "target": ("--revision", "--weight-format", "--sym", "--group-size", "--ratio", "--trust-remote-code",
                   "--resume", "--force", "--tokenizer", "fp32|fp16|int8|int4"),
        "pair": ("--source", "--resume", "--force", "smollm2-135m"),
        "check": ("PAIR",),
    }.items():  # fmt: skip
        assert export_cli.main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(flag in shown for flag in flags), (command, shown)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["pair", "smollm3", "out"], 2, "smollm2-135m"),
        (["target", "nowhere/at/all", "out"], 4, "does not exist"),
        (["target", "some-org/model", "out"], 4, "is not in the Hub's cache"),
        (["target", "broken.gguf", "out"], 4, "broken.gguf"),
        (["target", "broken.gguf", "taken"], 5, "name another folder"),
        (["target", "broken.gguf", "out", "--max-context", "0"], 2, "--max-context"),
        (["target", "broken.gguf", "out", "--weight-format", "fp16", "--sym"], 2, "fp16"),
        (["check", "nowhere"], 3, "missing"),
        (["train", "--minutes", "1"], 2, "--target"),
        (["train", "--target", "taken", "--minutes", "1"], 3, "missing"),
        (["train", "--target", "taken", "--minutes", "0"], 6, "minutes 0"),
        (["train", "--target", "taken", "--minutes", "1e308"], 6, "minutes 1e+308"),
        (["train", "--target", "taken", "--minutes", "1e20"], 6, "minutes 1e+20"),
        (["train", "--target", "taken", "--minutes", "nan"], 6, "minutes nan"),
        (["train", "--target", "taken", "--epochs", "1e308"], 6, "epochs 1e+308"),
        (["train", "--target", "taken", "--epochs", "1e20"], 6, "epochs 1e+20"),
        (["train", "--target", "taken", "--disk", "1e308"], 6, "disk_gb 1e+308"),
        (["train", "--target", "taken", "--learning-rate", "1e308"], 6, "learning_rate 1e+308"),
        (["train", "--target", "taken", "--regression", "1e308"], 6, "regression 1e+308"),
        (["train", "--target", "taken", "--regression", "-1"], 6, "regression -1"),
        (["train", "--target", "taken", *huge("--own-prompts")], 6, "own_prompts 99999999999999999999"),
        (["train", "--target", "taken", *huge("--max-new-tokens")], 6, "max_new_tokens 99999999999999999999"),
        (["train", "--target", "taken", *huge("--draft-vocab")], 6, "draft_vocab 99999999999999999999"),
        (["train", "--target", "taken", *huge("--window")], 6, "window 99999999999999999999"),
        (["train", "--target", "taken", *huge("--batch")], 6, "batch 99999999999999999999"),
        (["train", "--target", "taken", *huge("--teacher-top-k")], 6, "teacher_top_k 99999999999999999999"),
        (["train", "--target", "taken", *huge("--seed")], 6, "seed 99999999999999999999"),
        (["target", "broken.gguf", "out", *huge("--max-context")], 2, "--max-context 99999999999999999999"),
        (["target", "broken.gguf", "o\0t"], 2, "is no valid text"),
        (["target", "broken.gguf", "\udcff"], 2, "is no valid text"),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(
    arguments: list[str], code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(30))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").touch()
    assert export_cli.main(arguments) == code
    assert expected in error_line(capsys)
    assert {p.name for p in tmp_path.iterdir()} - {"cache"} == {"broken.gguf", "taken"}


def test_usage_error_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert export_cli.main(["target", "--no-such-flag"]) == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_target_without_a_chat_template_is_said_so(
    plain_ir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "ir"
    shutil.copytree(plain_ir, source)
    (source / "chat_template.jinja").unlink()
    assert export_cli.main(["target", str(source), str(tmp_path / "pair")]) == 0
    assert "note: " in (said := capsys.readouterr().err) and "no chat template" in said
    assert export_cli.main(["target", str(plain_ir), str(tmp_path / "other")]) == 0
    assert "chat template" not in capsys.readouterr().err


def test_target_then_check(plain_ir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "pair")
    assert export_cli.main(["target", str(plain_ir), out]) == 0
    assert "llama, 2 layers, int8" in capsys.readouterr().out
    assert export_cli.main(["check", out]) == 0
    assert "fine" in capsys.readouterr().out
    assert export_cli.main(["target", str(plain_ir), out]) == 5
    assert "--force" in error_line(capsys)
    assert export_cli.main(["target", str(plain_ir), out, "--resume"]) == 0
    (tmp_path / "pair/target/openvino_model.bin").write_bytes(b"")
    capsys.readouterr()
    assert export_cli.main(["check", out]) == 3
    assert "openvino_model.bin is truncated" in error_line(capsys)


def test_kill_at_any_time_leaves_no_half_pair(plain_ir: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    command = [sys.executable, "-m", "dovetail.exporter.cli.main", "target", str(plain_ir), str(out), "--resume"]
    for delay in (0.9, 1.2, 1.5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        if out.exists():
            check_pair_folder(out)
    assert export_cli.main([*command[3:]]) == 0
    check_pair_folder(out)
    assert {p.name for p in tmp_path.iterdir()} == {"pair", "cache"}


def test_interrupt_exits_130_and_leaves_nothing(plain_ir: Path, tmp_path: Path) -> None:
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell ignores it
        "import sys, time; from dovetail.exporter.cli.main import main; from dovetail.exporter.target import export\n"
        "export.save_ir = lambda model, xml: (xml.write_text('half'), print('writing', flush=True), time.sleep(30))\n"
        f"sys.exit(main(['target', {str(plain_ir)!r}, {str(tmp_path / 'pair')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "interrupted" in stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_really_full_disk_is_one_line_and_resume_works(plain_ir: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} -m dovetail.exporter.cli.main target {plain_ir} {disk}/pair"
    script = f"""
        mount -t tmpfs -o size=200k small {disk} || exit 77
        export DOVETAIL_CACHE={tmp_path}/cache
        {command}; echo "first exit $?"
        ls -A {disk}
        mount -o remount,size=20m {disk} || exit 77
        {command} --resume; echo "second exit $?"
        ls -A {disk}
        {sys.executable} -m dovetail.exporter.cli.main check {disk}/pair; echo "check exit $?"
    """
    mapping = [] if os.geteuid() == 0 else ["--map-root-user"]
    done = subprocess.run(["unshare", "--mount", *mapping, "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount a file system here")
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(errors) == 1 and "the disk is full" in errors[0], done.stderr
    lines = [line for line in done.stdout.splitlines() if str(disk) not in line]
    assert lines == ["first exit 5", "second exit 0", "pair", "check exit 0"]


def test_drafter_and_manifest_survive_a_check(tiny_full_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny_full_pair / MANIFEST_NAME).read_bytes()
    assert export_cli.main(["check", str(tiny_full_pair)]) == 0
    assert "dgf" in capsys.readouterr().out
    assert (tiny_full_pair / MANIFEST_NAME).read_bytes() == before
    assert read_manifest(tiny_full_pair).drafter is not None


def test_off_a_terminal_training_says_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from dovetail.exporter.cli.train import _Bars

    with _Bars(Progress(console=Console(file=sys.stdout, force_terminal=False), disable=True)) as bars:
        for done in range(1, 200):
            bars("answers", done, 0, "")
        for done in range(1, 51):
            bars("fit", done, 50, f"loss {done // 25}")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["answers 1", "fit 1/50  loss 0", "fit 25/50  loss 1", "fit 50/50  loss 2"]
