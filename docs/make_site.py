"""Build the web site of these documents in build/site: `make site`, which installs the `docs` extra.

Pages are gathered in build/pages at the same places as in the repository, so that their links hold on both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
FOLDERS = ("docs", "models", "tests/bench")  # beside the pages at the top
KINDS = ("*.md", "*.svg", "grafana.json")


def sources() -> list[Path]:
    """Every page, picture and dashboard, and the licence."""
    found = [*ROOT.glob("*.md"), ROOT / "LICENSE"]
    return found + [file for folder in FOLDERS for kind in KINDS for file in (ROOT / folder).rglob(kind)]


def main() -> int:
    """Gather the pages and build; a link that leads nowhere fails the build.  Returns the exit code."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for file in sources():
        place = PAGES / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "docs" / "site.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # about a version of mkdocs that pyproject.toml rules out
    return subprocess.run(command, check=False, env=quiet).returncode


if __name__ == "__main__":
    sys.exit(main())
