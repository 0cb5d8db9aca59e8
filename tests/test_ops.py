"""Every backend that runs here against the fp64 truth, by the error rule."""

from __future__ import annotations

import zlib

import pytest
import torch
import truth
from packs import CONTINUED, prefixes_of

from lastrerank import ops

LENGTHS = [1, 2, 63, 64, 65, 127, 129, 1000]
# Of one sequence in attention: many tiles of every backend's. A CPU takes seconds for a thousand tokens in 16 bits.
ATTENDED = [2, 63, 64, 65, 127, 129, 400]
PACKS = [[1], [1, 1, 1], [2, 65, 1, 130, 64], [129, 1, 63]]


def backends():
    """(backend, device, dtype, instruction set) that run on this machine."""
    for name in ops.BACKENDS:
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if device == "cuda" and not torch.cuda.is_available():
                    continue
                if name == "triton" and device == "cpu":
                    continue  # the interpreter has its own file
                try:
                    ops.select(name, torch.device(device), dtype)
                except RuntimeError:
                    continue
                if dtype != ops.residual_dtype(name, dtype):
                    continue  # rounds what it multiplies alone: see test_native.py
                sets = [None]
                if name == "native":
                    from lastrerank.ops.native import instruction_sets

                    sets = instruction_sets()
                for isa in sets:
                    label = f"{name}-{isa or device}-{str(dtype)[6:]}"
                    yield pytest.param((name, device, dtype, isa), id=label)


QUICK = [case for case in backends() if case.values[0][1] == "cuda" or case.values[0][2] == torch.float32]


@pytest.fixture(params=list(backends()))
def backend(request, monkeypatch):
    name, device, dtype, isa = request.param
    if isa is not None:
        monkeypatch.setenv("LASTRERANK_ISA", isa)
    return ops.select(name, torch.device(device), dtype)[1], torch.device(device), dtype


def randn(backend, *size, scale=1.0, offset=0.0):
    _, device, dtype = backend
    return (torch.randn(size, device=device) * scale + offset).to(dtype)


@pytest.fixture(autouse=True)
def seed_and_no_grad(request):
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    if "grad" in request.node.name:
        yield
    else:
        with torch.inference_mode():
            yield


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("width", [64, 1024, 1000])
def test_rms_norm(backend, rows, width):
    x, w = randn(backend, rows, width, scale=3), randn(backend, width, scale=0.1, offset=1)
    expected = truth.rms_norm(*truth.upcast(x, w), 1e-6)
    truth.assert_error_rule(backend[0].rms_norm(x, w, 1e-6), expected, truth.rms_norm(x, w, 1e-6))


@pytest.mark.parametrize("rows", LENGTHS)
def test_add_rms_norm(backend, rows):
    residual, x = randn(backend, rows, 1024, scale=3), randn(backend, rows, 1024)
    w = randn(backend, 1024, scale=0.1, offset=1)
    total = residual + x
    updated, normed = backend[0].add_rms_norm(residual, x, w, 1e-6)
    assert updated.data_ptr() == residual.data_ptr() and torch.equal(updated, total)
    truth.assert_error_rule(normed, truth.rms_norm(*truth.upcast(total, w), 1e-6), truth.rms_norm(total, w, 1e-6))


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("width", [64, 3072, 100])
def test_swiglu(backend, rows, width):
    x = randn(backend, rows, 2 * width, scale=4)
    truth.assert_error_rule(backend[0].swiglu(x), truth.swiglu(x.double()), truth.swiglu(x))


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (1024, 512), (300, 77)])
def test_linear(backend, rows, inner, outer):
    x, w, b = randn(backend, rows, inner), randn(backend, outer, inner, scale=inner**-0.5), randn(backend, outer)
    for bias in (None, b):
        expected = x.double() @ w.double().T + (0 if bias is None else b.double())
        plain = x @ w.T + (0 if bias is None else b)
        truth.assert_error_rule(backend[0].linear(x, w, bias), expected, plain)
        buffer = torch.full((rows, outer + 40), float("nan"), dtype=x.dtype, device=x.device)
        out = backend[0].linear(x, w, bias, buffer[:, 24 : 24 + outer])
        assert out.data_ptr() == buffer[:, 24:].data_ptr()
        truth.assert_error_rule(buffer[:, 24 : 24 + outer], expected, plain)
        assert buffer[:, :24].isnan().all() and buffer[:, 24 + outer :].isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 65, 1000])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (4, 2, 64), (3, 0, 64), (0, 2, 128), (14, 2, 64)])
