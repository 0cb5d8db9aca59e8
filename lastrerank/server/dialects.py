"""Bodies of the rerank interfaces people use, each translated to requests of ours and their answers back.

One body serves Jina, Cohere (v1, v2), vLLM, Voyage, Infinity, llama.cpp and text-embeddings-inference, whose fields
don't contradict each other. A field is used, known to change nothing, or refused by name; null is as absent. Documents
that are objects come back as the bytes they came as.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from lastrerank.engine import Answer
from lastrerank.request import BLOCK_SIZE, RerankRequest

# Clients write true as "true", and whole numbers as 2.0.
Flag = bool | str | None
Count = int | float | None


class BodyError(ValueError):
    """A body that can't be served. param: the field."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Call:
    """What a body asks for. texts: how many will be scored. render: the answers, and the model's name, as JSON."""

    requests: list[RerankRequest]
    texts: int
    param: str
    model: str | None
    refuse_cut: bool
    render: Callable[[Sequence[Answer], str], Any]


class TextDocument(Struct):
    """A document as an object; other fields come back with it."""

    text: str | UnsetType = UNSET


class RerankBody(Struct, forbid_unknown_fields=True):
    """A query and its documents, as Jina, Cohere, vLLM, Voyage, Infinity, llama.cpp, TEI (`texts`) and Mixedbread
    (`input`) have them.

    The cap of a document is max_doc_length; its other names, which clients send unasked, bound it and don't lift the
    model's own. Fields that would change a score and aren't computed here are refused unless they ask for nothing.
    """

    query: str
    documents: list[str | TextDocument] | None = None
    texts: list[str] | None = None
    input: list[str] | None = None
    model: str | None = None
    top_n: Count = None
    top_k: Count | UnsetType = UNSET
    return_documents: Flag = None
    return_text: Flag = None
    return_input: Flag = None
    return_embeddings: Flag = None
    return_len: Flag = None
    instruction: str | None = None
    orders: Count = None
    score_threshold: float | None = None
    block_size: Count = None
    max_doc_length: Count = None
    max_tokens_per_doc: Count = None
    truncate_prompt_tokens: Count = None
    max_query_length: Count = None
    truncation: Flag = None
    truncate: Flag = None
    truncation_direction: str | None = None
    truncation_side: str | None = None
    rank_fields: list[str] | None = None
    raw_scores: Flag = None
    max_chunks_per_doc: Count = None
    activation: Flag = None
    use_activation: Flag = None
    user: str | None = None
    priority: Count = None
    request_id: str | None = None


class _RawDocuments(Struct):
    documents: list[Raw]


class _ObjectDocuments(Struct):
    documents: list[Any]


class ScoreBody(Struct, forbid_unknown_fields=True):
    """One text against many, or pairs, as vLLM has them; pairs with the same first text are scored as one list."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None
    model: str | None = None
    truncate_prompt_tokens: Count = None
    truncation_side: str | None = None
    activation: Flag = None
    use_activation: Flag = None
    user: str | None = None
    priority: Count = None


class _Text(Struct):
    text: str


class RankingBody(Struct, forbid_unknown_fields=True):
    """A query and passages, as NVIDIA's NIM has them."""

    query: _Text
    passages: list[_Text]
    model: str | None = None
    truncate: str | None = None
    top_n: Count = None
    top_k: Count = None


# vLLM's names of what is scored against what.
_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
# What Infinity's own client sends for no model.
_INFINITYS_DEFAULT = "default/not-specified"

_rerank, _score, _ranking = (msgspec.json.Decoder(kind) for kind in (RerankBody, ScoreBody, RankingBody))
_raw_texts, _objects = msgspec.json.Decoder(_RawDocuments), msgspec.json.Decoder(_ObjectDocuments)


