"""`/openapi.json`: the routes, from the types that read their bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from lastrerank import __version__
from lastrerank.server.dialects import RankingBody, RerankBody, ScoreBody


class RankedDocument(Struct, forbid_unknown_fields=True):
    """A document's place among those sent, and its score. The document as it was sent, or in an object with `text`."""

    index: int
    relevance_score: float
    document: Any = UNSET
    embedding: list[float] | UnsetType | None = UNSET


class DataRow(Struct, forbid_unknown_fields=True):
    """The same for Voyage's clients, or (`score`, `input`) for Mixedbread's."""

    index: int
    relevance_score: float | UnsetType = UNSET
    score: float | UnsetType = UNSET
    object: str | UnsetType = UNSET
    document: Any = UNSET
    input: str | UnsetType = UNSET


class TextScore(Struct, forbid_unknown_fields=True):
    """What text-embeddings-inference calls a rank."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class PairScore(Struct, forbid_unknown_fields=True):
    """The score of the pair of that place."""

    index: int
    object: str
    score: float


class PassageLogit(Struct, forbid_unknown_fields=True):
    """A passage's place among those sent, and its score before an activation."""

    index: int
    logit: float


class Usage(Struct, forbid_unknown_fields=True):
    """Tokens of all prompts."""

    total_tokens: int
    prompt_tokens: int


class RerankAnswer(Struct, forbid_unknown_fields=True):
    """Results best first; `meta` is Cohere's, `data` Voyage's (where `top_k` was sent, or no `top_n`) or Mixedbread's
    (where `input` was)."""

    id: str
    model: str
    object: str
    created: int
    results: list[RankedDocument]
    usage: Usage
    meta: dict[str, Any]
    data: list[DataRow] | UnsetType = UNSET


class ScoreAnswer(Struct, forbid_unknown_fields=True):
    """Scores in the order of the texts."""

    id: str
    model: str
    object: str
    created: int
    data: list[PairScore]
    usage: Usage


class RankingAnswer(Struct, forbid_unknown_fields=True):
    """Passages best first."""

    rankings: list[PassageLogit]
    usage: Usage


# Where `texts` are taken, too: TEI's own, and llama.cpp's.
_TEIS = ("/rerank", "/reranking", "/v1/reranking")
_OR_TEIS: Any = RerankAnswer | list[TextScore]


def kinds(path: str) -> tuple[Any, Any]:
    """Of a POST route: what it reads, and what it answers with."""
    if path.endswith("score"):
        return ScoreBody, ScoreAnswer
    if path == "/v1/ranking":
        return RankingBody, RankingAnswer
    return RerankBody, _OR_TEIS if path in _TEIS else RerankAnswer


# What the fields of bodies do. docs/server.md has the same lines.
_FIELDS: dict[tuple[str, ...], str] = {
    ("query",): "what is asked",
    ("documents", "texts", "input", "passages"): "what is ranked: strings, or objects with `text`; `texts` is TEI's, "
                                                 "`input` Mixedbread's, `passages` NVIDIA's",
    ("model",): "checked against the server's names",
    ("top_n", "top_k"): "results wanted, the smaller of both",
    ("score_threshold",): "results below it are left out",
    ("return_documents", "return_text", "return_input"): "whether texts come back",
    ("return_embeddings",): "whether vectors do, of the listwise family",
    ("rank_fields",): "of documents that are objects what is ranked by: their values, a line each",
    ("instruction",): "where the family has a place for it",
    ("max_doc_length", "max_query_length"): "caps in tokens",
    ("max_tokens_per_doc", "truncate_prompt_tokens"): "bound a document's cap, and don't lift it",
    ("truncation", "truncate"): "false, or NVIDIA's `NONE`: a text over its cap is refused instead of cut",
    ("truncation_direction", "truncation_side"): "where texts are cut: `right`, nothing else",
    ("raw_scores", "activation", "use_activation"): "scores before the family's activation, or after it",
    ("block_size", "orders"): "as of `Reranker.rerank`",
    ("max_chunks_per_doc",): "nothing but null",
    ("user", "priority", "request_id", "return_len"): "change nothing",
    ("text_1", "queries", "data_1"): "of `/score`: a text, or as many as it is scored against",
    ("text_2", "items", "data_2"): "of `/score`: what is scored against it; `queries` go with `documents` or `items`",
}


