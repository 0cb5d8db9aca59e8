"""The process that serves an application: sockets, connections that are bounded in number and time, logs, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.config
import os
import resource
import socket
import time
from functools import partial
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
# Seconds for a TLS handshake, and without a byte of a body, after which a connection may make way.
_HANDSHAKE_SECONDS, _STALLED_SECONDS = 10.0, 3.0
# Who is answered before the body has been sent may send on for so long, and so much, to read the answer.
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 1 << 28
# Seconds between giving up on requests in flight and cutting their connections: to send them the error.
_LAST_WORDS = 1.0


class UnixSocket(socket.socket):
    """One bound to a path, which it removes as long as it is its own: another server may have taken it meanwhile."""

    def __init__(self, path: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.path = Path(path)
        self.bind(path)
        self._made = self._there()

    def _there(self) -> tuple[int, int] | None:
        try:
            found = self.path.lstat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @property
    def is_there(self) -> bool:
        return self._there() == self._made

    def remove(self) -> None:
        if self.is_there:
            self.path.unlink(missing_ok=True)


def bind(host: str, port: int, uds: str | None = None) -> socket.socket:
    """A bound socket, not yet listening: before a model is loaded, so that a wrong address shows at once.

    Raises:
        ValueError: it can't be bound; the message names host and port.
    """
    if uds is not None:
        try:
            if Path(uds).is_socket():
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                    if other.connect_ex(uds) == 0:
                        raise ValueError(f"uds is {uds!r}, on which another server listens")
                Path(uds).unlink()
            return UnixSocket(uds)
        except OSError as error:
            raise ValueError(f"uds is {uds!r}: {error.strerror or error}") from error
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


def release(bound: socket.socket) -> None:
    """Close it, and remove its path, if it has one of its own."""
    if isinstance(bound, UnixSocket):
        bound.remove()
    bound.close()


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

    class Connection(_Connection):
        max_connections, times = limits.max_connections, limits

    config = uvicorn.Config(
        app, http=Connection, log_config=_LOGS, access_log=False, timeout_keep_alive=keep_alive,  # type: ignore[arg-type]
        backlog=_ACCEPTED_AT_ONCE, root_path=root_path, ssl_certfile=certificate, ssl_keyfile=key, ws="none",
        server_header=False,
        timeout_graceful_shutdown=drain_seconds + _LAST_WORDS,  # type: ignore[arg-type]
    )  # fmt: skip
    _Server(config, engine, drain_seconds).run(sockets=[bound])


def possible_connections(wanted: int) -> int:
    """As many as file descriptors allow, after asking for as many as the system gives; fewer than wanted are logged."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + _RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft - _RESERVED_DESCRIPTORS))
    if found < wanted:
        message = f"{found} connections instead of {wanted}: the system gives no more than {soft} file descriptors"
        log({"message": message, "max_connections": found}, logging.WARNING)
    return found


class _Server(uvicorn.Server):
    """One whose requests in flight are told, when time is up, in the usual shape."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine, self._drain_seconds = engine, drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_Complaints())
        if self.config.ssl is not None:  # a connection counts as one only after its handshake
            create = partial(loop.create_server, ssl_handshake_timeout=_HANDSHAKE_SECONDS)
            loop.create_server = create  # type: ignore[method-assign]
        await super().startup(sockets)
        for bound in sockets or []:
            bound.listen(_BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain_seconds, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            # Here: when this has returned, uvicorn raises the signal again, which ends the process.
            for bound in sockets or []:
                release(bound)

    def _give_up(self) -> None:
        # On a thread: a lock is taken that a thread running a pass may hold for a moment.
        asyncio.get_running_loop().run_in_executor(None, self._engine.abandon)


class _Complaints:
    """What asyncio has to say, once in ten seconds: without descriptors it says the same thousands of times a
    second."""

    _last = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            logger.error("asyncio: %s", context.get("message"), exc_info=context.get("exception"))


class _Lingering:
    """A transport that, when it is closed under a body that is still being sent, first lets the answer be read: closed
    at once, the client would be told that the connection was reset, and nothing else."""

    def __init__(self, transport: Any, connection: _Connection) -> None:
        self._transport, self._connection, self._left = transport, connection, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._left or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self._connection.is_sending_body() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._left = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._connection.discard()


class _Connection(H11Protocol):
    """A connection that is closed when it sends no complete headers, or doesn't take its answer, in time. When there
    are too many, the one that has been silent for the longest makes way."""

    max_connections: int
    times: Limits
    _timer: asyncio.TimerHandle | None = None
    _since = 0.0
    _to_discard = -1  # bytes that are still taken of a body that nobody wants

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        self._since = time.monotonic()
        if len(self.connections) > self.max_connections:
            silent = [c for c in self.connections if isinstance(c, _Connection) and c._is_silent() and c is not self]
            victim = min(silent, key=lambda c: c._since, default=self)
            victim.transport.abort()
            self.connections.discard(victim)
        self._limit(self.times.header_seconds)

    def data_received(self, data: bytes) -> None:
        if self._to_discard >= 0:
            self._to_discard -= len(data)
            if self._to_discard < 0:
                self.transport.abort()
            return
        super().data_received(data)
        if self._to_discard >= 0:  # answered meanwhile
            return
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

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP, in the usual shape."""
        content = json.dumps({"error": {"message": msg, "type": "invalid_request", "param": None}, "detail": msg})
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{content}".encode())
        self.transport.close()

    def is_sending_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def discard(self) -> None:
        """Take what comes, for a moment, and close then."""
        self._to_discard = _LINGER_BYTES
        self._limit(_LINGER_SECONDS)

    def _is_silent(self) -> bool:
        """Whether no request is being read or answered, or the one that is has stopped in the middle of its body."""
        if self.cycle is None or self.cycle.response_complete:
            return True
        return self.cycle.more_body and time.monotonic() - self._since > _STALLED_SECONDS

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
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False}
        for name in ("uvicorn", "lastrerank", "py.warnings")
    },
}  # fmt: skip


def log_as_json() -> None:
    """Whatever this process logs from now on."""
    logging.config.dictConfig(_LOGS)
    logging.captureWarnings(True)


def log(entry: dict[str, Any], level: int = logging.INFO) -> None:
    """A line of the server's log before it serves."""
    logger.log(level, entry["message"], extra={"entry": entry})


def address(bound: socket.socket, has_tls: bool = False) -> str:
    """For people."""
    name = bound.getsockname()
    if isinstance(name, (str, bytes)):
        return os.fsdecode(name)
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http{'s' * has_tls}://{host}:{name[1]}"
