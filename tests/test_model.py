"""The forward pass against Transformers' own Qwen3 and Qwen2, in fp32 and bf16, and the memory it needs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2Model

from bench.baseline import TransformersReranker
from lastrerank import Reranker, RerankRequest
from lastrerank.model import ROW_CHUNK
from lastrerank.packing import pack
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

WIDE = {"hidden_size": 1024, "num_hidden_layers": 2, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "projector": (512, 512)}  # fmt: skip


def scores(results):
    return np.array([r["relevance_score"] for r in sorted(results, key=lambda r: r["index"])])


@pytest.mark.parametrize("window", [None, 64])
def test_full_width(tmp_path, documents, window):
    shape = WIDE if window is None else {**WIDE, "sliding_window": window}
    folder = write_random_checkpoint(tmp_path, shape, tokenizer=small_tokenizer(), dtype=torch.float32)
    arguments = ("How do I insert a table?", documents[:12])
    ours = scores(Reranker.from_pretrained(folder, backend="reference").rerank(*arguments))
    np.testing.assert_allclose(ours, scores(TransformersReranker(folder).rerank(*arguments)), rtol=0, atol=2e-5)


def test_bf16_by_the_error_rule(tiny, documents):
    """Against fp32, bf16 errs at most twice what Transformers errs in bf16, plus bf16's rounding of a cosine."""
    arguments = ("How do I insert a table?", documents[:30])
    truth = scores(TransformersReranker(tiny).rerank(*arguments))
    theirs = np.abs(scores(TransformersReranker(tiny, torch.bfloat16).rerank(*arguments)) - truth).max()
    ours = np.abs(scores(Reranker.from_pretrained(tiny, dtype="bfloat16").rerank(*arguments)) - truth).max()
    assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps


def test_attention_bias_without_qk_norm(tmp_path, documents):
    """Qwen2-family checkpoints differ only there."""
    overrides = {"model_type": "qwen2", "attention_bias": True, "use_qk_norm": False}
    folder = write_random_checkpoint(
        tmp_path, "tiny", tokenizer=small_tokenizer(), dtype=torch.float32, overrides=overrides
    )
    reranker = Reranker.from_pretrained(folder, backend="reference")
    encoded = reranker.encode(RerankRequest("insert", documents[:5]))
    batch = pack(encoded.blocks, torch.device("cpu"))
    with torch.inference_mode():
        ours = reranker.model.hidden_states(batch)

    raw = json.loads((folder / "config.json").read_text())
    model = Qwen2Model(Qwen2Config(**{k: v for k, v in raw.items() if k not in ("lastrerank", "architectures")}))
    state = load_file(folder / "model.safetensors")
    decoder = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    model.load_state_dict(decoder, strict=True)
    with torch.inference_mode():
        theirs = model(input_ids=batch.ids[None]).last_hidden_state[0][batch.read_rows]
    normed = reranker.model.ops.rms_norm(ours, reranker.model.weights.norm, 1e-6)
    torch.testing.assert_close(normed, theirs, rtol=1e-4, atol=1e-4)


def peak_bytes(reranker: Reranker, tokens: int) -> int:
    """Most memory allocated at once during a pass, by replaying the profiler's allocations."""
    text = "word " * tokens
    encoded = reranker.encode(RerankRequest("q", [text], max_doc_length=tokens))
    batch = pack(encoded.blocks, torch.device("cpu"))
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        reranker.model.hidden_states(batch)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_peak_activation_memory_follows_the_formula(tmp_path):
    """The residual and one packed projection for all tokens; everything else is chunk buffers, whatever the length."""
    shape = {**WIDE, "num_hidden_layers": 3, "intermediate_size": 1536}
    folder = write_random_checkpoint(tmp_path, shape, tokenizer=small_tokenizer())
    reranker = Reranker.from_pretrained(folder, dtype="bfloat16", backend="reference")
    short, long = 2 * ROW_CHUNK["cpu"], 4 * ROW_CHUNK["cpu"]
    peaks = [peak_bytes(reranker, tokens) for tokens in (short, long)]
    per_token = (peaks[1] - peaks[0]) / (long - short)
    # 2 KiB of residual, 8 KiB of projection, and the rotary table's 2 x 256 B: 0.6B-class width in bf16.
    assert 10 * 1024 <= per_token <= 12 * 1024
    chunk_buffers = peaks[0] - per_token * short
    assert chunk_buffers <= ROW_CHUNK["cpu"] * (2 * 1536 + 4096) * 2 * 4