def read_rerank(
    content: bytes, most: int, doc_cap: int, activated: bool, *, documents_back: bool, is_tei: bool = False,
    is_infinity: bool = False, version: str = "2",
) -> Call:
    """A `RerankBody`. most: documents allowed. doc_cap: the model's own, in tokens. activated: its family's scores are
    behind an activation. documents_back: whether documents come back unless it says otherwise. is_tei: this route
    answers `texts` with a bare list, as TEI does. is_infinity: it answers as Infinity does, which it also does where
    `raw_scores` stands, as Infinity's own clients always send it. version: of Cohere's API, as its answers name it.

    Raises:
        BodyError: it can't be served.
    """
    body: RerankBody = _decoded(_rerank, content)
    if not body.query:
        raise BodyError(422, "query is empty", "query")
    tei, mixedbread = body.texts is not None, body.input is not None
    if tei and not is_tei:
        raise BodyError(422, "texts: not on this route, expected documents", "texts")
    given = [name for name in ("documents", "texts", "input") if getattr(body, name) is not None]
    if not given:
        raise BodyError(422, "documents is missing: expected a list of strings or of objects with 'text'", "documents")
    if len(given) > 1:
        raise BodyError(422, f"{given[1]}: not together with {given[0]}", given[1])
    param = given[0]
    documents = getattr(body, param)
    _check_count(len(documents), most, param)
    _refuse(body, max_chunks_per_doc=(None,))
    _check_side(body, "truncation_direction", "truncation_side")
    # As they come, or without the activation of a family that has one.
    score = _raw if _flag(body, "raw_scores") or not _activation(body, activated) else _published
    if score is _raw and body.score_threshold is not None:
        raise BodyError(422, "score_threshold: of the published scores, not together with raw ones", "score_threshold")
    texts = _texts(documents, body.rank_fields, content)
    cuts = [value for name in ("truncation", "truncate") if (value := _flag(body, name)) is not None]
    # TEI's name, Mixedbread's and everyone else's mean the same.
    names = [name for name in ("return_documents", "return_text", "return_input") if getattr(body, name) is not None]
    asked = {_flag(body, name) for name in names}
    if len(asked) > 1:
        raise BodyError(422, f"{' and '.join(names)} contradict each other", names[-1])
    wanted = asked.pop() if asked else None
    back = documents_back and not tei and not mixedbread if wanted is None else wanted
    infinity = is_infinity or (not tei and body.raw_scores is not None)
    # Voyage's clients send top_k where they send anything.
    voyage = body.top_k is not UNSET or (body.top_n is None and not infinity)
    embeddings = bool(_flag(body, "return_embeddings"))
    if embeddings and tei:
        raise BodyError(422, "return_embeddings: what answers texts has no room for them", "return_embeddings")
    bounds = [cap for cap in (_count(body, "max_tokens_per_doc"), _prompt_cap(body)) if cap is not None]
    caps = [_count(body, "max_doc_length"), *(cap for cap in bounds if cap < doc_cap)]
    # vLLM's clients send 0 for all, to /rerank; Jina's and Cohere's mean nothing by it.
    top_n = None if is_tei and body.top_n == 0 else _count(body, "top_n")
    top_k = None if body.top_k is UNSET else _count(body, "top_k")
    request = RerankRequest(
        body.query, texts, top_n=top_n if top_k is None else top_k if top_n is None else min(top_n, top_k),
        return_embeddings=embeddings, max_doc_length=min((cap for cap in caps if cap is not None), default=None),
        max_query_length=_count(body, "max_query_length"), instruction=body.instruction,
        block_size=_count(body, "block_size") or BLOCK_SIZE, orders=_count(body, "orders") or 1,
        score_threshold=body.score_threshold,
    )  # fmt: skip
    raw: list[Any] = []
    if back and not tei:
        objects = any(not isinstance(document, str) for document in documents)
        raw = _decoded(_raw_texts, content).documents if objects else documents

    def render(answers: Sequence[Answer], model: str) -> Any:
        results = []
        for found in answers[0].results:
            row: dict[str, Any] = {"index": found["index"], "relevance_score": score(found)}
            if back and not tei:
                document = documents[found["index"]]
                as_is = infinity and isinstance(document, str)
                row["document"] = document if as_is else _as_object(document, raw[found["index"]])
            if embeddings:
                vector = found["embedding"]
                row["embedding"] = None if vector is None else vector.tolist()
            results.append(row)
        if tei:
            own = {"text": texts} if back else {}
            return [{"index": row["index"], "score": row["relevance_score"],
                     **{name: values[row["index"]] for name, values in own.items()}} for row in results]  # fmt: skip
        tokens = sum(answer.encoded.num_tokens for answer in answers)
        answer = {
            "id": uuid.uuid4().hex, "model": model, "object": "list", "usage": _usage(answers), "results": results,
            "created": int(time.time()),
            "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1},
                     "tokens": {"input_tokens": tokens, "output_tokens": 0}},
        }  # fmt: skip
        if infinity:  # its clients take no other object
            answer["object"] = "rerank"
        if mixedbread:  # whose clients read it there
            answer["data"] = [
                {"object": "rank_result", "index": row["index"], "score": row["relevance_score"]}
                | ({"input": documents[row["index"]]} if back else {}) for row in results
            ]  # fmt: skip
        elif voyage:  # whose clients read it there, and documents, where they ask for them, as they were sent
            data = [{"index": row["index"], "relevance_score": row["relevance_score"]} for row in results]
            for row in data if wanted else []:
                sent = documents[row["index"]]
                row["document"] = sent if isinstance(sent, str) else raw[row["index"]]
            answer["data"] = data
        return answer

    model = None if body.model == _INFINITYS_DEFAULT else body.model
    return Call([request], len(documents), param, model, False in cuts, render)


