"""`check TARGET DRAFTER` says what fits before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from safetensors.torch import load_file, save_file

from dovetail.exporter.cli.main import main
from dovetail.runtime.errors import InputError, MismatchError, SourceError

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub

WIDTH, VOCAB, DRAFT = 32, 263, 40
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT, "max_position_embeddings": 64, "rope_theta": 500.0,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]},
}  # fmt: skip


def eagle3(folder: Path, **changes: Any) -> Path:
    config = {**CONFIG, **changes}
    d, vocab, taps = config["hidden_size"], config["vocab_size"], 2
    size, inner = d // config["num_attention_heads"] * config["num_attention_heads"], config["intermediate_size"]
    p = "midlayer."
    tensors = {
        "fc.weight": torch.zeros(d, taps * d), "norm.weight": torch.zeros(d), "lm_head.weight": torch.zeros(DRAFT, d),
        "d2t": torch.zeros(DRAFT, dtype=torch.int64), f"{p}hidden_norm.weight": torch.zeros(d),
        f"{p}input_layernorm.weight": torch.zeros(d), f"{p}post_attention_layernorm.weight": torch.zeros(d),
        f"{p}self_attn.q_proj.weight": torch.zeros(size, 2 * d), f"{p}self_attn.o_proj.weight": torch.zeros(d, size),
        f"{p}self_attn.k_proj.weight": torch.zeros(size // 2, 2 * d),
        f"{p}self_attn.v_proj.weight": torch.zeros(size // 2, 2 * d),
        f"{p}mlp.gate_proj.weight": torch.zeros(inner, d), f"{p}mlp.up_proj.weight": torch.zeros(inner, d),
        f"{p}mlp.down_proj.weight": torch.zeros(d, inner), "embed_tokens.weight": torch.zeros(vocab, d),
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def checked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, list[str]], str]:
    """Exit code, what was said by its verdict, and the error line."""
    capsys.readouterr()
    code = main(["check", *map(str, arguments)])
    out, err = capsys.readouterr()
    said: dict[str, list[str]] = {}
    for line in out.splitlines():
        verdict, _, rest = line.partition(" ")
        said.setdefault(verdict, []).append(" ".join(rest.split()))
    return code, said, err.strip()


@pytest.fixture(params=["pair", "folder"])
def target(request: pytest.FixtureRequest, tiny_pair: Path, tiny_llama: Path) -> Path:
    return tiny_pair if request.param == "pair" else tiny_llama


def test_a_drafter_that_fits(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = checked(capsys, target, eagle3(tmp_path / "drafter"))
    assert code == 0 and "refused" not in said
    fits = said["fits"]
    assert "drafter an EAGLE-3 drafter" in fits and "layers reads outputs of 0, 1 of 2" in fits
    assert f"width of layers {WIDTH}" in fits and f"draft vocabulary {DRAFT} of {VOCAB} tokens" in fits
    assert "RoPE the drafter's own: theta 500" in fits
    assert any("count outputs" in line for line in fits)
    assert any("norm_output is missing" in line for line in fits)
    assert any(line.startswith("context 64 and") and "reads the end alone" in line for line in said["differs"])
    assert "tokenizer the checkpoint has no tokenizer.json to compare" in said["unknown"]
    assert any(line.startswith("acceptance the checkpoint does not say") for line in said["unknown"])


def test_dovetails_own_says_its_acceptance(
    tiny_pair: Path, tiny_drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_drafter, tmp_path / "drafter")
    (folder / "training.json").write_text('{"held_out": {"acceptance_length": 2.345}}')
    code, said, _ = checked(capsys, tiny_pair, folder)
    assert code == 0 and "acceptance 2.35 tokens a pass on its held-out text" in said["fits"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": 64}, "width of layers 64 and 32"),
        ({"vocab_size": VOCAB + 1}, f"vocabulary {VOCAB + 1} and {VOCAB}"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 7]}}, "layers reads outputs of 0, 7 of 2"),
        ({"eagle_config": {}, "eagle_aux_hidden_state_layer_ids": [0, 1]}, "settings eagle_aux"),
        ({"hidden_act": "gelu"}, "settings hidden_act 'gelu'"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}}, "settings eagle_aux"),
        ({"norm_output": 1}, "settings norm_output 1"),
        ({"rope_scaling": {"type": "dynamic"}}, "settings RoPE 'dynamic'"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], what: str, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, error = checked(capsys, tiny_pair, eagle3(tmp_path / "drafter", **changes))
    assert code == MismatchError.exit_code and len(error.splitlines()) == 1
    assert any(line.startswith(what) for line in said["refused"]), said


def test_a_tokenizer_of_another_model_is_refused(
    tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = eagle3(tmp_path / "drafter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_pair / "target" / name, folder / name)
    code, said, _ = checked(capsys, tiny_pair, folder)
    assert code == 0 and any(line.startswith("tokenizer") for line in said["fits"])
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    code, said, _ = checked(capsys, tiny_pair, folder)
    assert code == MismatchError.exit_code and any(line.startswith("tokenizer") for line in said["refused"])


def test_another_chat_template_is_told(tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = eagle3(tmp_path / "drafter")
    shutil.copyfile(tiny_pair / "target" / "tokenizer.json", folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    code, said, _ = checked(capsys, tiny_pair, folder)
    assert code == 0 and any(line.startswith("chat template '[What is 2 + 2?]'") for line in said["differs"])


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('no') }}", "{{ 'x' * 10 ** 9 }}"])
def test_a_template_that_cannot_be_used_is_told(
    template: str, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = eagle3(tmp_path / "drafter")
    shutil.copyfile(tiny_pair / "target" / "tokenizer.json", folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(template)
    code, said, _ = checked(capsys, tiny_pair, folder)
    assert code == 0 and any(line.startswith("chat template the drafter's cannot be used") for line in said["unknown"])


@pytest.mark.parametrize("log", ["[]", "{", '{"held_out": 3}', '{"held_out": {"acceptance_length": %s}}'])
@pytest.mark.parametrize("length", ["NaN", "-3", "true", "9" * 400])
def test_a_training_log_that_says_nothing(
    log: str, length: str, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = eagle3(tmp_path / "drafter")
    (folder / "training.json").write_text(log % length if "%" in log else log)
    code, said, _ = checked(capsys, tiny_pair, folder)
    assert code == 0 and any(line.startswith("acceptance the checkpoint does not say") for line in said["unknown"])


def test_a_strangers_text_stays_in_its_line(
    tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "org/x\nfits     everything\x1b[2J" + "y" * 10_000
    folder = eagle3(tmp_path / "drafter", target_model_name_or_path=name)
    code = main(["check", str(tiny_pair), str(folder)])
    out = capsys.readouterr().out
    assert code == 0 and not any(line.startswith("fits     everything") for line in out.splitlines())
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 400


def test_a_shipped_drafter_goes_by_its_name(tiny_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = checked(capsys, tiny_pair, "smollm2-135m")
    assert code == MismatchError.exit_code and f"width of layers 576 and {WIDTH}" in said["refused"]


def test_a_target_with_other_names_of_its_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "gpt2"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"n_embd": WIDTH, "n_layer": 2, "vocab_size": VOCAB}))
    code, said, _ = checked(capsys, target, eagle3(tmp_path / "drafter"))
    assert code == 0 and f"width of layers {WIDTH}" in said["fits"]
    (target / "config.json").write_text(json.dumps({"n_layer": 2, "vocab_size": VOCAB}))
    code, said, error = checked(capsys, target, tmp_path / "drafter")
    assert code == MismatchError.exit_code and any("no hidden_size" in line for line in said["refused"])
    assert error.endswith("(settings): correct the checkpoint")


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("command", ["check", "drafter"])
def test_quantised_weights_are_refused(
    kind: str, command: str, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pair = eagle3(tmp_path / "drafter"), shutil.copytree(tiny_pair, tmp_path / "pair")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "fc.weight": tensors["fc.weight"].to(getattr(torch, kind))}, folder / "model.safetensors")
    arguments = [str(pair), "--checkpoint", str(folder)] if command == "drafter" else [str(pair), str(folder)]
    assert main([command, *arguments]) == SourceError.exit_code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fc.weight" in error and "not quantised" in error


@pytest.mark.parametrize("change", ["sparse", "meta", "float8"])
def test_a_pickle_of_other_tensors_is_refused(
    change: str, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = eagle3(tmp_path / "drafter")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    fc = tensors["fc.weight"]
    odd = {"sparse": fc.to_sparse(), "meta": fc.to("meta"), "float8": fc.to(torch.float8_e5m2)}[change]
    torch.save({**tensors, "fc.weight": odd}, folder / "pytorch_model.bin")
    pair = shutil.copytree(tiny_pair, tmp_path / "pair")
    assert main(["drafter", str(pair), "--checkpoint", str(folder), "--allow-pickle"]) == SourceError.exit_code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fc.weight" in error and "Traceback" not in error


def test_no_weight_is_read(tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The values behind the header are NaN, which an export refuses."""
    folder = eagle3(tmp_path / "drafter")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-64:] = b"\xff" * 64
    file.write_bytes(content)
    assert checked(capsys, tiny_pair, folder)[0] == 0
    assert main(["drafter", str(shutil.copytree(tiny_pair, tmp_path / "pair")), "--checkpoint", str(folder)]) != 0


