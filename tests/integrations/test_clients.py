"""Clients made for other services, pointed at a running `lastrerank serve`, unchanged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import DOCUMENTS, QUERY

from bench.serving import serving

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def address(folder):
    with serving("--model", str(folder), "--model-name", "small") as (address, _):
        yield address


@dataclass(frozen=True)
class Client:
    """package: on PyPI, npm (npm:) or in an environment of its own (apart:), or None for a payload that was taken from
    its source. rank: (address, documents wanted) -> (index, score) of the best, best first; the score is None where the
    client doesn't show it."""

    name: str
    package: str | None
    rank: Callable[[str, int], list[tuple[int, float | None]]]


CLIENTS: list[Client] = []
# The clients' versions; others pin what they can't run beside, and are tried in `.venv-clients`.
TABLE = os.environ.get("CLIENTS_TABLE")
APART = Path(__file__).parents[2] / ".venv-clients"
NPM = Path(os.environ.get("CLIENTS_NPM", APART / "npm"))
MODEL = "small"


def client(name: str, package: str | None) -> Callable[[Any], Any]:
    def add(rank: Any) -> Any:
        CLIENTS.append(Client(name, package, rank))
        return rank

    return add


@client("cohere, v1", "cohere")
def _cohere_v1(address, n):
    import cohere

    response = cohere.Client("key", base_url=address).rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=n)
    return [(r.index, r.relevance_score) for r in response.results]


@client("cohere, v2", "cohere")
def _cohere_v2(address, n):
    import cohere

    response = cohere.ClientV2("key", base_url=address).rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=n)
    return [(r.index, r.relevance_score) for r in response.results]


@client("voyageai", "voyageai")
def _voyageai(address, n):
    import voyageai

    found = voyageai.Client("key", base_url=f"{address}/v1").rerank(QUERY, DOCUMENTS, model=MODEL, top_k=n)
    assert [r.document for r in found.results] == [DOCUMENTS[r.index] for r in found.results]
    assert found.total_tokens > 0
    return [(r.index, r.relevance_score) for r in found.results]


@client("infinity-client", "infinity-client")
def _infinity(address, n):
    from infinity_client.api.default import rerank
    from infinity_client.client import Client as Infinity
    from infinity_client.models import RerankInput

    body = RerankInput(query=QUERY, documents=DOCUMENTS, model=MODEL, top_n=n)
    found = rerank.sync(client=Infinity(base_url=address), body=body)
    assert found.object_.value == "rerank"
    unnamed = rerank.sync(client=Infinity(base_url=address), body=RerankInput(query=QUERY, documents=DOCUMENTS))
    assert [r.index for r in unnamed.results[:n]] == [r.index for r in found.results]
    return [(r.index, r.relevance_score) for r in found.results]


@client("tei-client", "tei-client")
def _tei(address, n):
    from tei_client.clients.http_client import HttpClient

    tei = HttpClient(address)
    assert tei.health() and tei.info().server_model_type.value == "reranker"
    return [(r.index, r.score) for r in tei.rerank(query=QUERY, texts=DOCUMENTS).ranks][:n]


@client("openai (raw POST)", "openai")
def _openai(address, n):
    import openai

    sdk = openai.OpenAI(base_url=f"{address}/v1", api_key="key")
    assert [m.id for m in sdk.models.list()] == sdk_names(address) and sdk.models.retrieve(MODEL).id == MODEL
    body = {"model": MODEL, "query": QUERY, "documents": DOCUMENTS, "top_n": n}
    found = sdk.post("/rerank", cast_to=object, body=body)
    return [(r["index"], r["relevance_score"]) for r in found["results"]]


def sdk_names(address):
    return [m["id"] for m in httpx.get(f"{address}/v1/models").json()["data"]]


