"""The HTTP interface: routes, status codes and headers in process; faults and signals against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import msgspec
import pytest
import torch

from bench.serving import serving
from lastrerank import Reranker
from lastrerank.engine import Engine
from lastrerank.server import Limits, create_app, dialects, limits, openapi
from lastrerank.server.openapi import RerankAnswer, kinds

QUERY = "how do I print"


@contextlib.contextmanager
def client_of(reranker, engine_arguments=None, **arguments):
    """A client over an application of its own."""
    with Engine(reranker, **(engine_arguments or {})) as engine:
        app = create_app(engine, model_name="small", close_engine=False, **arguments)
        with SyncClient(app) as client:
            client.engine = engine
            yield client


class SyncClient:
    """httpx's in-process transport is asynchronous: one loop on a thread runs it for a plain test."""

    def __init__(self, app):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    def __enter__(self):
        self.thread.start()
        return self

    def start(self, method, path, **arguments):
        return asyncio.run_coroutine_threadsafe(self.client.request(method, path, **arguments), self.loop)

    def post(self, path, body=None, **arguments):
        return self.start("POST", path, **({"json": body} if body is not None else {}), **arguments).result(60)

    def get(self, path, **arguments):
        return self.start("GET", path, **arguments).result(60)

    def __exit__(self, *exc):
        asyncio.run_coroutine_threadsafe(self.client.aclose(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture
def client(small_reranker):
    with client_of(small_reranker) as client:
        yield client


@pytest.mark.parametrize(("path", "back"), [("/v1/rerank", True), ("/rerank", True), ("/v2/rerank", False)])
def test_rerank(client, small_reranker, documents, path, back):
    sent = [documents[0], {"text": documents[1], "id": 7}, documents[2]]
    response = client.post(path, {"query": QUERY, "documents": sent, "top_n": 2, "model": "small"})
    assert response.status_code == 200
    body = response.json()
    expected = small_reranker.rerank(QUERY, sent, top_n=2)
    assert [r["index"] for r in body["results"]] == [r["index"] for r in expected]
    for result, own in zip(body["results"], expected, strict=True):
        assert abs(result["relevance_score"] - own["relevance_score"]) <= 1e-6
        as_sent = sent[result["index"]]
        document = as_sent if isinstance(as_sent, dict) else {"text": as_sent}
        assert result.get("document") == (document if back else None)
        assert "embedding" not in result
    assert body["object"] == "list" and body["model"] == "small"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] > 100
    for name in ("tokenise", "queue", "inference"):
        assert float(response.headers[f"x-{name}-ms"]) >= 0


def test_options(client, small_reranker, documents):
    sent = documents[:3]
    turned = client.post("/v2/rerank", {"query": QUERY, "documents": sent, "return_documents": True}).json()
    assert all("document" in r for r in turned["results"])
    turned = client.post("/rerank", {"query": QUERY, "documents": sent, "return_documents": False}).json()
    assert all("document" not in r for r in turned["results"])
    arguments = {"instruction": "prefer short ones", "max_doc_length": 9, "max_query_length": 3}
    body = client.post("/rerank", {"query": QUERY, "documents": sent, "return_embeddings": True} | arguments).json()
    for result, own in zip(body["results"], small_reranker.rerank(QUERY, sent, **arguments, return_embeddings=True),
                           strict=True):  # fmt: skip
        assert result["relevance_score"] == pytest.approx(own["relevance_score"], abs=1e-6)
        assert result["embedding"] == pytest.approx(own["embedding"].tolist(), abs=1e-4)
    short = client.post("/v2/rerank", {"query": QUERY, "documents": sent, "max_tokens_per_doc": 9}).json()
    expected = small_reranker.rerank(QUERY, sent, max_doc_length=9)
    assert [r["index"] for r in short["results"]] == [r["index"] for r in expected]
    for top_n in (99, 0):  # 0 is all to vLLM's clients
        answer = client.post("/rerank", {"query": QUERY, "documents": sent, "top_n": top_n}).json()
        assert len(answer["results"]) == 3
    assert client.post("/v1/rerank", {"query": QUERY, "documents": sent, "top_n": 0}).status_code == 422
    versions = [client.post(f"/{v}/rerank", {"query": QUERY, "documents": sent}).json()["meta"] for v in ("v1", "v2")]
    assert [meta["api_version"]["version"] for meta in versions] == ["1", "2"]


def test_score(client, small_reranker, documents):
    one = client.post("/score", {"text_1": QUERY, "text_2": documents[:3]}).json()
    expected = small_reranker.predict([(QUERY, d) for d in documents[:3]])
    assert [row["score"] for row in one["data"]] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [row["index"] for row in one["data"]] == [0, 1, 2]
    pairs = [("a", documents[0]), ("b", documents[1]), ("a", documents[2])]
    many = client.post("/score", {"text_1": [a for a, _ in pairs], "text_2": [b for _, b in pairs]}).json()
    assert [row["score"] for row in many["data"]] == pytest.approx(small_reranker.predict(pairs).tolist(), abs=1e-6)
    assert client.post("/score", {"text_1": ["a", "b"], "text_2": ["c"] * 3}).status_code == 422
    assert client.post("/score", {"text_1": [], "text_2": []}).status_code == 400


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"documents": []}, 400, "documents"),
        ({"top_n": -1}, 422, "top_n"),
        ({"top_k": 0}, 422, "top_k"),
        ({"top_n": "3"}, 422, "top_n"),
        ({"query": 5}, 422, "query"),
        ({"query": ""}, 422, "query"),
        ({"documents": "text"}, 422, "documents"),
        ({"documents": [{"title": "x"}]}, 422, "documents[0]"),
        ({"documents": ["a", 3]}, 422, "documents[1]"),
        ({"documents": ["a", {"text": None}]}, 422, "documents[1]"),
        ({"documents": ["\ud800"]}, 400, None),
        ({"top_k": "2"}, 422, "top_k"),
        ({"top_n": 1.5}, 422, "top_n"),
        ({"return_documents": "perhaps"}, 422, "return_documents"),
        ({"topn": 2}, 422, "topn"),
        ({"orders": 0}, 422, "orders"),
        ({"activation": True}, 422, "activation"),
        ({"truncation_direction": "left"}, 422, "truncation_direction"),
        ({"texts": ["a"]}, 422, "texts"),
        ({"return_text": True, "return_documents": False}, 422, "return_text"),
        ({"max_doc_length": 10**9}, 422, None),
        ({"model": "another"}, 404, "model"),
        ({"documents": ["x"] * 51}, 413, "documents"),
        ({"documents": ["fine", "word " * 400], "truncation": False}, 413, "documents[1]"),
    ],
    ids=str,
)
def test_bad_requests(small_reranker, change, status, param):
    with client_of(small_reranker, limits=Limits(max_documents=50)) as client:
        content = json.dumps({"query": QUERY, "documents": ["x"]} | change)
        response = client.post("/v1/rerank", content=content, headers={"content-type": "application/json"})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param"} and error["message"] == response.json()["detail"]
        assert (error["param"] or "").startswith(param or "")
        assert client.engine.pending == 0
        assert client.post("/v1/rerank", {"query": QUERY, "documents": ["x"]}).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"query": "\xff\xfe", "documents": ["x"]}', b"[" * 100_000 + b"]" * 100_000,
     b'{"query": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", b'{"query": 1e999, "documents": ["x"]}',
     b"\x00" * 100],
    ids=["empty", "cut off", "a list", "null", "not UTF-8", "deep list", "deep object", "infinite", "zeros"],
)  # fmt: skip
def test_malformed_bodies(client, content):
    response = client.post("/v1/rerank", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]["message"]
    assert client.post("/v1/rerank", {"query": QUERY, "documents": ["x"]}).status_code == 200


