"""The native backend beyond the operations' common tests: int8 exactly, threads, forks, sanitizers, absence."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lastrerank import Reranker, ops
from lastrerank.ops import Prefixes

try:
    from lastrerank.ops.native import NativeOperations, instruction_sets

    ISAS = instruction_sets()
except RuntimeError as reason:
    pytest.skip(f"native backend: {reason}", allow_module_level=True)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LASTRERANK_ISA", request.param)
    return request.param


def integer_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What int8 means: weights to 7 bits by output, activations to 8 bits by row, exact integer sums, in fp64; weights
    beyond five root mean squares apart, with activations as they are."""
    limit = (5 * weight.double().square().mean(1, keepdim=True).sqrt()).float()
    outliers = weight.where(weight.abs() > limit, 0.0)
    weight = weight - outliers
    row_scale = x.abs().amax(1, keepdim=True) / 127
    # By a tensor: PyTorch divides a number by a tensor as a product with the reciprocal, one rounding more.
    inverse = torch.where(row_scale > 0, torch.full_like(row_scale, 127) / x.abs().amax(1, keepdim=True), 0.0)
    scaled = x * inverse
    q = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc()
    column_scale = weight.abs().amax(1, keepdim=True) / 64
    column_scale = torch.where(column_scale > 0, column_scale, 1.0)
    w = (weight / column_scale).round()
    rest = (q.double() @ w.double().T) * (row_scale.double() * column_scale.double().T)
    return rest + x.double() @ outliers.double().T


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), inner=st.integers(1, 700), outer=st.integers(1, 100), seed=st.integers(0, 2**20))
def test_int8_equals_the_integer_reference(rows, inner, outer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inner, generator=generator), torch.randn(outer, inner, generator=generator)
    x[0] = 0
    weight[::3, -1] *= 100  # outliers from 26 inputs on
    out = NativeOperations(int8=True).prepare(weight).matmul(x, None, None)
    expected = integer_reference(x, weight)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


