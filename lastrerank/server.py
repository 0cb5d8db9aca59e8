"""`lastrerank serve`: the engine over HTTP, with the routes that rerankers are already called by.

Bodies are read with a limit and a time limit, and checked before anything is queued. Overload is answered at once with
429; a client that leaves has its request dropped; SIGTERM lets requests in flight finish. Logs never hold text.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import prometheus_client
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, FailFast, Field, StrictBool, StrictInt, StrictStr, field_validator
from starlette.exceptions import HTTPException as StarletteHTTPException

from lastrerank import __version__
from lastrerank.engine import (
    Answer,
    BadRequestError,
    ClosedError,
    DeadlineError,
    Engine,
    OverloadedError,
    TooLongError,
)
from lastrerank.request import RerankRequest

logger = logging.getLogger("lastrerank.server")

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_PAGE = Path(__file__).parent / "server.html"


@dataclass(frozen=True)
class Limits:
    """max_body: bytes. max_documents: in one request. Seconds: to send the body, and to wait for an answer."""

    max_body: int = 32 * 2**20
    max_documents: int = 2000
    body_seconds: float = 30.0
    request_seconds: float = 300.0


class TextDocument(BaseModel):
    """A document as an object; other fields come back with it."""

    model_config = ConfigDict(extra="allow")
    text: StrictStr


Text = StrictStr
Count = Annotated[StrictInt, Field(ge=1)]


class RerankBody(BaseModel):
    """A query and its documents, as Jina's and Cohere's APIs have them."""

    query: Annotated[Text, Field(min_length=1)]
    documents: Annotated[list[StrictStr | TextDocument], FailFast()]
    model: StrictStr | None = None
    top_n: Count | None = None
    return_documents: StrictBool | None = None
    return_embeddings: StrictBool = False
    instruction: StrictStr | None = None
    max_doc_length: Count | None = None
    max_query_length: Count | None = None
    max_tokens_per_doc: Count | None = None
    truncation: StrictBool = True


class ScoreBody(BaseModel):
    """One text against many, or pairs; pairs with the same text_1 are scored as one list."""

    text_1: Text | list[Text]
    text_2: Text | list[Text]
    model: StrictStr | None = None

    @field_validator("text_1", "text_2", mode="before")
    @classmethod
    def strings(cls, value: Any) -> Any:
        """One error, where a million bad items would otherwise be a million errors."""
        if isinstance(value, list):
            for position, item in enumerate(value):
                if not isinstance(item, str):
                    raise ValueError(f"item {position} is no string")
        return value


class Usage(BaseModel):
    total_tokens: int
    prompt_tokens: int


class Result(BaseModel):
    index: int
    relevance_score: float
    document: dict[str, Any] | None = None
    embedding: list[float] | None = None


class RerankResponse(BaseModel):
    id: str
    model: str
    object: Literal["list"] = "list"
    usage: Usage
    results: list[Result]


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    id: str
    model: str
    object: Literal["list"] = "list"
    usage: Usage
    data: list[Score]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": text}
    for code, text in {
        400: "no documents, or an unreadable body", 401: "a wrong or missing API key", 404: "no such model",
        408: "the body came too slowly", 413: "over a limit", 422: "a malformed request", 429: "overloaded",
        500: "a failure with an id", 503: "closing", 504: "too late",
    }.items()
}  # fmt: skip


def create_app(
    engine: Engine,
    *,
    model_name: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    close_engine: bool = True,
) -> FastAPI:
    """The application over an engine.

    Args:
        engine: answers.
        model_name: what `/v1/models` says and requests may name.
        api_key: wanted as `Authorization: Bearer`; None for none.
        limits: of requests.
        close_engine: whether shutting down drains and closes the engine.
    """
    bounds = limits or Limits()
    metrics = _Metrics(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if close_engine:
            await asyncio.to_thread(engine.close)

    def authorized(request: Request) -> None:
        if api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                raise _error(401, "the API key is wrong or missing", "authentication")

    app = FastAPI(
        title="lastrerank", version=__version__, lifespan=lifespan, responses=_ERRORS,
        description="Last-token listwise reranking. Scores are cosines in [-1, 1].",
    )  # fmt: skip
    app.state.engine = engine
    # Bound and time a body as it is read, beneath everything that reads it.
    app.add_middleware(_BodyGuard, limits=bounds)
    protected = [Depends(authorized)]

    async def answer(request: Request, wanted: list[RerankRequest], refuse_cut: bool = False) -> list[Answer]:
        """All requests' answers; dropped if the client leaves or time is up."""
        try:
            submitted = engine.submit_many(wanted, bounds.request_seconds, refuse_cut=refuse_cut)
        except (ValueError, TypeError) as error:
            raise _error(422, str(error), "invalid_request") from error
        futures = [asyncio.wrap_future(future) for future in submitted]
        together = asyncio.ensure_future(asyncio.gather(*futures))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waiting: set[asyncio.Future[Any]] = {together, gone}
            await asyncio.wait(waiting, timeout=bounds.request_seconds, return_when=asyncio.FIRST_COMPLETED)
            if together.done():
                return together.result()
            if gone.done():
                raise _error(499, "the client left", "disconnected")
            raise DeadlineError(f"no answer within {bounds.request_seconds} s")
        finally:
            gone.cancel()
            together.cancel()
            for future in futures:
                future.cancel()

    def check(body: RerankBody | ScoreBody, texts: int) -> None:
        if body.model is not None and body.model != model_name:
            raise _error(404, f"model is {body.model!r}, this server has {model_name!r}", "not_found", "model")
        if texts == 0:
            raise _error(400, "documents is empty", "invalid_request", "documents")
        if texts > bounds.max_documents:
            message = f"{texts} documents, at most {bounds.max_documents} in a request"
            raise _error(413, message, "too_large", "documents")

    async def rerank(request: Request, response: Response, body: RerankBody, documents_back: bool) -> RerankResponse:
        check(body, len(body.documents))
        documents = [d if isinstance(d, str) else d.model_dump() for d in body.documents]
        wanted = RerankRequest(
            body.query, documents, top_n=body.top_n, return_embeddings=body.return_embeddings,
            max_doc_length=body.max_doc_length or body.max_tokens_per_doc, max_query_length=body.max_query_length,
            instruction=body.instruction,
        )  # fmt: skip
        (got,) = await answer(request, [wanted], refuse_cut=not body.truncation)
        _time(response, [got])
        metrics.documents.observe(len(documents))
        back = documents_back if body.return_documents is None else body.return_documents
        results = [
            Result(
                index=r["index"], relevance_score=r["relevance_score"],
                document=_as_object(r["document"]) if back else None,
                embedding=r["embedding"].tolist() if body.return_embeddings else None,
            )
            for r in got.results
        ]  # fmt: skip
        return RerankResponse(id=uuid.uuid4().hex, model=model_name, usage=_usage([got]), results=results)

    async def rerank_with_documents(request: Request, response: Response, body: RerankBody) -> RerankResponse:
        """Rank documents by relevance to a query; documents come back unless `return_documents` is false."""
        return await rerank(request, response, body, True)

    async def rerank_without_documents(request: Request, response: Response, body: RerankBody) -> RerankResponse:
        """Rank documents by relevance to a query; documents come back only if `return_documents` is true."""
        return await rerank(request, response, body, False)

    async def score(request: Request, response: Response, body: ScoreBody) -> ScoreResponse:
        """Score pairs of texts."""
        left, right = ([text] if isinstance(text, str) else text for text in (body.text_1, body.text_2))
        check(body, min(len(left), len(right)))
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            message = f"text_1 has {len(left)} texts, text_2 {len(right)}: expected one, or as many"
            raise _error(422, message, "invalid_request", "text_1")
        check(body, len(right))
        groups: dict[str, list[int]] = {}
        for position, text in enumerate(left):
            groups.setdefault(text, []).append(position)
        answers = await answer(request, [RerankRequest(q, [right[i] for i in own]) for q, own in groups.items()])
        _time(response, answers)
        scores = [0.0] * len(right)
        for own, got in zip(groups.values(), answers, strict=True):
            for result in got.results:
                scores[own[result["index"]]] = result["relevance_score"]
        data = [Score(index=i, score=value) for i, value in enumerate(scores)]
        return ScoreResponse(id=uuid.uuid4().hex, model=model_name, usage=_usage(answers), data=data)

    routes = {"/v1/rerank": rerank_with_documents, "/rerank": rerank_with_documents,
              "/v2/rerank": rerank_without_documents}  # fmt: skip
    for path, route in routes.items():
        app.post(path, response_model=RerankResponse, response_model_exclude_none=True, dependencies=protected)(route)
    app.post("/score", response_model=ScoreResponse, dependencies=protected)(score)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process works: passes are run."""
        if not engine.alive:
            raise _error(503, "the engine is closed", "unavailable")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """Requests are taken: the model is loaded and the queue has room."""
        full = engine.queued_tokens >= engine.max_queue_tokens
        if not engine.alive or full:
            raise _error(503, "the queue is full" if full else "the engine is closed", "unavailable")
        return {"status": "ready", "queued_tokens": engine.queued_tokens}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        text = prometheus_client.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/info", dependencies=protected)
    async def info() -> dict[str, Any]:
        """Model, device, caps and limits."""
        reranker = engine.reranker
        return {
            "model": model_name, "version": __version__, "device": str(reranker.device), "backend": reranker.backend,
            "dtype": reranker.dtype, "max_context": reranker.config.max_context,
            "max_query_length": reranker.config.max_query_length, "max_doc_length": reranker.config.max_doc_length,
            "max_batch_tokens": engine.max_batch_tokens, "max_queue_tokens": engine.max_queue_tokens,
            "max_documents": bounds.max_documents, "max_body_bytes": bounds.max_body,
        }  # fmt: skip

    @app.get("/v1/models", dependencies=protected)
    async def models() -> dict[str, Any]:
        """The model served."""
        return {"object": "list", "data": [{"id": model_name, "object": "model", "owned_by": "lastrerank"}]}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return _PAGE.read_text(encoding="utf-8")

    @app.middleware("http")
    async def observed(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        try:
            response = await call_next(request)
        except Exception as error:
            response = _failure(error)
        seconds = time.perf_counter() - started
        route = getattr(request.scope.get("route"), "path", "unknown")
        method = request.method if request.method in _METHODS else "other"  # clients make them up
        metrics.requests.labels(route, method, str(response.status_code)).inc()
        metrics.seconds.labels(route).observe(seconds)
        logger.info(json.dumps({"method": method, "route": route, "status": response.status_code,
                                "ms": round(1e3 * seconds, 2), "queued_tokens": engine.queued_tokens}))  # fmt: skip
        return response

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        detail = error.detail if isinstance(error.detail, dict) else {"message": str(error.detail), "type": "http",
                                                                      "param": None}  # fmt: skip
        return JSONResponse({"error": detail}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _json_error(422, f"{where or 'body'}: {first['msg']}", "invalid_request", where or None)

    for kind in (OverloadedError, DeadlineError, ClosedError, BadRequestError):
        app.add_exception_handler(kind, lambda request, error: _failure(error))
    return app


def _error(status: int, message: str, kind: str, param: str | None = None) -> HTTPException:
    return HTTPException(status, {"message": message, "type": kind, "param": param})


def _json_error(status: int, message: str, kind: str, param: str | None = None, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": param}}, status, headers=headers)


def _failure(error: Exception) -> Response:
    """The response to what went wrong; what is nobody's fault but ours gets an id that is in the log."""
    if isinstance(error, OverloadedError):
        return _json_error(429, str(error), "overloaded", **{"Retry-After": str(round(error.retry_after))})
    if isinstance(error, DeadlineError):
        return _json_error(504, str(error), "timeout")
    if isinstance(error, ClosedError):
        return _json_error(503, str(error), "unavailable")
    if isinstance(error, TooLongError):
        return _json_error(413, str(error), "too_large", error.where)
    if isinstance(error, BadRequestError):
        return _json_error(422, str(error), "invalid_request")
    number = uuid.uuid4().hex[:12]
    logger.error("error %s: %s: %s", number, type(error).__name__, error, exc_info=error)
    return _json_error(500, f"internal error {number}", "internal")