def test_a_target_or_drafter_that_is_none(tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafter = eagle3(tmp_path / "drafter")
    for arguments, code, said in (
        ((tmp_path / "nowhere", drafter), SourceError.exit_code, "is no target"),
        ((tiny_pair, tmp_path / "nowhere"), SourceError.exit_code, "config.json is missing"),
        ((tiny_pair, tiny_pair / "target"), SourceError.exit_code, "has no weights"),
        ((tiny_pair, "--allow-pickle"), InputError.exit_code, "--allow-pickle is for a DRAFTER"),
        ((tiny_pair, "--revision", "main"), InputError.exit_code, "--revision is for a DRAFTER"),
        ((tiny_pair, drafter, "--revision", "main"), SourceError.exit_code, "--revision"),
    ):
        found = checked(capsys, *arguments)
        assert found[0] == code and said in found[2] and len(found[2].splitlines()) == 1


def test_hub_ids_are_compared_without_a_download_of_weights(hub: FakeHub, tiny_llama: Path, tmp_path: Path) -> None:
    drafter = eagle3(tmp_path / "drafter")
    for name, folder in (("org/target", tiny_llama), ("org/drafter", drafter)):
        hub.add(name, {file.name: file.read_bytes() for file in folder.iterdir()})
    done = hub.export(tmp_path / "home", "check", "org/target", "org/drafter")
    assert done.returncode == 0, done.stderr
    assert "an EAGLE-3 drafter" in done.stdout and f"{DRAFT} of {VOCAB} tokens" in done.stdout
    assert "config.json" in hub.fetched and not [name for name in hub.fetched if name.endswith(".safetensors")]
    hub.add("org/pickled", {"config.json": b'{"hidden_size": 8}', "pytorch_model.bin": b"x"})
    again = hub.export(tmp_path / "home", "check", "org/target", "org/drafter", "--revision", "nowhere")
    assert again.returncode == SourceError.exit_code and "'nowhere'" in again.stderr
    refused = hub.export(tmp_path / "home", "check", "org/target", "org/pickled")
    assert refused.returncode == SourceError.exit_code and "--allow-pickle" in refused.stderr
