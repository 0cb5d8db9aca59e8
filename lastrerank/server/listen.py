"""The process that serves an application: sockets, connections that are bounded in number and time, logs, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lastrerank.engine import Engine
from lastrerank.server.limits import Limits

logger = logging.getLogger("lastrerank.server")

# File descriptors that are left for everything but connections.
_RESERVED_DESCRIPTORS = 128
# Connections that asyncio accepts at once, before it looks at how many there are: fewer than the descriptors reserved.
_ACCEPTED_AT_ONCE, _BACKLOG = 16, 1024
# Seconds between giving up on requests in flight and cutting their connections: to send them the error.
_LAST_WORDS = 1.0


def bind(host: str, port: int, uds: str | None = None) -> socket.socket:
    """A bound socket, not yet listening: before a model is loaded, so that a wrong address shows at once.

    Raises:
        ValueError: it can't be bound; the message names host and port.
    """
    if uds is not None:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if Path(uds).is_socket():
                Path(uds).unlink()
            bound.bind(uds)
        except OSError as error:
            raise ValueError(f"uds is {uds!r}: {error.strerror or error}") from error
        return bound
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}, expected 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"can't listen on host {host!r}, port {port}: {error.strerror or error}") from error
    return bound


def serve(
    app: Any,
    engine: Engine,
    bound: socket.socket,
    limits: Limits,
    *,
    drain_seconds: float,
    keep_alive: float,
    root_path: str = "",
    certificate: str | None = None,
    key: str | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then answer what is in flight for `drain_seconds`, fail the rest, and return."""
    most = _connections(limits.max_connections)

    class Connection(_Connection):
        max_connections, times = most, limits

    config = uvicorn.Config(
        app, http=Connection, log_config=_LOGS, access_log=False, timeout_keep_alive=keep_alive,  # type: ignore[arg-type]
        backlog=_ACCEPTED_AT_ONCE, root_path=root_path, ssl_certfile=certificate, ssl_keyfile=key, ws="none",
        server_header=False,
        timeout_graceful_shutdown=drain_seconds + _LAST_WORDS,  # type: ignore[arg-type]
    )  # fmt: skip
    _Server(config, engine, drain_seconds).run(sockets=[bound])


def _connections(wanted: int) -> int:
    """As many as file descriptors allow, after asking for as many as the system gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + _RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft - _RESERVED_DESCRIPTORS))


class _Server(uvicorn.Server):
    """One whose requests in flight are told, when time is up, in the usual shape."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine, self._drain_seconds = engine, drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or []:
            bound.listen(_BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain_seconds, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        # On a thread: a lock is taken that a thread running a pass may hold for a moment.
        asyncio.get_running_loop().run_in_executor(None, self._engine.abandon)


class _Connection(H11Protocol):
    """A connection that is closed when it sends no complete headers, or doesn't take its answer, in time. When there
    are too many, the one that has been silent for the longest makes way."""

    max_connections: int
    times: Limits
    _timer: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = time.monotonic()
        if len(self.connections) > self.max_connections:
            silent = [c for c in self.connections if isinstance(c, _Connection) and c._is_silent() and c is not self]
            victim = min(silent, key=lambda c: c._since, default=self)
            victim.transport.abort()
            self.connections.discard(victim)
        self._limit(self.times.header_seconds)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._since = time.monotonic()
        if not self._is_silent():
            self._limit(None)
        elif self._timer is None and self.timeout_keep_alive_task is None:  # the first bytes of another request
            self._limit(self.times.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit(self.times.write_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._limit(None)

    def _is_silent(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _limit(self, seconds: float | None) -> None:
        """Close the connection after so many seconds, unless this is called again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self.transport.abort)


class JsonFormatter(logging.Formatter):
    """A line of JSON for everything: time, level, logger, and a message or a request's entry."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "logger": record.name,
        }  # fmt: skip
        entry |= getattr(record, "entry", None) or {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


_LOGS: dict[str, Any] = {
    "version": 1, "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonFormatter}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False} for name in ("uvicorn", "lastrerank")
    },
}  # fmt: skip


def address(bound: socket.socket) -> str:
    """For people."""
    name = bound.getsockname()
    if isinstance(name, (str, bytes)):
        return os.fsdecode(name)
    return f"http://[{name[0]}]:{name[1]}" if ":" in name[0] else f"http://{name[0]}:{name[1]}"