def _as_object(document: Any) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else dict(document)


def _usage(answers: list[Answer]) -> Usage:
    tokens = sum(answer.encoded.num_tokens for answer in answers)
    return Usage(total_tokens=tokens, prompt_tokens=tokens)


def _time(response: Response, answers: list[Answer]) -> None:
    """Milliseconds in headers: of the slowest list, where there are several."""
    for name in ("tokenise", "queue", "inference"):
        seconds = max(getattr(answer, f"{name}_seconds") for answer in answers)
        response.headers[f"x-{name}-ms"] = f"{1e3 * seconds:.2f}"


async def _disconnected(request: Request) -> None:
    """Returns when the client leaves. The body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _BodyGuard:
    """Refuses a body that is too large or comes too slowly, before it is in memory."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self.limits.max_body
        if declared.isdigit() and int(declared) > limit:
            await self._refuse(scope, receive, send, 413)
            return
        body, end = bytearray(), time.monotonic() + self.limits.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                await self._refuse(scope, receive, send, 408)
                return
            if message["type"] == "http.disconnect":
                await Response(status_code=499)(scope, receive, send)  # nobody reads it, but it is counted
                return
            body += message.get("body", b"")
            if len(body) > limit:
                await self._refuse(scope, receive, send, 413)
                return
            if not message.get("more_body"):
                break
        pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any, status: int) -> None:
        message, kind = {
            413: (f"the body is over {self.limits.max_body} bytes", "too_large"),
            408: (f"the body took more than {self.limits.body_seconds} s", "timeout"),
        }[status]
        await _json_error(status, message, kind, connection="close")(scope, receive, send)


class _Metrics:
    """What `/metrics` shows; a registry of its own, so that several applications may live in one process."""

    def __init__(self, engine: Engine) -> None:
        own = self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "lastrerank_requests", "HTTP requests", ["route", "method", "status"], registry=own
        )
        self.seconds = prometheus_client.Histogram(
            "lastrerank_request_seconds", "From first byte to last", ["route"], registry=own
        )
        self.documents = prometheus_client.Histogram(
            "lastrerank_documents", "Documents of a request", buckets=(1, 5, 10, 25, 50, 100, 250, 1000), registry=own
        )
        queued = prometheus_client.Gauge("lastrerank_queued_tokens", "Tokens queued", registry=own)
        queued.set_function(lambda: engine.queued_tokens)
        pending = prometheus_client.Gauge("lastrerank_pending_requests", "Requests not answered", registry=own)
        pending.set_function(lambda: engine.pending)
        own.register(_EngineCounters(engine))


class _EngineCounters(Collector):
    """The engine's own statistics as counters."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        for name, value in vars(self.engine.statistics).items():
            text = f"Engine: {name.replace('_', ' ')}"
            yield CounterMetricFamily(f"lastrerank_engine_{name}", text, value=value)
