"""The `rerankers` library: a ranker with its interface; `pip install 'lastrerank[rerankers]'`.

Once this module is imported, `rerankers.Reranker(model, model_type="lastrerank")` makes one, too.
"""

from __future__ import annotations

import os
from typing import Any

from lastrerank.families import Cosine
from lastrerank.integrations import needs
from lastrerank.reranker import Reranker

with needs("rerankers"):
    from rerankers.documents import Document
    from rerankers.models import AVAILABLE_RANKERS
    from rerankers.models.ranker import BaseRanker
    from rerankers.results import RankedResults, Result
    from rerankers.utils import prep_docs


class LastrerankRanker(BaseRanker):
    """Args: model_name_or_path and arguments as `Reranker.from_pretrained`; instruction as in `Reranker.rerank`;
    verbose is the library's."""

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        verbose: int = 1,
        instruction: str | None = None,
        **arguments: Any,
    ) -> None:
        self.verbose, self.instruction = verbose, instruction
        self.model = Reranker.from_pretrained(model_name_or_path, **arguments)
        self.ranking_type = "listwise" if isinstance(self.model.family.readout, Cosine) else "pointwise"

    def rank(
        self,
        query: str,
        docs: str | list[str] | Document | list[Document],
        doc_ids: list[str] | list[int] | None = None,
        metadata: list[dict[str, Any]] | None = None,
    ) -> RankedResults:
        """All documents in one request, best first."""
        documents = prep_docs(docs, doc_ids, metadata)
        found = self.model.rerank(query, [document.text for document in documents], instruction=self.instruction)
        results = [
            Result(document=documents[r["index"]], score=r["relevance_score"], rank=place)
            for place, r in enumerate(found, 1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)

    def score(self, query: str, doc: str) -> float:
        """The score of a list of one."""
        return self.model.rerank(query, [doc], instruction=self.instruction)[0]["relevance_score"]


AVAILABLE_RANKERS["lastrerank"] = LastrerankRanker
