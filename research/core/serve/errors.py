"""What goes wrong with a request, in the words of OpenAI's interface: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from research.core.errors import UserError
from research.core.serve.driver import STOPPING, EngineFailed

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
# TGI's own names and status codes (its clients map them back to exceptions).
TGI_PATHS = ("/generate", "/generate_stream")
_TGI_TYPES = {400: "validation", 404: "validation", 422: "validation", 429: "overloaded", 503: "overloaded"}


class ApiError(Exception):
    """An answer other than 200. ``param`` is the request's field that is at fault, ``headers`` go out with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client has closed the connection, or takes nothing from it: nobody waits for an answer."""


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    """A field that cannot be used: 400 with its name."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def engine_trouble(error: str | None) -> ApiError:
    """A request that the engine had to give up."""
    if error == STOPPING:
        return ApiError(503, f"{STOPPING}, and did not wait for this answer", code="draining")
    return ApiError(500, f"the engine gave this request up: {error}", code="engine_error")


def payload(error: ApiError) -> dict[str, Any]:
    """The body of an error answer, and of an error inside a stream."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def tgi_payload(error: ApiError) -> dict[str, str]:
    return {"error": error.message, "error_type": _TGI_TYPES.get(error.status, "generation")}


def response(path: str, error: ApiError) -> Response:
    """The HTTP answer to ``error`` in the words of the interface that ``path`` belongs to."""
    status = error.status
    if path in TGI_PATHS:
        status = 422 if status == 400 else status
        return JSONResponse(tgi_payload(error), status, headers=error.headers)
    return JSONResponse(payload(error), status, headers=error.headers)


def install(app: FastAPI) -> None:
    """Answer every error in this shape; nothing that a request says ends the server or shows a traceback."""

    async def answer(request: Request, error: Exception) -> Response:
        return response(request.url.path, translate(error))

    for kind in (ApiError, ClientGone, UserError, RequestValidationError, HTTPException, EngineFailed, Exception):
        app.add_exception_handler(kind, answer)


def translate(error: Exception) -> ApiError:
    """The answer to any exception; those that no request can be blamed for are logged with their traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientGone):
        return ApiError(499, str(error))
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, EngineFailed):
        return ApiError(503, f"the engine has failed: {error}", code="engine_failed")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("a request raised what nobody expected", exc_info=error)
    return ApiError(500, "the server made a mistake; its log says more", code="internal_error")


def _invalid(errors: Sequence[Any]) -> ApiError:
    """What pydantic found first, with the field's name as a user would write it: ``messages[0].content``."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}")
    name = _field(first)
    says = dict.fromkeys(_says(error) for error in errors if _field(error) == name)  # one for each member of a union
    message = "; or ".join(list(says)[:3])
    return ApiError(400, f"{name}: {message}" if name else message, param=name or None)


def _field(error: Any) -> str:
    own = (error.get("ctx") or {}).get("field")
    name = ""
    for part in [*error["loc"], *([own] if own else ())]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part is own or (part not in _NO_FIELDS and part.isidentifier() and part.islower()):
            name += f".{part}" if name else part
    return name


# Places of FastAPI's, and names of types, by which pydantic tells a union's members apart.
_NO_FIELDS = frozenset(("body", "query", "path", "header", "str", "int", "float", "bool", "dict", "list", "nullable"))


def _says(error: Any) -> str:
    return "is missing" if error["type"] == "missing" else error["msg"].removeprefix("Value error, ")
