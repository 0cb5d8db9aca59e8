"""The bundled checkpoint on real lists: that it ranks, and that every backend and dtype ranks as the reference does.

`data/help_lists.json`: 18 queries of dev splits in three languages, twelve of BM25's pages each, in random order.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from bench.quality import kendall_tau
from lastrerank import Reranker
from lastrerank.cli import default_model

LISTS = json.loads((Path(__file__).parent / "data" / "help_lists.json").read_text(encoding="utf-8"))["lists"]


def orders(reranker: Reranker) -> list[list[int]]:
    requests = [{"query": row["query"], "documents": row["documents"]} for row in LISTS]
    found = reranker.rerank_many(requests, progress=False)
    return [[result["index"] for result in results] for results in found]


def ndcg(ranked: list[list[int]]) -> float:
    """Mean nDCG of lists with one relevant document."""
    gains = [1 / math.log2(2 + order.index(row["relevant"])) for order, row in zip(ranked, LISTS, strict=True)]
    return sum(gains) / len(gains)


@pytest.fixture(scope="module")
def truth() -> list[list[int]]:
    return orders(Reranker.from_pretrained(default_model(), device="cpu", backend="reference", dtype="float32"))


def test_relevant_pages_come_up(truth):
    """A random order has 0.42, the mean over twelve places; this checkpoint had 0.66 when it was bundled."""
    chance = sum(1 / math.log2(2 + place) for place in range(12)) / 12
    assert ndcg(truth) > chance + 0.18, ndcg(truth)


@pytest.mark.parametrize(
    ("backend", "dtype", "least"),
    # int8: 0.98 is the target (0.995 measured); without its outliers kept it had 0.75.
    [("native", "float32", 0.999), ("native", "int8", 0.98), ("reference", "bfloat16", 0.9)],
)
def test_rank_agreement(truth, backend, dtype, least):
    try:
        other = Reranker.from_pretrained(default_model(), device="cpu", backend=backend, dtype=dtype)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    found = orders(other)
    taus = [kendall_tau(a, b) for a, b in zip(found, truth, strict=True)]
    assert sum(taus) / len(taus) >= least, taus
    assert abs(ndcg(found) - ndcg(truth)) < 0.05


@pytest.mark.parametrize("place", [3, 27, 58, 99])
def test_a_hundred_documents_are_told_apart(place):
    """The one that has the query's words is first, wherever it stands: numbers are read to their last digit."""
    rng = random.Random(place)
    words = "server network password library python kernel driver mail archive daemon font compiler".split()  # noqa: SIM905
    documents = [" ".join(rng.choices(words, k=30)) for _ in range(100)]
    documents[place] += " insert a picture into a table"
    found = Reranker.from_pretrained(default_model(), device="cpu").rerank("insert picture table", documents)
    assert found[0]["index"] == place
    assert found[0]["relevance_score"] > found[1]["relevance_score"] + 0.05
