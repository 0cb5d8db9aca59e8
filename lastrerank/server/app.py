"""The application: routes over an engine. Overload is answered at once with 429; a client that leaves has its request
dropped. Logs never hold text."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from lastrerank import __version__
from lastrerank.engine import Answer, ClosedError, DeadlineError, Engine
from lastrerank.request import RerankRequest
from lastrerank.server import dialects
from lastrerank.server.dialects import BodyError, Call
from lastrerank.server.errors import error_response, failure
from lastrerank.server.limits import Guard, Limits, Receive, Scope, Send
from lastrerank.server.metrics import METHODS, Metrics
from lastrerank.server.openapi import description

logger = logging.getLogger("lastrerank.server")

_PAGES = Path(__file__).parent
# Bodies and answers larger than this are decoded and encoded beside the event loop.
_LARGE = 1 << 16

Reader = Callable[[bytes], Call]


def create_app(
    engine: Engine,
    *,
    model_name: str | Sequence[str],
    any_model: bool = False,
    api_key: str | None = None,
    limits: Limits | None = None,
    allow_origins: Sequence[str] = (),
    close_engine: bool = True,
    drain_seconds: float | None = None,
) -> Starlette:
    """The application over an engine.

    Args:
        engine: answers.
        model_name: what requests may name, the first being what `/v1/models` lists first and answers carry; of a Hub id
            the part after the owner serves as well.
        any_model: requests may name anything.
        api_key: wanted as `Authorization: Bearer`; None for none.
        limits: of requests.
        allow_origins: web pages' origins that browsers may call from ("*" for all).
        close_engine: whether shutting down drains and closes the engine.
        drain_seconds: what draining may take; None for as long as it does.
    """
    bounds = limits or Limits()
    names = list(dict.fromkeys([model_name] if isinstance(model_name, str) else model_name))
    known = tuple(dict.fromkeys((*names, *(name.split("/")[-1] for name in names))))
    metrics, created, parsing = Metrics(engine), int(time.time()), asyncio.Lock()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if close_engine:
            await asyncio.to_thread(engine.close, timeout=drain_seconds)

    async def answers_of(request: Request, wanted: list[RerankRequest], refuse_cut: bool) -> list[Answer]:
        """All requests' answers; dropped if the client leaves or time is up."""
        try:
            submit = partial(engine.submit_many, wanted, bounds.request_seconds, refuse_cut=refuse_cut)
            large = sum(len(one.documents) for one in wanted) > 100
            submitted = await asyncio.to_thread(submit) if large else submit()
        except TypeError as error:
            raise BodyError(422, str(error)) from error
        except ValueError as error:
            raise error if type(error) is not ValueError else BodyError(422, str(error)) from error
        futures = [asyncio.wrap_future(future) for future in submitted]
        together = asyncio.ensure_future(asyncio.gather(*futures))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waiting: set[asyncio.Future[Any]] = {together, gone}
            await asyncio.wait(waiting, timeout=bounds.request_seconds, return_when=asyncio.FIRST_COMPLETED)
            if together.done():
                return together.result()
            if gone.done():
                raise HTTPException(499, "the client left")
            raise DeadlineError(f"no answer within {bounds.request_seconds} s")
        finally:
            gone.cancel()
            together.cancel()
            for future in futures:
                future.cancel()

    async def serve(read: Reader, request: Request) -> Response:
        content: bytes = request.scope["lastrerank.body"]
        large = len(content) > _LARGE
        if large:
            async with parsing:  # one at a time: the interpreter's lock is held meanwhile
                call = await asyncio.to_thread(read, content)
        else:
            call = read(content)
        if call.model is not None and call.model not in known and not any_model:
            raise BodyError(404, f"model is {call.model!r:.80}, this server has {', '.join(map(repr, names))}", "model")
        answers = await answers_of(request, call.requests, call.refuse_cut)
        metrics.documents.observe(call.texts)
        model = names[0] if call.model is None else call.model
        encode = lambda: msgspec.json.encode(call.render(answers, model))  # noqa: E731
        response = Response(await asyncio.to_thread(encode) if large else encode(), media_type="application/json")
        for name in ("tokenise", "queue", "inference"):  # milliseconds; of the slowest list, where there are several
            seconds = max(getattr(answer, f"{name}_seconds") for answer in answers)
            response.headers[f"x-{name}-ms"] = f"{1e3 * seconds:.2f}"
        return response

    most = bounds.max_documents
    doc_cap = engine.reranker.encoder.max_doc_length
    activated = engine.reranker.family.readout.kind == "probability"
    rerank = partial(dialects.read_rerank, most=most, doc_cap=doc_cap, activated=activated)
    score = partial(dialects.read_score, most=most, doc_cap=doc_cap, activated=activated)
    ranking = partial(dialects.read_ranking, most=most)
    readers: dict[str, Reader] = {
        "/v1/rerank": partial(rerank, documents_back=True, version="1"),
        "/v2/rerank": partial(rerank, documents_back=False),
        "/rerank": partial(rerank, documents_back=True, is_tei=True),
        "/infinity/rerank": partial(rerank, documents_back=False, is_infinity=True),
        "/reranking": partial(rerank, documents_back=False, is_tei=True),
        "/v1/reranking": partial(rerank, documents_back=False, is_tei=True),
        "/score": score,
        "/v1/score": score,
        "/v1/ranking": ranking,
    }
    described = list(readers)
    readers |= {f"/v1/retrieval/{name}/reranking": ranking for name in known}  # as NVIDIA's service has it

    async def health(request: Request) -> Response:
        if not engine.alive:
            return error_response(503, "the engine is closed", "unavailable")
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        full = engine.is_full
        if not engine.alive or full:
            return error_response(503, "the queue is full" if full else "the engine is closed", "unavailable")
        return JSONResponse({"status": "ready", "queued_tokens": engine.queued_tokens})

    async def prometheus(request: Request) -> Response:
        return Response(metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def info(request: Request) -> Response:
        reranker = engine.reranker
        return JSONResponse({
            "model": names[0], "version": __version__, "device": str(reranker.device), "backend": reranker.backend,
            "dtype": reranker.dtype,
            "max_context": min(reranker.config.max_context, reranker.config.max_positions),
            "family": reranker.family.name, "scores": reranker.family.readout.kind,
            "max_query_length": reranker.encoder.max_query_length, "max_doc_length": reranker.encoder.max_doc_length,
            "max_batch_tokens": engine.max_batch_tokens, "max_queue_tokens": engine.max_queue_tokens,
            "max_request_tokens": engine.max_request_tokens, "max_documents": most, "max_body_bytes": bounds.max_body,
            # As text-embeddings-inference names them.
            "model_id": names[0], "model_sha": None, "model_dtype": reranker.dtype, "sha": None, "docker_label": None,
            "auto_truncate": True, "max_concurrent_requests": bounds.max_connections, "max_batch_requests": None,
            "tokenization_workers": None,
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_client_batch_size": most, "max_input_length": reranker.encoder.max_doc_length,
        })  # fmt: skip

    def as_model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "lastrerank"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [as_model(name) for name in known]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in known and not any_model:
            message = f"no model {name!r:.80}, this server has {', '.join(map(repr, names))}"
            return error_response(404, message, "not_found", "model")
        return JSONResponse(as_model(name))

    async def openapi(request: Request) -> Response:
        return JSONResponse(description(described, api_key is not None, request.scope.get("root_path", "")))

    def page(file: str, request: Request) -> Response:
        return HTMLResponse((_PAGES / file).read_text(encoding="utf-8"))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "not_found" if error.status_code == 404 else "http"
        return error_response(error.status_code, str(error.detail), kind, **dict(error.headers or {}))

    async def failed(request: Request, error: Exception) -> Response:
        return failure(error)

    posts = [Route(path, partial(serve, read), methods=["POST"], name=path) for path, read in readers.items()]
    gets: dict[str, Any] = {
        "/health": health, "/ready": ready, "/metrics": prometheus, "/info": info, "/v1/models": models,
        "/v1/models/{name:path}": one_model, "/openapi.json": openapi, "/": partial(page, "page.html"),
        "/docs": partial(page, "docs.html"),
    }  # fmt: skip
    middleware = [Middleware(_Observed, metrics=metrics, engine=engine, routes=[*readers, *gets])]
    if allow_origins:
        middleware.append(Middleware(
            CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["x-request-id", "x-tokenise-ms", "x-queue-ms", "x-inference-ms", "retry-after"],
        ))  # fmt: skip
    middleware.append(Middleware(Guard, limits=bounds, api_key=api_key, readers=frozenset(readers)))
    # Of a path with a slash too many no redirect is made: it would lead wherever the Host header says.
    app = Starlette(
        routes=[*posts, *(Route(path, route, methods=["GET"]) for path, route in gets.items())], lifespan=lifespan,
        middleware=middleware, exception_handlers={HTTPException: http_error, BodyError: failed, **_failures(failed)},
    )  # fmt: skip
    app.router.redirect_slashes = False
    app.state.engine = engine
    return app


def _failures(handler: Any) -> dict[Any, Any]:
    from lastrerank import engine

    kinds = (engine.OverloadedError, engine.DeadlineError, engine.ClosedError, engine.BadRequestError)
    return dict.fromkeys(kinds, handler)


class _Observed:
    """Around everything: an id for each request, what goes wrong unforeseen as a 500 with an id, counters, a log
    line."""

    def __init__(self, app: Any, metrics: Metrics, engine: Engine, routes: Sequence[str]) -> None:
        self.app, self.metrics, self.engine = app, metrics, engine
        self.routes = {route for route in routes if "{" not in route}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        number = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex

        async def observed(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except asyncio.CancelledError:  # time for draining is up
            if status:
                raise
            await failure(ClosedError("cancelled"))(scope, receive, observed)
        except Exception as error:
            if status:
                raise
            await failure(error)(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - started
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            route = path if path in self.routes else "unknown"
            method = scope["method"] if scope["method"] in METHODS else "other"  # clients make them up
            self.metrics.observe(route, method, status, seconds)
            entry = {"id": number, "method": method, "route": route, "status": status,
                     "ms": round(1e3 * seconds, 2), "queued_tokens": self.engine.queued_tokens}  # fmt: skip
            logger.info("%s %s %s", method, route, status, extra={"entry": entry})


async def _disconnected(request: Request) -> None:
    """Returns when the client leaves. The body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
