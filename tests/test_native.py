"""The native backend beyond the operations' common tests: int8 exactly, threads, forks, sanitizers, absence."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lastrerank import Reranker, ops
from lastrerank.ops import Prefixes
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.rotation import block_of, rotated

try:
    from lastrerank.ops.native import NativeOperations, instruction_sets

    ISAS = instruction_sets()
except RuntimeError as reason:
    pytest.skip(f"native backend: {reason}", allow_module_level=True)


DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LASTRERANK_ISA", request.param)
    return request.param


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """The rotation with its sums in the kernels' order, so that rounding to a grid is the same."""
    block, step = block_of(rows.shape[1]), 1
    rows = rows * block**-0.5
    while step < block:
        a, b = rows.reshape(len(rows), -1, 2, step).unbind(2)
        rows, step = torch.stack([a + b, a - b], 2).flatten(1), 2 * step
    return rows


def integer_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What int8 means: both rotated, weights to 7 bits by output, activations to 8 bits by row, exact integer sums, in
    fp64."""
    x, weight = in_order(x), in_order(weight)
    row_scale = x.abs().amax(1, keepdim=True) / 127
    # By a tensor: PyTorch divides a number by a tensor as a product with the reciprocal, one rounding more.
    inverse = torch.where(row_scale > 0, torch.full_like(row_scale, 127) / x.abs().amax(1, keepdim=True), 0.0)
    scaled = x * inverse
    q = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc()
    column_scale = weight.abs().amax(1, keepdim=True) / 64
    column_scale = torch.where(column_scale > 0, column_scale, 1.0)
    w = (weight / column_scale).round()
    return (q.double() @ w.double().T) * (row_scale.double() * column_scale.double().T)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), inner=st.integers(1, 700), outer=st.integers(1, 100), seed=st.integers(0, 2**20))
def test_int8_equals_the_integer_reference(rows, inner, outer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inner, generator=generator), torch.randn(outer, inner, generator=generator)
    x[0] = 0
    weight[::3, -1] *= 100
    out = NativeOperations(torch.int8).prepare(weight).matmul(x, None, None)
    expected = integer_reference(x, weight)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


def test_int8_on_every_instruction_set(isa):
    for width in (257, 96, 576):  # rotated by one, 32 and 64
        x, weight = torch.randn(33, width), torch.randn(65, width)
        weight[1::2, 70] = 30.0
        out = NativeOperations(torch.int8).prepare(weight).matmul(x, None, None)
        torch.testing.assert_close(out.double(), integer_reference(x, weight), rtol=2e-6, atol=1e-5)
    # Extreme values: nothing saturates on the way.
    x, weight = rotated(torch.full((5, 3072), 7.0)), rotated(torch.full((9, 3072), 3.0))
    out = NativeOperations(torch.int8).prepare(weight).matmul(x, None, None)
    torch.testing.assert_close(out, torch.full((5, 9), 21.0 * 3072), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_does_not_hide_what_is_not_finite(isa, bad):
    x = torch.randn(3, 64)
    x[1, 40] = bad
    weight = torch.randn(8, 64)
    out = NativeOperations(torch.int8).prepare(weight).matmul(x, None, None)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    weight[3, 7] = bad
    out = NativeOperations(torch.int8).prepare(weight).matmul(torch.randn(2, 64), None, None)
    assert out[:, 3].isnan().all() and out[:, [2, 4]].isfinite().all()


def test_bf16_weights_are_read_directly(isa):
    weight = torch.randn(40, 96).bfloat16()
    x = torch.randn(7, 96)
    for dtype in DTYPES:
        operations = NativeOperations(dtype)
        direct, upcast = (operations.prepare(w).matmul(x, None, None) for w in (weight, weight.float()))
        assert torch.equal(direct, upcast)
    assert torch.equal(NativeOperations().prepare(weight).unpack(), weight.float())


def test_fp32_by_bf16_units_is_fp32(isa):
    """Where the processor multiplies bf16 faster, weights that are bf16 numbers are multiplied as such, in fp32 all the
    same: no further from the truth than PyTorch's product in fp32, over seven orders of magnitude."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50, 1000, generator=generator) * 10 ** torch.linspace(-5, 2, 50)[:, None]
    weight = torch.randn(70, 1000, generator=generator).bfloat16()
    bias = torch.randn(70, generator=generator)
    truth = x.double() @ weight.double().T
    packed = NativeOperations().prepare(weight)
    for shift in (None, bias):
        out = packed.matmul(x, shift, None).double()
        plain = torch.nn.functional.linear(x, weight.float(), shift).double()
        wanted = truth if shift is None else truth + shift.double()
        errors = [(y - wanted).norm(dim=1) / wanted.norm(dim=1) for y in (out, plain)]
        assert errors[0].mean() <= 1.1 * errors[1].mean() and errors[0].max() <= 2 * errors[1].max()
    assert packed.unpack().equal(weight.float())
    # What is no bf16 number stays what it is.
    finer = weight.float() * (1 + 2**-20)
    assert NativeOperations().prepare(finer).unpack().equal(finer)
    for bad in (float("nan"), float("inf")):
        x[3, 7] = bad
        out = packed.matmul(x, None, None)
        assert not out[3].isfinite().any() and out[[2, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_in_one_with_their_product(isa, dtype):
    """Bit for bit, whether the halves are whole panels or not; and as the reference says."""
    operations, x = NativeOperations(dtype), torch.randn(70, 96)
    for width in (256, 250):
        weight = torch.randn(2 * width, 96).bfloat16()
        packed = operations.prepare(weight)
        assert packed.gates == (width == 256)
        out = operations.linear_swiglu(x, packed)
        assert out.equal(operations.swiglu(operations.linear(x, packed)))
        plain = ReferenceOperations().linear_swiglu(x, weight.float())
        bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.int8: 5e-2}[dtype]
        assert (out - plain).norm() <= bound * plain.norm()
        assert operations.linear_swiglu(x[:0], packed).shape == (0, width)
    with pytest.raises(ValueError, match=r"x \(70, 95\): expected x \[T, 96\]"):
        operations.linear_swiglu(x[:, :95], packed)


def test_a_wrong_width_is_named():
    for dtype in DTYPES:
        with pytest.raises(ValueError, match=r"x \(3, 65\): expected x \[T, 64\]"):
            NativeOperations(dtype).prepare(torch.randn(8, 64)).matmul(torch.randn(3, 65), None, None)


def test_rows_do_not_depend_on_their_neighbours(isa):
    x, weight = torch.randn(700, 640), torch.randn(100, 640)
    for dtype in DTYPES:
        for stored in (weight, weight.bfloat16()):
            packed = NativeOperations(dtype).prepare(stored)
            whole = packed.matmul(x, None, None)
            for rows in (slice(0, 0), slice(0, 1), slice(17, 42), slice(190, 470), slice(699, 700)):
                assert torch.equal(packed.matmul(x[rows], None, None), whole[rows])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_results(small, threads):
    reranker = Reranker.from_pretrained(small, backend="native")
    documents = [f"document number {i} " * (i % 9) for i in range(40)]
    before = torch.get_num_threads()
    expected = [r["relevance_score"] for r in reranker.rerank("q", documents)]
    try:
        torch.set_num_threads(threads)
        got: list[list[float]] = []
        callers = [
            threading.Thread(target=lambda: got.append([r["relevance_score"] for r in reranker.rerank("q", documents)]))
            for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert len(got) == 4
    for scores in got:
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


def _linear_in_a_child(queue, packed, x):
    # Nothing else of PyTorch: its own thread pool does not survive a fork.
    queue.put(packed.matmul(x, None, None)[-1, -1].item())


def test_usable_after_fork():
    x, packed = torch.randn(400, 256), NativeOperations().prepare(torch.randn(300, 256))
    expected = packed.matmul(x, None, None)[-1, -1].item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_linear_in_a_child, args=(queue, packed, x))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(timeout=60)


def scores(reranker, documents):
    return {r["index"]: r["relevance_score"] for r in reranker.rerank("Tabelle", documents)}


def attention(operations, q, k, v, lengths, **options):
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with torch.no_grad():
        return operations.attention(q, k, v, cu, tuple(lengths), scale=q.shape[2] ** -0.5, **options)


def heads_of(length, dim=64, heads=4, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 300), dim=st.sampled_from([2, 18, 64, 128]), window=st.sampled_from([None, 1, 70]),
       scale=st.sampled_from([0.1, 1.0, 5.0]), seed=st.integers(0, 2**20))  # fmt: skip
