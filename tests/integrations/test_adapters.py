"""Each adapter gives the library's own objects in our order, with our scores."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import DOCUMENTS, QUERY

from lastrerank.checkpoint import BUNDLED


def test_langchain(folder, expected):
    pytest.importorskip("langchain_core")
    from langchain_core.documents import Document

    from lastrerank.integrations.langchain import LastrerankRerank

    documents = [Document(page_content=text, metadata={"n": i}) for i, text in enumerate(DOCUMENTS)]
    compressor = LastrerankRerank.from_pretrained(str(folder))
    for found in (compressor.compress_documents(documents, QUERY),
                  asyncio.run(compressor.acompress_documents(documents, QUERY))):  # fmt: skip
        assert [d.metadata["n"] for d in found] == [i for i, _ in expected[:3]]
        assert [d.metadata["relevance_score"] for d in found] == pytest.approx([s for _, s in expected[:3]])
    assert all("relevance_score" not in d.metadata for d in documents)
    assert compressor.compress_documents([], QUERY) == []
    made = LastrerankRerank(str(folder), top_n=2, instruction="short", dtype=torch.bfloat16)
    again = LastrerankRerank(**json.loads(made.model_dump_json()))
    assert again.model_dump() == made.model_dump() and again.reranker.dtype == "bfloat16" and again.top_n == 2


def test_langchain_retriever(folder):
    """In the place where people use it."""
    pytest.importorskip("langchain_classic")
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    from lastrerank.integrations.langchain import LastrerankRerank

    class Everything(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return [Document(page_content=text) for text in DOCUMENTS]

    compressor = LastrerankRerank.from_pretrained(str(folder), top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Everything())
    assert len(retriever.invoke(QUERY)) == 2


def test_langchain_cross_encoder(folder, expected):
    """Ours where LangChain wants one of its cross-encoders."""
    compressors = pytest.importorskip("langchain_classic.retrievers.document_compressors")
    from langchain_core.documents import Document

    from lastrerank.integrations.langchain import LastrerankCrossEncoder

    model = LastrerankCrossEncoder(str(folder))
    scores = dict(enumerate(model.score([(QUERY, text) for text in DOCUMENTS])))
    assert scores == pytest.approx(dict(expected)) and model.score([]) == []
    documents = [Document(page_content=text, metadata={"n": i}) for i, text in enumerate(DOCUMENTS)]
    found = compressors.CrossEncoderReranker(model=model, top_n=3).compress_documents(documents, QUERY)
    assert [d.metadata["n"] for d in found] == [i for i, _ in expected[:3]]
    with pytest.raises(ValueError, match="a model with its arguments, or a loaded reranker"):
        LastrerankCrossEncoder(str(folder), reranker=model.reranker)


def test_llama_index(folder, expected):
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    from lastrerank.integrations.llama_index import LastrerankRerank

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.0) for i, text in enumerate(DOCUMENTS)]
    post = LastrerankRerank(str(folder), top_n=4)
    found = post.postprocess_nodes(nodes, query_str=QUERY)
    assert [int(n.node.node_id) for n in found] == [i for i, _ in expected[:4]]
    assert [n.score for n in found] == pytest.approx([s for _, s in expected[:4]])
    assert post.class_name() == "LastrerankRerank" and post.postprocess_nodes([], QueryBundle(QUERY)) == []
    with pytest.raises(ValueError, match="query_bundle is None"):
        post.postprocess_nodes(nodes)
    # What is kept is everything, and the events are those of the other rerankers.
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler

    seen = []

    class Handler(BaseEventHandler):
        def handle(self, event, **more):
            seen.append(event.class_name())

    again = LastrerankRerank.from_json(LastrerankRerank(str(folder), top_n=2, dtype=torch.bfloat16).to_json())
    assert again.top_n == 2 and again._reranker.dtype == "bfloat16"
    get_dispatcher().add_event_handler(Handler())
    again.postprocess_nodes(nodes, query_str=QUERY)
    assert seen == ["ReRankStartEvent", "ReRankEndEvent"]
    # And those of before its dispatcher.
    from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler

    debug = LlamaDebugHandler(print_trace_on_end=False)
    LastrerankRerank(str(folder), callback_manager=CallbackManager([debug])).postprocess_nodes(nodes, query_str=QUERY)
    (pair,) = debug.get_event_pairs(CBEventType.RERANKING)
    assert [len(event.payload["nodes"]) for event in pair] == [5, 3]


def test_haystack(folder, expected):
    pytest.importorskip("haystack")
    from haystack import Document, Pipeline

    from lastrerank.integrations.haystack import LastrerankRanker

    documents = [Document(content=text, meta={"n": i}) for i, text in enumerate(DOCUMENTS)]
    pipeline = Pipeline()
    pipeline.add_component("ranker", LastrerankRanker(str(folder), top_k=4, dtype=torch.float32))
    pipeline = Pipeline.loads(pipeline.dumps(), allowed_modules=[LastrerankRanker.__module__])
    found = pipeline.run({"ranker": {"query": QUERY, "documents": documents}})["ranker"]["documents"]
    assert [d.meta["n"] for d in found] == [i for i, _ in expected[:4]]
    assert [d.score for d in found] == pytest.approx([s for _, s in expected[:4]])
    ranker = LastrerankRanker(str(folder))
    assert len(ranker.run(QUERY, documents, top_k=1)["documents"]) == 1 and ranker.run(QUERY, []) == {"documents": []}
    with pytest.raises(ValueError, match="top_k is 0"):
        LastrerankRanker(str(folder), top_k=0)


def _kept(name, folder, arguments):
    """An adapter made of a path and PyTorch's own names, and what is read back from what it writes."""
    if name == "langchain":
        pytest.importorskip("langchain_core")
        from lastrerank.integrations.langchain import LastrerankRerank

        made = LastrerankRerank(folder, **arguments)
        return made, LastrerankRerank(**json.loads(made.model_dump_json()))
    if name == "llama_index":
        pytest.importorskip("llama_index.core")
        from lastrerank.integrations.llama_index import LastrerankRerank

        made = LastrerankRerank(folder, **arguments)
        return made, LastrerankRerank.from_json(made.to_json())
    pytest.importorskip("haystack")
    from lastrerank.integrations.haystack import LastrerankRanker

    made = LastrerankRanker(folder, **arguments)
    return made, LastrerankRanker.from_dict(json.loads(json.dumps(made.to_dict())))


