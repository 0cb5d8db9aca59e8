"""Static buckets of CUDA graphs. What goes in and what comes out is checked on any device; the capture needs a GPU."""

from __future__ import annotations

import pytest
import torch

from lastrerank import Reranker, RerankRequest
from lastrerank.graphs import BUCKETS, GraphedModel, _Captured, bucket_of, empty_bucket, fill
from lastrerank.packing import PackedBatch, pack


def passes(reranker, *lists):
    encoded = [reranker.encode(RerankRequest("a query", list(documents))) for documents in lists]
    return pack([block for request in encoded for block in request.blocks], reranker.device)


def with_lengths(bucket):
    """The reference needs lengths on the host, which a graph's kernels read on the device."""
    lengths = tuple(bucket.cu_seqlens.diff().tolist())
    return PackedBatch(
        bucket.ids, bucket.positions, bucket.cu_seqlens, lengths, bucket.read_rows, bucket.max_positions
    )


@pytest.fixture
def lists(documents):
    return [documents[:1], documents[1:2], ["x"]], [documents[3:4]], [documents[4:6], ["a", "b"]]


@torch.inference_mode()
def test_a_filled_bucket_gives_the_pass_itself(small_reranker, lists):
    """Bucket after bucket filled with one pass after another, so that what the last one left is there."""
    model = small_reranker.model
    bucket = empty_bucket(2048, small_reranker.device)
    for some in lists:
        batch = passes(small_reranker, *some)
        assert bucket_of(batch, (2048,)) == 2048
        fill(bucket, batch)
        out = model.hidden_states(with_lengths(bucket))[: len(batch.read_rows)]
        expected = model.hidden_states(batch)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_does_not_fit_is_left_to_an_ordinary_pass(small_reranker):
    long = passes(small_reranker, ["word " * 200, "word " * 200])
    assert bucket_of(long, (512, 1024)) == 1024 and bucket_of(long, (512,)) is None
    bucket = empty_bucket(512, small_reranker.device)
    sequences, reads = len(bucket.cu_seqlens) - 1, len(bucket.read_rows)
    nothing = torch.zeros(0)

    def short(sequences, reads):
        return PackedBatch(nothing, nothing, nothing, (1,) * sequences, torch.zeros(reads), 1)

    assert bucket_of(short(sequences, reads), (512,)) == 512
    assert bucket_of(short(sequences + 1, reads), (512,)) is None
    assert bucket_of(short(sequences, reads + 1), (512,)) is None


class _Replayed:
    """Stands for a captured graph: runs the model on the static buffers, into the static result."""

    def __init__(self, model, bucket, hidden):
        self.model, self.bucket, self.hidden = model, bucket, hidden

    def replay(self):
        self.hidden.copy_(self.model.hidden_states(with_lengths(self.bucket)))


class _Stream:
    """Stands for a stream, or an event on it."""

    def wait_event(self, event):
        assert event.recorded

    def record(self, stream):
        self.recorded = True


@pytest.fixture
def stand_in_graphs(small_reranker, monkeypatch):
    """A `GraphedModel` of two buckets whose captures need no GPU, and the tokens of those it made, in order."""
    graphs, made = GraphedModel(small_reranker.model, small_reranker.device, (512, 1024, 2048)), []

    def capture(self, tokens):
        made.append(tokens)
        bucket = empty_bucket(tokens, self._device)
        hidden = torch.empty(len(bucket.read_rows), small_reranker.config.hidden_size)
        return _Captured(bucket, _Replayed(self._model, bucket, hidden), hidden)

    monkeypatch.setattr(GraphedModel, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "Event", _Stream)
    return graphs, made


@torch.inference_mode()
def test_a_bucket_is_captured_when_a_pass_needs_it(small_reranker, lists, stand_in_graphs):
    """The largest one before it, whose memory the others take."""
    graphs, made = stand_in_graphs
    for some in lists:
        batch = passes(small_reranker, *some)
        tokens = bucket_of(batch, graphs.buckets)
        expected = small_reranker.model.hidden_states(batch)
        for _ in range(2):
            out = graphs.hidden_states(batch)
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert tokens in graphs.captured
    assert made[0] == 2048 and len(made) == len(set(made)) == len(graphs.captured)
    graphs.capture()
    assert graphs.captured == (512, 1024, 2048)
    assert graphs.hidden_states(passes(small_reranker, ["word " * 200] * 12)) is None


@torch.inference_mode()
def test_a_pass_without_its_graph_is_an_ordinary_one(small_reranker, documents, stand_in_graphs, monkeypatch, caplog):
    graphs, made = stand_in_graphs
    capture = GraphedModel._capture

    def fails(self, tokens):
        if tokens < 2048:
            made.append(tokens)
            raise torch.OutOfMemoryError("no memory")
        return capture(self, tokens)

    monkeypatch.setattr(GraphedModel, "_capture", fails)
    monkeypatch.setattr(small_reranker, "_graphs", graphs)
    plain = Reranker.from_pretrained(small_reranker.checkpoint.folder, device="cpu", backend=small_reranker.backend)
    for _ in range(2):
        assert small_reranker.rerank("q", documents[:2]) == plain.rerank("q", documents[:2])
    assert len(made) == 2  # and not again
    [warning] = [record for record in caplog.records if "no CUDA graph" in record.message]
    assert "no memory" in warning.message


def test_a_bucket_that_can_not_be_captured_is_done_without(small_reranker, stand_in_graphs, monkeypatch, caplog):
    graphs, _ = stand_in_graphs
    capture = GraphedModel._capture

    def fails(self, tokens):
        if tokens == 1024:
            raise torch.OutOfMemoryError("no memory")
        return capture(self, tokens)

    monkeypatch.setattr(GraphedModel, "_capture", fails)
    monkeypatch.setattr(small_reranker, "_graphs", graphs)
    small_reranker.warmup()
    assert graphs.captured == (512, 2048) and list(graphs.failed) == [1024]
    assert graphs.failed[1024].__traceback__ is None  # else the pass's tensors would be kept with it
    assert ["no memory" in record.message for record in caplog.records] == [True]


def test_warmup_changes_no_score(small, documents):
    reranker = Reranker.from_pretrained(small, device="cpu")
    before = reranker.rerank("a query", documents[:5])
    reranker.warmup()
    assert reranker.rerank("a query", documents[:5]) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturing needs a GPU")
def test_captured_passes(tiny, documents):
    eager, graphed = (Reranker.from_pretrained(tiny, device="cuda", backend="triton") for _ in range(2))
    eager._graphs = None
    for count in (1, 3, 10):
        a, b = (
            sorted(r.rerank("a query", documents[:count]), key=lambda x: x["index"]) for r in (eager, graphed)
        )
        assert all(abs(x["relevance_score"] - y["relevance_score"]) < 2e-2 for x, y in zip(a, b, strict=True))
    assert 0 < len(graphed._graphs.captured) < len(BUCKETS)
    graphed.warmup()
    assert graphed._graphs.captured == BUCKETS