def test_attention_by_the_error_rule(length, dim, window, scale, seed):
    """What is multiplied is less fine, by so much and no more: of the error of PyTorch's own attention in bf16, in root
    mean squares over heads enough that a few numbers don't decide, bf16 has at most 1.5, int8 0.2 where it multiplies
    integers of 16 bits, 5 where they have 8, on AMX that of bf16. (A grid of 2,895 steps up to the largest value errs
    by 1e-4 of that, one of 127 by 2.3e-3, 8 bits of fraction by 1.6e-3 of the root mean square: 0.06 and 1.4 times by
    how much the largest is larger, so 0.19 and 4.2 for the values alone in a row of 128 normal numbers, whose largest
    is about 3; queries, keys and weights have grids of their own.)"""
    groups = 4 + 512 // length
    q, k, v = (x * scale for x in heads_of(length, dim, heads=2 * groups, kv_heads=groups, seed=seed))
    truth = attention(ReferenceOperations(), *(x.double() for x in (q, k, v)), [length], window=window)
    coarse = attention(ReferenceOperations(), *(x.bfloat16() for x in (q, k, v)), [length], window=window)
    error = (coarse.double() - truth).norm()
    for isa in ISAS:
        with patch.dict(os.environ, LASTRERANK_ISA=isa):
            for dtype in DTYPES:
                operations = NativeOperations(dtype)
                of_int8 = {b"in bf16": 1.5, b"in 8 bits": 5, b"in 16 bits": 0.2}[operations.kernels.int8_attention]
                share = {torch.float32: 1e-3, torch.bfloat16: 1.5, torch.int8: of_int8}[dtype]
                got = attention(operations, q, k, v, [length], window=window)
                assert (got.double() - truth).norm() <= share * error, (isa, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_alone_and_in_company(isa, dtype):
    """Bit for bit: neighbours, even such that are no numbers, what the sequence continues, what comes after a row, and
    reading few rows change nothing."""
    native, lengths = NativeOperations(dtype), [37, 600, 5]
    q, k, v = heads_of(sum(lengths))
    own = slice(37, 637)
    alone = attention(native, q[own], k[own], v[own], [600], window=None)
    for x in (q, k, v):
        x[:37] = x[637:] = float("nan")
    assert torch.equal(attention(native, q, k, v, lengths, window=None)[own], alone)
    q, k, v = q[own], k[own], v[own]
    for cut in (1, 63, 64, 130, 255, 257):
        assert torch.equal(attention(native, q[:cut], k[:cut], v[:cut], [cut], window=None), alone[:cut])
    rows = torch.tensor([0, 65, 300, 599])
    assert torch.equal(attention(native, q[rows], k, v, [600], window=None, rows=rows), alone[rows])
    for prefix in (90, 300):
        shared = Prefixes(torch.tensor([[0, 0], [0, prefix]], dtype=torch.int32), ((0, 0), (0, prefix)))
        assert torch.equal(attention(native, q, k, v, [prefix, 600 - prefix], window=None, prefixes=shared), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_attention_does_not_hide_what_is_not_finite(isa, dtype, which, bad):
    """It shows in the rows that see it and in no others: in some channel of a query's or key's head and a value's."""
    native = NativeOperations(dtype)
    for heads, kv_heads, window in ((4, 2, None), (3, 1, None), (4, 2, 64)):
        generator = torch.Generator().manual_seed(1)
        parts = [torch.randn(600, count, 32, generator=generator) for count in (heads, kv_heads, kv_heads)]
        parts[which][70, 0, 5] = bad if which else float("nan")  # an infinite query may see its key alone
        group = heads // kv_heads if which else 1
        seen = slice(70, 71) if which == 0 else slice(70, 600 if window is None else 70 + window)
        out = attention(native, *parts, [600], window=window)
        hit = ~out.isfinite().all(2)
        if which == 2:
            assert hit[seen, :group].all()
        else:
            assert hit[seen, :group].any()
        hit[seen, :group] = False
        assert not hit.any()
        rows = torch.tensor([40, 69, 80, 599])
        read = attention(native, parts[0][rows], *parts[1:], [600], window=window, rows=rows)
        assert read.nan_to_num(7.0, 8.0, 9.0).equal(out[rows].nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [3.3895e38, 3.4e38])  # the second is an infinity in bf16
def test_the_largest_numbers_change_no_earlier_row(isa, dtype, value):
    native, generator = NativeOperations(dtype), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(130, 2, 32, generator=generator) for _ in range(3))
    expected = attention(native, q, k, v, [130], window=None)
    for place in (1, 70, 129):
        other = v.clone()
        other[place, 0, 3] = value
        assert torch.equal(attention(native, q, k, other, [130], window=None)[:place], expected[:place])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_that_differ_little(isa, dtype):
    """The maximum has weight 1, however large it is: logits of 3.9 millions and, in later tiles, of one more."""
    length, later = 700, 300
    q, k, v = heads_of(length, dim=16, heads=2, kv_heads=1)
    for large in (1024.0, 960.0, 1000.0):
        q[:], k[:], v[:] = 1024.0, large, 0.0
        q[..., -1], k[..., -1] = 1.0, 0.0
        k[later:, :, -1], v[later:] = 4.0, 1.0
        out = attention(NativeOperations(dtype), q, k, v, [length], window=None)
        more = torch.arange(1, length + 1 - later) * np.e
        torch.testing.assert_close(out[later:, 0, 0], (more / (later + more)).float(), rtol=0, atol=4e-3)
        assert out[:later].eq(0).all()


def test_bf16_is_what_it_says(isa):
    """Weights and what they multiply rounded to nearest, ties to even; exact products; sums in fp32."""
    generator = torch.Generator().manual_seed(3)
    for rows, inner, outer in ((1, 1, 1), (7, 33, 40), (130, 700, 65)):
        x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, outer))
        bias = torch.randn(outer, generator=generator)
        out = NativeOperations(torch.bfloat16).prepare(weight).matmul(x, bias, None)
        truth = x.bfloat16().double() @ weight.bfloat16().double().T + bias.double()
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5 * inner**0.5)
    x = torch.tensor([[1 + 2**-8], [1 + 3 * 2**-8], [float("inf")]])  # the first two are ties
    one = NativeOperations(torch.bfloat16).prepare(torch.ones(1, 1))
    assert one.matmul(x, None, None)[:, 0].tolist() == [1.0, 1 + 2**-6, float("inf")]
    assert one.matmul(torch.tensor([[float("nan")]]), None, None).isnan().all()


