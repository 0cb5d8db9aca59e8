"""Clients made for other services, pointed at a running `lastrerank serve`, unchanged."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import DOCUMENTS, QUERY

from bench.serving import serving


@pytest.fixture(scope="module")
def address(folder):
    with serving("--model", str(folder), "--model-name", "small") as (address, _):
        yield address


def test_cohere_sdk(address, expected):
    cohere = pytest.importorskip("cohere")
    for client in (cohere.Client("key", base_url=address), cohere.ClientV2("key", base_url=address)):
        response = client.rerank(model="small", query=QUERY, documents=DOCUMENTS, top_n=3)
        assert [r.index for r in response.results] == [i for i, _ in expected[:3]]
        assert [r.relevance_score for r in response.results] == pytest.approx([s for _, s in expected[:3]])


def test_langchains_jina_rerank(address, expected):
    pytest.importorskip("langchain_community")
    from langchain_community.document_compressors import JinaRerank
    from langchain_core.documents import Document

    compressor = JinaRerank(jina_api_key="key", model="small", top_n=3)
    import langchain_community.document_compressors.jina_rerank as module

    module.JINA_API_URL = f"{address}/v1/rerank"
    documents = [Document(page_content=text, metadata={"n": i}) for i, text in enumerate(DOCUMENTS)]
    found = compressor.compress_documents(documents, QUERY)
    assert [d.metadata["n"] for d in found] == [i for i, _ in expected[:3]]
    assert [d.metadata["relevance_score"] for d in found] == pytest.approx([s for _, s in expected[:3]])


def test_schemathesis_finds_no_server_error(address, tmp_path):
    """Requests made from the description, good and bad: no 5xx, and answers that are as described."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--checks",
               "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
               "--max-examples", "60", "--seed", "1", "--request-timeout", "20"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 13" in done.stdout, done.stdout[-3000:]
