"""Ray on a local cluster of several processes: a served deployment, and a dataset reranked shard by shard."""

from __future__ import annotations

import json
import urllib.request

import pytest
from conftest import DOCUMENTS, QUERY

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def post(address, body, **headers):
    headers = {"content-type": "application/json", **headers}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read()), response.headers


@pytest.mark.parametrize("arguments", [{"replicas": 0}, {"replicas": 2, "autoscaling": {"max_replicas": 3}}])
def test_replicas_that_contradict_are_refused(arguments):
    from lastrerank.integrations.ray import deployment

    with pytest.raises(ValueError, match="replicas is"):
        deployment("model", **arguments)


def test_served_by_two_replicas(cluster, folder, expected):
    from ray import serve

    from lastrerank.integrations.ray import deployment

    serve.start(http_options={"port": 8765})
    serve.run(deployment(str(folder), replicas=2, backend="reference"), route_prefix="/")
    try:
        for _ in range(10):
            body, headers = post("http://127.0.0.1:8765/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
            assert [r["index"] for r in body["results"]] == [i for i, _ in expected]
            assert float(headers["x-inference-ms"]) > 0
        with pytest.raises(urllib.error.HTTPError) as refused:
            post("http://127.0.0.1:8765/v1/rerank", {"query": QUERY, "documents": []})
        assert refused.value.code == 400
        status = serve.status().applications["default"].deployments["lastrerank"]
        assert status.replica_states == {"RUNNING": 2}
    finally:
        serve.shutdown()


def test_a_key_and_limits_are_the_servers(cluster, folder):
    from ray import serve

    from lastrerank.integrations.ray import deployment

    serve.start(http_options={"port": 8765})
    application = deployment(str(folder), api_key="secret", limits={"max_documents": 2}, backend="reference")
    serve.run(application, route_prefix="/")
    try:
        for headers, documents, status in (({}, DOCUMENTS[:1], 401), ({"authorization": "Bearer other"}, ["a"], 401),
                                           ({"authorization": "Bearer secret"}, DOCUMENTS[:3], 413)):  # fmt: skip
            with pytest.raises(urllib.error.HTTPError) as refused:
                post("http://127.0.0.1:8765/v1/rerank", {"query": QUERY, "documents": documents}, **headers)
            assert refused.value.code == status
        body, _ = post("http://127.0.0.1:8765/v1/rerank", {"query": QUERY, "documents": DOCUMENTS[:2]},
                       authorization="Bearer secret")  # fmt: skip
        assert len(body["results"]) == 2
    finally:
        serve.shutdown()


def test_dataset_by_shards_with_resume(cluster, folder, reranker, tmp_path):
    from lastrerank.evaluation.beir import BeirDataset
    from lastrerank.integrations.ray import rerank_dataset

    queries = {f"q{i}": f"{QUERY} {i}" for i in range(7)}
    documents = {f"d{i}": text for i, text in enumerate(DOCUMENTS)}
    dataset = BeirDataset("toy", "test", documents, queries, {q: {"d0": 1} for q in queries})
    candidates = {q: list(documents) for q in queries}
    whole = rerank_dataset(str(folder), dataset, candidates, tmp_path, shards=3, workers=2)
    for query, names in whole.items():
        alone = reranker.rerank(queries[query], list(documents.values()))
        assert names == [f"d{r['index']}" for r in alone]
    shard = tmp_path / "shard-0001.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(lines[:-1]))  # as if the worker had died before its last query
    assert rerank_dataset(str(folder), dataset, candidates, tmp_path, shards=3, workers=2) == whole
    assert sorted(shard.read_text().splitlines()) == sorted("".join(lines).splitlines())
