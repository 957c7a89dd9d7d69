"""Many replicas of the server on a Ray cluster: `serve run dovetail.runtime.serve.ray:app`.

Ray is imported when the application is built. What needs no Ray works and is tested without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(arguments: dict[str, Any]) -> Application:
    """Return the application for the arguments of `serve run`; see Settings. Raises InputError."""
    from dovetail.runtime.serve.ray.deployment import build
    from dovetail.runtime.serve.ray.settings import Settings

    return build(Settings.of(arguments))
