"""MTEB: the interface of its cross-encoders; `pip install 'lastrerank[mteb]'`.

The paper's table, for whoever has the weights and the network (`first` holds the first stage's saved predictions):

    model = MtebReranker("jinaai/jina-reranker-v3")
    task = mteb.get_task("SciFact").convert_to_reranking("first", top_k=100)
    mteb.evaluate(model, task)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lastrerank.integrations import needs
from lastrerank.request import RerankRequest
from lastrerank.reranker import Reranker

with needs("mteb"):
    from mteb.models.model_meta import ModelMeta


class MtebReranker:
    """Args: model_name, revision, device and other arguments as `Reranker.from_pretrained`."""

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        self.reranker = Reranker.from_pretrained(model_name, revision=revision, device=device or "auto", **arguments)
        own = self.reranker.identity()
        name = own["model"] if "/" in own["model"] else f"lastrerank/{own['model']}"
        # MTEB keeps results by name and revision: whatever changes a score is in it.
        kept = "-".join(str(own[part]) for part in ("digest", "dtype", "backend", "rounding") if part in own)
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": kept})

    def predict(
        self, inputs1: Iterable[Mapping[str, Any]], inputs2: Iterable[Mapping[str, Any]], **task: Any
    ) -> np.ndarray:
        """fp32 score of each (query, document) pair; consecutive pairs of one query are scored as one list."""
        queries, documents = ([text for batch in inputs for text in batch["text"]] for inputs in (inputs1, inputs2))
        if len(queries) != len(documents):
            raise ValueError(f"{len(queries)} queries and {len(documents)} documents, expected pairs")
        starts = [i for i, query in enumerate(queries) if i == 0 or query != queries[i - 1]]
        ends = [*starts[1:], len(queries)]
        requests = [RerankRequest(queries[a], documents[a:b]) for a, b in zip(starts, ends, strict=True)]
        scores = np.empty(len(queries), np.float32)
        for start, results in zip(starts, self.reranker.rerank_many(requests), strict=True):
            for result in results:
                # Before an activation, which makes ties of scores that aren't equal.
                scores[start + result["index"]] = result.get("raw_score", result["relevance_score"])
        return scores