@pytest.mark.parametrize("norm", [True, False])
def test_qk_norm_rope(backend, rows, heads, kv_heads, dim, norm):
    _, device, _ = backend
    qkv = randn(backend, rows, (heads + 2 * kv_heads) * dim, scale=2)
    weights = [randn(backend, dim, scale=0.1, offset=1) if norm else None for _ in range(2)]
    angle = torch.arange(2048, device=device)[:, None] * 1e4 ** -(torch.arange(dim // 2, device=device) / (dim // 2))
    positions = torch.randint(0, 2048, (rows,), device=device)
    fixed = (positions, heads, kv_heads, 1e-6)
    cos, sin = angle.cos(), angle.sin()
    expected = truth.qk_norm_rope(*truth.upcast(qkv, *weights, cos, sin), *fixed)
    plain = truth.qk_norm_rope(qkv, *weights, cos, sin, *fixed)
    # As the model passes it for the last layer: a part of a wider buffer.
    buffer = torch.full((rows, qkv.shape[1] + 64), float("nan"), dtype=qkv.dtype, device=device)
    buffer[:, 64:] = qkv
    out = backend[0].qk_norm_rope(buffer[:, 64:], *weights, cos, sin, *fixed)
    assert out.data_ptr() == buffer[:, 64:].data_ptr()
    truth.assert_error_rule(out, expected, plain)
    assert torch.equal(out[:, (heads + kv_heads) * dim :], qkv[:, (heads + kv_heads) * dim :])
    assert buffer[:, :64].isnan().all()


def packed_qkv(backend, seqlens, heads, kv_heads, dim):
    """q, k, v as views of one packed buffer, cu_seqlens."""
    qkv = randn(backend, sum(seqlens), (heads + 2 * kv_heads) * dim)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    views = [x.unflatten(1, (-1, dim)) for x in (q, k, v)]
    cu = torch.tensor([0, *seqlens], device=qkv.device).cumsum(0).int()
    return views, cu


@pytest.mark.parametrize("seqlens", [[n] for n in ATTENDED] + PACKS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 63, 1024])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 128), (3, 1, 64)])
def test_attention(backend, seqlens, window, heads, kv_heads, dim):
    views, cu = packed_qkv(backend, seqlens, heads, kv_heads, dim)
    expected = truth.attention(*truth.upcast(*views), seqlens, window, dim**-0.5)
    plain = truth.attention(*views, seqlens, window, dim**-0.5)
    operations = backend[0]
    result = operations.attention(*views, cu, tuple(seqlens), window, dim**-0.5)
    truth.assert_error_rule(result, expected, plain)
    over_the_queries = operations.attention(*views, cu, tuple(seqlens), window, dim**-0.5, out=views[0])
    assert over_the_queries.data_ptr() == views[0].data_ptr() and torch.equal(over_the_queries, result)


@pytest.mark.parametrize("backend", QUICK, indirect=True)
@pytest.mark.parametrize("window", [None, 1, 63, 1024])
def test_attention_of_a_thousand_tokens(backend, window):
    (q, k, v), cu = packed_qkv(backend, [1000], 4, 2, 128)
    rows = torch.tensor([0, 500, 999], device=q.device)
    for read in (None, rows):
        own = q if read is None else q[read]
        result = backend[0].attention(own, k, v, cu, (1000,), window, 128**-0.5, rows=read)
        expected = truth.attention(*truth.upcast(own, k, v), [1000], window, 128**-0.5, read)
        truth.assert_error_rule(result, expected, truth.attention(own, k, v, [1000], window, 128**-0.5, read))


