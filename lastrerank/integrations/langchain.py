"""LangChain: a document compressor, and a cross-encoder for its own; `pip install 'lastrerank[langchain]'`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lastrerank.integrations import as_json, needs
from lastrerank.reranker import Reranker

with needs("langchain"):
    from langchain_core.callbacks import Callbacks
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables import run_in_executor
    from pydantic import ConfigDict, Field


class LastrerankRerank(BaseDocumentCompressor):
    """Ranks retrieved documents and keeps the best, with `relevance_score` in their metadata.

    Args:
        model: folder, bundled name or Hub id; or a loaded `reranker`, which a dump leaves out. Default: the small
            checkpoint in the package.
        top_n: kept; None for all.
        instruction: as in `Reranker.rerank`.
        arguments: of `Reranker.from_pretrained`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    reranker: Reranker = Field(exclude=True)
    top_n: int | None = 3
    instruction: str | None = None

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        top_n: int | None = 3,
        instruction: str | None = None,
        *,
        reranker: Reranker | None = None,
        **arguments: Any,
    ) -> None:
        model = None if model is None else os.fspath(model)
        own = as_json({**arguments.pop("arguments", {}), **arguments})  # from a dump: in one
        super().__init__(
            reranker=_loaded(model, reranker, own), model=model, arguments=own, top_n=top_n, instruction=instruction  # type: ignore[call-arg]
        )

    @classmethod
    def from_pretrained(cls, id_or_path: str | os.PathLike[str] | None = None, **arguments: Any) -> LastrerankRerank:
        """The same as the constructor with a model."""
        return cls(id_or_path, **arguments)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The best `top_n`, best first; the documents given are not changed."""
        results = self.reranker.rerank(
            query, [document.page_content for document in documents], self.top_n, instruction=self.instruction
        )
        return [
            documents[r["index"]].model_copy(
                update={"metadata": documents[r["index"]].metadata | {"relevance_score": r["relevance_score"]}}
            )
            for r in results
        ]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The same on a thread."""
        return await run_in_executor(None, self.compress_documents, documents, query, callbacks)


class LastrerankCrossEncoder(BaseCrossEncoder):
    """Scores pairs for what LangChain does with a cross-encoder, its `CrossEncoderReranker` for one.

    Args:
        model: folder, bundled name or Hub id; or a loaded `reranker`. Default: the small checkpoint in the package.
        arguments: of `Reranker.from_pretrained`.
    """

    def __init__(
        self, model: str | os.PathLike[str] | None = None, *, reranker: Reranker | None = None, **arguments: Any
    ) -> None:
        self.reranker = _loaded(model, reranker, arguments)

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """A score for each (query, document), as `Reranker.predict` gives it: pairs of one query are one list."""
        return self.reranker.predict(text_pairs).tolist() if text_pairs else []


def _loaded(
    model: str | os.PathLike[str] | None, reranker: Reranker | None, arguments: dict[str, Any]
) -> Reranker:
    if reranker is not None and (model is not None or arguments):
        raise ValueError("expected a model with its arguments, or a loaded reranker")
    return reranker or Reranker.from_pretrained(model, **arguments)