@pytest.mark.parametrize("name", ["langchain", "llama_index", "haystack"])
def test_what_from_pretrained_takes_is_kept(name, folder):
    """Paths, devices and dtypes as PyTorch has them; without a model the one in the package."""
    arguments = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "deterministic": True}
    made, again = _kept(name, Path(folder), arguments)
    assert made.model == again.model == str(folder)
    assert again.arguments == {"device": "cpu", "dtype": "bfloat16", "deterministic": True}
    made, again = _kept(name, None, {})
    assert made.model is None and again.model is None
    loaded = getattr(again, "reranker", None) or getattr(again, "_reranker", None)
    assert loaded is None or loaded.checkpoint.name == BUNDLED  # Haystack loads later


def test_rerankers(folder, expected):
    pytest.importorskip("rerankers")
    from lastrerank.integrations.rerankers import LastrerankRanker

    ranker = LastrerankRanker(str(folder), verbose=0)
    results = ranker.rank(QUERY, DOCUMENTS, doc_ids=list("abcde"))
    assert [r.doc_id for r in results] == ["abcde"[i] for i, _ in expected]
    assert [r.score for r in results] == pytest.approx([s for _, s in expected])
    assert [r.rank for r in results.top_k(2)] == [1, 2]
    assert -1 <= ranker.score(QUERY, DOCUMENTS[0]) <= 1
    assert asyncio.run(ranker.rank_async(QUERY, DOCUMENTS)).results_count() == 5
    import rerankers

    again = rerankers.Reranker(str(folder), model_type="lastrerank", verbose=0)
    assert [r.score for r in again.rank(QUERY, DOCUMENTS)] == [r.score for r in results]


