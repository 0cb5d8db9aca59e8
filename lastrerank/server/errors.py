"""One shape for everything that goes wrong: `{"error": {message, type, param}, "detail": message}`."""

from __future__ import annotations

import logging
import uuid

from starlette.responses import JSONResponse, Response

from lastrerank.engine import (
    BadRequestError,
    ClosedError,
    DeadlineError,
    OverloadedError,
    TooLargeError,
    TooLongError,
)
from lastrerank.server.dialects import BodyError

logger = logging.getLogger("lastrerank.server")


def error_response(status: int, message: str, kind: str, param: str | None = None, **headers: str) -> JSONResponse:
    """`detail` is where Jina's clients look."""
    content = {"error": {"message": message, "type": kind, "param": param}, "detail": message}
    return JSONResponse(content, status, headers=headers)


def failure(error: Exception) -> Response:
    """The response to an exception; what is nobody's fault but ours gets an id that is in the log, and no word more."""
    if isinstance(error, BodyError):
        kind = {400: "invalid_request", 413: "too_large", 404: "not_found"}.get(error.status, "invalid_request")
        return error_response(error.status, str(error), kind, error.param)
    if isinstance(error, OverloadedError):
        retry = {"Retry-After": str(max(1, round(error.retry_after)))}
        return error_response(429, str(error), "overloaded", **retry)
    if isinstance(error, DeadlineError):
        return error_response(504, str(error), "timeout")
    if isinstance(error, ClosedError):
        logger.info("refused: %s", error)
        return error_response(503, "the server is closing", "unavailable", **{"Retry-After": "5"})
    if isinstance(error, TooLongError):
        return error_response(413, str(error), "too_large", error.where)
    if isinstance(error, TooLargeError):
        return error_response(413, str(error), "too_large")
    if isinstance(error, BadRequestError):
        return error_response(422, str(error), "invalid_request")
    number = uuid.uuid4().hex[:12]
    logger.error("error %s: %s: %s", number, type(error).__name__, error, exc_info=error)
    return error_response(500, f"internal error {number}", "internal")
