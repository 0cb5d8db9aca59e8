"""Tests against the real libraries; `make test-integrations`, in an environment of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lastrerank import Reranker
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

DOCUMENTS = ["Choose Insert - Page Number.", "Print several pages on one sheet.", "The spelling checker.", "", "Style"]
QUERY = "page numbers"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = {"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256}}
    return write_random_checkpoint(
        tmp_path_factory.mktemp("small"), "tiny", tokenizer=small_tokenizer(), overrides=overrides
    )


@pytest.fixture(scope="session")
def reranker(folder: Path) -> Reranker:
    return Reranker.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="session")
def expected(reranker: Reranker) -> list[tuple[int, float]]:
    """(index, score) of every document, best first."""
    return [(r["index"], r["relevance_score"]) for r in reranker.rerank(QUERY, DOCUMENTS)]