def test_bf16_scores_by_the_error_rule(tiny_windowed, documents):
    """No further from fp32 than PyTorch's own bf16; weights in half the memory."""
    folder = tiny_windowed
    truth, plain, native = (
        scores(Reranker.from_pretrained(folder, backend=backend, dtype=dtype), documents[:40])
        for backend, dtype in (("reference", "float32"), ("reference", "bfloat16"), ("native", "bfloat16"))
    )
    error, own = (sum((truth[i] - other[i]) ** 2 for i in truth) ** 0.5 for other in (plain, native))
    assert 0 < own <= error
    auto = Reranker.from_pretrained(folder, dtype="bfloat16")
    assert auto.backend == "native" and scores(auto, documents[:40]) == native
    gate_up = auto.model.weights.layers[0].gate_up
    assert gate_up._packed.element_size() == 2


def test_a_bf16_model_is_kept(small, documents, tmp_path):
    Reranker.from_pretrained(small, dtype="bfloat16").save_pretrained(tmp_path)  # its table and norms were fp32
    bf16 = Reranker.from_pretrained(tmp_path, dtype="bfloat16")
    expected = scores(bf16, documents[:9])
    bf16.save_pretrained(tmp_path)
    assert scores(Reranker.from_pretrained(tmp_path, dtype="bfloat16"), documents[:9]) == expected
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