def _litellm(provider, base):
    def rank(address, n):
        import litellm

        own = {"model": f"{provider}/{MODEL}", "api_base": address + base, "api_key": "key"}
        found, everything = (
            litellm.rerank(query=QUERY, documents=DOCUMENTS, **more, **own) for more in ({"top_n": n}, {})
        )
        assert len(everything.results) == len(DOCUMENTS)
        assert [r["index"] for r in everything.results[:n]] == [r["index"] for r in found.results]
        return [(r["index"], r["relevance_score"]) for r in found.results]

    return rank


for _provider, _base in (
    ("cohere", "/v1/rerank"), ("jina_ai", "/v1/rerank"), ("infinity", "/infinity"), ("hosted_vllm", ""), ("voyage", ""),
    ("huggingface", ""), ("nvidia_nim", ""),
):  # fmt: skip
    client(f"LiteLLM, {_provider}", "litellm")(_litellm(_provider, _base))


def _rerankers(provider, path):
    def rank(address, n):
        from rerankers import Reranker as Theirs

        options = {"api_key": "key", "api_provider": provider, "url": address + path, "verbose": 0}
        ranker = Theirs(MODEL, model_type="APIRanker", **options)
        found = ranker.rank(QUERY, DOCUMENTS)
        return [(r.document.doc_id, r.score) for r in found.results][:n]

    return rank


for _provider, _path in (("jina", "/v1/rerank"), ("cohere", "/v1/rerank"), ("voyage", "/v1/rerank"),
                         ("mixedbread.ai", "/v1/reranking"), ("text-embeddings-inference", "/rerank")):  # fmt: skip
    client(f"rerankers, {_provider}", "rerankers")(_rerankers(_provider, _path))


def _langchain(make):
    def rank(address, n):
        from langchain_core.documents import Document

        documents = [Document(page_content=text, metadata={"n": i}) for i, text in enumerate(DOCUMENTS)]
        found = make(address, n).compress_documents(documents, QUERY)
        return [(d.metadata["n"], d.metadata.get("relevance_score")) for d in found][:n]

    return rank


def _langchain_jina(address, n):
    import langchain_community.document_compressors.jina_rerank as module

    module.JINA_API_URL = f"{address}/v1/rerank"
    return module.JinaRerank(jina_api_key="key", model=MODEL, top_n=n)


def _langchain_cohere(address, n):
    from langchain_cohere import CohereRerank

    return CohereRerank(cohere_api_key="key", base_url=address, model=MODEL, top_n=n)


def _langchain_infinity(address, n):
    pytest.importorskip("infinity_client")
    from infinity_client.client import Client as Infinity
    from langchain_community.document_compressors import InfinityRerank

    return InfinityRerank(client=Infinity(base_url=address), model=MODEL, top_n=n)


def _langchain_voyage(address, n):
    from langchain_voyageai import VoyageAIRerank

    return VoyageAIRerank(api_key="key", base_url=f"{address}/v1", model=MODEL, top_k=n)


def _langchain_nvidia(address, n):
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    return NVIDIARerank(base_url=f"{address}/v1", model=MODEL, top_n=n, api_key="key")


for _name, _package, _make in (
    ("JinaRerank", "langchain-community", _langchain_jina), ("CohereRerank", "langchain-cohere", _langchain_cohere),
    ("InfinityRerank", "langchain-community", _langchain_infinity),
    ("VoyageAIRerank", "langchain-voyageai", _langchain_voyage),
    ("NVIDIARerank", "langchain-nvidia-ai-endpoints", _langchain_nvidia),
):  # fmt: skip
    client(f"LangChain, {_name}", _package)(_langchain(_make))


def _llama_index(make):
    def rank(address, n):
        from llama_index.core.schema import NodeWithScore, TextNode

        nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i))) for i, text in enumerate(DOCUMENTS)]
        found = make(address, n).postprocess_nodes(nodes, query_str=QUERY)
        return [(int(node.node.node_id), node.score) for node in found][:n]

    return rank


def _llama_cohere(address, n):
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    return CohereRerank(api_key="key", base_url=address, model=MODEL, top_n=n)


