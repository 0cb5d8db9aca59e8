"""Static buckets of CUDA graphs. What goes in and what comes out is checked on any device; the capture needs a GPU."""

from __future__ import annotations

import pytest
import torch

from lastrerank import Reranker, RerankRequest
from lastrerank.graphs import BUCKETS, empty_bucket, fill, holds
from lastrerank.packing import PackedBatch, pack


def passes(reranker, *lists):
    encoded = [reranker.encode(RerankRequest("a query", list(documents))) for documents in lists]
    return pack([block for request in encoded for block in request.blocks], reranker.device)


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
        assert holds(bucket, batch)
        fill(bucket, batch)
        # The reference needs lengths on the host, which a graph's kernels read on the device.
        lengths = tuple(bucket.cu_seqlens.diff().tolist())
        static = PackedBatch(
            bucket.ids, bucket.positions, bucket.cu_seqlens, lengths, bucket.read_rows, bucket.max_positions
        )
        out = model.hidden_states(static)[: len(batch.read_rows)]
        expected = model.hidden_states(batch)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_does_not_fit_is_left_to_an_ordinary_pass(small_reranker):
    bucket = empty_bucket(512, small_reranker.device)
    assert not holds(bucket, passes(small_reranker, ["word " * 200, "word " * 200]))
    sequences, reads = len(bucket.cu_seqlens) - 1, len(bucket.read_rows)
    short = PackedBatch(*(torch.zeros(0),) * 2, torch.zeros(sequences + 2), (1,), torch.zeros(1), 1)
    assert not holds(bucket, short)
    short = PackedBatch(*(torch.zeros(0),) * 2, torch.zeros(sequences + 1), (1,), torch.zeros(reads + 1), 1)
    assert not holds(bucket, short)


def test_warmup_changes_no_score(small, documents):
    reranker = Reranker.from_pretrained(small, device="cpu")
    before = reranker.rerank("a query", documents[:5])
    reranker.warmup()
    assert reranker.rerank("a query", documents[:5]) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturing needs a GPU")
def test_captured_passes(tiny, documents):
    eager, graphed = (Reranker.from_pretrained(tiny, device="cuda", backend="triton") for _ in range(2))
    graphed.warmup()
    for count in (1, 3, 10):
        a, b = (
            sorted(r.rerank("a query", documents[:count]), key=lambda x: x["index"]) for r in (eager, graphed)
        )
        assert all(abs(x["relevance_score"] - y["relevance_score"]) < 2e-2 for x, y in zip(a, b, strict=True))
    assert len(BUCKETS) == len(graphed._graphs._captured)