def test_native_scores_are_the_references(tiny_windowed, documents):
    truth, native = (
        scores(Reranker.from_pretrained(tiny_windowed, backend=backend), documents[:40])
        for backend in ("reference", "native")
    )
    assert max(abs(truth[i] - native[i]) for i in truth) <= 2e-5


def test_int8_scores_differ_little(tiny, documents):
    truth, int8 = (
        scores(Reranker.from_pretrained(tiny, dtype=dtype), documents[:40]) for dtype in ("float32", "int8")
    )
    difference = max(abs(truth[i] - int8[i]) for i in truth)
    assert 0 < difference < 0.1


def test_a_quantised_weight_unpacked_and_packed_again_is_itself(isa):
    operations = NativeOperations(torch.int8)
    for shape in ((5, 7), (64, 64), (33, 130), (9, 96), (17, 3072)):
        weight = torch.randn(shape)
        packed = operations.prepare(weight)
        unpacked, turned = packed.unpack(), rotated(weight)
        assert ((rotated(unpacked) - turned).abs().amax(1) <= turned.abs().amax(1) / 128 * 1.001).all()
        again = operations.prepare(unpacked, packed.scales)
        assert torch.equal(again._packed, packed._packed) and torch.equal(again._sums, packed._sums)


@pytest.mark.parametrize("width", [1, 7, 64, 96, 576, 3072])
def test_the_rotation_is_walsh_and_hadamards(width):
    """By its definition, entry (i, j) is -1 to the number of bits that i and j share; it turns itself back."""
    block = block_of(width)
    assert block == max(b for b in (1, 2, 4, 8, 16, 32, 64) if width % b == 0)
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]).double()
    x = torch.randn(5, width)
    truth = (x.double().unflatten(1, (-1, block)) @ matrix / block**0.5).flatten(1)
    for found in (rotated(x), in_order(x)):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotated(rotated(x)), x, rtol=1e-6, atol=1e-6)


