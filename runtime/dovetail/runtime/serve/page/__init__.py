"""The page at `/`: static files, which talk to the server's own API and load nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

# Scripts and styles come from these files alone, and no script may make HTML of a text.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_KINDS = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}  # fmt: skip


@dataclass(frozen=True)
class PageFile:
    """A file of the page. Send it with HEADERS."""

    content: bytes
    media_type: str


def page_files() -> dict[str, PageFile]:
    """Return each file of the page by its path on the server: `/`, `/page/app.js` and others."""
    found = {}
    for file in files(__name__).iterdir():
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            found[path] = PageFile(file.read_bytes(), kind)
    return found
