"""The routes, and who may use them."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.runtime.serve.body import BoundedRoute
from dovetail.runtime.serve.chat import chat
from dovetail.runtime.serve.completions import complete
from dovetail.runtime.serve.conversation import Conversation, as_dicts
from dovetail.runtime.serve.failures import ApiError, handle_failures, reply, shutting_down
from dovetail.runtime.serve.metrics import CONTENT_TYPE
from dovetail.runtime.serve.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
)  # fmt: skip
from dovetail.runtime.serve.page import HEADERS, page_files
from dovetail.runtime.serve.responses import respond
from dovetail.runtime.serve.service import Service
from dovetail.runtime.text.encoding import encode_prompt

PAGE = page_files()
WITHOUT_KEY = frozenset({"/health", *PAGE})  # the page asks its user for the key
TO_THE_END = frozenset({"/health", "/metrics"})  # answer while the server shuts down


def make_app(
    service: Service, *, api_key: str | None = None, cors: Sequence[str] = (), local: str | None = None
) -> FastAPI:
    """Return the application. api_key: None lets everybody in. cors: origins of web pages.

    local: the host that a server on a loopback address was given. Host headers with other names
    than this one and those of loopback are then refused. None answers them all.
    """
    app = FastAPI(title="Dovetail", docs_url=None, redoc_url=None)  # both pages would load scripts from elsewhere
    app.state.service, app.state.began = service, int(time.time())
    app.include_router(routes)
    handle_failures(app)
    app.add_middleware(Gate, service=service, api_key=api_key, local=local)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    return app


def is_loopback(name: str) -> bool:
    """Return whether a name or an address is always this machine's own."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")  # RFC 6761


def _host_name(header: str) -> str:
    """Return the name or the address in a Host header, without its port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0].lower()


class Gate:
    """Lets requests in that name the server and have the key, until the server drains.

    A web page can let its own name lead to 127.0.0.1 (DNS rebinding). The browser then lets the page
    read what a local server answers. The Host header shows the page's name.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None, local: str | None) -> None:
        self._app, self._service, self._local = app, service, local
        self._secret = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (reply(refusal) if refusal else self._app)(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        # Starlette's TrustedHostMiddleware knows no ranges of addresses, and its refusals are not OpenAI's.
        name = _host_name(headers.get("host", "localhost"))  # every browser sends the header
        if self._local is not None and name != self._local.lower() and not is_loopback(name):
            return ApiError(403, f"the Host header names {name!r:.60}, not this server: ask localhost",
                            param="host", code="unknown_host")  # fmt: skip
        given = headers.get("authorization", "").encode("latin-1")
        if self._secret is not None and path not in WITHOUT_KEY and not hmac.compare_digest(given, self._secret):
            return ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                            headers={"www-authenticate": "Bearer"})  # fmt: skip
        if self._service.ending and path not in TO_THE_END:
            return shutting_down()
        return None


routes = APIRouter(route_class=BoundedRoute)


@routes.head("/health", include_in_schema=False)
@routes.get("/health")
async def health(request: Request) -> Response:
    """Return 200, or 503 while the server shuts down and after its engine has failed."""
    ending = _service(request).ending
    return JSONResponse({"status": "ending" if ending else "ok"}, 503 if ending else 200)


@routes.get("/", include_in_schema=False)
@routes.get("/page/{name}", include_in_schema=False)
async def page(request: Request) -> Response:
    """Return a file of the page."""
    file = PAGE.get(request.url.path)
    if file is None:
        raise ApiError(404, "the page has no such file")
    return Response(file.content, media_type=file.media_type, headers=HEADERS)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return a scrape for Prometheus."""
    return Response(_service(request).metrics.exposition(), media_type=CONTENT_TYPE)


@routes.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the one model."""
    return {"object": "list", "data": [_model(request)]}


@routes.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Describe the model."""
    _service(request).check_model(name)
    return _model(request)


@routes.post("/v1/chat/completions")
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer a conversation."""
    return await chat(_service(request), request, asked)


@routes.post("/v1/completions")
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Continue texts."""
    return await complete(_service(request), request, asked)


@routes.post("/v1/responses")
async def responses(request: Request, asked: ResponseRequest) -> Response:
    """Answer a conversation, in the form of the newer API."""
    return await respond(_service(request), request, asked)


@routes.post("/tokenize")
async def tokenize(request: Request, asked: TokenizeRequest) -> dict[str, Any]:
    """Return the ids of a prompt or of messages, which have no additions but the template's."""
    service = _service(request)
    service.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if asked.prompt is not None:
        ids = await asyncio.to_thread(
            service.tokenizer.encode, asked.prompt, add_special_tokens=asked.add_special_tokens
        )
    else:
        conversation = Conversation(
            messages=as_dicts(asked.messages or ()),
            tools=[tool.function for tool in asked.tools or ()],
            template=asked.chat_template_kwargs or {},
        )
        options = {**conversation.template_options(), "add_generation_prompt": asked.add_generation_prompt}
        ids = await asyncio.to_thread(
            encode_prompt, service.tokenizer, conversation.messages, False, options, parse_special=False
        )
    strings = None
    if asked.return_token_strs:
        strings = [service.spellings[token].text.decode(errors="replace") for token in ids]
    return {"count": len(ids), "max_model_len": service.engine.max_context, "tokens": ids, "token_strs": strings}


@routes.post("/detokenize")
async def detokenize(request: Request, asked: DetokenizeRequest) -> dict[str, Any]:
    """Return the text of token ids, special tokens included."""
    service = _service(request)
    service.check_model(asked.model)
    for token in asked.tokens:
        if not service.tokenizer.has_token(token):
            raise ApiError(400, f"tokens has {token}, which is none of the model's", param="tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, asked.tokens, skip_special_tokens=False)
    return {"prompt": text}


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(request: Request) -> dict[str, Any]:
    service = _service(request)
    return {
        "id": service.name, "object": "model", "created": request.app.state.began, "owned_by": "dovetail",
        "max_model_len": service.engine.max_context,
    }  # fmt: skip
