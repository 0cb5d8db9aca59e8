"""The operations written out literally, in whatever dtype the inputs have: in fp64 the truth, in the inputs' own dtype
what plain PyTorch would give. Shares nothing with `lastrerank`. And the error rule that compares the two."""

from __future__ import annotations

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x, cos, sin):
    """x `[T, H, d]`, cos and sin `[T, d/2]`."""
    half = x.shape[-1] // 2
    c, s = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]
    return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, eps):
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
    parts = [heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]]
    for i, weight in enumerate((q_weight, k_weight)):
        if weight is not None:
            parts[i] = rms_norm(parts[i], weight, eps)
        parts[i] = rope(parts[i], cos[positions].to(qkv.dtype), sin[positions].to(qkv.dtype))
    return torch.cat(parts, 1).reshape(qkv.shape)


def attention(q, k, v, seqlens, window, scale, rows=None, prefixes=None):
    """prefixes: of each sequence the first row and the number of rows that it continues."""
    group, total = q.shape[1] // k.shape[1], sum(seqlens)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    index = torch.arange(total, device=q.device)
    sequence = torch.repeat_interleave(
        torch.arange(len(seqlens), device=q.device), torch.tensor(seqlens, device=q.device)
    )
    query = index if rows is None else rows
    visible = (sequence[query][:, None] == sequence[None]) & (index[None] <= query[:, None])
    distance = query[:, None] - index[None]
    if prefixes is not None:
        first, shared = torch.tensor(prefixes, device=q.device)[sequence[query]].T[:, :, None]
        before = (index[None] >= first) & (index[None] < first + shared)
        starts = torch.tensor([0, *seqlens], device=q.device).cumsum(0)[sequence[query]][:, None]
        distance = torch.where(before, shared + query[:, None] - starts - (index[None] - first), distance)
        visible |= before
    if window is not None:
        visible &= distance < window
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    probabilities = torch.softmax(logits.masked_fill(~visible, float("-inf")), -1)
    return torch.einsum("hqk,khd->qhd", probabilities, v)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def score(hidden, doc_rows, query_rows, doc_sequence, sequence_request, norm_weight, w1, w2, eps):
    project = lambda x: torch.relu(rms_norm(x, norm_weight, eps) @ w1.T) @ w2.T  # noqa: E731
    docs, queries = project(hidden[doc_rows]), project(hidden[query_rows])
    cos = torch.nn.functional.cosine_similarity
    scores = torch.empty(len(docs), dtype=hidden.dtype, device=hidden.device)
    for request in range(int(sequence_request.max()) + 1):
        sequences = [s for s in range(len(queries)) if sequence_request[s] == request]
        weights = torch.stack(
            [((1 + cos(docs[doc_sequence == s], queries[s][None])) / 2).max() for s in sequences]
        )
        fused = (queries[sequences] * weights[:, None]).sum(0) / weights.sum()
        for s in sequences:
            scores[doc_sequence == s] = cos(docs[doc_sequence == s], fused[None])
    return docs, queries, scores


def logit(hidden, norm_weight, vector, eps):
    return (rms_norm(hidden, norm_weight, eps) * vector).sum(-1)


def logit_terms(hidden, norm_weight, vector):
    """Largest root of the sum of squared terms of a logit: what its rounding is relative to."""
    return float(((rms_norm(hidden.double(), norm_weight.double(), 1e-6) * vector.double()) ** 2).sum(-1).sqrt().max())


def projection_terms(hidden, norm_weight, w1, w2, eps):
    """Largest sum of magnitudes in the projector's second product: what its rounding is relative to."""
    return float((torch.relu(rms_norm(hidden, norm_weight, eps) @ w1.T) @ w2.abs().T).max())


def upcast(*values):
    """Floating-point tensors to fp64, everything else as it is."""
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def assert_error_rule(
    out: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, scale: float | None = None
) -> None:
    """Error of `out` against the fp64 truth at most twice plain PyTorch's in the same dtype, plus the dtype's rounding
    of the largest value (or of `scale`, where what is summed is larger than the sum: a cosine's terms reach 1)."""
    assert out.shape == truth.shape
    assert torch.isfinite(out).all(), "not finite: unwritten or poisoned"
    error, allowed = (out.double() - truth).abs().max(), 2 * (plain.double() - truth).abs().max()
    floor = torch.finfo(out.dtype).eps * (truth.abs().max() if scale is None else scale)
    assert error <= allowed + floor, f"error {error:.3e} > 2 x plain {allowed / 2:.3e} + rounding {floor:.3e}"