def test_what_stands_out_costs_the_others_little(isa):
    """A channel thirty times the others, of activations or of weights, which the other side has not: most of the error
    that its grid would bring to all others is gone. (Rotated, its 30 are 30 / 8 in each of 64 numbers, beside which the
    others reach 3.5: the steps are a quarter as long.)"""
    generator = torch.Generator().manual_seed(1)

    def on_a_grid(rows, most):
        step = rows.abs().amax(1, keepdim=True) / most
        return (rows / step).round() * step

    for large, small, share in ((0, 1, 0.6), (1, 0, 0.4)):
        x, weight = pair = [torch.randn(n, 576, generator=generator) for n in (50, 64)]
        pair[large][:, 70], pair[small][:, 70] = 30.0, 0.0
        truth = x.double() @ weight.double().T
        plain = (on_a_grid(x, 127).double() @ on_a_grid(weight, 64).double().T - truth).norm()
        found = (NativeOperations(torch.int8).prepare(weight).matmul(x, None, None) - truth).norm()
        assert found < share * plain


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory of a mapping is shown on Linux only")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_was_packed_is_not_kept(small, tmp_path, documents, dtype):
    """Beside the packed weights a CPU keeps the table alone, and of that only the pages it looked rows up in."""
    path = shutil.copytree(small, tmp_path / "copy") / "model.safetensors"
    reranker = Reranker.from_pretrained(path.parent, backend="native", dtype=dtype)
    mappings = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert len(mappings) == 1, "the table is not memory-mapped, or something else is"
    assert int(mappings[0]) * 1024 < path.stat().st_size / 4
    assert len(scores(reranker, documents[:3])) == 3