def _llama_jina(address, n):
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    return JinaRerank(api_key="key", base_url=f"{address}/v1", model=MODEL, top_n=n)


def _llama_tei(address, n):
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    return TextEmbeddingInference(base_url=address, model_name=MODEL, top_n=n)


def _llama_nvidia(address, n):
    from llama_index.postprocessor.nvidia_rerank import NVIDIARerank

    return NVIDIARerank(base_url=f"{address}/v1", model=MODEL, top_n=n, nvidia_api_key="key")


def _llama_voyage(address, n):
    import voyageai
    from llama_index.postprocessor.voyageai_rerank import VoyageAIRerank

    ranker = VoyageAIRerank(api_key="key", model=MODEL, top_k=n)
    ranker._client = voyageai.Client("key", base_url=f"{address}/v1")  # it has no argument for it
    return ranker


for _name, _package, _make in (
    ("CohereRerank", "llama-index-postprocessor-cohere-rerank", _llama_cohere),
    ("JinaRerank", "llama-index-postprocessor-jinaai-rerank", _llama_jina),
    ("TextEmbeddingInference", "llama-index-postprocessor-tei-rerank", _llama_tei),
    ("NVIDIARerank", "llama-index-postprocessor-nvidia-rerank", _llama_nvidia),
    ("VoyageAIRerank", "llama-index-postprocessor-voyageai-rerank", _llama_voyage),
):  # fmt: skip
    client(f"LlamaIndex, {_name}", _package)(_llama_index(_make))


def _haystack(make):
    def rank(address, n):
        from haystack import Document

        documents = [Document(content=text, meta={"n": i}) for i, text in enumerate(DOCUMENTS)]
        ranker = make(address, n)
        if hasattr(ranker, "warm_up"):
            ranker.warm_up()
        return [(d.meta["n"], d.score) for d in ranker.run(query=QUERY, documents=documents)["documents"]][:n]

    return rank


def _haystack_jina(address, n):
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    return JinaRanker(model=MODEL, api_key=Secret.from_token("key"), base_url=f"{address}/v1/rerank", top_k=n)


def _haystack_cohere(address, n):
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.cohere import CohereRanker

    return CohereRanker(model=MODEL, api_key=Secret.from_token("key"), api_base_url=address, top_k=n)


def _haystack_nvidia(address, n):
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.nvidia import NvidiaRanker

    return NvidiaRanker(model=MODEL, api_key=Secret.from_token("key"), api_url=f"{address}/v1", top_k=n)


def _haystack_tei(address, n):
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    return HuggingFaceTEIRanker(url=address, top_k=n)


for _name, _package, _make in (
    ("HuggingFaceTEIRanker", "huggingface-api-haystack", _haystack_tei),
    ("JinaRanker", "jina-haystack", _haystack_jina), ("CohereRanker", "cohere-haystack", _haystack_cohere),
    ("NvidiaRanker", "nvidia-haystack", _haystack_nvidia),
):  # fmt: skip
    client(f"Haystack, {_name}", _package)(_haystack(_make))


def _elsewhere(command, script, folder=None, **settings):
    """A script in another environment, in its folder or one that is gone afterwards: values in, rows out, as JSON."""

    def rank(address, n):
        values = json.dumps({"address": address, "model": MODEL, "query": QUERY, "documents": DOCUMENTS, "n": n})
        with tempfile.TemporaryDirectory() as own:
            done = subprocess.run([*command, script, values], cwd=folder or own, capture_output=True, text=True,
                                  timeout=300, env=os.environ | settings)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]

    return rank


def _npm(script):
    return _elsewhere(("node", "--input-type=module", "-e"), script, NPM)


def _apart(name, function, **settings):
    """A program that pins what the others can't run beside: `rank`, defined in its environment."""
    script = f"import json, sys\n{function}\nprint(json.dumps(rank(**json.loads(sys.argv[1]))))"
    return _elsewhere((str(APART / name / "bin" / "python"), "-c"), script, **settings)


