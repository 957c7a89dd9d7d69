"""The documents: sentences that a newcomer can read, links that lead somewhere, options that are the commands'.

Sentences: README.md, CONTRIBUTING.md, docs/**/*.md and the README of tests/bench; docs/reference/options.md is
generated and has the words of --help.
Code blocks and tables are no sentences, and may be as wide as they are; so may a line that holds nothing but one link
or one word too long to break.  Links: these pages, CHANGELOG.md and the drafters' cards.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ROOT / "docs" / "reference" / "options.md"
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "bench" / "README.md"]
PROSE = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
CHANGELOG = ROOT / "CHANGELOG.md"
LINKED = [*PROSE, CHANGELOG, *sorted((ROOT / "models").rglob("README.md"))]
CODE = [file for room in ("runtime", "exporter", "models", "tests") for file in sorted((ROOT / room).rglob("*.py"))]

MOST_WORDS = 30
MOST_COLUMNS = 100
MOST_NUMBERS = 2  # of a sentence of the README
FIRST_LINES = 25  # of the README, which hold the installation and the first command
BEGINNINGS = ("Of ", "What ", "Where there is ")

FENCE = re.compile(r"^\s*(```|~~~)")
ITEM = re.compile(r"^\s*([-*+]|\d+[.)])\s+")
HEADING = re.compile(r"^(#{1,6})\s+(.*)$")
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
# A full stop, then a space, then what may begin a sentence; "e.g." and the like end none.
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.?!][\"')*_]*\s+(?=[A-Z0-9`\"'(*_\[])")
NUMBER = re.compile(r"(?<![\w.\-])\d[\d,.]*\d?(?:x|%)?(?![\w-])")


@dataclass(frozen=True)
class Block:
    """A heading, a paragraph or an item of a list, as one line of text.  line: where it begins, from 1."""

    line: int
    text: str


def blocks(text: str) -> Iterator[Block]:
    """What is to be read as prose: no code, no tables, no comments."""
    begin, parts, fenced, comment = 0, list[str](), False, False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fenced ^= bool(FENCE.match(line))
        comment |= line.lstrip().startswith("<!--")
        apart = fenced or comment or FENCE.match(line) or line.lstrip().startswith("|") or not line.strip()
        alone = HEADING.match(line)
        if parts and (apart or alone or ITEM.match(line)):
            yield Block(begin, " ".join(parts))
            parts = []
        comment &= "-->" not in line
        if apart:
            continue
        begin = begin if parts else number
        parts.append(ITEM.sub("", line).strip().lstrip("#> ").strip())
        if alone:
            yield Block(begin, parts.pop())


def plain(text: str) -> str:
    """Without marks: code is a word, a link its text, a picture nothing."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = LINK.sub(lambda link: link[1], text)
    text = re.sub(r"``.+?``|`[^`]+`", "`code`", text)
    return text.replace("**", "").replace("*", "")


def sentences(text: str) -> Iterator[Block]:
    for block in blocks(text):
        for sentence in SENTENCE_END.split(plain(block.text)):
            yield Block(block.line, sentence.strip())


def long_sentences(text: str) -> list[str]:
    found = []
    for sentence in sentences(text):
        words = [word for word in sentence.text.split() if re.search(r"\w", word)]
        if len(words) > MOST_WORDS:
            found.append(f"{sentence.line}: {len(words)} words: {sentence.text}")
    return found


def odd_beginnings(text: str) -> list[str]:
    return [f"{each.line}: {each.text}" for each in sentences(text) if each.text.startswith(BEGINNINGS)]


def crowded_sentences(text: str) -> list[str]:
    """Sentences with more numbers than a reader keeps in mind."""
    return [f"{each.line}: {each.text}" for each in sentences(text) if len(NUMBER.findall(each.text)) > MOST_NUMBERS]


def long_lines(text: str) -> list[str]:
    found, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= bool(FENCE.match(line))
        unbreakable = " " not in ITEM.sub("", line).strip()
        if len(line) > MOST_COLUMNS and not (fenced or line.lstrip().startswith("|") or unbreakable):
            found.append(f"{number}: {len(line)} columns")
    return found


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    text = re.sub(r"[^\w\- ]", "", plain(heading.replace("`", "")).lower())
    return text.strip().replace(" ", "-")


def anchors(text: str) -> set[str]:
    without_code = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return {slug(match[2]) for match in map(HEADING.match, without_code.splitlines()) if match}


