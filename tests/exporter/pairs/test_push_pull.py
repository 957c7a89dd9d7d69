"""Whole pairs to the Hub and back, against a server of this test that answers as the Hub does."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dovetail.exporter.pairs.card import write_card
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.exporter.pairs.push import push_pair
from dovetail.runtime.errors import ExportError, InputError, IntegrityError, ManifestError, SourceError
from dovetail.runtime.pair.check import read_sound
from dovetail.runtime.pair.manifest import read_manifest, write_manifest

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub, Files

REPO, TOKEN = "somebody/pair", "hf_of_the_owner"


@pytest.fixture
def pair(tiny_full_pair: Path, tmp_path: Path) -> Path:
    """A pair with files of its user's."""
    pair = shutil.copytree(tiny_full_pair, tmp_path / "mine" / "pair")
    (pair / "notes.txt").write_text("private")
    (pair / "target" / "secret.txt").write_text("private")
    (pair / ".cache").mkdir()
    (pair / ".cache" / "x").write_text("private")
    return pair


@pytest.fixture
def published(hub: FakeHub, tiny_full_pair: Path) -> Path:
    """The pair in a repository, as a push leaves it."""
    names = [*read_manifest(tiny_full_pair).files, "dovetail.json"]
    hub.add(REPO, {**{name: (tiny_full_pair / name).read_bytes() for name in names}, "README.md": b"# A pair"})
    return tiny_full_pair


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file; links are none."""
    return {
        file.relative_to(folder).as_posix(): sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink()
    }


def left(folder: Path) -> set[str]:
    """Names of what a pull leaves in `folder`."""
    return {path.name for path in folder.iterdir()} - {"home", "cache"}


def failure(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The line of an error, after lines of progress alone."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert (done.returncode, done.stdout, len(lines)) == (code, "", 1), done.stderr
    return lines[0]


def test_a_pair_goes_to_the_hub_and_comes_back(hub: FakeHub, pair: Path, tmp_path: Path) -> None:
    pushed = hub.export(tmp_path / "home", "push", pair, REPO, "--private", token=TOKEN)
    assert pushed.returncode == 0, pushed.stderr
    repository = hub.repositories[REPO]
    assert repository.private and repository.refs["main"] in pushed.stdout
    manifest = read_manifest(pair)
    files = repository.commits[repository.refs["main"]]
    assert {*files} == {*manifest.files, "dovetail.json", "README.md", ".gitattributes"}
    assert not any(content == b"private" for content in files.values())
    assert "target/openvino_model.bin" in files and sha256(files["target/openvino_model.bin"]).hexdigest() in hub.stored

    out = tmp_path / "pulled"
    assert "set HF_TOKEN" in failure(hub.export(tmp_path / "home", "pull", REPO, out), SourceError.exit_code)
    pulled = hub.export(tmp_path / "home", "pull", REPO, out, token=TOKEN)
    assert pulled.returncode == 0, pulled.stderr
    assert {*tree(out)} == {*manifest.files, "dovetail.json"}
    assert tree(out).items() <= tree(pair).items()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert check_pair_folder(out) == manifest


def test_a_push_again_changes_what_changed_and_keeps_a_card_of_the_owner(
    hub: FakeHub, pair: Path, tmp_path: Path
) -> None:
    def push(*arguments: object) -> Files:
        done = hub.export(tmp_path / "home", "push", pair, REPO, *arguments, token=TOKEN)
        assert done.returncode == 0, done.stderr
        assert ("README.md of its own, which stays" in done.stderr) == own
        return hub.repositories[REPO].commits[hub.repositories[REPO].refs["main"]]

    own = False
    first = push()
    write_manifest(pair, replace(read_manifest(pair), name="renamed"))
    stored = {*hub.stored}
    second = push()
    assert {name for name in second if second[name] != first[name]} == {"dovetail.json", "README.md"}
    assert {*hub.stored} == stored
    assert b"# renamed" in second["README.md"]
    hub.repositories[REPO].commit({**second, "README.md": b"# My own words", "figures.csv": b"1,2"})
    own = True
    third = push()
    assert third["README.md"] == b"# My own words" and third["figures.csv"] == b"1,2"


def test_a_push_to_a_branch_makes_the_branch(hub: FakeHub, pair: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = hub.export(tmp_path / "home", "push", pair, REPO, "--revision", "int8", token=TOKEN)
        assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO]
    assert {*repository.commits[repository.refs["main"]]} == {".gitattributes"}
    card = repository.commits[repository.refs["int8"]]["README.md"].decode()
    assert f"dovetail-export pull {REPO} ./pair --revision int8" in card
    failure(hub.export(tmp_path / "home", "pull", REPO, tmp_path / "out", token=TOKEN), SourceError.exit_code)
    for revision in ("int8", repository.refs["int8"]):
        out = tmp_path / revision
        done = hub.export(tmp_path / "home", "pull", REPO, out, "--revision", revision, token=TOKEN)
        assert done.returncode == 0, done.stderr
        read_sound(out)


def test_no_file_is_left_out_silently(hub: FakeHub, pair: Path, tmp_path: Path) -> None:
    hub.ignored = (".bin",)  # as a .gitignore of the repository would have it
    assert hub.export(tmp_path / "home", "push", pair, REPO, token=TOKEN).returncode == 0
    assert "target/openvino_model.bin" in hub.repositories[REPO].commits[hub.repositories[REPO].refs["main"]]
    hub.repositories.clear()
    hub.lost = ("tokenizer.json",)
    line = failure(hub.export(tmp_path / "home", "push", pair, REPO, token=TOKEN), ExportError.exit_code)
    assert f"{REPO} lacks target/tokenizer.json after the push" in line


def test_an_upload_that_fails_commits_nothing(hub: FakeHub, pair: Path, tmp_path: Path) -> None:
    hub.full = True
    line = failure(hub.export(tmp_path / "home", "push", pair, REPO, token=TOKEN), ExportError.exit_code)
    assert "the Hub answers 413 (no room for more): repeat the command" in line
    assert {*hub.repositories[REPO].commits[hub.repositories[REPO].refs["main"]]} == {".gitattributes"}
    hub.full = False
    assert hub.export(tmp_path / "home", "push", pair, REPO, token=TOKEN).returncode == 0


def test_a_damaged_pair_is_not_pushed(hub: FakeHub, pair: Path, tmp_path: Path) -> None:
    weights = pair / "target" / "openvino_model.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    line = failure(hub.export(tmp_path / "home", "push", pair, REPO, token=TOKEN), IntegrityError.exit_code)
    assert "was altered" in line and hub.asked == []
    line = failure(hub.export(tmp_path / "home", "push", tmp_path, REPO, token=TOKEN), ManifestError.exit_code)
    assert "dovetail.json is missing" in line


@pytest.mark.parametrize(
    ("repo", "arguments", "token", "code", "told"),
    [
        ("pair", [], TOKEN, InputError.exit_code, "'pair' is no Hub id: give OWNER/NAME"),
        ("a/b/c", [], TOKEN, InputError.exit_code, "no Hub id"),
        ("me/x--y", [], TOKEN, InputError.exit_code, "'me/x--y' is no Hub id: give OWNER/NAME"),
        ("m\xe9/x", [], TOKEN, InputError.exit_code, "'m\xe9/x' is no Hub id: give OWNER/NAME"),
        (REPO, [], None, ExportError.exit_code, "set HF_TOKEN to a token"),
        (REPO, [], "hf_unknown", ExportError.exit_code, "the Hub refuses the token"),
        ("others/pair", [], TOKEN, ExportError.exit_code, "You don't have the rights"),
        ("somebody/public", ["--private"], TOKEN, InputError.exit_code, "exists and is public"),
    ],
)
def test_a_push_that_the_hub_refuses_is_one_line(
    hub: FakeHub, pair: Path, tmp_path: Path, repo: str, arguments: list[str], token: str | None, code: int, told: str
) -> None:
    commit = hub.add("somebody/public", {"a": b"b"}).refs["main"]
    before = tree(pair)
    line = failure(hub.export(tmp_path / "home", "push", pair, repo, *arguments, token=token), code)
    assert told in line and (token is None or token not in line)
    assert [*hub.repositories] == ["somebody/public"] and hub.repositories["somebody/public"].refs == {"main": commit}
    assert tree(pair) == before


def test_a_name_is_checked_before_the_pair(tmp_path: Path) -> None:
    for name in ("me/x--y", "me/x.git", "mé/x", "pair"):
        with pytest.raises(InputError, match=f"{name!r} is no Hub id: give OWNER/NAME, of letters"):
            push_pair(tmp_path / "nowhere", name)


def test_without_the_hub_a_push_and_a_pull_are_one_line(hub: FakeHub, pair: Path, tmp_path: Path) -> None:
    push, pull = ("push", pair, REPO), ("pull", REPO, tmp_path / "out")
    for command, code in ((push, ExportError.exit_code), (pull, SourceError.exit_code)):
        assert "unset HF_HUB_OFFLINE" in failure(hub.export(tmp_path / "home", *command, HF_HUB_OFFLINE="1"), code)
    hub.stop()
    for command, code in ((push, ExportError.exit_code), (pull, SourceError.exit_code)):
        assert "is unreachable: connect" in failure(hub.export(tmp_path / "home", *command, token=TOKEN), code)
    assert not (tmp_path / "out").exists()


def test_a_pull_keeps_what_is_there(hub: FakeHub, published: Path, tiny_pair: Path, tmp_path: Path) -> None:
    other, taken, empty = tmp_path / "other", tmp_path / "taken", tmp_path / "empty"
    shutil.copytree(tiny_pair, other)
    (other / "notes.txt").write_text("mine")
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    empty.mkdir()
    before = tree(tmp_path)
    line = failure(hub.export(tmp_path / "home", "pull", REPO, other), ExportError.exit_code)
    assert "already holds the finished pair 'tiny': use --force" in line
    for arguments in ([], ["--force"]):
        line = failure(hub.export(tmp_path / "home", "pull", REPO, taken, *arguments), ExportError.exit_code)
        assert "is not empty and holds no pair" in line
    assert hub.asked == [] and tree(tmp_path) == before
    for out, arguments in ((other, ["--force"]), (empty, [])):
        done = hub.export(tmp_path / "home", "pull", REPO, out, *arguments)
        assert done.returncode == 0, done.stderr
        assert read_sound(out) == read_manifest(published)
    assert (other / "notes.txt").read_text() == "mine"
    assert tree(empty) == {**tree(published)}


def damaged(files: Files, name: str) -> Files:
    content = bytearray(files[name])
    content[len(content) // 2] ^= 1
    return {**files, name: bytes(content)}


def with_manifest(content: Files, **changes: Any) -> Files:
    return {**content, "dovetail.json": json.dumps({**json.loads(content["dovetail.json"]), **changes}).encode()}


def listing(files: Files, name: str) -> Files:
    entries = json.loads(files["dovetail.json"])["files"]
    return with_manifest(files, files={**entries, name: {"size": 1, "sha256": "0" * 64}})


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (
            lambda files: damaged(files, "target/openvino_model.bin"),
            3,
            "holds a damaged pair: target/openvino_model.bin",
        ),
        (lambda files: {**files, "target/tokenizer.json": b"{}"}, 3, "tokenizer.json is truncated"),
        (lambda files: {n: c for n, c in files.items() if n != "target/config.json"}, 3, "lacks target/config.json"),
        (lambda files: {"config.json": b"{}"}, 4, "is no pair, it has no dovetail.json"),
        (lambda files: {**files, "dovetail.json": b"[]"}, 3, "the manifest is a list"),
        (lambda files: with_manifest(files, format_version=9), 3, "format_version 9"),
        (lambda files: listing(files, "../outside"), 3, "lies outside the pair"),
        (lambda files: listing(files, "/etc/outside"), 3, "lies outside the pair"),
        (lambda files: with_manifest(files, files={}), 3, "no digest"),
    ],
)
def test_a_repository_without_a_sound_pair_leaves_nothing(
    hub: FakeHub, published: Path, tmp_path: Path, change: Any, code: int, told: str
) -> None:
    repository = hub.repositories[REPO]
    good = repository.commits[repository.refs["main"]]
    repository.commit(change(good))
    line = failure(hub.export(tmp_path / "home", "pull", REPO, tmp_path / "out"), code)
    assert told in line and REPO in line and left(tmp_path) == set()
    repository.commit(good)
    done = hub.export(tmp_path / "home", "pull", REPO, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(published)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_interrupted_pull_goes_on(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    out, last = tmp_path / "out", "target/tokenizer.json"
    hub.broken = last
    line = failure(hub.export(tmp_path / "home", "pull", REPO, out), SourceError.exit_code)
    assert "a broken disk" in line and REPO in line and left(tmp_path) == {".out.build"}
    hub.down = 503
    failure(hub.export(tmp_path / "home", "pull", REPO, out), SourceError.exit_code)
    assert left(tmp_path) == {".out.build"}
    hub.down = 0
    hub.broken = ""
    hub.fetched.clear()
    done = hub.export(tmp_path / "home", "pull", REPO, out)
    assert done.returncode == 0, done.stderr
    assert last in hub.fetched and "target/openvino_model.bin" not in hub.fetched  # it was whole
    assert tree(out) == tree(published) and left(tmp_path) == {"out"}


def test_a_pull_of_nothing_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("somebody/model", {"config.json": b"{}"})
    for repo, told in (
        ("somebody/none", "does not exist"), ("somebody/model", "is no pair"), ("me/x--y", "correct the name"),
    ):  # fmt: skip
        assert told in failure(hub.export(tmp_path / "home", "pull", repo, tmp_path / "out"), SourceError.exit_code)
        assert left(tmp_path) == set()
    hub.answers = {}
    line = failure(hub.export(tmp_path / "home", "pull", REPO, tmp_path / "out"), SourceError.exit_code)
    assert "the Hub's answer is unusable (KeyError 'id'): check HF_ENDPOINT" in line and left(tmp_path) == set()


def metadata(card: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(card.data).items() if value}


def test_the_card_says_what_the_manifest_says(tiny_full_pair: Path) -> None:
    from huggingface_hub import ModelCard

    manifest = read_manifest(tiny_full_pair)
    source = {"repo": "meta/Big|Model", "revision": "c" * 40, "license": "apache-2.0"}
    known = replace(manifest, name="<b>a\n# b", provenance={**manifest.provenance, "target": {"source": source}})
    card = ModelCard(write_card(known, REPO))
    data = metadata(card)
    assert (data["base_model"], data["license"], data["library_name"]) == ("meta/Big|Model", "apache-2.0", "dovetail")
    assert {"dovetail", "openvino", "speculative-decoding", "int8"} <= {*data["tags"]}
    assert "# \\<b\\>a # b\n" in card.text and "| base model | meta/Big\\|Model, commit cccc" in card.text
    assert "The licence of the base model, apache-2.0, holds" in card.text and "of its own" not in card.text
    tokens = replace(manifest, drafter=replace(manifest.needed_drafter, reads_tokens=True, feature_layers=()))
    assert "The drafter is a language model of its own, whose licence holds too." in write_card(tokens, REPO)
    unknown = ModelCard(write_card(replace(manifest, drafter=None, provenance={}), REPO))
    assert not {"base_model", "license"} & {*metadata(unknown)}
    assert "does not say under which licence" in unknown.text and "| drafter | none |" in unknown.text
    reference = replace(
        manifest, provenance={"reference": {"pair": "smollm2-135m"}, "target": {"source": {"license": "My Own"}}}
    )
    data = metadata(ModelCard(write_card(reference, REPO)))
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and "license" not in data


def test_a_licence_comes_from_the_card_of_the_source(tiny_llama: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    from dovetail.exporter.target.sources import resolve_source

    source = shutil.copytree(tiny_llama, tmp_path / "hf")
    for card, license in (
        ("---\nlanguage:\n- en\nlicense: apache-2.0\ntags: []\n---\n# A model\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("# No metadata\nlicense: mit\n", None),
        ("---\nlicense: [\n", None),
        ("\udcff", None),
    ):
        (source / "README.md").write_bytes(card.encode("utf-8", "surrogateescape"))
        assert resolve_source(str(source)).license == license, card
    assert resolve_source(str(tiny_gguf)).license is None