client("cohere-ai", "npm:cohere-ai")(_npm("""
import { CohereClientV2 } from "cohere-ai";
const { address, model, query, documents, n } = JSON.parse(process.argv[1]);
const found = await new CohereClientV2({ token: "key", environment: address }).rerank(
  { model, query, documents, topN: n });
console.log(JSON.stringify(found.results.map(r => [r.index, r.relevanceScore])));
"""))
client("Vercel AI SDK, @ai-sdk/cohere", "npm:@ai-sdk/cohere")(_npm("""
import { rerank } from "ai";
import { createCohere } from "@ai-sdk/cohere";
const { address, model, query, documents, n } = JSON.parse(process.argv[1]);
const cohere = createCohere({ apiKey: "key", baseURL: `${address}/v2` });
const found = await rerank({ model: cohere.reranking(model), query, documents, topN: n });
console.log(JSON.stringify(found.ranking.map(r => [r.originalIndex, r.score])));
"""))
# With the client that it brings; n8n's node has no field for an address.
client("LangChain.js, CohereRerank (n8n's reranker, too)", "npm:@langchain/cohere")(_npm("""
import { createRequire } from "node:module";
import { CohereRerank } from "@langchain/cohere";
const { address, model, query, documents, n } = JSON.parse(process.argv[1]);
const { CohereClient } = createRequire(import.meta.resolve("@langchain/cohere"))("cohere-ai");
const reranker = new CohereRerank({ model, topN: n, client: new CohereClient({ token: "key", environment: address }) });
const found = await reranker.rerank(documents, query);
console.log(JSON.stringify(found.map(r => [r.index, r.relevanceScore])));
"""))


client("Open WebUI, ExternalReranker", "apart:open-webui")(_apart("open-webui", """
def rank(address, model, query, documents, n):
    from open_webui.retrieval.models.external import ExternalReranker

    scores = ExternalReranker("key", f"{address}/v1/rerank", model).predict([(query, text) for text in documents])
    return sorted(enumerate(scores), key=lambda row: -row[1])[:n]
""", FROM_INIT_PY="true", DATA_DIR=".", STATIC_DIR=".", WEBUI_SECRET_KEY="key", OFFLINE_MODE="true"))  # fmt: skip
# it shows shares of the range from worst to best; its own check of what a person types in asks for a share of .8
client("Dify, OAICompatRerankModel", "apart:dify-plugin")(_apart("dify-plugin", """
def rank(address, model, query, documents, n):
    from dify_plugin.interfaces.model.openai_compatible.rerank import OAICompatRerankModel

    dify, credentials = OAICompatRerankModel([]), {"endpoint_url": f"{address}/v1", "api_key": "key"}
    dify.validate_credentials(model, credentials)
    found = dify.invoke(model, credentials, query, documents, top_n=n).docs
    assert [d.text for d in found] == [documents[d.index] for d in found]
    assert [found[0].score, found[-1].score] == [1, 0]
    return [(d.index, None) for d in found]
"""))  # fmt: skip


def _payload(path, body, rows, key="relevance_score"):
    """What a program sends and how it reads the answer, after its source."""

    def rank(address, n):
        sent = {"model": MODEL, "query": QUERY} | body(n)
        answer = httpx.post(address + path, json=sent, headers={"Authorization": "Bearer key"}).json()
        found = [(row["index"], row[key]) for row in rows(answer)]
        return sorted(found, key=lambda row: -row[1])[:n]

    return rank


