"""What a server does before it looks at a request: the key, and bounds on bodies in size, in total, and in time."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
import zlib
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from starlette.responses import Response

from lastrerank.server.errors import error_response

# Open to everyone: whether the process lives, its counters, and the pages.
OPEN = ("/", "/health", "/ready", "/metrics", "/docs", "/openapi.json")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """max_body: bytes of a request, unpacked. max_total_body: bytes of all that are being read or answered, at least
    twice max_body: one as it came, packed, and what it unpacks to. max_documents: in one request. max_connections: open
    at once. Seconds: to send the headers, to send the body, to wait for an answer, and to take it."""

    max_body: int = 32 * 2**20
    max_total_body: int = 128 * 2**20
    max_documents: int = 2000
    max_connections: int = 1000
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    request_seconds: float = 300.0
    write_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name.startswith("max_")
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not value > 0 or math.isinf(value):
                expected = "a positive integer" if whole else "a positive number of seconds"
                raise ValueError(f"{field.name} is {value!r}, expected {expected}")
        if self.max_total_body < 2 * self.max_body:
            raise ValueError(
                f"max_total_body is {self.max_total_body}, expected at least twice max_body ({self.max_body}): "
                "a packed body and what it unpacks to"
            )


class Guard:
    """Checks the key before a body costs anything, then reads the body within its bounds, where one is wanted (a POST
    to one of `readers`); the application finds it as `scope["lastrerank.body"]`."""

    def __init__(self, app: Any, limits: Limits, api_key: str | None, readers: Collection[str]) -> None:
        self.app, self.limits, self.api_key, self.readers = app, limits, api_key, readers
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if self.api_key is not None and path not in OPEN and not preflight and not self._has_key(headers):
            await error_response(
                401, "the API key is wrong or missing", "authentication", **{"WWW-Authenticate": "Bearer"}, **_CLOSE
            )(scope, receive, send)
            return
        if scope["method"] != "POST" or path not in self.readers:
            await self.app(scope, receive, _closing(send) if _has_body(headers) else send)
            return
        body = await self._read(headers, receive)
        if isinstance(body, Response):
            await body(scope, receive, send)
            return
        scope["lastrerank.body"] = body
        empty = [{"type": "http.request", "body": b"", "more_body": False}]

        async def replay() -> Any:
            return empty.pop() if empty else await receive()

        try:
            await self.app(scope, replay, send)
        finally:
            self._held -= len(body)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        assert self.api_key is not None
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(b" "), self.api_key.encode())

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | Response:
        """The body, counted among those held, or what to answer instead."""
        limits, declared = self.limits, headers.get(b"content-length", b"0")
        packed = headers.get(b"content-encoding", b"identity").strip().lower()
        if packed not in (b"identity", b"gzip"):
            return error_response(415, "content-encoding: expected gzip or none", "unsupported", **_CLOSE)
        announced = int(declared) if declared.isdigit() else 0
        if announced > limits.max_body:
            return self._too_large()
        if self._held + announced > limits.max_total_body:
            return self._busy()
        chunks: list[bytes] = []
        size, end = 0, time.monotonic() + limits.body_seconds
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
                except asyncio.TimeoutError:
                    message_text = f"the body took more than {limits.body_seconds} s"
                    return error_response(408, message_text, "timeout", **_CLOSE)
                if message["type"] == "http.disconnect":
                    return Response(status_code=499)  # nobody reads it, but it is counted
                chunk = message.get("body", b"")
                if size + len(chunk) > limits.max_body:
                    return self._too_large()
                if self._held + len(chunk) > limits.max_total_body:
                    return self._busy()
                size += len(chunk)
                self._held += len(chunk)
                chunks.append(chunk)
                if not message.get("more_body"):
                    break
            body = b"".join(chunks)
            if packed == b"gzip":
                if self._held + limits.max_body > limits.max_total_body:
                    return self._busy()
                self._held += limits.max_body  # what it may become
                size += limits.max_body
                unpacked = await asyncio.to_thread(_unzipped, body, limits.max_body)
                if unpacked is None:
                    return error_response(400, "the body is not the gzip data that it says it is", "invalid_request")
                if len(unpacked) > limits.max_body:
                    return self._too_large()
                body = unpacked
        finally:
            self._held -= size
        self._held += len(body)
        return body

    def _too_large(self) -> Response:
        return error_response(413, f"the body is over {self.limits.max_body} bytes", "too_large", **_CLOSE)

    def _busy(self) -> Response:
        message = f"bodies of {self.limits.max_total_body} bytes in all are being read or answered"
        return error_response(429, message, "overloaded", **{"Retry-After": "1"}, **_CLOSE)


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _closing(send: Send) -> Send:
    """For an answer to a request whose body isn't read."""

    async def closing(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing


# What is still to come of a body isn't read.
_CLOSE = {"connection": "close"}


def _unzipped(content: bytes, most: int) -> bytes | None:
    """At most one byte more than `most`, or None for what is no gzip file."""
    unpack = zlib.decompressobj(wbits=31)
    try:
        found = unpack.decompress(content, most + 1)
    except zlib.error:
        return None
    return found if unpack.eof or len(found) > most else None
