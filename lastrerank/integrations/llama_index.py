"""LlamaIndex: a node postprocessor; `pip install 'lastrerank[llama-index]'`."""

from __future__ import annotations

import os
from typing import Any

from lastrerank.integrations import as_json, needs
from lastrerank.reranker import Reranker

with needs("llama-index"):
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

dispatcher = get_dispatcher(__name__)


class LastrerankRerank(BaseNodePostprocessor):
    """Ranks nodes by their text as an LLM would see it, keeps the best `top_n`, and gives them our scores.

    Args:
        model: folder, bundled name or Hub id; default: the small checkpoint in the package.
        top_n: kept; None for all.
        instruction: as in `Reranker.rerank`.
        arguments: of `Reranker.from_pretrained`.
    """

    model: str | None = Field(default=None, description="Folder, bundled name or Hub id; None: the one in the package.")
    top_n: int | None = Field(default=3, description="Nodes kept; None for all.")
    instruction: str | None = Field(default=None, description="What else the ranking should follow.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Of `Reranker.from_pretrained`.")
    _reranker: Reranker = PrivateAttr()

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        top_n: int | None = 3,
        instruction: str | None = None,
        **arguments: Any,
    ) -> None:
        model = None if model is None else os.fspath(model)
        # From `from_dict`: a field of the base class, the class's name, and our arguments in one.
        fields = {"callback_manager": arguments.pop("callback_manager")} if "callback_manager" in arguments else {}
        arguments.pop("class_name", None)
        own = as_json({**arguments.pop("arguments", {}), **arguments})
        super().__init__(model=model, top_n=top_n, instruction=instruction, arguments=own, **fields)
        self._reranker = Reranker.from_pretrained(model, **own)

    @classmethod
    def class_name(cls) -> str:
        return "LastrerankRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("query_bundle is None, expected a query")
        name = self.model or self._reranker.checkpoint.name
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n or len(nodes), model_name=name)
        )
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        payload = {EventPayload.NODES: nodes, EventPayload.MODEL_NAME: name, EventPayload.TOP_K: self.top_n,
                   EventPayload.QUERY_STR: query_bundle.query_str}  # fmt: skip
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            results = self._reranker.rerank(
                query_bundle.query_str, texts, self.top_n, instruction=self.instruction
            )
            ranked = [NodeWithScore(node=nodes[r["index"]].node, score=r["relevance_score"]) for r in results]
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))
        return ranked