for _name, _path, _body, _rows in (
    # dify-official-plugins, jina: documents come back as objects
    ("Dify, Jina", "/v1/rerank",
     lambda n: {"documents": DOCUMENTS, "top_n": n, "return_documents": True},
     lambda a: [r for r in a["results"] if r["document"]["text"] == DOCUMENTS[r["index"]]]),
    # ragflow/rag/llm/rerank_model.py
    ("RAGFlow, Jina", "/v1/rerank", lambda n: {"documents": DOCUMENTS, "top_n": len(DOCUMENTS)},
     lambda a: a["results"] if a["usage"]["total_tokens"] else []),
    ("RAGFlow, Xinference", "/v1/rerank",
     lambda n: {"documents": DOCUMENTS, "return_documents": "true", "return_len": "true"},
     lambda a: a["results"] if a["meta"]["tokens"]["input_tokens"] else []),
    # langchain4j-jina's JinaScoringModel and langchain4j-cohere's CohereScoringModel
    ("LangChain4j, Jina", "/v1/rerank", lambda n: {"documents": DOCUMENTS, "return_documents": False},
     lambda a: a["results"] if a["usage"]["total_tokens"] else []),
    ("LangChain4j, Cohere", "/v1/rerank", lambda n: {"documents": DOCUMENTS},
     lambda a: a["results"] if a["meta"]["billed_units"]["search_units"] else []),
    ("llama.cpp's clients", "/reranking", lambda n: {"documents": DOCUMENTS, "top_n": n}, lambda a: a["results"]),
):  # fmt: skip
    client(_name, None)(_payload(_path, _body, _rows))


def _version(package):
    """Installed, or None."""
    if package.startswith("npm:"):
        path = NPM / "node_modules" / package.removeprefix("npm:") / "package.json"
        return json.loads(path.read_text())["version"] if path.is_file() and shutil.which("node") else None
    if package.startswith("apart:"):
        name = package.removeprefix("apart:")
        folders = [str(folder) for folder in (APART / name).glob("lib/python*/site-packages")]
        return next((found.version for found in metadata.distributions(name=name, path=folders)), None)
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


@pytest.fixture(scope="module")
def table():
    """Rows of the documentation's table, as they turn out."""
    rows: dict[str, str] = {}
    yield rows
    if TABLE and len(rows) < len(CLIENTS):
        pytest.fail(f"no table: not tried {[one.name for one in CLIENTS if one.name not in rows]}")
    if TABLE:
        lines = [f"| {one.name} | {rows[one.name]} |" for one in CLIENTS if one.name in rows]
        head = "| client | tried with |\n|---|---|\n"
        Path(TABLE).write_text(_INTRODUCTION + head + "\n".join(lines) + "\n", encoding="utf-8")


_INTRODUCTION = """# Clients

Every client here with a version was pointed at a running `lastrerank serve`, unchanged but for the address, and ranked
as `Reranker.rerank` does, with its scores. Two classes have no argument for an address: LangChain's JinaRerank (a
constant of its module was set) and LlamaIndex's VoyageAIRerank (its client was replaced). Of the programs without a
version the requests were made as their source makes them, and the answers read as it does. `make test-clients` makes
the table.

"""


@pytest.mark.parametrize("one", CLIENTS, ids=lambda one: one.name)
def test_client(one, address, expected, table, monkeypatch):
    version = None if one.package is None else _version(one.package)
    if one.package is not None and version is None:
        pytest.skip(f"{one.package} is not installed here")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = one.rank(address, 3)
    assert [index for index, _ in found] == [index for index, _ in expected[:3]]
    shown = [(score, wanted) for (_, score), (_, wanted) in zip(found, expected, strict=False) if score is not None]
    assert [score for score, _ in shown] == pytest.approx([wanted for _, wanted in shown], abs=1e-6)
    package = (one.package or "").rpartition(":")[2]
    kept = "" if len(shown) == len(found) else "; it shows no score as it came"
    table[one.name] = ("its requests, after its source" if one.package is None else f"{package} {version}") + kept


def test_schemathesis_finds_no_server_error(address, tmp_path):
    """Requests made from the description, good and bad: no 5xx, and answers that are as described."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--checks",
               "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
               "--max-examples", "60", "--seed", "1", "--request-timeout", "20"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 15" in done.stdout, done.stdout[-3000:]
