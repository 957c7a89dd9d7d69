"""Read request bodies of strangers: JSON of bounded size and depth, without NaN and half characters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from dovetail.runtime.serve.failures import ApiError
from dovetail.runtime.system.files import parse_json


class BoundedRequest(Request):
    """A request whose body is read up to `app.state.service.limits.body_bytes`."""

    async def body(self) -> bytes:
        """Return the whole body. Raises ApiError for a larger one, before it is read."""
        if not hasattr(self, "_body"):
            most, parts, size = self.app.state.service.limits.body_bytes, list[bytes](), 0
            stated = self.headers.get("content-length", "")
            if stated.isdecimal() and int(stated) > most:
                raise _too_large(most)
            async for part in self.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        """Return the value of the body. Raises ApiError."""
        try:
            return await asyncio.to_thread(parse_json, await self.body(), finite=True)  # large ones take a second
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON that can be used: {error}", code="invalid_json") from None


class BoundedRoute(APIRoute):
    """A route whose handler gets a BoundedRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return bounded


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes: send a shorter prompt")