@pytest.mark.parametrize("seqlens", [[1], [200], [2, 65, 1, 130, 64], [400]], ids=str)
@pytest.mark.parametrize("window", [None, 1, 63])
def test_attention_of_read_rows(backend, seqlens, window):
    (q, k, v), cu = packed_qkv(backend, seqlens, 4, 2, 128)
    ends = cu[1:].long() - 1
    some = torch.randint(0, sum(seqlens), (7,), device=q.device)
    rows = torch.cat([ends, some]).unique()
    q = q[rows]
    expected = truth.attention(*truth.upcast(q, k, v), seqlens, window, 128**-0.5, rows)
    plain = truth.attention(q, k, v, seqlens, window, 128**-0.5, rows)
    result = backend[0].attention(q, k, v, cu, tuple(seqlens), window, 128**-0.5, rows=rows)
    truth.assert_error_rule(result, expected, plain)


@pytest.mark.parametrize(("seqlens", "continued"), CONTINUED, ids=str)
@pytest.mark.parametrize("window", [None, 1, 63, 100])
@pytest.mark.parametrize("read", [False, True])
def test_attention_of_sequences_that_continue_others(backend, seqlens, continued, window, read):
    (q, k, v), cu = packed_qkv(backend, seqlens, 4, 2, 64)
    prefixes = prefixes_of(seqlens, continued, q.device)
    rows = torch.cat([cu[1:].long() - 1, cu[2:3].long()]).unique() if read else None
    q = q if rows is None else q[rows]
    arguments = (tuple(seqlens), window, 0.125)
    expected = truth.attention(*truth.upcast(q, k, v), *arguments, rows, prefixes.host)
    plain = truth.attention(q, k, v, *arguments, rows, prefixes.host)
    result = backend[0].attention(q, k, v, cu, *arguments, rows=rows, prefixes=prefixes)
    truth.assert_error_rule(result, expected, plain)
    if not read:
        in_place = backend[0].attention(q, k, v, cu, *arguments, out=q, prefixes=prefixes)
        assert in_place.data_ptr() == q.data_ptr() and torch.equal(in_place, result)


def test_what_is_continued_is_all_that_is_seen(backend):
    """Bitwise the same whatever stands before, between and behind."""
    (q, k, v), cu = packed_qkv(backend, [5, 40, 7, 60, 3], 4, 2, 64)
    prefixes = prefixes_of([5, 40, 7, 60, 3], [None, None, None, 1, None], q.device)
    arguments = (cu, (5, 40, 7, 60, 3), None, 0.125)
    expected = backend[0].attention(q, k, v, *arguments, prefixes=prefixes)[52:112].clone()
    for rows in (slice(0, 5), slice(45, 52), slice(112, 115)):
        k[rows], v[rows], q[rows] = float("nan"), float("nan"), float("nan")
    assert torch.equal(backend[0].attention(q, k, v, *arguments, prefixes=prefixes)[52:112], expected)
    k[10] = float("nan")
    assert backend[0].attention(q, k, v, *arguments, prefixes=prefixes)[52:112].isnan().all()