def test_large_bodies_are_refused(small_reranker):
    with client_of(small_reranker, limits=Limits(max_body=1000)) as client:
        big = {"query": QUERY, "documents": ["x" * 2000]}
        assert client.post("/v1/rerank", big).status_code == 413

        async def pieces():
            for _ in range(50):
                yield b"x" * 100

        assert client.post("/v1/rerank", content=pieces()).status_code == 413  # no length declared
        assert client.post("/v1/rerank", {"query": QUERY, "documents": ["x"]}).status_code == 200


@pytest.mark.parametrize("flag", ["return_text", "return_documents"])
def test_whether_texts_come_back_has_two_names(client, flag):
    tei = client.post("/rerank", {"query": QUERY, "texts": ["a", "b"], flag: True}).json()
    assert {row["text"] for row in tei} == {"a", "b"}
    for back in (True, False):
        rows = client.post("/v1/rerank", {"query": QUERY, "documents": ["a", "b"], flag: back}).json()["results"]
        assert all(("document" in row) == back for row in rows)
    refused = client.post("/rerank", {"query": QUERY, "texts": ["a"], "return_embeddings": True})
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "return_embeddings"


def test_limits_that_no_packed_body_could_keep_are_refused():
    with pytest.raises(ValueError, match="max_total_body is 1500, expected at least twice max_body"):
        Limits(max_body=1000, max_total_body=1500)
    Limits(max_body=1000, max_total_body=2000)