def test_a_quantised_model_is_kept(small, documents, tmp_path):
    """Half the size of 16 bit in the linears, the same scores again, and those of its weights in other dtypes."""
    int8 = Reranker.from_pretrained(small, dtype="int8")
    int8.save_pretrained(tmp_path / "int8")
    expected = scores(int8, documents[:20])
    again = Reranker.from_pretrained(tmp_path / "int8", dtype="int8")
    assert expected == scores(again, documents[:20])
    again.save_pretrained(tmp_path / "twice")
    first, second = (safetensors.torch.load_file(tmp_path / n / "model.safetensors") for n in ("int8", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    truth = scores(Reranker.from_pretrained(tmp_path / "int8", backend="reference"), documents[:20])
    assert max(abs(expected[i] - truth[i]) for i in expected) < 0.1  # the activations are not quantised here
    stored = safetensors.torch.load_file(tmp_path / "int8" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8

    def refused(change, message):
        damaged = dict(stored)
        change(damaged)
        safetensors.torch.save_file(damaged, tmp_path / "int8" / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            Reranker.from_pretrained(tmp_path / "int8", dtype="int8")

    name = "model.layers.1.mlp.down_proj.weight"
    refused(lambda s: s.update({name: torch.full_like(s[name], 65)}), f"{name} has integers beyond 64")
    refused(lambda s: s.update({name: torch.full_like(s[name], -128)}), f"{name} has integers beyond 64")
    refused(lambda s: s.update({f"{name}_scale": s[f"{name}_scale"] * 0}), "_scale is not positive and finite")
    del stored["model.layers.0.mlp.down_proj.weight_scale"]
    safetensors.torch.save_file(stored, tmp_path / "int8" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing, the first: .*down_proj\.weight_scale"):
        Reranker.from_pretrained(tmp_path / "int8", dtype="int8")


def test_absence_is_explained(small, monkeypatch):
    from lastrerank.ops import native

    def missing():
        raise RuntimeError("its library was not built: no working C++ compiler when lastrerank was installed")

    monkeypatch.setattr(native, "_tables", missing)
    assert Reranker.from_pretrained(small).backend == "reference"
    with pytest.raises(RuntimeError, match="no working C\\+\\+ compiler"):
        Reranker.from_pretrained(small, backend="native")
    with pytest.raises(RuntimeError, match=r"no backend serves torch\.int8 on cpu: .*reference: it has no int8"):
        Reranker.from_pretrained(small, dtype="int8")
    reasons = ops.availability(torch.device("cpu"), torch.float32)
    assert "compiler" in str(reasons["native"])


def test_an_unknown_instruction_set_is_refused(small, monkeypatch):
    monkeypatch.setenv("LASTRERANK_ISA", "sse9")
    with pytest.raises(RuntimeError, match="LASTRERANK_ISA is 'sse9'"):
        Reranker.from_pretrained(small, backend="native")


# Flags of the instruction sets, as in CMakeLists.txt.
X86 = {"portable": [], "avx2": ["-mavx2", "-mfma"]}
X86["avx512"] = [*X86["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86["avx512vnni"] = [*X86["avx512"], "-mavx512vnni"]
X86["avx512bf16"] = [*X86["avx512vnni"], "-mavx512bf16"]
X86["amx"] = [*X86["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
ARM = {"portable": [], "dotprod": ["-march=armv8.2-a+dotprod"], "armv86": ["-march=armv8.2-a+dotprod+bf16+i8mm"]}
ALL_OF_THEM = """#include "kernels.h"
extern "C" const lastrerank::Kernels* lastrerank_kernels(int i) {
  static const lastrerank::Kernels* all[] = {%s nullptr};
  return all[i];
}
"""


def build_driver(folder, sets, define="", compiler="g++", flags=(), every=False):
    """The driver, linked with the kernels of these instruction sets. every: it runs them all, whatever is here."""
    flags = ["-std=c++17", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *([f"-D{define}"] if define else []), *flags]
    jobs, objects = [], [str(folder / f"{name}.o") for name in sets]
    for (name, own), target in zip(sets.items(), objects, strict=True):
        command = [compiler, *flags, *own, f"-DLASTRERANK_ISA={name}", "-c", str(ROOT / "csrc/kernels.cpp")]
        command += ["-o", target]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        complaints = job.communicate(timeout=300)[1]
        assert job.returncode == 0, complaints
    api = ROOT / "csrc/api.cpp"
    if every:
        api = folder / "all.cpp"
        api.write_text(ALL_OF_THEM % "".join(f"&lastrerank::kernels_{name}, " for name in sets))
    sources = [str(ROOT / "tests/native_driver.cpp"), str(ROOT / "csrc/parallel.cpp"), str(api)]
    driver = folder / "driver"
    subprocess.run([compiler, *flags, *sources, *objects, "-o", str(driver), "-lpthread"], check=True, timeout=300)
    return driver


def run_driver(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "0 failures\n"


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_compiler
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(tmp_path, sanitizers):
    """The driver with every kernel that runs here, under the sanitizers."""
    flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    sets = {name: own for name, own in (X86 | ARM).items() if name in ISAS}
    driver = build_driver(tmp_path, sets, flags=flags, every=True)
    run_driver(driver, 2, *([] if sanitizers == "thread" else ["fork"]))


@needs_compiler
@pytest.mark.skipif("avx2" not in ISAS, reason="needs an x86 compiler and AVX2")
def test_avx512_and_amx_by_stand_ins(tmp_path):
    """The kernels for AVX-512, VNNI, bf16 units and AMX, wherever the tests run: with the instructions'
    definitions in place of the instructions."""
    # Sanitized: memory that AMX's own instructions touch is not, as they are assembly.
    header = ["-O1", "-mavx2", "-mfma", "-include", str(ROOT / "tests/avx512_stand_ins.h")]
    vnni = [*header, "-DSTAND_IN_VNNI"]
    bf16 = [*vnni, "-DSTAND_IN_BF16"]
    sets = {"avx512": header, "avx512vnni": vnni, "avx512bf16": bf16, "amx": [*bf16, "-DSTAND_IN_AMX"]}
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run_driver(build_driver(tmp_path, sets, flags=sanitized, every=True), 1)


@needs_compiler
def test_arm_matrices_by_stand_ins(tmp_path):
    """The kernels for Arm's products of matrices, on any processor, likewise."""
    header = ["-O1", "-include", str(ROOT / "tests/arm_stand_ins.h")]
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run_driver(build_driver(tmp_path, {"armv86": header}, flags=sanitized, every=True), 1)


ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_arm(tmp_path):
    """On an Arm processor that has everything, one with 8-bit dot products alone, and one with neither."""
    driver = build_driver(tmp_path, ARM, "LASTRERANK_ARM", ARM_COMPILER, ["-O1", "-static"])
    for processor in ("max", "neoverse-n1", "cortex-a53"):
        run_driver(ARM_EMULATOR, "-cpu", processor, driver, 2)


SHAPES = {
    "linear, other width": lambda n: n.linear(torch.randn(3, 65), n.prepare(torch.randn(64, 64))),
    "linear into fewer rows": lambda n: n.linear(torch.randn(100, 64), n.prepare(torch.randn(64, 64)), None,
                                                 torch.empty(2, 64)),
    "linear, short bias": lambda n: n.linear(torch.randn(3, 8), n.prepare(torch.randn(96, 8)), torch.randn(1)),
    "linear, flat x": lambda n: n.linear(torch.randn(64), n.prepare(torch.randn(64, 64))),
    "weight of no inputs": lambda n: n.prepare(torch.randn(64, 0)),
    "flat weight": lambda n: n.prepare(torch.randn(64)),
    "integer weight": lambda n: n.prepare(torch.ones(4, 4, dtype=torch.int64)),
    "rms_norm, short weight": lambda n: n.rms_norm(torch.randn(3, 96), torch.randn(4), 1e-6),
    "add_rms_norm, fewer rows": lambda n: n.add_rms_norm(torch.randn(9, 64), torch.randn(1, 64), torch.randn(64), 1e-6),
    "swiglu, odd width": lambda n: n.swiglu(torch.randn(3, 7)),
    "rope, position beyond": lambda n: rope(n, positions=torch.tensor([0, 1, 10**9, 3])),
    "rope, position below": lambda n: rope(n, positions=torch.tensor([0, 1, -1, 3])),
    "rope, fewer positions": lambda n: rope(n, positions=torch.tensor([0])),
    "rope, other table": lambda n: rope(n, sin=torch.randn(9, 4)),
    "rope, other norm": lambda n: rope(n, q_weight=torch.randn(8)),
    "rope, no heads": lambda n: rope(n, num_heads=0, num_kv_heads=0),
    "rope, other heads": lambda n: rope(n, num_heads=3),
    "attention, sequence beyond the rows": lambda n: attend(n, cu_seqlens=[0, 10**6], seqlens=(10**6,)),
    "attention, other lengths": lambda n: attend(n, seqlens=(4, 6)),
    "attention, backwards": lambda n: attend(n, cu_seqlens=[0, 12, 10], seqlens=(12, -2)),
    "attention, no key heads": lambda n: attend(n, k=torch.randn(10, 0, 8), v=torch.randn(10, 0, 8)),
    "attention, other head width": lambda n: attend(n, q=torch.randn(10, 4, 16)),
    "attention, heads that don't group": lambda n: attend(n, q=torch.randn(10, 3, 8)),
    "attention, fewer queries": lambda n: attend(n, q=torch.randn(9, 4, 8)),
    "attention, other values": lambda n: attend(n, v=torch.randn(9, 2, 8)),
    "attention, other out": lambda n: attend(n, out=torch.empty(2, 4, 8)),
    "attention, prefix beyond": lambda n: attend(n, prefixes=Prefixes(torch.tensor([[5, 6]]).int(), ((5, 6),))),
    "attention, prefix before": lambda n: attend(n, prefixes=Prefixes(torch.tensor([[-1, 2]]).int(), ((-1, 2),))),
    "attention, prefixes of others": lambda n: attend(n, prefixes=Prefixes(torch.zeros(2, 2).int(), ((0, 0),) * 2)),
    "logit, other width": lambda n: n.logit(torch.randn(3, 8), torch.randn(8), torch.randn(9), 1e-6),
    "attention, no window": lambda n: attend(n, window=0),
    "attention, row beyond": lambda n: attend(n, q=torch.randn(2, 4, 8), rows=torch.tensor([1, 10])),
    "attention, rows backwards": lambda n: attend(n, q=torch.randn(2, 4, 8), rows=torch.tensor([3, 1])),
    "attention, fewer rows": lambda n: attend(n, rows=torch.tensor([3])),
}  # fmt: skip


def rope(native, positions=None, sin=None, q_weight=None, num_heads=2, num_kv_heads=1):
    table = torch.randn(9, 8)
    native.qk_norm_rope(
        torch.randn(4, 64), q_weight, None, table, table if sin is None else sin,
        torch.arange(4) if positions is None else positions, num_heads, num_kv_heads, 1e-6,
    )  # fmt: skip


def attend(
    native, q=None, k=None, v=None, cu_seqlens=(0, 10), seqlens=(10,), window=None, rows=None, out=None, prefixes=None
):
    q, k, v = (torch.randn(10, heads, 8) if x is None else x for x, heads in ((q, 4), (k, 2), (v, 2)))
    native.attention(q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32), seqlens, window, 1.0, rows, out, prefixes)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_that_do_not_belong_together_are_refused(name, dtype):
    """Before a pointer is taken: they would be read and written beyond."""
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=r"\w"):
        SHAPES[name](NativeOperations(dtype))


def test_rows_of_almost_nothing_stay_numbers():
    """In int8 the inverse of a row's largest value must not overflow."""
    native = NativeOperations(torch.int8)
    weight = native.prepare(torch.randn(8, 64))
    x = torch.randn(4, 64)
    x[1], x[2] = 1e-42, 0.0
    with torch.no_grad():
        out = native.linear(x, weight)
    assert out.isfinite().all() and out[1].abs().max() <= 1e-30 and out[2].eq(0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_zero_in_kernels_and_nowhere_else(isa, threads):
    """They are slow, and sharp attention is full of them; the caller's arithmetic stays as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.full((300, 64), 1e-39)
        out = NativeOperations().prepare(torch.rand(64, 64) + 1000).matmul(x, None, None)
    finally:
        torch.set_num_threads(before)
    assert out.eq(0).all()
    assert np.float32(1e-39) * np.float32(0.5) > 0 and (x * 0.5 > 0).all()


STARVED = """
import resource, sys
from pathlib import Path
import torch
from lastrerank.ops.native import NativeOperations
torch.set_num_threads(2)
native, q = NativeOperations(), torch.randn(400_000, 4, 16)
weight, x = native.prepare(torch.randn(64, 64)), torch.randn(400_000, 64)
out = torch.empty(400_000, 64)
cu = torch.tensor([0, len(q)], dtype=torch.int32)
with torch.no_grad():
    weight.matmul(x[:64], None, out[:64])
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    free = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (20 << 20), free[1]))
    failed = []
    for call in (lambda: weight.matmul(x, None, out), lambda: native.attention(
            q, q[:, :2], q[:, 2:], cu, (len(q),), 8, 1.0, out=q)):
        try:
            call()
        except MemoryError as error:
            failed.append(str(error))
    resource.setrlimit(resource.RLIMIT_AS, free)
    right = torch.allclose(weight.matmul(x[:999], None, out[:999]), x[:999] @ weight.unpack().T, atol=1e-3)
print(failed, right)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_weight_in_large_pages_is_the_same(dtype, monkeypatch):
    """Pages of 2 MiB are asked for, for weights that fill some, where there are any; PyTorch's own memory elsewhere."""
    native = pytest.importorskip("lastrerank.ops.native")
    if not hasattr(native.mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system knows no pages of 2 MiB")
    operations, weight, x = native.NativeOperations(dtype), torch.randn(2304, 1024), torch.randn(5, 1024)
    large, small = operations.prepare(weight), operations.prepare(weight[:32])
    monkeypatch.delattr(native.mmap, "MADV_HUGEPAGE")
    own = operations.prepare(weight)
    from_pytorch = [part._packed.untyped_storage().resizable() for part in (large, small, own)]
    assert from_pytorch == [False, True, True]
    assert torch.equal(operations.linear(x, large), operations.linear(x, own))
    assert torch.equal(large.unpack(), own.unpack())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_a_kernel_without_memory_fails_its_pass_alone():
    """std::bad_alloc doesn't cross the C interface, and the kernels go on working afterwards."""
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{['a native kernel got no memory'] * 2} True"


THREADLESS = """
import resource, torch
from lastrerank.ops.native import NativeOperations
torch.set_num_threads(1)
native = NativeOperations()
weight, x = native.prepare(torch.randn(64, 64)), torch.randn(4096, 64)
want = weight.matmul(x, None, None)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
import lastrerank.ops.native as module
module.num_threads = lambda: 8
print(torch.equal(weight.matmul(x, None, None), want))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a user's threads as Linux does")
def test_kernels_do_with_the_threads_that_there_are():
    """A thread that can't start (root may always start one) is done without."""
    done = subprocess.run([sys.executable, "-c", THREADLESS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "True"


CROWDED = """
import os, time, torch
from pathlib import Path
from lastrerank.ops.native import NativeOperations
torch.set_num_threads(2)
native = NativeOperations()
weight, x = native.prepare(torch.randn(64, 64)), torch.randn(4096, 64)
want = weight.matmul(x, None, None)
neighbour = os.fork()
if neighbour == 0:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    end = time.monotonic() + 10
    while time.monotonic() < end: pass
    os._exit(0)
same, end = True, time.monotonic() + 1
while time.monotonic() < end:
    same &= torch.equal(weight.matmul(x, None, None), want)
    time.sleep(.0005)
os.kill(neighbour, 9)
threads = list(Path("/proc/self/task").iterdir())
masks = {os.sched_getaffinity(int(thread.name)) == os.sched_getaffinity(0) for thread in threads}
print(same, len(threads) > 1, masks)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.cpu_count() < 2, reason="wants two processors of Linux")
def test_threads_that_went_elsewhere_may_go_where_they_like():
    """Beside a busy neighbour a woken thread leaves its waker's processor, for the moment alone."""
    done = subprocess.run([sys.executable, "-c", CROWDED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "True True {True}"
