"""Triton kernels against the fp64 truth by the error rule: on a GPU where there is one, else in Triton's interpreter.

In a process of its own where the interpreter is needed, because Triton reads `TRITON_INTERPRET` when it is imported.
With `LASTRERANK_EMULATE=sm_90` (or sm_80; `make test-emulated`) what is tested is the compiled code, executed by the
emulator; test_emulated_kernels.py is what every run of the tests has of it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import zlib

import pytest
import torch
import truth
from packs import CONTINUED, prefixes_of

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
EMULATE = os.environ.get("LASTRERANK_EMULATE")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if not INTERPRET and DEVICE == "cpu" and not EMULATE:

    @pytest.mark.takes_minutes
    def test_in_the_interpreter():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-p", "no:xdist"],
            env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:]
        assert " passed" in done.stdout

else:
    if INTERPRET:
        from triton_interpreter import repair

        repair()
    from lastrerank.ops.triton import TritonOperations

    operations = TritonOperations()
    DTYPES = [torch.float32, torch.float16, torch.bfloat16]

    @pytest.fixture(autouse=True)
    def seed_and_no_grad(request):
        torch.manual_seed(zlib.crc32(request.node.name.encode()))
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if EMULATE:
                from emulator import emulating

                stack.enter_context(emulating(EMULATE))
            yield

    def randn(dtype, *size, scale=1.0, offset=0.0):
        return (torch.randn(size, device=DEVICE) * scale + offset).to(dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", [1, 2, 63, 129])
    @pytest.mark.parametrize("width", [64, 1000, 1024])
    def test_rms_norm(dtype, rows, width):
        wide = torch.full((rows, width + 32), float("nan"), dtype=dtype, device=DEVICE)
        wide[:, :width] = randn(dtype, rows, width, scale=3)
        x, weight = wide[:, :width], randn(dtype, width, scale=0.1, offset=1)
        expected = truth.rms_norm(x.double(), weight.double(), 1e-6)
        truth.assert_error_rule(operations.rms_norm(x, weight, 1e-6), expected, truth.rms_norm(x, weight, 1e-6))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", [1, 65])
    def test_add_rms_norm(dtype, rows):
        residual, x, weight = randn(dtype, rows, 1024), randn(dtype, rows, 1024), randn(dtype, 1024, offset=1)
        total = residual + x
        updated, out = operations.add_rms_norm(residual, x, weight, 1e-6)
        assert updated is residual and torch.equal(residual, total)
        expected = truth.rms_norm(total.double(), weight.double(), 1e-6)
        truth.assert_error_rule(out, expected, truth.rms_norm(total, weight, 1e-6))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [64, 100, 3072])
    def test_swiglu(dtype, width):
        x = randn(dtype, 5, 2 * width, scale=4)
        truth.assert_error_rule(operations.swiglu(x), truth.swiglu(x.double()), truth.swiglu(x))

    def strided(x):
        """The same values, every other element of a longer tensor whose others are poisoned."""
        poison = float("nan") if x.is_floating_point() else 2**20
        wide = torch.full((2 * len(x),), poison, dtype=x.dtype, device=x.device)
        wide[::2] = x
        return wide[::2]

    def test_one_dimensional_arguments_may_have_strides():
        """Norm weights, positions, starts, rows to read and maps: every kernel that takes one."""
        x, weight, head = randn(torch.float32, 5, 64), randn(torch.float32, 64, offset=1), randn(torch.float32, 16)
        assert torch.equal(operations.rms_norm(x, strided(weight), 1e-6), operations.rms_norm(x, weight, 1e-6))
        added = [operations.add_rms_norm(x.clone(), x, w, 1e-6)[1] for w in (weight, strided(weight))]
        assert torch.equal(*added)

        positions, table = torch.tensor([3, 0, 8, 5, 1], device=DEVICE), randn(torch.float32, 9, 8)
        rotated = [
            operations.qk_norm_rope(x.clone(), w, w, table, table, p, 2, 1, 1e-6)
            for w, p in ((head, positions), (strided(head), strided(positions)))
        ]
        assert torch.equal(*rotated)

        q, k, v = randn(torch.float32, 70, 4, 64), randn(torch.float32, 70, 2, 64), randn(torch.float32, 70, 2, 64)
        cu = torch.tensor([0, 33, 33, 70], dtype=torch.int32, device=DEVICE)
        rows = torch.tensor([2, 32, 40, 69], device=DEVICE)
        for window in (None, 7):
            whole = [operations.attention(q, k, v, c, (33, 0, 37), window, 0.1) for c in (cu, strided(cu))]
            assert torch.equal(*whole)
            read = [operations.attention(q[rows], k, v, c, (33, 0, 37), window, 0.1, rows=r)
                    for c, r in ((cu, rows), (strided(cu), strided(rows)))]  # fmt: skip
            assert torch.equal(*read)

        hidden, w1, w2 = randn(torch.float32, 7, 64), randn(torch.float32, 32, 64), randn(torch.float32, 32, 32)
        maps = [torch.tensor(m, device=DEVICE) for m in ([0, 1, 3, 4], [2, 5], [0, 0, 1, 1], [0, 0])]
        plain = operations.score(hidden, *maps, weight, w1, w2, 1e-6)
        apart = operations.score(hidden, *map(strided, maps), strided(weight), w1, w2, 1e-6)
        for a, b in zip(plain, apart, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        "call",
        [
            lambda: operations.rms_norm(randn(torch.float32, 3, 64), randn(torch.float32, 4), 1e-6),
            lambda: operations.add_rms_norm(*(randn(torch.float32, n, 64) for n in (9, 1)), torch.ones(64), 1e-6),
            lambda: operations.swiglu(randn(torch.float32, 3, 7)),
            lambda: operations.qk_norm_rope(randn(torch.float32, 4, 64), torch.ones(8), None, torch.ones(9, 8),
                                            torch.ones(9, 8), torch.arange(4), 2, 1, 1e-6),
            lambda: operations.attention(*(randn(torch.float32, 9, h, 64) for h in (3, 2, 2)), torch.tensor([0, 9]),
                                         (9,), None, 1.0),
            lambda: operations.attention(*(randn(torch.float32, n, 2, 64) for n in (8, 9, 9)), torch.tensor([0, 9]),
                                         (9,), None, 1.0),
            lambda: operations.attention(*(randn(torch.float32, 9, 2, d) for d in (64, 128, 128)),
                                         torch.tensor([0, 9]), (9,), None, 1.0),
            lambda: operations.score(randn(torch.float32, 7, 64), torch.arange(4), torch.arange(2),
                                     torch.zeros(3).long(), torch.zeros(2).long(), torch.ones(64), torch.ones(8, 64),
                                     torch.ones(8, 8), 1e-6),
        ],
    )  # fmt: skip
    def test_shapes_that_do_not_belong_together_are_refused(call):
        with pytest.raises((ValueError, RuntimeError), match="shape"):
            call()

    def assert_quantized(rows, expected):
        """Scales from the largest of each row, values rounded to nearest: e4m3 has 3 bits, and 2^-9 is its least."""
        values, scale = rows
        assert values.dtype == torch.float8_e4m3fn and scale.shape == (len(expected), 1)
        assert torch.allclose(scale.double(), expected.abs().amax(1, keepdim=True) / 448, rtol=1e-2)
        error = (values.double() * scale - expected).abs()
        assert (error <= expected.abs() * 2**-4 + scale * 2**-10 + 2e-2 * scale).all()
        assert values.double().abs().amax(1).eq(448).all()  # the range is used

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("width", [64, 1000])
    def test_quantized_rows(dtype, width):
        from lastrerank.kernels.rms_norm import quantized_rows
        from lastrerank.kernels.swiglu import quantized_swiglu

        x, residual, weight = randn(dtype, 5, width), randn(dtype, 5, width), randn(dtype, width, offset=1)
        assert_quantized(quantized_rows(x), x.double())
        assert_quantized(quantized_rows(x, None, weight, 1e-6), truth.rms_norm(x.double(), weight.double(), 1e-6))
        total = residual + x
        expected = truth.rms_norm(total.double(), weight.double(), 1e-6)
        assert_quantized(quantized_rows(x, residual, weight, 1e-6), expected)
        assert torch.equal(residual, total)
        assert_quantized(quantized_swiglu(x), truth.swiglu(x.double()))
        x[2, 3] = float("nan")
        assert quantized_rows(x)[0][2].float().isnan().any() and quantized_rows(torch.zeros_like(x))[0].eq(0).all()

    def test_float8_linear():
        """Against the product of the same quantised operands, in fp64."""
        from lastrerank.ops.float8 import Float8Operations

        float8 = Float8Operations()
        x, weight, bias = randn(torch.bfloat16, 7, 64), randn(torch.bfloat16, 48, 64), randn(torch.bfloat16, 48)
        kept, rows = float8.prepare(weight), float8.rms_norm(x, torch.ones_like(x[0]), 1e-6)
        exact = (rows.values.double() * rows.scale) @ (kept.values.double() * kept.scale).t()
        poisoned = torch.full((7, 100), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        for out in (None, poisoned[:, 20:68], torch.full((7, 48), float("nan"), dtype=torch.bfloat16, device=DEVICE)):
            result = float8.linear(rows, kept, bias, out)
            assert out is None or result.data_ptr() == out.data_ptr()
            assert (result.double() - exact - bias.double()).abs().max() <= 2**-7 * exact.abs().max()
        assert poisoned[:, 68:].isnan().all()
        with pytest.raises(ValueError, match="multiples of 16"):
            float8.prepare(weight[:7])

    def test_float8_model(tmp_path):
        """Scores move, and by little; what that does to a ranking is for a trained checkpoint to say."""
        from lastrerank.model import Model
        from lastrerank.ops.float8 import Float8Operations

        reranker = model_of(tmp_path, "tiny")[0]
        float8 = Float8Operations()
        weights = reranker.checkpoint.weights(reranker.device, torch.bfloat16, float8.prepare)
        arguments = ("a query", ["a document", "another one of some length", "short"])
        exact = {r["index"]: r["relevance_score"] for r in reranker.rerank(*arguments)}
        reranker.model = Model(reranker.config, weights, float8)
        moved = {r["index"]: r["relevance_score"] for r in reranker.rerank(*arguments)}
        assert 0 < max(abs(moved[i] - exact[i]) for i in exact) < 0.15

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (3, 0, 64), (0, 2, 128), (14, 2, 64)])
    @pytest.mark.parametrize("norm", [True, False])
    def test_qk_norm_rope(dtype, heads, kv_heads, dim, norm):
        rows = 5
        qkv = randn(dtype, rows, (heads + 2 * kv_heads) * dim, scale=2)
        weights = [randn(dtype, dim, scale=0.1, offset=1) if norm else None for _ in range(2)]
        cos, sin = (torch.rand(300, dim // 2, device=DEVICE) for _ in range(2))
        positions = torch.randint(0, 300, (rows,), device=DEVICE)
        fixed = (positions, heads, kv_heads, 1e-6)
        expected = truth.qk_norm_rope(*truth.upcast(qkv, *weights, cos, sin), *fixed)
        plain = truth.qk_norm_rope(qkv, *weights, cos, sin, *fixed)
        buffer = torch.full((rows, qkv.shape[1] + 64), float("nan"), dtype=dtype, device=DEVICE)
        buffer[:, 64:] = qkv
        out = operations.qk_norm_rope(buffer[:, 64:], *weights, cos, sin, *fixed)
        truth.assert_error_rule(out, expected, plain)
        assert torch.equal(out[:, (heads + kv_heads) * dim :], qkv[:, (heads + kv_heads) * dim :])
        assert buffer[:, :64].isnan().all()

    def packed(dtype, seqlens, heads, kv_heads, dim):
        qkv = randn(dtype, sum(seqlens), (heads + 2 * kv_heads) * dim)
        parts = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
        cu = torch.tensor([0, *seqlens], device=DEVICE).cumsum(0).int()
        return [x.unflatten(1, (-1, dim)) for x in parts], cu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    # Where it takes no time: so long that every stage of a pipeline comes round twice.
    @pytest.mark.parametrize("seqlens", [[1], [2, 65, 1, 130, 64], [200 if INTERPRET else 600]], ids=str)
    @pytest.mark.parametrize("window", [None, 1, 63, 100, 1024])
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 128), (3, 1, 64)])
    def test_attention(dtype, seqlens, window, heads, kv_heads, dim):
        views, cu = packed(dtype, seqlens, heads, kv_heads, dim)
        expected = truth.attention(*truth.upcast(*views), seqlens, window, dim**-0.5)
        plain = truth.attention(*views, seqlens, window, dim**-0.5)
        poisoned = torch.full_like(views[0], float("nan"), memory_format=torch.contiguous_format)
        result = operations.attention(*views, cu, tuple(seqlens), window, dim**-0.5, out=poisoned)
        truth.assert_error_rule(result, expected, plain)
        over_the_queries = operations.attention(*views, cu, tuple(seqlens), window, dim**-0.5, out=views[0])
        assert torch.equal(over_the_queries, result)

    def test_tiles_are_every_tile_heaviest_first():
        """With sequences to spare, as a static bucket has them, and a bound that is larger than their number."""
        from lastrerank.kernels.attention import bound_of_tiles, tiles_of

        lengths, block_q = [5, 0, 64, 1, 130, 0], 16
        cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        every = {(s, t) for s, length in enumerate(lengths) for t in range(-(-length // block_q))}
        for tokens in (200, 1000):
            most = bound_of_tiles(tokens, len(lengths), tokens, block_q)
            found = list(map(tuple, tiles_of(cu, most, block_q).tolist()))
            assert len(found) == most and set(found[: len(every)]) == every
            assert all(tile == -1 for _, tile in found[len(every) :])
            assert sorted((t for _, t in found), reverse=True) == [t for _, t in found]
        continued = torch.tensor([0, 5, 5, 69, 70, 200, 217], dtype=torch.int32, device=DEVICE)
        prefixes = torch.tensor([[0, 0]] * 5 + [[5, 64]], dtype=torch.int32, device=DEVICE)
        order = tiles_of(continued, 17, block_q, prefixes).tolist()
        seen = [t * block_q + (64 if s == 5 else 0) for s, t in order if t >= 0]
        assert seen == sorted(seen, reverse=True) and [5, 1] in order and len(seen) == 1 + 4 + 1 + 9 + 2

    def test_tiles_of_other_sequences_are_refused():
        (q, k, v), cu = packed(torch.float32, [5, 40], 4, 2, 64)
        from lastrerank.kernels.attention import tiles as tiles_for

        tiles = tiles_for(cu, 45, 40, 2, 64, torch.float32)
        whole = operations.attention(q, k, v, cu, (5, 40), None, 0.125)
        assert torch.equal(operations.attention(q, k, v, cu, (5, 40), None, 0.125, tiles=tiles), whole)
        for arguments in ({"tiles": tiles[1:]}, {"tiles": tiles, "rows": torch.arange(45, device=DEVICE)}):
            with pytest.raises(ValueError, match="tiles has shape"):
                operations.attention(q, k, v, cu, (5, 40), None, 0.125, **arguments)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("window", [None, 63])
    def test_attention_of_read_rows(dtype, window):
        seqlens = [2, 165, 1, 130]
        (q, k, v), cu = packed(dtype, seqlens, 4, 2, 128)
        rows = torch.cat([cu[1:].long() - 1, torch.randint(0, sum(seqlens), (9,), device=DEVICE)]).unique()
        q = q[rows]
        expected = truth.attention(*truth.upcast(q, k, v), seqlens, window, 128**-0.5, rows)
        plain = truth.attention(q, k, v, seqlens, window, 128**-0.5, rows)
        result = operations.attention(q, k, v, cu, tuple(seqlens), window, 128**-0.5, rows=rows)
        truth.assert_error_rule(result, expected, plain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("seqlens", "continued"), CONTINUED, ids=str)
    @pytest.mark.parametrize("window", [None, 63])
    @pytest.mark.parametrize("read", [False, True])
    def test_attention_of_sequences_that_continue_others(dtype, seqlens, continued, window, read):
        (q, k, v), cu = packed(dtype, seqlens, 4, 2, 64)
        prefixes = prefixes_of(seqlens, continued, q.device)
        rows = torch.cat([cu[1:].long() - 1, cu[2:3].long()]).unique() if read else None
        q = q if rows is None else q[rows]
        arguments = (tuple(seqlens), window, 0.125)
        expected = truth.attention(*truth.upcast(q, k, v), *arguments, rows, prefixes.host)
        plain = truth.attention(q, k, v, *arguments, rows, prefixes.host)
        result = operations.attention(q, k, v, cu, *arguments, rows=rows, prefixes=prefixes)
        truth.assert_error_rule(result, expected, plain)
        if not read:
            assert torch.equal(operations.attention(q, k, v, cu, *arguments, out=q, prefixes=prefixes), result)

    def test_what_is_continued_is_all_that_is_seen():
        (q, k, v), cu = packed(torch.float16, [5, 40, 7, 60, 3], 4, 2, 64)
        prefixes = prefixes_of([5, 40, 7, 60, 3], [None, None, None, 1, None], q.device)
        arguments = (cu, (5, 40, 7, 60, 3), None, 0.125)
        expected = operations.attention(q, k, v, *arguments, prefixes=prefixes)[52:112].clone()
        for rows in (slice(0, 5), slice(45, 52), slice(112, 115)):
            k[rows], v[rows], q[rows] = float("nan"), float("nan"), float("nan")
        assert torch.equal(operations.attention(q, k, v, *arguments, prefixes=prefixes)[52:112], expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [64, 896, 1000, 2560])
    def test_logit(dtype, width):
        hidden, weight = randn(dtype, 5, width + 8, scale=3)[:, 8:], randn(dtype, width, scale=0.1, offset=1)
        vector = torch.randn(width, device=DEVICE) * width**-0.5
        expected = truth.logit(*truth.upcast(hidden, weight, vector), 1e-6)
        plain = truth.logit(hidden.float(), weight.float(), vector, 1e-6)
        result = operations.logit(hidden, weight, vector, 1e-6)
        truth.assert_error_rule(result, expected, plain, scale=truth.logit_terms(hidden, weight, vector))
        hidden[2, 3] = float("inf")
        assert operations.logit(hidden, weight, vector, 1e-6).isfinite().tolist() == [True, True, False, True, True]
        assert operations.logit(hidden[:0], weight, vector, 1e-6).shape == (0,)
        with pytest.raises(ValueError, match=r"expected \[R, D\], \[D\] and \[D\]"):
            operations.logit(hidden, weight[1:], vector, 1e-6)

    def test_attention_does_not_see_neighbours():
        (q, k, v), _ = packed(torch.float16, [70, 130, 5], 4, 2, 64)
        cu = torch.tensor([0, 130], device=DEVICE).int()
        alone = operations.attention(q[70:200], k[70:200], v[70:200], cu, (130,), None, 0.125)
        k[:70], v[200:], q[:70] = float("nan"), float("nan"), float("nan")
        cu = torch.tensor([0, 70, 200, 205], device=DEVICE).int()
        together = operations.attention(q, k, v, cu, (70, 130, 5), None, 0.125)
        assert torch.equal(together[70:200], alone)

    def far_rows(rows, width):
        """fp16 rows so far apart that the last begin past element 2^31; only their pages are ever touched on a CPU, and
        a GPU holds one such tensor (6.4 GB) at a time."""
        if DEVICE != "cpu":
            torch.cuda.empty_cache()
            if torch.cuda.mem_get_info()[0] < 7 << 30:
                pytest.skip("the GPU has no 7 GiB free")
        stride = (2**31 // (rows - 2)) // 16 * 16 + 64
        whole = torch.empty(stride * rows, dtype=torch.float16, device=DEVICE)
        view = whole.as_strided((rows, width), (stride, 1))
        assert (rows - 1) * stride > 2**31
        view.copy_(randn(torch.float16, rows, width))
        return view

    FAR = pytest.mark.skipif(EMULATE is not None, reason="the emulator copies what a launch is given")

    @FAR
    def test_norms_and_gate_past_2_to_the_31():
        eps = 1e-6
        x, weight = far_rows(6, 64), randn(torch.float16, 64)
        assert torch.equal(operations.rms_norm(x, weight, eps), operations.rms_norm(x.contiguous(), weight, eps))
        assert torch.equal(operations.swiglu(x), operations.swiglu(x.contiguous()))
        near = randn(torch.float16, 6, 64)
        expected = operations.add_rms_norm(x.clone().contiguous(), near, weight, eps)[1]
        assert torch.equal(operations.add_rms_norm(x, near, weight, eps)[1], expected)

    @FAR
    def test_heads_past_2_to_the_31():
        rows = 6
        qkv = far_rows(rows, 4 * 64)
        views, cu = [part.unflatten(1, (-1, 64)) for part in qkv.split([128, 64, 64], 1)], torch.tensor([0, 2, 6])
        cu = cu.to(DEVICE, torch.int32)
        near = [view.contiguous() for view in views]
        for window in (None, 2):
            expected = operations.attention(*near, cu, (2, 4), window, 0.125)
            assert torch.equal(operations.attention(*views, cu, (2, 4), window, 0.125), expected)
        table, positions = torch.rand(rows, 32, device=DEVICE), torch.arange(rows, device=DEVICE)
        weight = randn(torch.float16, 64)
        arguments = (weight, weight, table, table, positions, 2, 1, 1e-6)
        expected = operations.qk_norm_rope(qkv.clone(memory_format=torch.contiguous_format), *arguments)
        assert torch.equal(operations.qk_norm_rope(qkv, *arguments), expected)

    @FAR
    def test_readouts_past_2_to_the_31():
        x, weight = far_rows(6, 64), randn(torch.float16, 64)
        maps = [torch.tensor(m, device=DEVICE) for m in ([0, 1, 4], [2, 5], [0, 0, 1], [0, 1])]
        projector = (weight, randn(torch.float16, 32, 64), randn(torch.float16, 16, 32))
        for out, expected in zip(
            operations.score(x, *maps, *projector, 1e-6), operations.score(x.contiguous(), *maps, *projector, 1e-6),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(out, expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("documents", "requests"), [([1], [0]), ([20, 20, 5], [0, 0, 0]), ([2, 1, 5, 1], [0, 1, 1, 2])], ids=str
    )
    def test_score(dtype, documents, requests):
        width, p1, p = 200, 72, 40
        sequence = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        maps = (torch.arange(sum(documents)) + sequence, torch.tensor(documents).add(1).cumsum(0) - 1, sequence,
                torch.tensor(requests))  # fmt: skip
        maps = tuple(x.to(DEVICE) for x in maps)
        pooled = []
        for _ in range(max(1, 16 // sum(documents))):  # of one document a few numbers would decide
            hidden = randn(dtype, sum(documents) + len(documents), width, scale=2)
            weights = (randn(dtype, width, scale=0.1, offset=1), randn(dtype, p1, width, scale=width**-0.5),
                       randn(dtype, p, p1, scale=p1**-0.5))  # fmt: skip
            expected = truth.score(hidden.double(), *maps, *truth.upcast(*weights), 1e-6)
            plain = truth.score(hidden.float(), *maps, *(w.float() for w in weights), 1e-6)
            terms = truth.projection_terms(hidden.double(), *truth.upcast(*weights), 1e-6)
            found = operations.score(hidden, *maps, *weights, 1e-6)
            pooled.append([[x.flatten() / s for x, s in zip(parts, (terms, terms, 1.0), strict=True)]
                           for parts in (found, expected, plain)])  # fmt: skip
        for part in range(3):
            found, expected, plain = (torch.cat([draw[kind][part] for draw in pooled]) for kind in range(3))
            truth.assert_error_rule(found, expected, plain, 1.0)

    def model_of(tmp_path, shape, dtype=torch.float32):
        from lastrerank import Reranker
        from lastrerank.families import FAMILIES
        from lastrerank.model import Model
        from lastrerank.random_checkpoint import SHAPES, small_tokenizer, texts_for, write_random_checkpoint

        overrides = {"num_hidden_layers": 2} | ({"sliding_window": 100} if "3.5" in shape else {})
        texts = texts_for(FAMILIES[SHAPES[shape].get("family", "listwise")])
        write_random_checkpoint(tmp_path, shape, tokenizer=small_tokenizer(texts), overrides=overrides)
        reranker = Reranker.from_pretrained(tmp_path, device=DEVICE, dtype="float32", backend="reference")
        return reranker, Model(reranker.config, reranker.model.weights, operations)

    def pass_of(*lengths):
        """Of sequences of random tokens, shorter than a prompt; in the interpreter every row takes its time."""
        from lastrerank.packing import PackedBatch

        starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        ids = torch.randint(300, (sum(lengths),), device=DEVICE)
        positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])
        read = torch.cat([starts[:-1] + 3, starts[1:] - 1]).sort().values
        return PackedBatch(ids, positions, starts.int(), lengths, read, max(lengths))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_overflowed_gives_no_score(bad):
        """Through the gather, the norm, the ReLU and the cosine: a hidden row that is not finite must show."""
        hidden = randn(torch.float16, 4, 64)
        hidden[1, 5] = bad
        maps = [torch.tensor(x, device=DEVICE) for x in ([0, 1, 2], [3], [0, 0, 0], [0])]
        weights = (randn(torch.float16, 64), randn(torch.float16, 32, 64), randn(torch.float16, 16, 32))
        scores = operations.score(hidden, *maps, *weights, 1e-6)[2]
        assert scores.isfinite().tolist() == [True, False, True]

    @pytest.mark.parametrize("shape", ["tiny", "tiny-v3.5"])
    def test_whole_model(shape, tmp_path):
        """The reference's scores, fp32, through every kernel."""
        reference, fast = (model_of(tmp_path, shape)[0] for _ in range(2))
        fast.model = model_of(tmp_path, shape)[1]
        arguments = ("a query", ["a document", "another one of some length " * 4, "short", "x y z"])
        a, b = (
            {r["index"]: r["relevance_score"] for r in x.rerank(*arguments, block_size=3)} for x in (reference, fast)
        )
        assert max(abs(a[i] - b[i]) for i in a) <= 2e-5

    @pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-qwen2"])
    def test_whole_pointwise_model(shape, tmp_path):
        """The same of a model that reads logits, prompts sharing their beginning."""
        reference, fast = (model_of(tmp_path, shape)[0] for _ in range(2))
        fast.model = model_of(tmp_path, shape)[1]
        arguments = ("a query", ["a document", "another one of some length " * 4, "short", "x y z"])
        a, b = ({r["index"]: r["raw_score"] for r in x.rerank(*arguments)} for x in (reference, fast))
        assert max(abs(a[i] - b[i]) for i in a) <= 1e-4

    def test_a_static_bucket(tmp_path):
        """What a CUDA graph replays: lengths known to the device alone, sequences and read rows to spare."""
        from lastrerank.graphs import empty_bucket, fill

        model = model_of(tmp_path, "tiny-v3.5")[1]
        bucket = empty_bucket(128, torch.device(DEVICE))
        for lengths in ((20, 50), (110,)):  # one is longer than the window
            batch = pass_of(*lengths)
            fill(bucket, batch)
            out, expected = model.hidden_states(bucket)[: len(batch.read_rows)], model.hidden_states(batch)
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_registered_operations():
        """PyTorch's own checks: schemas, what is written and what aliases, fakes, traced as run."""
        check = torch.library.opcheck
        registered = torch.ops.lastrerank
        x, weight = randn(torch.float32, 5, 64), randn(torch.float32, 64)
        with torch.inference_mode(False):
            x, weight = x.clone(), weight.clone()
            check(registered.rms_norm.default, (x, weight, 1e-6))
            check(registered.add_rms_norm_.default, (x.clone(), x, weight, 1e-6))
            check(registered.swiglu.default, (x,))
            qkv, table, positions = torch.randn(5, 256).to(DEVICE), torch.rand(5, 32).to(DEVICE), torch.arange(5)
            check(registered.qk_norm_rope_.default,
                  (qkv, weight, None, table, table, positions.to(DEVICE), 2, 1, 1e-6))
            q, k, v = (part.unflatten(1, (-1, 64)).contiguous() for part in qkv.split([128, 64, 64], 1))
            cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
            continued = torch.tensor([[0, 0], [0, 2]], dtype=torch.int32, device=DEVICE)
            check(registered.attention.default, (q, k, v, cu, 3, None, 0.125, None, None, None, False))
            check(registered.attention.default, (q, k, v, cu, 3, None, 0.125, None, continued, None, False))
            read = torch.tensor([1, 3]).to(DEVICE)
            check(registered.attention.default, (q[:2], k, v, cu, 3, 2, 0.125, read, None, None, False))
            check(registered.attention_.default, (q, k, v, cu, 3, 2, 0.125, continued, None, False))
            check(registered.attention_tiles.default, (cu, 5, 3, 2, 64, torch.float32, continued))
            tiles = registered.attention_tiles(cu, 5, 3, 2, 64, torch.float32, None)
            check(registered.attention.default, (q, k, v, cu, 3, None, 0.125, None, None, tiles, False))
            check(registered.logit.default, (x, weight, torch.randn(64).to(DEVICE), 1e-6))
            maps = [torch.tensor(m, device=DEVICE) for m in ([0, 1, 3], [2, 4], [0, 0, 1], [0, 0])]
            projector = (weight, torch.randn(32, 64).to(DEVICE), torch.randn(16, 32).to(DEVICE))
            check(registered.score.default, (x, *maps, *projector, 1e-6))

    @pytest.mark.parametrize("shape", ["tiny", "tiny-v3.5"])
    def test_the_forward_compiles_as_one_graph(shape, tmp_path):
        model = model_of(tmp_path, shape)[1]
        batch = pass_of(20, 33)
        expected = model.hidden_states(batch)
        compiled = torch.compile(model.hidden_states, fullgraph=True, backend="aot_eager")
        assert (compiled(batch) - expected).abs().max() <= 2e-5 * expected.abs().max()
        other = pass_of(27)
        expected = model.hidden_states(other)
        assert (compiled(other) - expected).abs().max() <= 2e-5 * expected.abs().max()

    @pytest.mark.parametrize("window", [None, 1, 3, 100])
    def test_flops_are_counted(window):
        """Against the count of visible pairs in the literal mask."""
        from torch.utils.flop_counter import FlopCounterMode

        (q, k, v), cu = packed(torch.float32, [5, 1, 9], 4, 2, 64)
        visible = sum(min(i + 1, window or i + 1) for length in (5, 1, 9) for i in range(length))
        with FlopCounterMode(display=False) as counter:
            operations.attention(q, k, v, cu, (5, 1, 9), window, 0.125, out=q)
        assert counter.get_total_flops() == 4 * 4 * 64 * visible
        rows = torch.tensor([2, 5, 14], device=DEVICE)  # positions 2, 0 and 8
        seen = sum(min(position + 1, window or position + 1) for position in (2, 0, 8))
        with FlopCounterMode(display=False) as counter:
            operations.attention(q[rows], k, v, cu, (5, 1, 9), window, 0.125, rows=rows)
        assert counter.get_total_flops() == 4 * 4 * 64 * seen
        prefixes = prefixes_of([5, 1, 9], [None, None, 0], q.device)
        seen = visible - sum(min(i + 1, window or i + 1) for i in range(9))
        seen += sum(min(i + 1, window or i + 1) for i in range(5, 14))
        with FlopCounterMode(display=False) as counter:
            operations.attention(q, k, v, cu, (5, 1, 9), window, 0.125, out=q, prefixes=prefixes)
        assert counter.get_total_flops() == 4 * 4 * 64 * seen

    def test_bad_shapes_are_named():
        x = randn(torch.float32, 4, 8)
        with pytest.raises(ValueError, match=r"weight \(7,\)"):
            operations.rms_norm(x, torch.ones(7, device=DEVICE), 1e-6)
        with pytest.raises(ValueError, match="rows must be contiguous"):
            operations.rms_norm(x.t(), torch.ones(4, device=DEVICE), 1e-6)
        with pytest.raises(ValueError, match=r"gate_up has shape \(4, 7\)"):
            operations.swiglu(x[:, :7])
        with pytest.raises(ValueError, match="head_dim is 8"):
            operations.attention(x[:, None], x[:, None], x[:, None], torch.tensor([0, 4]), (4,), None, 1.0)