def test_api_key(small_reranker):
    with client_of(small_reranker, api_key="secret") as client:
        body = {"query": QUERY, "documents": ["x"]}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer sécret".encode()}):
            refused = client.post("/v1/rerank", body, headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication"
        assert client.post("/v1/rerank", body, headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200 and client.get("/info").status_code == 401


def test_other_routes(client):
    client.post("/v1/rerank", {"query": QUERY, "documents": ["a", "b"]})
    client.post("/v1/rerank", {"query": QUERY, "documents": []})
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["status"] == "ready"
    assert client.get("/v1/models").json()["data"][0]["id"] == "small"
    assert client.get("/info").json()["max_doc_length"] == 256
    metrics = client.get("/metrics").text
    assert 'lastrerank_requests_total{method="POST",route="/v1/rerank",status="200"} 1.0' in metrics
    assert 'lastrerank_requests_total{method="POST",route="/v1/rerank",status="400"} 1.0' in metrics
    assert "lastrerank_engine_answered_total 1.0" in metrics and "lastrerank_queued_tokens 0.0" in metrics
    page = client.get("/")
    assert "<form" in page.text and "http" not in page.text.split("</title>")[1]  # nothing from elsewhere
    missing = client.get("/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["message"]


def test_the_description_says_what_is_served(client):
    schema = client.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    posts = {path for path, methods in schema["paths"].items() if "post" in methods}
    assert posts == {"/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking", "/score", "/v1/score",
                     "/v1/ranking", "/infinity/rerank"}  # fmt: skip
    assert {"400", "413", "422", "429"} <= schema["paths"]["/v1/rerank"]["post"]["responses"].keys()
    assert schema["components"]["schemas"]["Error"]
    for path, name, code in [("/v1/models/{name}", "nothing", "404"), ("/v1/models/{name}", "small", "200")]:
        answer = client.get(path.format(name=name))
        described = schema["paths"][path]["get"]["responses"][code]
        assert str(answer.status_code) == code and ("content" in described) == (code == "404")
    assert schema["paths"]["/ready"]["get"]["responses"].keys() == {"200", "503"}
    for path in posts:  # every example is served
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for name, example in content["examples"].items():
            answer = client.post(path, example["value"])
            assert answer.status_code == 200, (path, name)
            msgspec.convert(answer.json(), kinds(path)[1])  # as described
    more = {"query": QUERY, "documents": ["a", {"text": "b"}, ""], "return_embeddings": True, "top_k": 3}
    msgspec.convert(client.post("/v2/rerank", more | {"return_documents": True}).json(), RerankAnswer)
    for path in posts:
        described = schema["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert ("anyOf" in described) == (path in ("/rerank", "/reranking", "/v1/reranking"))
        assert "$ref" in described or "anyOf" in described
    page = client.get("/docs").text
    assert "openapi.json" in page and "//" not in page.replace("http://www.w3.org", "")


def test_infinitys_clients_get_its_answers(client):
    body = {"query": "page numbers", "documents": ["insert a page", "style"]}
    for path, more in (("/rerank", {"raw_scores": False}), ("/infinity/rerank", {})):
        answer = client.post(path, body | more | {"return_documents": True}).json()
        assert answer["object"] == "rerank" and isinstance(answer["created"], int), path
        assert [r["document"] for r in answer["results"]] == [body["documents"][r["index"]] for r in answer["results"]]
        assert "document" not in client.post(path, body | {"return_documents": False}).json()["results"][0]
    for more in ({}, {"raw_scores": None}):
        assert client.post("/rerank", body | more).json()["object"] == "list"
    objects = body | {"documents": [{"text": "a", "id": 7}], "raw_scores": True, "return_documents": True}
    assert client.post("/v1/rerank", objects).json()["results"][0]["document"] == {"text": "a", "id": 7}


def test_voyages_and_mixedbreads_clients_find_data(client):
    body = {"query": "page numbers", "documents": ["insert a page", "style"]}
    for more in ({}, {"top_k": None}, {"top_k": 2}, {"return_documents": True}):
        answer = client.post("/v1/rerank", body | more).json()
        expected = [{"index": r["index"], "relevance_score": r["relevance_score"]} for r in answer["results"]]
        if "return_documents" in more:
            expected = [row | {"document": body["documents"][row["index"]]} for row in expected]
        assert answer["data"] == expected, more
    assert "data" not in client.post("/v1/rerank", body | {"top_n": 2}).json()  # nobody's, twice
    theirs = {"query": body["query"], "input": body["documents"], "top_k": 1}
    [best] = client.post("/v1/rerank", theirs | {"return_input": True}).json()["data"]
    [row] = client.post("/v1/rerank", body | {"top_n": 1}).json()["results"]
    assert best == {"object": "rank_result", "index": row["index"], "score": row["relevance_score"],
                    "input": row["document"]["text"]}  # fmt: skip
    assert "input" not in client.post("/v1/rerank", theirs).json()["data"][0]
    refused = client.post("/v1/rerank", body | {"input": ["a"]})
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "input"


def test_infinitys_name_for_no_model_is_none(client):
    body = {"query": "q", "documents": ["a"], "model": "default/not-specified"}
    assert client.post("/rerank", body).json()["model"] == client.get("/v1/models").json()["data"][0]["id"]


def test_vllms_other_names(client):
    texts = ["insert a page", "style"]
    expected = client.post("/v1/score", {"text_1": "page", "text_2": texts}).json()
    assert isinstance(expected["created"], int)
    for body in ({"queries": "page", "items": texts}, {"data_1": "page", "data_2": texts, "truncation_side": "right"}):
        assert client.post("/v1/score", body).json()["data"] == expected["data"]
    for body, param in (({"queries": "page", "data_2": texts}, "documents"), ({"data_1": "page"}, "data_2"),
                        ({"queries": "a", "documents": "b", "items": "c"}, "items"),
                        ({"text_1": "a", "text_2": "b", "truncation_side": "left"}, "truncation_side")):  # fmt: skip
        refused = client.post("/v1/score", body)
        assert refused.status_code == 422 and refused.json()["error"]["param"] == param, body


def test_llama_cpps_routes_take_texts(client):
    expected = client.post("/rerank", {"query": "page", "texts": ["insert a page", "style"]}).json()
    for path in ("/reranking", "/v1/reranking"):
        assert client.post(path, {"query": "page", "texts": ["insert a page", "style"]}).json() == expected


def test_nvidias_paths_hold_the_models_name(client):
    name = client.get("/v1/models").json()["data"][0]["id"]
    body = {"query": {"text": "page numbers"}, "passages": [{"text": "insert a page"}, {"text": "style"}]}
    found = client.post("/v1/ranking", body).json()["rankings"]
    assert client.post(f"/v1/retrieval/{name}/reranking", body).json()["rankings"] == found and len(found) == 2
    assert client.post("/v1/retrieval/another/reranking", body).status_code == 404
    for more in ({"top_n": 1}, {"top_k": 1}, {"top_n": 2, "top_k": 1.0}):
        assert client.post("/v1/ranking", body | more).json()["rankings"] == found[:1]
    assert client.post("/v1/ranking", body | {"top_k": 0}).status_code == 422


def test_caps_that_clients_send_unasked_bound_and_lift_nothing(client):
    """Cohere's clients send 4096 to any model; the model's own cap is what its documents are cut at anyway."""
    info = client.get("/info").json()
    long = "words and words " * info["max_doc_length"]
    body = {"query": "page numbers", "documents": [long, "style"]}
    plain = client.post("/v2/rerank", body).json()["results"]
    assert client.post("/v2/rerank", body | {"max_tokens_per_doc": 10**6}).json()["results"] == plain
    assert client.post("/v2/rerank", body | {"truncate_prompt_tokens": 10**6}).json()["results"] == plain
    assert client.post("/v2/rerank", body | {"max_tokens_per_doc": 3}).json()["results"] != plain
    assert client.post("/v1/rerank", body | {"max_doc_length": 10**9}).status_code == 422  # our own: asked for
    scores = client.post("/score", {"text_1": "page", "text_2": [long], "truncate_prompt_tokens": 10**6})
    assert scores.status_code == 200


def test_scores_below_a_threshold_are_left_out(client):
    body = {"query": "page numbers", "documents": ["insert a page", "style", "print"]}
    scores = [r["relevance_score"] for r in client.post("/v1/rerank", body).json()["results"]]
    kept = client.post("/v1/rerank", body | {"score_threshold": scores[1]}).json()["results"]
    assert [r["relevance_score"] for r in kept] == scores[:2]
    assert client.post("/v1/rerank", body | {"score_threshold": None}).json()["results"][2:]
    assert client.post("/v1/rerank", body | {"score_threshold": "x"}).status_code == 422
    for raw in ({"raw_scores": True}, {"activation": False}):  # which scores it is of is not said
        refused = client.post("/v1/rerank", body | raw | {"score_threshold": 0.5})
        assert refused.status_code == 422 and refused.json()["error"]["param"] == "score_threshold"


def test_overload_is_answered_at_once(small_reranker, monkeypatch):
    gate, real = threading.Event(), small_reranker.read_rows
    monkeypatch.setattr(small_reranker, "read_rows", lambda *a, **k: (gate.wait(30), real(*a, **k))[1])
    with client_of(small_reranker, {"max_queue_tokens": 1000}) as client:
        body = {"query": QUERY, "documents": ["some words here " * 20] * 4}
        waiting = client.start("POST", "/v1/rerank", json=body)
        while client.engine.pending == 0:
            time.sleep(0.005)
        started = time.perf_counter()
        refused = client.post("/v1/rerank", body)
        assert time.perf_counter() - started < 5
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded"
        gate.set()
        assert waiting.result(60).status_code == 200
        assert client.post("/v1/rerank", body).status_code == 200


def test_a_failure_has_an_id_and_the_server_goes_on(small_reranker, monkeypatch, caplog):
    with client_of(small_reranker) as client:
        with monkeypatch.context() as broken:
            broken.setattr(small_reranker, "read_rows", lambda *a, **k: 1 / 0)
            failed = client.post("/v1/rerank", {"query": QUERY, "documents": ["the secret text"]})
        assert failed.status_code == 500
        number = re.fullmatch(r"internal error (\w+)", failed.json()["error"]["message"])[1]
        assert number in caplog.text and "secret text" not in caplog.text and "secret" not in failed.text
        assert client.post("/v1/rerank", {"query": QUERY, "documents": ["x"]}).status_code == 200


def test_a_fault_of_ours_is_not_the_clients(small_reranker, monkeypatch):
    """A ValueError from within is a 500 with an id, not a 422."""

    def broken(*arguments, **keywords):
        raise ValueError("kernel shape")

    with client_of(small_reranker) as client:
        monkeypatch.setattr(small_reranker, "read_rows", broken)
        response = client.post("/v1/rerank", {"query": QUERY, "documents": ["x"]})
        assert response.status_code == 500 and "kernel" not in response.text


def test_score_of_many_lists_is_refused_whole(small_reranker):
    with client_of(small_reranker, {"max_queue_tokens": 3000}) as client:
        pairs = {"text_1": [f"query {i}" for i in range(100)], "text_2": ["text"] * 100}
        assert client.post("/score", pairs).status_code == 200  # an empty queue takes anything
        bad = {"text_1": ["fine", ""], "text_2": ["a", "b"]}
        assert client.post("/score", bad).status_code == 422
        assert client.engine.pending == 0


def test_a_million_bad_items_are_one_error(client):
    content = b'{"query": "q", "documents": [' + b",".join([b"1"] * 1_000_000) + b"]}"
    started = time.perf_counter()
    response = client.post("/v1/rerank", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422 and time.perf_counter() - started < 20
    assert response.json()["error"]["param"] == "documents[0]"
    content = content.replace(b'"query"', b'"text_1"').replace(b'"documents"', b'"text_2"')
    response = client.post("/score", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422 and response.json()["error"]["param"] == "text_2[0]"
    assert len(response.text) < 1000


def test_made_up_methods_are_not_counted_apart(client):
    for method in ("A1", "A2"):
        assert client.start(method, "/rerank").result(60).status_code == 405
    metrics = client.get("/metrics").text
    assert 'method="other"' in metrics and "A1" not in metrics


def test_too_late_is_504(small_reranker, monkeypatch):
    real = small_reranker.read_rows
    monkeypatch.setattr(small_reranker, "read_rows", lambda *a, **k: (time.sleep(0.5), real(*a, **k))[1])
    with client_of(small_reranker, limits=Limits(request_seconds=0.1)) as client:
        assert client.post("/v1/rerank", {"query": QUERY, "documents": ["x"]}).status_code == 504


# A real server, in a process of its own


SLOW = """
import time; from lastrerank import Reranker
real = Reranker.read_rows
Reranker.read_rows = lambda self, blocks, **k: (time.sleep(0.3), real(self, blocks, **k))[1]
"""


def test_real_server_faults(small, documents):
    body = {"query": QUERY, "documents": documents[:2]}
    options = ["--model", str(small), "--max-batch-tokens", "200", "--max-body", "100000"]
    with serving(*options, first=SLOW) as (address, process):
        expected = httpx.post(f"{address}/rerank", json=body, timeout=60).json()["results"]
        local = Reranker.from_pretrained(small).rerank(QUERY, documents[:2])
        assert [r["index"] for r in expected] == [r["index"] for r in local]

        # Clients that leave: their work is dropped, the next one is served.
        for _ in range(20):
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(f"{address}/rerank", json=body, timeout=0.02)
        deadline = time.monotonic() + 20
        while httpx.get(f"{address}/ready", timeout=20).json()["queued_tokens"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        dropped = re.search(r"lastrerank_engine_dropped_total (\d+)", httpx.get(f"{address}/metrics").text)
        assert int(dropped[1]) >= 10
        assert httpx.post(f"{address}/rerank", json=body, timeout=60).json()["results"] == expected

        # A body of 50 MB, declared and not sent, and one sent.
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 52428800\r\n\r\n")
            assert b" 413 " in raw.recv(1000)
        with contextlib.suppress(httpx.TransportError):  # the server may close before all is sent
            assert httpx.post(f"{address}/rerank", content=b"x" * 50_000_000, timeout=60).status_code == 413

        # Nonsense on the wire.
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
            raw.recv(1000)
        assert httpx.post(f"{address}/rerank", json=body, timeout=60).status_code == 200

        # SIGTERM with requests in flight: they are answered, then the process ends.
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(httpx.post(f"{address}/rerank", json=body, timeout=60)))
            for _ in range(4)
        ]
        [thread.start() for thread in threads]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        [thread.join() for thread in threads]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert all(answer.json()["results"] == expected for answer in answers)
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_slow_bodies_are_cut_off(small_reranker):
    """One byte now and then: refused after the time limit, whatever is still to come."""

    async def main():
        with Engine(small_reranker) as engine:
            app = create_app(engine, model_name="x", close_engine=False, limits=Limits(body_seconds=0.3))
            sent = []

            async def receive():
                await asyncio.sleep(0.1)
                return {"type": "http.request", "body": b" ", "more_body": True}

            async def send(message):
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/rerank", "raw_path": b"/rerank", "query_string": b"",
                     "headers": [], "http_version": "1.1", "scheme": "http", "client": ("x", 1), "server": ("x", 2),
                     "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip
            started = time.perf_counter()
            await app(scope, receive, send)
            assert 0.2 < time.perf_counter() - started < 10
            return sent

    sent = asyncio.run(main())
    assert sent[0]["status"] == 408


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A reranker that judges one document at a time."""
    from lastrerank.families import FAMILIES
    from lastrerank.random_checkpoint import small_tokenizer, texts_for, write_random_checkpoint

    tokenizer = small_tokenizer(texts_for(FAMILIES["qwen3-reranker"]))
    folder = tmp_path_factory.mktemp("pairs")
    write_random_checkpoint(folder, "tiny-qwen3", tokenizer=tokenizer, dtype=torch.float32)
    return Reranker.from_pretrained(folder)


def test_a_family_of_pairs(pairs, documents):
    """The published score, and the raw one for whoever asks for it; what pairs have not is refused by name."""
    expected = pairs.rerank(QUERY, documents[:4])
    published, raw = ({r["index"]: r[name] for r in expected} for name in ("relevance_score", "raw_score"))
    with client_of(pairs) as client:
        info = client.get("/info").json()
        assert info["family"] == "qwen3-reranker" and info["scores"] == "probability"
        body = {"query": QUERY, "documents": documents[:4]}
        for options, scores in (
            ({}, published), ({"activation": None}, published), ({"activation": False}, raw),
            ({"raw_scores": True}, raw), ({"use_activation": "false"}, raw), ({"use_activation": True}, published),
        ):  # fmt: skip
            results = client.post("/v1/rerank", body | options).json()["results"]
            assert [r["index"] for r in results] == [r["index"] for r in expected]
            assert all(abs(r["relevance_score"] - scores[r["index"]]) <= 1e-5 for r in results)
        tei = {"query": QUERY, "texts": documents[:4]}
        for options, scores in (({}, published), ({"raw_scores": True}, raw)):
            for result in client.post("/rerank", tei | options).json():
                assert abs(result["score"] - scores[result["index"]]) <= 1e-5
        nim = {"query": {"text": QUERY}, "passages": [{"text": d} for d in documents[:4]]}
        for result in client.post("/v1/ranking", nim).json()["rankings"]:
            assert abs(result["logit"] - raw[result["index"]]) <= 1e-5
        score = {"text_1": QUERY, "text_2": documents[:4], "activation": False}
        for result in client.post("/v1/score", score).json()["data"]:
            assert abs(result["score"] - raw[result["index"]]) <= 1e-5
        for option in ({"return_embeddings": True}, {"orders": 2}, {"block_size": 3}):
            refused = client.post("/v1/rerank", body | option)
            assert refused.status_code == 422 and f"{next(iter(option))} is" in refused.json()["error"]["message"]
        refused = client.post("/v1/rerank", body | {"activation": True, "use_activation": False})
        assert refused.status_code == 422 and "contradict each other" in refused.text


def test_every_field_is_documented():
    """In the OpenAPI description, and in the same words on the page."""
    text = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
    schemas = openapi.description(["/v1/rerank", "/score", "/v1/ranking"], False)["components"]["schemas"]
    for body in (dialects.RerankBody, dialects.ScoreBody, dialects.RankingBody):
        for name in body.__struct_fields__:
            said = schemas[body.__name__]["properties"][name]["description"]
            assert re.search(rf"^\| .*`{name}`.* \| {re.escape(said)} \|$", text, re.MULTILINE), (body.__name__, name)
    for path in limits.OPEN:
        assert f"`{path}`" in text, path