def read_score(content: bytes, most: int, doc_cap: int, activated: bool) -> Call:
    """A `ScoreBody`; as `read_rerank`.

    Raises:
        BodyError: it can't be served.
    """
    body: ScoreBody = _decoded(_score, content)
    given = {name for pair in _PAIRS for name in pair if getattr(body, name) is not None}
    first, second = max(_PAIRS, key=lambda pair: len(given.intersection(pair)))
    for name in (first, second):
        if name not in given:
            raise BodyError(422, f"{name} is missing: expected a string or a list of strings", name)
    for name in sorted(given - {first, second}):
        raise BodyError(422, f"{name}: not together with {first} and {second}", name)
    _check_side(body, "truncation_side")
    left, right = ([text] if isinstance(text, str) else text for text in (getattr(body, first), getattr(body, second)))
    for name, texts in ((first, left), (second, right)):
        _check_count(len(texts), most, name)
    if "" in left:
        raise BodyError(422, f"{first} has an empty text", first)
    left = left * len(right) if len(left) == 1 else left
    if len(left) != len(right):
        raise BodyError(422, f"{first} has {len(left)} texts, {second} {len(right)}: expected one, or as many", first)
    groups: dict[str, list[int]] = {}
    for position, text in enumerate(left):
        groups.setdefault(text, []).append(position)
    cap, score = _prompt_cap(body), _published if _activation(body, activated) else _raw
    cap = None if cap is None or cap >= doc_cap else cap
    requests = [RerankRequest(q, [right[i] for i in own], max_doc_length=cap) for q, own in groups.items()]

    def render(answers: Sequence[Answer], model: str) -> Any:
        scores = [0.0] * len(right)
        for own, got in zip(groups.values(), answers, strict=True):
            for result in got.results:
                scores[own[result["index"]]] = score(result)
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
        return {"id": uuid.uuid4().hex, "model": model, "object": "list", "created": int(time.time()),
                "usage": _usage(answers), "data": data}  # fmt: skip

    return Call(requests, len(right), second, body.model, False, render)


def read_ranking(content: bytes, most: int) -> Call:
    """A `RankingBody`.

    Raises:
        BodyError: it can't be served.
    """
    body: RankingBody = _decoded(_ranking, content)
    if not body.query.text:
        raise BodyError(422, "query.text is empty", "query.text")
    _check_count(len(body.passages), most, "passages")
    if body.truncate not in (None, "END", "NONE"):
        raise BodyError(422, f"truncate is {body.truncate!r:.40}, expected 'END' or 'NONE'", "truncate")

    def render(answers: Sequence[Answer], model: str) -> Any:
        rankings = [{"index": r["index"], "logit": _raw(r)} for r in answers[0].results]
        return {"rankings": rankings, "usage": _usage(answers)}

    wanted = [count for count in (_count(body, "top_n"), _count(body, "top_k")) if count is not None]
    texts = [passage.text for passage in body.passages]
    request = RerankRequest(body.query.text, texts, top_n=min(wanted, default=None))
    return Call([request], len(body.passages), "passages", body.model, body.truncate == "NONE", render)


def _activation(body: RerankBody | ScoreBody, activated: bool) -> bool:
    """Whether scores are wanted as published, not before their activation, by vLLM's field of either name. One that is
    asked for of a family that has none is refused."""
    values = [_flag(body, name) for name in ("activation", "use_activation")]
    if True in values and False in values:
        raise BodyError(422, "activation and use_activation contradict each other", "activation")
    if True in values and not activated:
        name = ("activation", "use_activation")[values.index(True)]
        raise BodyError(422, f"{name} is true, which isn't computed here: this model's scores have no activation", name)
    return False not in values


def _published(result: Mapping[str, Any]) -> float:
    """A result's score as its model's family publishes it."""
    return result["relevance_score"]


def _raw(result: Mapping[str, Any]) -> float:
    """The score before an activation; a cosine is one that has none."""
    return result.get("raw_score", result["relevance_score"])


