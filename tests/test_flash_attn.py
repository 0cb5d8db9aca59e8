"""The optional attention provider: how it is called, against a stand-in with the library's conventions."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import truth
from packs import prefixes_of

from lastrerank import ops

pytest.importorskip("triton", reason="Triton is not installed")


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size=(-1, -1)
):  # fmt: skip
    """flash-attn's documented meaning of its arguments, by the literal truth of the tests."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    lengths = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max(lengths)
    left, _right = window_size
    return truth.attention(q, k, v, lengths, None if left < 0 else left + 1, softmax_scale), "the softmax's logarithms"


@pytest.fixture(params=["flash_attn_interface", "fa3_fwd_interface"])
def operations(monkeypatch, request):
    from lastrerank.ops.flash_attn import FlashAttnOperations

    module = types.ModuleType(request.param)
    module.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, request.param, module)
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


def test_sequences_that_continue_others_go_through_our_kernel(operations, monkeypatch):
    from lastrerank.ops.triton import TritonOperations

    seen = []
    monkeypatch.setattr(TritonOperations, "attention", lambda self, *arguments: seen.append(arguments))
    q, k, v = (torch.randn(9, heads, 64) for heads in (4, 2, 2))
    cu, prefixes = torch.tensor([0, 4, 9]).int(), prefixes_of([4, 5], [None, 0], q.device)
    operations.attention(q, k, v, cu, (4, 5), None, 0.125, prefixes=prefixes)
    assert seen[0][-2] is prefixes


def test_absent_library_is_named(monkeypatch):
    from lastrerank.ops.flash_attn import FlashAttnOperations

    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"flash-attn is not installed .*flash_attn_interface"):
        FlashAttnOperations()
    with pytest.raises(RuntimeError, match="CUDA device, not on cpu"):
        ops.select("flash-attn", torch.device("cpu"), torch.bfloat16)
