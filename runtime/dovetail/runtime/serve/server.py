"""One process, one socket: serves until a signal, and then finishes what runs."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dovetail.runtime.errors import DeviceError, one_line
from dovetail.runtime.serve.service import Service

BACKLOG = 2048  # connections that wait to be accepted: uvicorn's default
GRACE_S = 5  # seconds for connections without an answer, once all answers have ended


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket, before seconds of loading. Raises DeviceError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(BACKLOG)  # now: two servers may bind one port, but not listen on it
            stack.pop_all()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DeviceError(f"cannot listen on {host} port {port} ({reason}): give another --host or --port") from None
    return bound


class Server(uvicorn.Server):
    """The first signal drains: new requests get 503. After the last answer, or a second signal, it stops."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, ws="none", lifespan="off",
                timeout_graceful_shutdown=GRACE_S,
            )
        )  # fmt: skip
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._forced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._forced = self._service.draining
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and self._draining is None:
            self._draining = asyncio.create_task(self._service.engine.drain())
        if self._forced:
            await self._service.engine.close()  # running answers end with an error
            self.should_exit = self.force_exit = True
        if self._draining and self._draining.done():
            self._draining.result()
            self.should_exit = True
        return await super().on_tick(counter)

    async def run_engine(self, bound: socket.socket) -> bool:
        """Serve until a signal, and close the engine. Return whether every answer was finished."""
        await self.serve([bound])
        await self._service.engine.close()
        return not self._forced
