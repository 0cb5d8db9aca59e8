"""Haystack: a ranker component; `pip install 'lastrerank[haystack]'`.

Haystack 3 loads saved pipelines from modules it has been told to trust:
`Pipeline.loads(text, allowed_modules=["lastrerank.integrations.haystack"])`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from lastrerank.integrations import as_json, needs
from lastrerank.reranker import Reranker

with needs("haystack"):
    from haystack import Document, component, default_from_dict, default_to_dict


@component
class LastrerankRanker:
    """Ranks documents by relevance to a query.

    Args:
        model: folder, bundled name or Hub id, default the small checkpoint in the package; loaded by `warm_up`, or by
            the first run.
        top_k: kept; None for all.
        instruction: as in `Reranker.rerank`.
        arguments: of `Reranker.from_pretrained`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        top_k: int | None = 10,
        instruction: str | None = None,
        **arguments: Any,
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}, expected at least 1")
        self.model = None if model is None else os.fspath(model)
        self.top_k, self.instruction, self.arguments = top_k, instruction, arguments
        self._reranker: Reranker | None = None

    def warm_up(self) -> None:
        """Load the model; does nothing the second time."""
        if self._reranker is None:
            self._reranker = Reranker.from_pretrained(self.model, **self.arguments)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Copies of the best documents with our scores, best first; a document without content counts as empty."""
        self.warm_up()
        assert self._reranker is not None
        texts = [document.content or "" for document in documents]
        wanted = self.top_k if top_k is None else top_k
        results = self._reranker.rerank(query, texts, wanted, instruction=self.instruction)
        return {"documents": [replace(documents[r["index"]], score=r["relevance_score"]) for r in results]}

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline's file."""
        return default_to_dict(
            self, model=self.model, top_k=self.top_k, instruction=self.instruction, **as_json(self.arguments)
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LastrerankRanker:
        """From a pipeline's file."""
        return default_from_dict(cls, data)
