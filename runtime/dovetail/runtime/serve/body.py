"""Read request bodies of strangers: JSON of bounded size, depth and time, without NaN and half characters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from dovetail.runtime.serve.failures import ApiError
from dovetail.runtime.system.files import parse_json

BODY_S = 60  # seconds that a client may take to send a body


async def read_body(request: Request, most: int) -> bytes:
    """Return the whole body. most: its bytes. Raises ApiError for a larger one and for a slow client."""
    stated, parts, size = request.headers.get("content-length", ""), list[bytes](), 0
    if stated.isdecimal() and int(stated) > most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {BODY_S} seconds: send it faster, or a shorter one",
                       headers={"connection": "close"}) from None  # fmt: skip
    return b"".join(parts)


class BoundedRequest(Request):
    """A request whose body is read up to `app.state.service.limits.body_bytes`."""

    async def body(self) -> bytes:
        """Return the whole body. Raises ApiError."""
        if not hasattr(self, "_body"):
            self._body = await read_body(self, self.app.state.service.limits.body_bytes)
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