@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("width", [64, 896, 1000, 2560])
def test_logit(backend, rows, width):
    _, device, _ = backend
    hidden, weight = randn(backend, rows, width, scale=3), randn(backend, width, scale=0.1, offset=1)
    vector = torch.randn(width, device=device) * width**-0.5
    result = backend[0].logit(hidden, weight, vector, 1e-6)
    assert result.dtype == torch.float32 and result.shape == (rows,)
    if rows:
        expected = truth.logit(*truth.upcast(hidden, weight, vector), 1e-6)
        plain = truth.logit(hidden.float(), weight.float(), vector, 1e-6)
        truth.assert_error_rule(result, expected, plain, scale=truth.logit_terms(hidden, weight, vector))
        hidden[rows // 2, 3] = float("nan")
        assert backend[0].logit(hidden, weight, vector, 1e-6).isnan().tolist() == [r == rows // 2 for r in range(rows)]


def test_attention_does_not_see_neighbours(backend):
    """Bitwise the same alone and packed, whatever the neighbours hold."""
    (q, k, v), _ = packed_qkv(backend, [70, 130, 5], 4, 2, 64)
    alone = backend[0].attention(
        q[70:200], k[70:200], v[70:200], torch.tensor([0, 130], device=q.device).int(), (130,), None, 0.125
    )
    k[:70], v[200:], q[:70] = 1e4, float("nan"), 1e4
    cu = torch.tensor([0, 70, 200, 205], device=q.device).int()
    packed = backend[0].attention(q, k, v, cu, (70, 130, 5), None, 0.125)
    assert torch.equal(packed[70:200], alone)


def readout_inputs(backend, documents, requests, width=256, p1=64, p=32):
    """documents[s] per sequence, requests[s] its request."""
    _, device, _ = backend
    total = sum(documents) + len(documents)
    hidden = randn(backend, total, width, scale=2)
    sequence = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    doc_rows = torch.arange(sum(documents)) + sequence
    query_rows = torch.tensor(documents).add(1).cumsum(0) - 1
    maps = [x.to(device) for x in (doc_rows, query_rows, sequence, torch.tensor(requests))]
    weights = [randn(backend, width, scale=0.1, offset=1), randn(backend, p1, width, scale=width**-0.5),
               randn(backend, p, p1, scale=p1**-0.5)]  # fmt: skip
    return hidden, maps, weights


@pytest.mark.parametrize(
    ("documents", "requests"),
    [([1], [0]), ([3], [0]), ([125, 125, 50], [0, 0, 0]), ([2, 1, 5, 1], [0, 1, 1, 2]), ([1] * 40, list(range(40)))],
    ids=str,
)
@pytest.mark.parametrize(("width", "p1", "p"), [(256, 64, 32), (1024, 512, 512), (96, 40, 24)])
def test_score(backend, documents, requests, width, p1, p):
    hidden, maps, weights = readout_inputs(backend, documents, requests, width, p1, p)
    expected = truth.score(hidden.double(), *maps, *truth.upcast(*weights), 1e-6)
    # Plain PyTorch casts to fp32 before the cosine, as the specification says.
    plain = truth.score(hidden.float(), *maps, *(w.float() for w in weights), 1e-6)
    results = backend[0].score(hidden, *maps, *weights, 1e-6)
    terms = truth.projection_terms(hidden.double(), *truth.upcast(*weights), 1e-6)
    for out, exact, reference, scale in zip(results, expected, plain, (terms, terms, 1.0), strict=True):
        assert out.dtype == torch.float32
        truth.assert_error_rule(out, exact, reference, scale)


def test_score_of_opposite_documents_is_finite(backend):
    """A block whose best document scores -1 has weight 0; alone in its request it is still its own query."""
    hidden, maps, weights = readout_inputs(backend, [1], [0])
    weights[1].abs_(), weights[2].abs_()
    hidden[1] = -hidden[0]
    scores = backend[0].score(hidden, *maps, *weights, 1e-6)[2]
    assert torch.isfinite(scores).all()


def test_embed(backend):
    table = randn(backend, 50, 64)
    ids = torch.randint(0, 50, (20,), device=table.device)
    assert torch.equal(backend[0].embed(ids, table), table[ids])


@pytest.mark.filterwarnings("ignore:.*not a double precision:UserWarning")
def test_reference_grads():
    """The reference differentiates, out of place: against numerical gradients in fp64-like precision where it can."""
    from lastrerank.ops.reference import ReferenceOperations

    operations = ReferenceOperations()
    torch.manual_seed(0)
    # The reference computes in fp32, so numerical gradients need a wide step and a loose match.
    check = dict(eps=1e-2, atol=2e-2, rtol=2e-2, fast_mode=False)
    leaf = lambda *size: torch.randn(size, requires_grad=True)  # noqa: E731
    x, w = leaf(3, 8), leaf(8)
    assert torch.autograd.gradcheck(lambda x, w: operations.rms_norm(x, w, 1e-6), (x, w), **check)
    assert torch.autograd.gradcheck(
        lambda r, x, w: operations.add_rms_norm(r, x, w, 1e-6), (leaf(3, 8), leaf(3, 8), leaf(8)), **check
    )
    assert torch.autograd.gradcheck(operations.swiglu, (leaf(3, 8),), **check)
    assert torch.autograd.gradcheck(operations.linear, (leaf(3, 8), leaf(5, 8), leaf(5)), **check)
    cos, sin = torch.rand(9, 4), torch.rand(9, 4)
    positions = torch.tensor([0, 5, 8])
    assert torch.autograd.gradcheck(
        lambda qkv, q, k: operations.qk_norm_rope(qkv, q, k, cos, sin, positions, 2, 1, 1e-6),
        (leaf(3, 32), leaf(8), leaf(8)), **check,
    )  # fmt: skip
    cu = torch.tensor([0, 4, 5]).int()
    for window, rows in ((None, None), (2, None), (None, torch.tensor([1, 3, 4]))):
        q = leaf(5 if rows is None else 3, 2, 8)
        assert torch.autograd.gradcheck(
            lambda q, k, v, window=window, rows=rows: operations.attention(q, k, v, cu, (4, 1), window, 0.3, rows=rows),
            (q, leaf(5, 1, 8), leaf(5, 1, 8)), **check,
        )  # fmt: skip
    maps = (torch.tensor([0, 1, 3]), torch.tensor([2, 4]), torch.tensor([0, 0, 1]), torch.tensor([0, 0]))
    assert torch.autograd.gradcheck(
        lambda h, n, a, b: operations.score(h, *maps, n, a, b, 1e-6)[:2],
        (leaf(5, 8), leaf(8), leaf(6, 8), leaf(4, 6)), **check,
    )  # fmt: skip


def test_no_square_tensor_at_long_lengths():
    """Peak memory of attention grows with T, not with T squared."""
    from lastrerank.ops.reference import ReferenceOperations

    operations, peak = ReferenceOperations(), []
    for window in (None, 64):
        for length in (4096, 8192):
            q = torch.randn(length, 2, 64)
            with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
                cu = torch.tensor([0, length]).int()
                operations.attention(q, q[:, :1], q[:, 1:], cu, (length,), window, 0.125, out=q)
            peak.append(max(abs(e.self_cpu_memory_usage) for e in profile.key_averages()))
        assert peak[-1] < 4 * peak[-2] and peak[-1] < 8192 * 8192


def test_choosing_a_backend(caplog):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="backend is 'nope'"):
        ops.select("nope", cpu, torch.float32)
    name, _ = ops.select("auto", cpu, torch.float32)
    assert name in ops.BACKENDS
    reasons = ops.availability(cpu, torch.float32)
    assert reasons[name] is None and set(reasons) == set(ops.BACKENDS)


def test_one_warning_where_auto_is_slower_than_it_need_be(monkeypatch, caplog):
    def missing(device, dtype):
        raise RuntimeError("its library isn't there: no compiler")

    monkeypatch.setitem(ops.BACKENDS, "native", missing)
    ops._warn_once.cache_clear()
    cpu = torch.device("cpu")
    for _ in range(3):
        assert ops.select("auto", cpu, torch.float32)[0] == "reference"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "slower than it need be: plain PyTorch computes, since native: its library isn't there: no compiler"
    ]
    caplog.clear()
    ops._warn_once.cache_clear()
    ops.select("auto", cpu, torch.float16)  # asked for: nothing else serves it
    ops.select("reference", cpu, torch.float32)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