def _decoded(decoder: msgspec.json.Decoder[Any], content: bytes) -> Any:
    try:
        if not content.isascii():
            str(content, "utf-8")  # what is only passed through isn't looked at otherwise
        return decoder.decode(content)
    except msgspec.ValidationError as error:
        if str(error).startswith("Object contains unknown field") and (known := _without_nulls(decoder, content)):
            return _decoded(decoder, known)
        message, _, path = _short(error).partition(" - at `$.")
        where = path.removesuffix("`") or None
        if where is not None and (item := re.match(r"(documents|texts|passages)\[\d+\]", where)):
            where = item[0]
            wanted = {"texts": "a string", "documents": "a string or an object with text"}
            message = f"{message}; expected {wanted.get(item[1], 'an object with text')}"
        if message.startswith("Object contains unknown field"):
            where = message.split("`")[1]
            raise BodyError(
                422, f"{where} is not a field that is known here: it would be ignored, and may change the result", where
            ) from None
        raise BodyError(422, f"{where or 'body'}: {message}".replace("`", "'"), where) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BodyError(400, f"the body is no JSON: {_short(error)}") from None
    except RecursionError:
        raise BodyError(422, "the body is nested too deeply") from None


def _short(error: Exception) -> str:
    """Names in it may be as long as a body."""
    text = str(error)
    return text if len(text) <= 300 else f"{text[:120]}...{text[-120:]}"


def _without_nulls(decoder: msgspec.json.Decoder[Any], content: bytes) -> bytes | None:
    """The body without those fields that aren't known and are null, if there are any: null is as absent."""
    found = msgspec.json.decode(content, type=dict[str, Raw])
    fields = decoder.type.__struct_fields__
    known = {name: value for name, value in found.items() if name in fields or bytes(value) != b"null"}
    return msgspec.json.encode(known) if len(known) < len(found) else None


def _check_count(count: int, most: int, param: str) -> None:
    if count == 0:
        raise BodyError(400, f"{param} is empty", param)
    if count > most:
        raise BodyError(413, f"{param} has {count} texts, at most {most} may be in a request", param)


def _texts(documents: Sequence[Any], rank_fields: list[str] | None, content: bytes) -> list[str]:
    """What is scored of each document: its text, or the values of Cohere's `rank_fields` in their order, a line
    each."""
    if rank_fields is not None and (len(set(rank_fields)) < len(rank_fields) or not 0 < len(rank_fields) <= 64):
        raise BodyError(422, "rank_fields: expected at most 64 names, each once", "rank_fields")
    if rank_fields is not None and rank_fields != ["text"] and not all(isinstance(d, str) for d in documents):
        texts = []
        for position, document in enumerate(_decoded(_objects, content).documents):
            values = [document] if isinstance(document, str) else [document.get(name) for name in rank_fields]
            if not all(isinstance(value, str) for value in values):
                raise BodyError(422, f"documents[{position}]: expected the rank_fields {rank_fields!s:.80} as strings",
                                f"documents[{position}]")  # fmt: skip
            texts.append("\n".join(values))
        return texts
    for position, document in enumerate(documents):
        if not isinstance(document, str) and document.text is UNSET:
            raise BodyError(422, f"documents[{position}]: expected a string or an object with 'text', got an object "
                            "without", f"documents[{position}]")  # fmt: skip
    return [document if isinstance(document, str) else document.text for document in documents]


def _as_object(document: Any, raw: Any) -> Any:
    return {"text": document} if isinstance(document, str) else raw


def _flag(body: Struct, name: str) -> bool | None:
    value = getattr(body, name)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value is None or isinstance(value, bool):
        return value
    raise BodyError(422, f"{name} is {value!r:.40}, expected true or false", name)


def _count(body: Struct, name: str) -> int | None:
    value = getattr(body, name)
    if value is None:
        return None
    if isinstance(value, bool) or value != int(value) or value < 1:
        raise BodyError(422, f"{name} is {value!r:.40}, expected an integer of at least 1", name)
    return int(value)


def _prompt_cap(body: RerankBody | ScoreBody) -> int | None:
    """vLLM's `truncate_prompt_tokens`, of which -1 is as much as the model takes."""
    return None if body.truncate_prompt_tokens == -1 else _count(body, "truncate_prompt_tokens")


def _check_side(body: Struct, *names: str) -> None:
    """Texts are cut at their end alone."""
    for name in names:
        side = getattr(body, name)
        if side is not None and side.lower() != "right":
            raise BodyError(422, f"{name} is {side!r:.40}, expected 'right'", name)


def _refuse(body: Struct, **allowed: tuple[Any, ...]) -> None:
    for name, values in allowed.items():
        if getattr(body, name) not in values:
            raise BodyError(422, f"{name} is {getattr(body, name)!r:.40}, which isn't computed here", name)


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    tokens = sum(answer.encoded.num_tokens for answer in answers)
    return {"total_tokens": tokens, "prompt_tokens": tokens}
