"""Failures as OpenAI's clients expect them: {"error": {message, type, param, code}} and a status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dovetail.runtime.errors import ContextOverflow, DovetailError, InputError, QueueFull
from dovetail.runtime.system.files import shown

NEVER_AGAIN = {"x-should-retry": "false"}  # OpenAI's clients read this header
_SOON = {"retry-after": "1"}
_CODES = {
    401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "request_timeout",
    413: "request_too_large",
}  # fmt: skip


class ApiError(HTTPException):
    """A request that is not answered. HTTPException, so that FastAPI lets it through."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def shutting_down() -> ApiError:
    """Return the refusal of a server that takes nothing new."""
    return ApiError(503, "the server is shutting down: ask another", code="shutting_down", headers={"retry-after": "5"})


def failed(error: Exception) -> ApiError:
    """Return the answer to an error that Dovetail or FastAPI raises on purpose."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", headers=_SOON)
        case ContextOverflow():
            return ApiError(400, str(error), code="context_length_exceeded")
        case InputError():
            return ApiError(400, str(error))
        case DovetailError():
            return ApiError(500, str(error))
    return ApiError(500, "the server failed: its log has the reason")


def body(error: ApiError) -> dict[str, Any]:
    """Return an error as JSON."""
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status_code == 429 else kind
    code = error.code or _CODES.get(error.status_code)
    return {"error": {"message": error.detail, "type": kind, "param": error.param, "code": code}}


def reply(error: ApiError) -> JSONResponse:
    """Return an error as a whole reply."""
    return JSONResponse(body(error), error.status_code, error.headers)


def handle_failures(app: FastAPI) -> None:
    """Let `app` answer every error in OpenAI's form."""

    async def answer(_request: Request, error: Exception) -> JSONResponse:
        return reply(failed(error))

    for kind in (RequestValidationError, HTTPException, DovetailError, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> ApiError:
    """Name the first field that cannot be used. The value may be large or secret, and is left out."""
    first = error.errors()[0]
    if len(first["loc"]) == 1:
        return ApiError(
            400, "the body is no JSON object: send one with Content-Type: application/json", code="invalid_json"
        )
    # Each branch of a union has an error. A branch whose type fits says more, and a place inside it.
    alike = [each for each in error.errors() if each["loc"][:2] == first["loc"][:2]]
    first = max(alike, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
    place, value = list[str](), error.body
    for part in first["loc"][1:]:  # pydantic names the branches of a union too, which the body lacks
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside or (first["type"] == "missing" and part == first["loc"][-1]):
            place.append(str(part))
            value = value[part] if inside else None
    param = shown(".".join(place), 100) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"the field {param} is unknown: leave it out", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"the field {param} is missing: send it", param=param, code="missing_required_parameter")
    message = shown(str(first["msg"]).removeprefix("Value error, "), 300)  # pydantic's, before our own words
    if first["type"] != "value_error":  # whose words have a remedy
        message += ": send another value"
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")