def test_int8_on_every_instruction_set(isa):
    x, weight = torch.randn(33, 257), torch.randn(65, 257)
    weight[1::2, 200] = 30.0
    out = NativeOperations(int8=True).prepare(weight).matmul(x, None, None)
    torch.testing.assert_close(out.double(), integer_reference(x, weight), rtol=2e-6, atol=1e-5)
    # Extreme values: nothing saturates on the way.
    x, weight = torch.full((5, 3072), -7.0), torch.full((9, 3072), 3.0)
    x[:, ::2] = 7.0
    out = NativeOperations(int8=True).prepare(weight).matmul(x.abs(), None, None)
    torch.testing.assert_close(out, torch.full((5, 9), 21.0 * 3072), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_does_not_hide_what_is_not_finite(isa, bad):
    x = torch.randn(3, 64)
    x[1, 40] = bad
    out = NativeOperations(int8=True).prepare(torch.randn(8, 64)).matmul(x, None, None)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_bf16_weights_are_read_directly(isa):
    weight = torch.randn(40, 96).bfloat16()
    x = torch.randn(7, 96)
    for int8 in (False, True):
        operations = NativeOperations(int8=int8)
        direct, upcast = (operations.prepare(w).matmul(x, None, None) for w in (weight, weight.float()))
        assert torch.equal(direct, upcast)
    assert torch.equal(NativeOperations().prepare(weight).unpack(), weight.float())


def test_a_wrong_width_is_named():
    for int8 in (False, True):
        with pytest.raises(ValueError, match=r"x \(3, 65\): expected x \[T, 64\]"):
            NativeOperations(int8=int8).prepare(torch.randn(8, 64)).matmul(torch.randn(3, 65), None, None)


def test_rows_do_not_depend_on_their_neighbours(isa):
    x, weight = torch.randn(300, 640), torch.randn(100, 640)
    for int8 in (False, True):
        packed = NativeOperations(int8=int8).prepare(weight)
        whole = packed.matmul(x, None, None)
        for rows in (slice(0, 1), slice(17, 42), slice(299, 300)):
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
    operations = NativeOperations(int8=True)
    for shape in ((5, 7), (64, 64), (33, 130)):
        weight = torch.randn(shape)
        packed = operations.prepare(weight)
        unpacked = packed.unpack()
        assert ((unpacked - weight).abs().amax(1) <= weight.abs().amax(1) / 128 * 1.001).all()
        again = operations.prepare(unpacked, packed.scales)
        assert torch.equal(again._packed, packed._packed) and torch.equal(again._sums, packed._sums)


def test_an_outlier_costs_the_other_weights_nothing(isa):
    """One large weight in an output: without it the grid is as fine as before, and itself it is exact."""
    operations, weight = NativeOperations(int8=True), torch.randn(16, 300)
    plain = operations.prepare(weight.index_fill(1, torch.tensor([70]), 0.0)).unpack()
    weight[:, 70] = 100.0
    packed = operations.prepare(weight)
    unpacked = packed.unpack()
    assert (unpacked[:, 70] == 100.0).all()
    unpacked[:, 70] = 0.0
    assert torch.equal(unpacked, plain)
    again = operations.prepare(packed.unpack(), packed.scales)
    x = torch.randn(50, 300)
    assert torch.equal(again.matmul(x, None, None), packed.matmul(x, None, None))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory of a mapping is shown on Linux only")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_was_packed_is_not_kept(small, tmp_path, documents, dtype):
    """Beside the packed weights a CPU keeps the table alone, and of that only the pages it looked rows up in."""
    path = shutil.copytree(small, tmp_path / "copy") / "model.safetensors"
    reranker = Reranker.from_pretrained(path.parent, backend="native", dtype=dtype)
    mappings = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert len(mappings) == 1, "the table is not memory-mapped, or something else is"
    assert int(mappings[0]) * 1024 < path.stat().st_size / 4
    assert len(scores(reranker, documents[:3])) == 3


def test_a_quantised_model_is_kept(tiny, documents, tmp_path):
    """Half the size of 16 bit in the linears, the same scores again, and those of its weights in other dtypes."""
    state = safetensors.torch.load_file(tiny / "model.safetensors")
    for name, column in (("self_attn.k_proj", 5), ("mlp.down_proj", 9)):
        state[f"model.layers.1.{name}.weight"][::2, column] *= 30
    with_outliers = shutil.copytree(tiny, tmp_path / "outliers")
    safetensors.torch.save_file(state, with_outliers / "model.safetensors", metadata={"format": "pt"})
    int8 = Reranker.from_pretrained(with_outliers, dtype="int8")
    int8.save_pretrained(tmp_path / "int8")
    expected = scores(int8, documents[:20])
    again = scores(Reranker.from_pretrained(tmp_path / "int8", dtype="int8"), documents[:20])
    assert expected == again
    truth = scores(Reranker.from_pretrained(tmp_path / "int8", backend="reference"), documents[:20])
    assert max(abs(expected[i] - truth[i]) for i in expected) < 0.1  # the activations are not quantised here
    stored = safetensors.torch.load_file(tmp_path / "int8" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    assert len(stored["model.layers.1.mlp.down_proj.weight_outlier"]) > 10

    def refused(change, message):
        damaged = dict(stored)
        change(damaged)
        safetensors.torch.save_file(damaged, tmp_path / "int8" / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            Reranker.from_pretrained(tmp_path / "int8", dtype="int8")

    name = "model.layers.1.mlp.down_proj.weight"
    refused(lambda s: s.update({f"{name}_outlier_index": s[f"{name}_outlier_index"] + 4000}), "points outside of")
    refused(lambda s: s.update({f"{name}_scale": s[f"{name}_scale"] * 0}), "_scale is not positive and finite")
    refused(lambda s: s.pop(f"{name}_outlier_index"), "1 tensors are missing.*outlier_index")
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(tmp_path, sanitizers):
    """The driver with every kernel that runs here, under the sanitizers."""
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Wno-psabi",
             f"-I{ROOT / 'csrc'}"]  # fmt: skip
    sets = {"portable": [], "avx2": ["-mavx2", "-mfma"]} if "avx2" in ISAS else {"portable": []}
    # Without LASTRERANK_X86 the table would hold the portable kernels only; with it, all four must link.
    x86 = {"avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]} if "avx2" in ISAS else {}
    x86 |= {"avx512vnni": [*x86["avx512"], "-mavx512vnni"]} if x86 else {}
    objects = []
    jobs = []
    for name, isa_flags in (sets | x86).items():
        objects.append(str(tmp_path / f"{name}.o"))
        command = ["g++", *flags, *isa_flags, f"-DLASTRERANK_ISA={name}", "-c", str(ROOT / "csrc/kernels.cpp"), "-o",
                   objects[-1]]  # fmt: skip
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        assert job.wait(timeout=300) == 0, job.stderr.read()
    driver = str(tmp_path / "driver")
    sources = [str(ROOT / path) for path in ("tests/native_driver.cpp", "csrc/api.cpp", "csrc/parallel.cpp")]
    define = ["-DLASTRERANK_X86"] if x86 else []
    subprocess.run(["g++", *flags, *define, *sources, *objects, "-o", driver, "-lpthread"], check=True, timeout=300)
    mode = [] if sanitizers == "thread" else ["fork"]
    done = subprocess.run([driver, "4", *mode], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "0 failures\n"


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
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_shapes_that_do_not_belong_together_are_refused(name, int8):
    """Before a pointer is taken: they would be read and written beyond."""
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=r"\w"):
        SHAPES[name](NativeOperations(int8))


def test_rows_of_almost_nothing_stay_numbers():
    """In int8 the inverse of a row's largest value must not overflow."""
    native = NativeOperations(int8=True)
    weight = native.prepare(torch.randn(8, 64))
    x = torch.randn(4, 64)
    x[1], x[2] = 1e-42, 0.0
    with torch.no_grad():
        out = native.linear(x, weight)
    assert out.isfinite().all() and out[1].abs().max() <= 1e-30 and out[2].eq(0).all()


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
