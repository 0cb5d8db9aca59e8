"""`pytest-benchmark` suite: `pytest bench --benchmark-enable`. The reference operations and a whole small rerank."""

from __future__ import annotations

import pytest
import torch

from lastrerank import Reranker, ops
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

BACKENDS = [name for name, why in ops.availability(torch.device("cpu"), torch.float32).items() if why is None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [128, 2048])
def test_add_rms_norm(benchmark, backend, rows):
    operations = ops.select(backend, torch.device("cpu"), torch.float32)[1]
    residual, x, weight = torch.randn(rows, 1024), torch.randn(rows, 1024), torch.ones(1024)
    with torch.inference_mode():
        benchmark(operations.add_rms_norm, residual, x, weight, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seqlens", [(512,), (64,) * 8, (2048,)], ids=str)
def test_attention(benchmark, backend, seqlens):
    operations = ops.select(backend, torch.device("cpu"), torch.float32)[1]
    q, k = torch.randn(sum(seqlens), 16, 128), torch.randn(sum(seqlens), 8, 128)
    cu = torch.tensor([0, *seqlens]).cumsum(0).int()
    with torch.inference_mode():
        benchmark(operations.attention, q, k, k.clone(), cu, seqlens, None, 128**-0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rerank(benchmark, backend, tmp_path):
    reranker = Reranker.from_pretrained(
        write_random_checkpoint(tmp_path, "tiny", tokenizer=small_tokenizer()), backend=backend
    )
    benchmark(reranker.rerank, "a query", ["a document of some words"] * 20)