_DOCUMENTS = ["Paris is the capital of France.", "The Rhine is a river."]
_QUERY = "What is the capital of France?"
_EXAMPLES: dict[type, dict[str, Any]] = {
    RerankBody: {
        "Jina, Cohere, llama.cpp": {"query": _QUERY, "documents": _DOCUMENTS, "top_n": 1},
        "objects as documents": {"query": _QUERY, "documents": [{"text": _DOCUMENTS[0], "id": 7}]},
        "Voyage (the answer has `data`)": {"query": _QUERY, "documents": _DOCUMENTS, "top_k": 1},
        "Cohere's rank_fields": {"query": _QUERY, "rank_fields": ["title", "body"],
                                 "documents": [{"title": "Paris", "body": _DOCUMENTS[0]}]},
        "vLLM": {"query": _QUERY, "documents": _DOCUMENTS, "truncate_prompt_tokens": 512},
        "Infinity (documents come back as strings)": {"query": _QUERY, "documents": _DOCUMENTS, "raw_scores": False,
                                                      "return_documents": True},
        "Mixedbread (the answer has `data`)": {"query": _QUERY, "input": _DOCUMENTS, "top_k": 1, "return_input": True},
        "text-embeddings-inference (a bare list comes back)": {"query": _QUERY, "texts": _DOCUMENTS,
                                                               "raw_scores": False, "return_text": True},
    },
    ScoreBody: {
        "one against many": {"text_1": _QUERY, "text_2": _DOCUMENTS},
        "vLLM": {"queries": _QUERY, "documents": _DOCUMENTS},
    },
    RankingBody: {"NVIDIA": {"query": {"text": _QUERY}, "passages": [{"text": text} for text in _DOCUMENTS]}},
}
_ERRORS = {
    400: "no documents, or no JSON", 401: "a wrong or missing API key", 404: "no such model",
    408: "the body came too slowly", 413: "over a limit", 415: "an unknown content-encoding",
    422: "a malformed request, or a field that isn't known", 429: "overloaded", 500: "a failure with an id",
    503: "closing", 504: "too late",
}  # fmt: skip
# What each says, and with which errors; those that say something of the model want the key.
_GETS: dict[str, tuple[str, dict[int, str]]] = {
    "/health": ("The process works: passes are run.", {503: "closed"}),
    "/ready": ("Requests are taken: the queue has room.", {503: "closed, or the queue is full"}),
    "/metrics": ("Counters for Prometheus.", {}),
    "/info": ("Model, device, caps and limits.", {401: _ERRORS[401]}),
    "/v1/models": ("The names of the model served.", {401: _ERRORS[401]}),
    "/v1/models/{name}": ("One of them.", {code: _ERRORS[code] for code in (401, 404)}),
}


def description(posts: Sequence[str], has_key: bool, root_path: str = "") -> dict[str, Any]:
    """OpenAPI 3.1 of the application with these POST routes; has_key: whether an API key is wanted; root_path: under
    which a proxy shows it."""
    used = list(dict.fromkeys(kind for path in posts for kind in kinds(path)))
    refs, schemas = msgspec.json.schema_components(used, ref_template="#/components/schemas/{name}")
    by_kind = dict(zip(used, refs, strict=True))
    for kind in {kinds(path)[0] for path in posts}:
        for name, field in schemas[kind.__name__]["properties"].items():
            field["description"] = next(text for names, text in _FIELDS.items() if name in names)
    schemas["Error"] = {
        "type": "object", "required": ["error", "detail"],
        "properties": {
            "detail": {"type": "string"},
            "error": {"type": "object", "properties": {
                "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}}},
        },
    }  # fmt: skip
    secured: list[dict[str, list[str]]] = [{"key": []}] if has_key else []
    paths: dict[str, Any] = {}
    for path in posts:
        kind, answer = kinds(path)
        examples = {
            name: {"value": value} for name, value in _EXAMPLES[kind].items()
            if "texts" not in value or path in _TEIS
        }
        paths[path] = {"post": {
            "summary": (kind.__doc__ or "").split("\n")[0], "operationId": path.strip("/").replace("/", "_"),
            "requestBody": {"required": True, "content": {
                "application/json": {"schema": by_kind[kind], "examples": examples}}},
            "responses": {"200": {"description": "scores", "content": _json(by_kind[answer])}, **_failures(_ERRORS)},
            "security": secured,
        }}  # fmt: skip
    for path, (text, errors) in _GETS.items():
        paths[path] = {"get": {
            "summary": text, "responses": {"200": {"description": text}, **_failures(errors)},
            "security": secured if 401 in errors else [],
            **({"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
               if "{name}" in path else {}),
        }}  # fmt: skip
    components: dict[str, Any] = {"schemas": schemas}
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0", "servers": [{"url": root_path or "/"}], "paths": paths, "components": components,
        "info": {"title": "lastrerank", "version": __version__,
                 "description": "Last-token reranking. Scores are as the model's family publishes them: cosines in "
                 "[-1, 1], probabilities or logits (/info says which)."},
    }  # fmt: skip


def _failures(errors: Mapping[int, str]) -> dict[str, Any]:
    content = _json({"$ref": "#/components/schemas/Error"})
    return {str(code): {"description": text, "content": content} for code, text in errors.items()}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