def dead_links(text: str, page: Path) -> list[str]:
    """Relative links of `page` to files that are not there, and to headings that their pages do not have."""
    found = []
    without_code = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    for _, link in LINK.findall(re.sub(r"`[^`\n]+`", "", without_code)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        if (file != page and not file.exists()) or not file.is_relative_to(ROOT):
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(text if file == page else file.read_text(encoding="utf-8")):
            found.append(f"{link}: no such heading")
    return found


def strings(source: str) -> Iterator[str]:
    """Every string of a module, "{}" where an f-string has a value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def explained(text: str) -> list[list[str]]:
    """The messages in the last table of the page of errors, each as its pieces around "..."."""
    table = text.partition("## Some messages")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [quoted.strip("`").split("...") for cell in cells for quoted in re.findall("`[^`]+`", cell)]


def load_options() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PROSE if page != OPTIONS], ids=name)
def test_sentences_are_short_and_lines_fit(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not long_sentences(text)
    assert not odd_beginnings(text)
    assert not long_lines(text)


def test_lines_of_the_changelog_fit() -> None:
    assert not long_lines(CHANGELOG.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page.read_text(encoding="utf-8"), page)


def test_the_readme_begins_with_installation_and_a_command_and_has_few_numbers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = "\n".join(text.splitlines()[:FIRST_LINES])
    assert "make run" in first and "dovetail-run " in first
    assert not crowded_sentences(text)


def test_pages_that_the_code_names_are_there() -> None:
    lost = []
    for file in (*CODE, ROOT / "Makefile", ROOT / "pyproject.toml"):
        for page in re.findall(r"\bdocs/(?:[a-z-]+/)*[a-z-]+\.md", file.read_text(encoding="utf-8")):
            lost += [f"{name(file)}: {page}"] if not (ROOT / page).is_file() else []
    assert not lost


def test_the_map_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in ("runtime", "models", "exporter"):
        for folder in (ROOT / package / "dovetail" / package).iterdir():
            if folder.is_dir() and (folder / "__init__.py").is_file():
                assert f" {folder.name}/" in page, f"docs/architecture.md: {package} has a room {folder.name}"


def test_files_that_the_map_names_are_there() -> None:
    homes = [ROOT, *(ROOT / package / "dovetail" / package for package in ("runtime", "models", "exporter"))]
    for page in (ROOT / "docs" / "architecture.md", *(ROOT / "docs" / "developing").glob("*.md")):
        for path in re.findall(r"`([\w./-]+\.py)`", page.read_text(encoding="utf-8")):
            assert any((home / path).is_file() for home in homes), f"{name(page)}: {path}"


def test_messages_that_are_explained_are_said() -> None:
    said = "\n".join(text for file in CODE if "tests" not in file.parts for text in strings(file.read_text("utf-8")))
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    lost = [pieces for pieces in explained(page) if not re.search(".*".join(map(re.escape, pieces)), said)]
    assert explained(page) and not lost


def test_options_are_those_of_the_commands() -> None:
    fresh = load_options().page()
    assert OPTIONS.read_text(encoding="utf-8") == fresh, "run python docs/make_options.py"


def test_options_are_written_without_an_engine_and_without_torch() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['page'](); print(*sys.modules)"
    command = [sys.executable, "-c", code, str(ROOT / "docs" / "make_options.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not {"torch", "transformers", "optimum", "openvino", "onnxruntime"} & set(done.stdout.split())


# --- every check can fail

LONG = "Every word of this sentence is short, " + "and one more " * 9 + "comes."


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        f"# Heading\n\nShort. {LONG}\n",
        f"- an item\n- {LONG}",
        f"A link to [{LONG}](page.md) ends here.",
        "One sentence over\n" + "two words\n" * 15,
    ],
)
def test_a_long_sentence_is_found(text: str) -> None:
    assert len(long_sentences(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{LONG}\n```",
        f"| a table |\n|---|\n| {LONG} |",
        f"<!-- {LONG} -->",
        "A sentence of `dovetail-run --a-flag with many words of its own and more and more and more of them` is short.",
        "One sentence ends here. " * 20,
        "- an item of four words\n" * 20,
        "It is e.g. one sentence. " * 12,
    ],
)
def test_what_is_no_long_sentence_is_left_alone(text: str) -> None:
    assert not long_sentences(text)


@pytest.mark.parametrize("text", ["Of ten five fell.", "A. What is drawn is kept.", "# What passes cost"])
def test_an_odd_beginning_is_found(text: str) -> None:
    assert odd_beginnings(text)


@pytest.mark.parametrize("text", ["Often.", "Whatever comes is kept.", "Where there are two, both count.", "`Of` is."])
def test_other_beginnings_are_left_alone(text: str) -> None:
    assert not odd_beginnings(text)


@pytest.mark.parametrize("text", ["From 1 to 2 in 3 s.", "It is 1.5x, 2.5x and 40%."])
def test_a_crowded_sentence_is_found(text: str) -> None:
    assert crowded_sentences(text)
    assert not crowded_sentences("SmolLM2-135M takes 2 of 3. Another takes 1.")


@pytest.mark.parametrize("text", ["word " * 21, "- " + "word " * 21, "[a link](" + "x" * 90 + ") and words"])
def test_a_long_line_is_found(text: str) -> None:
    assert long_lines(text)


@pytest.mark.parametrize("text", ["| " + "cell " * 30, "```\n" + "word " * 30 + "\n```", "[link](" + "x" * 120 + ")"])
def test_a_line_that_cannot_be_broken_is_left_alone(text: str) -> None:
    assert not long_lines(text)


@pytest.mark.parametrize(
    "text",
    [
        "[nothing](nowhere.md)",
        "[no heading](README.md#no-such-heading)",
        "[none here](#elsewhere)\n\n# Here",
        "```\n# In code\n```\n[code has no headings](#in-code)",
        "[outside](../../etc/passwd)",
    ],
)
def test_a_dead_link_is_found(text: str) -> None:
    assert len(dead_links(text, ROOT / "page.md")) == 1


@pytest.mark.parametrize("text", ["[here](#a-heading)\n\n# A `heading`", "[there](README.md)", "[far](https://x.org)"])
def test_a_link_that_leads_somewhere_is_left_alone(text: str) -> None:
    assert not dead_links(text, ROOT / "page.md")


def test_stale_options_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = load_options()
    monkeypatch.setattr(options, "PAGE", tmp_path / "options.md")
    (tmp_path / "options.md").write_text("# Options\n", encoding="utf-8")
    assert options.main(["--check"]) == 1
    assert options.main([]) == 0 and options.main(["--check"]) == 0


def test_the_site_lists_every_page_of_results_and_every_card() -> None:
    listed = (ROOT / "docs/site.yml").read_text(encoding="utf-8")
    pages = [*ROOT.glob("docs/results/*.md"), *ROOT.glob("models/dovetail/models/data/*/README.md")]
    assert not [page for page in pages if f" {page.relative_to(ROOT)}\n" not in listed]