def test_sentence_transformers(reranker, tmp_path):
    """The same calls on a real CrossEncoder (random, tiny) and on ours: the same shape of answer."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "page", "numbers", "print"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        num_labels=1)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    theirs = CrossEncoder(str(tmp_path), device="cpu")
    for arguments in ({}, {"top_k": 2}, {"top_k": 2, "return_documents": True}):
        a, b = (model.rank(QUERY, DOCUMENTS, **arguments) for model in (theirs, reranker))
        assert [set(row) for row in a] == [set(row) for row in b]
        assert all(x["score"] >= y["score"] for x, y in itertools.pairwise(b))
    pairs = [(QUERY, text) for text in DOCUMENTS]
    a, b = (model.predict(pairs) for model in (theirs, reranker))
    assert a.shape == b.shape and a.dtype == b.dtype


def test_sentence_transformers_evaluators_and_mining(reranker):
    """What it does with a CrossEncoder, done with ours: an evaluation, hard negatives."""
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
    from sentence_transformers.models import BoW
    from sentence_transformers.util import mine_hard_negatives

    sample = {"query": QUERY, "positive": [DOCUMENTS[0]], "documents": DOCUMENTS}
    metrics = CrossEncoderRerankingEvaluator([sample], name="toy", write_csv=False)(reranker)
    rank = [row["corpus_id"] for row in reranker.rank(QUERY, DOCUMENTS)].index(0)
    assert metrics["toy_mrr@10"] == pytest.approx(1 / (1 + rank))
    pairs = Dataset.from_dict({"query": ["page", "print"], "answer": [DOCUMENTS[0], DOCUMENTS[1]]})
    words = BoW(vocab=["page", "print", "style", "number"])
    mined = mine_hard_negatives(
        pairs, SentenceTransformer(modules=[words]), corpus=DOCUMENTS, cross_encoder=reranker, range_max=4,
        num_negatives=1, verbose=False,
    )  # fmt: skip
    assert len(mined) == 2 and set(mined["negative"]) <= set(DOCUMENTS)


def test_mteb_reranking_task(folder, reranker):
    """A whole evaluation by MTEB itself, on a task made here."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    from lastrerank.integrations.mteb import MtebReranker

    class Toy(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Toy", description="toy", dataset={"path": "toy/toy", "revision": "1"}, type="Reranking",
            category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
            modalities=["text"], date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
            dialect=None, sample_creation=None, reference=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, *args, **kwargs):
            ids = [f"d{i}" for i in range(len(DOCUMENTS))]
            rows = [{"id": i, "text": text, "title": ""} for i, text in zip(ids, DOCUMENTS, strict=True)]
            test = {"corpus": Dataset.from_list(rows), "queries": Dataset.from_list([{"id": "q", "text": QUERY}]),
                    "relevant_docs": {"q": {"d0": 1}}, "top_ranked": {"q": ids}}  # fmt: skip
            self.dataset = {"default": {"test": test}}
            self.data_loaded = True

    result = mteb.evaluate(MtebReranker(str(folder)), Toy(), cache=None)
    place = [r["index"] for r in reranker.rerank(QUERY, DOCUMENTS)].index(0)
    scores = result.task_results[0].scores["test"][0]
    assert scores["mrr_at_10"] == pytest.approx(1 / (1 + place), abs=1e-4)


def test_the_same_script_with_the_model_swapped(tmp_path, reranker):
    """Drop-in: what works on the Transformers model works on ours, with the same order."""
    pytest.importorskip("transformers")
    from bench.baseline import TransformersReranker

    def script(model):
        return [(r["index"], r["document"]) for r in model.rerank(QUERY, DOCUMENTS, top_n=4, max_doc_length=256)]

    assert script(TransformersReranker(reranker.checkpoint.folder)) == script(reranker)
