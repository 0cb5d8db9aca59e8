"""The readout of a last-token reranker in three launches, without a host synchronisation.

    x = hidden[row] / rms(hidden[row]) * norm_weight,   vector = relu(x w1.T) w2.T        (launches 1 and 2)
    per sequence s:  weight_s = max_i (1 + cos(query_s, doc_i)) / 2      over its own documents
    per request g:   fused_g = sum_s weight_s query_s, or its only query
    score_i = cos(doc_i, fused of i's request)                                            (launch 3)

Everything after the gather is fp32. hidden `[R, D]`; w1 `[P1, D]`, w2 `[P, P1]`; maps as in `packing.ReadoutMaps`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A product of fp32 by FMA keeps its operands in registers: a depth of 64 spills on every NVIDIA chip.
_ROWS, _COLUMNS, _DEPTH = 16, 64, 32
_DOCUMENTS = 8


@triton.jit(do_not_specialize=["num_docs", "num_rows"])
def _project_kernel(
    x_ptr, doc_rows_ptr, query_rows_ptr, norm_weight_ptr, w_ptr, out_ptr,
    x_row_stride, num_docs, num_rows, width, num_out, eps,
    GATHER: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = x w.T; in the first projection x is gathered and normed (GATHER) and out rectified (RELU)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    row = r.to(tl.int64)
    if GATHER:  # documents first, then queries
        row = tl.load(doc_rows_ptr + r, r < num_docs, other=0).to(tl.int64)
        row += tl.load(query_rows_ptr + r - num_docs, (r >= num_docs) & (r < num_rows), other=0).to(tl.int64)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    odd = tl.zeros((ROWS, COLUMNS), tl.float32)  # of every other step: a chain of half the length rounds half as often
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, DEPTH):
        d = start + tl.arange(0, DEPTH)  # [DEPTH]
        inside = d < width
        x_mask = (r < num_rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row_stride + d[None, :], x_mask, other=0.0).to(tl.float32)
        if GATHER:
            squares += tl.sum(x * x, axis=1)
            x *= tl.load(norm_weight_ptr + d, inside, other=0.0).to(tl.float32)[None, :]
        w_mask = (c < num_out)[:, None] & inside[None, :]
        w = tl.load(w_ptr + c[:, None] * width + d[None, :], w_mask, other=0.0).to(tl.float32)  # [COLUMNS, DEPTH]
        acc, odd = odd, tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    acc += odd
    if GATHER:
        acc *= tl.rsqrt(squares / width + eps)[:, None]
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # a maximum would turn NaN into 0, and an overflow into a score
    out_mask = (r < num_rows)[:, None] & (c < num_out)[None, :]
    tl.store(out_ptr + r.to(tl.int64)[:, None] * num_out + c[None, :], acc, out_mask)


@triton.jit
def _cosines(docs, query):
    """docs [DOCUMENTS, BLOCK], query [BLOCK] -> [DOCUMENTS]; 0 for a zero vector, NaN where a norm overflows."""
    norms = tl.sqrt(tl.sum(docs * docs, axis=1)) * tl.sqrt(tl.sum(query * query, axis=0))
    return tl.sum(docs * query[None, :], axis=1) / tl.maximum(norms, 1e-16) + 0.0 * norms


@triton.jit(do_not_specialize=["num_docs", "num_sequences"])
def _fuse_kernel(
    docs_ptr, queries_ptr, doc_sequence_ptr, sequence_request_ptr, scores_ptr, num_docs, num_sequences, width,
    DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a request."""
    request = tl.program_id(0)
    d = tl.arange(0, BLOCK)  # [BLOCK]
    inside = d < width
    fused = tl.zeros((BLOCK,), tl.float32)
    only = tl.zeros((BLOCK,), tl.float32)
    blocks = 0
    for s in range(0, num_sequences):
        if tl.load(sequence_request_ptr + s) == request:
            query = tl.load(queries_ptr + s * width + d, inside, other=0.0)
            best = -1.0
            for start in range(0, num_docs, DOCUMENTS):
                n = start + tl.arange(0, DOCUMENTS)  # [DOCUMENTS]
                own = (n < num_docs) & (tl.load(doc_sequence_ptr + n, n < num_docs, other=-1) == s)
                if tl.max(own.to(tl.int32), axis=0) > 0:
                    mask = own[:, None] & inside[None, :]
                    docs = tl.load(docs_ptr + n.to(tl.int64)[:, None] * width + d[None, :], mask, other=0.0)
                    found = _cosines(docs, query)
                    best = tl.maximum(best, tl.max(tl.where(own, found, -1.0), axis=0))
                    best += 0.0 * tl.sum(tl.where(own, found, 0.0), axis=0)  # NaN, which a maximum drops
            fused += query * ((1.0 + best) / 2.0)
            only = query
            blocks += 1
    if blocks == 1:
        fused = only
    if blocks > 0:
        for start in range(0, num_docs, DOCUMENTS):
            n = start + tl.arange(0, DOCUMENTS)
            sequence = tl.load(doc_sequence_ptr + n, n < num_docs, other=0)
            own = (n < num_docs) & (tl.load(sequence_request_ptr + sequence) == request)
            if tl.max(own.to(tl.int32), axis=0) > 0:
                mask = own[:, None] & inside[None, :]
                docs = tl.load(docs_ptr + n.to(tl.int64)[:, None] * width + d[None, :], mask, other=0.0)
                tl.store(scores_ptr + n, _cosines(docs, fused), own)


