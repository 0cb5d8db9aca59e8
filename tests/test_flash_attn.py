"""The optional attention provider: how it is called, against a stand-in with the library's conventions."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import truth
from packs import CONTINUED, prefixes_of

from lastrerank import ops

pytest.importorskip("triton", reason="Triton is not installed")


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size=(-1, -1)
):  # fmt: skip
    """flash-attn's documented meaning of its arguments, by the literal truth of the tests."""
    lengths, key_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert causal and max_seqlen_q == max(lengths) and max_seqlen_k == max(key_lengths)
    left, _right = window_size
    window = None if left < 0 else left + 1
    if lengths == key_lengths:
        return truth.attention(q, k, v, lengths, window, softmax_scale), "the softmax's logarithms"
    # Fewer queries than keys: they are the last ones of their sequence.
    rows = torch.cat([end - torch.arange(n, 0, -1) for end, n in zip(cu_seqlens_k[1:], lengths, strict=True)])
    return truth.attention(q, k, v, key_lengths, window, softmax_scale, rows), "the softmax's logarithms"


@pytest.fixture
def operations(monkeypatch):
    from lastrerank.ops.flash_attn import FlashAttnOperations

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return FlashAttnOperations()


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@torch.inference_mode()
def test_attention_means_the_same(operations, window):
    q, k, v = torch.randn(20, 4, 64), torch.randn(20, 2, 64), torch.randn(20, 2, 64)
    cu, lengths = torch.tensor([0, 3, 4, 20], dtype=torch.int32), (3, 1, 16)
    expected = truth.attention(*truth.upcast(q, k, v), lengths, window, 0.125)
    plain = truth.attention(q, k, v, lengths, window, 0.125)
    truth.assert_error_rule(operations.attention(q, k, v, cu, lengths, window, 0.125), expected, plain)
    assert operations.attention(q, k, v, cu, lengths, window, 0.125, out=q) is q
    truth.assert_error_rule(q, expected, plain)


@pytest.mark.parametrize(("seqlens", "continued"), CONTINUED, ids=str)
@pytest.mark.parametrize("window", [None, 7, 100])
@torch.inference_mode()
def test_sequences_that_continue_others(operations, seqlens, continued, window):
    q, k, v = (torch.randn(sum(seqlens), heads, 64) for heads in (4, 2, 2))
    cu = torch.tensor([0, *seqlens]).cumsum(0).int()
    prefixes = prefixes_of(seqlens, continued, q.device)
    expected = truth.attention(*truth.upcast(q, k, v), seqlens, window, 0.125, None, prefixes.host)
    plain = truth.attention(q, k, v, seqlens, window, 0.125, None, prefixes.host)
    result = operations.attention(q, k, v, cu, tuple(seqlens), window, 0.125, prefixes=prefixes)
    truth.assert_error_rule(result, expected, plain)


def test_absent_library_is_named(monkeypatch):
    from lastrerank.ops.flash_attn import FlashAttnOperations

    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"flash-attn is not installed .*flash_attn_interface"):
        FlashAttnOperations()
    with pytest.raises(RuntimeError, match="CUDA device, not on cpu"):
        ops.select("flash-attn", torch.device("cpu"), torch.bfloat16)