def score(
    hidden: torch.Tensor,
    doc_rows: torch.Tensor,
    query_rows: torch.Tensor,
    doc_sequence: torch.Tensor,
    sequence_request: torch.Tensor,
    norm_weight: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lastrerank.ops.Operations.score`; returns vectors `[N + S, P]`, documents first, and scores `[N]`.

    Raises:
        ValueError: shapes don't fit, or weights are not contiguous.
    """
    if w1.shape[1] != hidden.shape[1] or w2.shape[1] != w1.shape[0] or norm_weight.shape != hidden.shape[1:]:
        raise ValueError(
            f"hidden, norm_weight, w1 and w2 have shapes {tuple(hidden.shape)}, {tuple(norm_weight.shape)}, "
            f"{tuple(w1.shape)} and {tuple(w2.shape)}: expected [R, D], [D], [P1, D] and [P, P1]"
        )
    if hidden.stride(1) != 1 or not (w1.is_contiguous() and w2.is_contiguous()):
        raise ValueError("hidden must have contiguous rows, w1 and w2 must be contiguous")
    maps = (("doc_sequence", doc_sequence, doc_rows), ("sequence_request", sequence_request, query_rows))
    for name, rows, per in maps:
        if rows.ndim != 1 or per.ndim != 1 or rows.shape != per.shape:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}, the rows {tuple(per.shape)}")
    # The kernels know no stride of what has one dimension.
    doc_rows, query_rows, doc_sequence, sequence_request, norm_weight = (
        x.contiguous() for x in (doc_rows, query_rows, doc_sequence, sequence_request, norm_weight)
    )
    num_rows = len(doc_rows) + len(query_rows)
    vectors = hidden
    for index, weight in enumerate((w1, w2)):
        out = torch.empty(num_rows, len(weight), dtype=torch.float32, device=hidden.device)
        grid = (triton.cdiv(num_rows, _ROWS), triton.cdiv(len(weight), _COLUMNS))
        _project_kernel[grid](
            vectors, doc_rows, query_rows, norm_weight, weight, out,
            vectors.stride(0), len(doc_rows), num_rows, weight.shape[1], len(weight), eps,
            GATHER=index == 0, RELU=index == 0, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, num_warps=4,
        )  # fmt: skip
        vectors = out
    docs, queries = vectors[: len(doc_rows)], vectors[len(doc_rows) :]
    scores = torch.empty(len(docs), dtype=torch.float32, device=hidden.device)
    _fuse_kernel[(len(queries),)](
        docs, queries, doc_sequence, sequence_request, scores, len(docs), len(queries), docs.shape[1],
        DOCUMENTS=_DOCUMENTS, BLOCK=triton.next_power_of_2(docs.shape[1]), num_warps=4,
    )  # fmt: skip
    return vectors, scores
