"""The emulator of compiled kernels: instructions against numpy, and faults that it must notice."""

from __future__ import annotations

import re
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux", allow_module_level=True)

from emulator import MODES, Fault, emulating
from emulator.block import Block
from emulator.instructions import decode
from emulator.memory import GlobalMemory
from emulator.program import parse

RANDOM = np.random.default_rng(0)
# Registers of every kind; thread n finds its element of argument i at %rdi.
_HEAD = """
.visible .entry kernel({parameters})
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<40>; .reg .b32 %r<200>; .reg .b64 %rd<40>;
    mov.u32 %r100, %tid.x;
"""


def execute(body, inputs, output, threads=32, mode="lazy", shared=0, before=""):
    """Run `body` with element n of each input in thread n: %r0.. (32 bit), %rs0.. or %rd20..; the output is stored from
    the register of its width with number 50 (%r50, %rs30, %rd30)."""
    memory = GlobalMemory()
    arrays = [*inputs, output]
    addresses = [memory.put(array) for array in arrays]
    lines = [before]
    for number, array in enumerate(arrays):
        lines.append(f"ld.param.b64 %rd{number}, [kernel_param_{number}];")
        lines.append(f"mad.wide.u32 %rd{number}, %r100, {array.itemsize}, %rd{number};")
    names = {2: "%rs{}", 4: "%r{}", 8: "%rd2{}"}
    for number, array in enumerate(inputs):
        register = names[array.itemsize].format(number)
        lines.append(f"ld.global.b{8 * array.itemsize} {{ {register} }}, [ %rd{number} + 0 ];")
    result = {2: "%rs30", 4: "%r50", 8: "%rd30"}[output.itemsize]
    lines += [body, f"st.global.b{8 * output.itemsize} [ %rd{len(inputs)} + 0 ], {{ {result} }};", "ret;"]
    parameters = ", ".join(f".param .u64 kernel_param_{n}" for n in range(len(arrays)))
    run("\n".join(lines), parameters, addresses, memory, threads, mode, shared)
    return memory.get(addresses[-1], output.nbytes).view(output.dtype).copy()


def run(body, parameters, arguments, memory, threads, mode="lazy", shared=0):
    program = parse(_HEAD.format(parameters=parameters, threads=threads) + body + "\n}")
    Block(program, decode(program), memory, arguments, 0, (0, 0, 0), (1, 1, 1), shared, mode, 0).run()


def integers(dtype):
    return RANDOM.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 32, dtype, endpoint=True)


def floats():
    return (RANDOM.standard_normal(32) * 10).astype(np.float32)


I32, U32, F32, U64 = np.int32, np.uint32, np.float32, np.uint64
CASES = [
    ("add.s32 %r50, %r0, %r1;", (I32, I32), lambda a, b: a + b),
    ("sub.s32 %r50, %r0, %r1;", (I32, I32), lambda a, b: a - b),
    ("mul.lo.s32 %r50, %r0, %r1;", (I32, I32), lambda a, b: a * b),
    ("mul.hi.u32 %r50, %r0, %r1;", (U32, U32), lambda a, b: ((a.astype(U64) * b) >> U64(32)).astype(U32)),
    ("mul.hi.s32 %r50, %r0, %r1;", (I32, I32), lambda a, b: ((a.astype(np.int64) * b) >> 32).astype(I32)),
    ("mad.lo.s32 %r50, %r0, %r1, 7;", (I32, I32), lambda a, b: a * b + I32(7)),
    ("mul.wide.s32 %rd30, %r0, %r1;", (I32, I32), lambda a, b: a.astype(np.int64) * b),
    ("mad.wide.u32 %rd30, %r0, 12, %rd21;", (U32, U64), lambda a, b: a.astype(U64) * U64(12) + b),
    ("min.s32 %r50, %r0, %r1;", (I32, I32), np.minimum),
    ("max.u32 %r50, %r0, %r1;", (U32, U32), np.maximum),
    ("div.s32 %r50, %r0, 7;", (I32,), lambda a: np.trunc(a / 7).astype(I32)),
    ("rem.s32 %r50, %r0, 7;", (I32,), lambda a: np.fmod(a, I32(7))),
    ("and.b32 %r50, %r0, %r1;", (U32, U32), np.bitwise_and),
    ("or.b32 %r50, %r0, %r1;", (U32, U32), np.bitwise_or),
    ("xor.b32 %r50, %r0, %r1;", (U32, U32), np.bitwise_xor),
    ("not.b32 %r50, %r0;", (U32,), np.invert),
    ("neg.s32 %r50, %r0;", (I32,), np.negative),
    ("shl.b32 %r50, %r0, 5;", (U32,), lambda a: a << U32(5)),
    ("shl.b32 %r50, %r0, 32;", (U32,), np.zeros_like),
    ("shr.u32 %r50, %r0, 5;", (U32,), lambda a: a >> U32(5)),
    ("shr.s32 %r50, %r0, 40;", (I32,), lambda a: a >> I32(31)),
    ("bfe.u32 %r50, %r0, 4, 9;", (U32,), lambda a: (a >> U32(4)) & U32(511)),
    ("bfe.s32 %r50, %r0, 4, 9;", (I32,), lambda a: (a << I32(19)) >> I32(23)),
    ("prmt.b32 %r50, %r0, %r1, 0x5410;", (U32, U32), lambda a, b: (a & U32(0xFFFF)) | (b << U32(16))),
    ("add.f32 %r50, %r0, %r1;", (F32, F32), lambda a, b: a + b),
    ("fma.rn.f32 %r50, %r0, %r1, %r2;", (F32,) * 3, lambda a, b, c: (a.astype("d") * b + c).astype(F32)),
    ("div.full.f32 %r50, %r0, %r1;", (F32, F32), lambda a, b: a / b),
    ("max.f32 %r50, %r0, 0f00000000;", (F32,), lambda a: np.maximum(a, F32(0))),
    ("max.f32 %r50, %r0, 0f7FC00000;", (F32,), lambda a: a),  # a NaN loses
    ("abs.f32 %r50, %r0;", (F32,), np.abs),
    ("ex2.approx.ftz.f32 %r50, %r0;", (F32,), np.exp2),
    ("cvt.rn.f32.s32 %r50, %r0;", (I32,), lambda a: a.astype(F32)),
    ("cvt.s64.s32 %rd30, %r0;", (I32,), lambda a: a.astype(np.int64)),
    ("cvt.u64.u32 %rd30, %r0;", (U32,), lambda a: a.astype(U64)),
    ("cvt.u32.u64 %r50, %rd20;", (U64,), lambda a: a.astype(U32)),
    ("cvt.u16.u32 %rs30, %r0;", (U32,), lambda a: a.astype(np.uint16)),
    ("setp.lt.s32 %p1, %r0, %r1; selp.b32 %r50, %r0, %r1, %p1;", (I32, I32), np.minimum),
    ("setp.gt.u32 %p1, %r0, %r1; @%p1 mov.u32 %r50, %r0; @!%p1 mov.u32 %r50, %r1;", (U32, U32), np.maximum),
    ("setp.eq.f32 %p1, 0f7FC00000, %r0; selp.b32 %r50, 1, 0, %p1;", (F32,), lambda a: np.zeros(32, U32)),
    ("setp.neu.f32 %p1, 0f7FC00000, %r0; selp.b32 %r50, 1, 0, %p1;", (F32,), lambda a: np.ones(32, U32)),
    ("mov.b32 {%rs1, %rs2}, %r0; mov.b32 %r50, {%rs2, %rs1};", (U32,), lambda a: (a << U32(16)) | (a >> U32(16))),
    ("shfl.sync.bfly.b32 %r50, %r0, 3, 31, -1;", (U32,), lambda a: a[np.arange(32) ^ 3]),
    ("shfl.sync.idx.b32 %r50, %r0, 5, 31, -1;", (U32,), lambda a: np.full(32, a[5])),
    ("shfl.sync.up.b32 %r50, %r0, 2, 0, -1;", (U32,), lambda a: a[np.maximum(np.arange(32) - 2, [0, 1] + [0] * 30)]),
    ("redux.sync.max.s32 %r50, %r0, -1;", (I32,), lambda a: np.full(32, a.max())),
    ("elect.sync %r1|%p1, -1; selp.b32 %r50, 1, 0, %p1;", (U32,), lambda a: (np.arange(32) == 0).astype(U32)),
]  # fmt: skip


@pytest.mark.parametrize(("body", "types", "expected"), CASES, ids=[case[0] for case in CASES])
@np.errstate(all="ignore")
def test_an_instruction_is_what_numpy_computes(body, types, expected):
    inputs = [floats() if t is F32 else integers(t) for t in types]
    wanted = expected(*inputs)
    found = execute(body, inputs, np.zeros(32, wanted.dtype))
    assert np.array_equal(found, wanted, equal_nan=wanted.dtype.kind == "f")


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_halves(kind):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    a, b = floats(), floats()

    def bits(x):
        return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)

    packed = execute(f"cvt.rn.{kind}x2.f32 %r50, %r1, %r0;", [a, b], np.zeros(32, U32))
    assert np.array_equal(packed & 0xFFFF, bits(a)) and np.array_equal(packed >> 16, bits(b))
    wide = execute(f"cvt.f32.{kind} %r50, %rs0;", [bits(a)], np.zeros(32, F32))
    assert np.array_equal(wide, torch.from_numpy(a).to(dtype).float().numpy())
    total = execute(f"add.{kind}x2 %r50, %r0, %r1;", [packed, packed[::-1].copy()], np.zeros(32, U32))
    exact = (torch.from_numpy(a).to(dtype) + torch.from_numpy(a[::-1].copy()).to(dtype)).view(torch.int16).numpy()
    assert np.array_equal((total & 0xFFFF).astype(np.uint16), exact.view(np.uint16))


def test_float8():
    values = np.array([0, 1, -1.06, 300, 1e9, -1e9, 0.001, 5] * 4, F32)
    found = execute("cvt.rn.satfinite.e4m3x2.f32 %rs30, %r0, %r0;", [values], np.zeros(32, np.uint16))
    exact = torch.from_numpy(values.clip(-448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(found, exact * np.uint16(257))


def test_a_matrix_product_by_the_documented_fragments():
    """mma.sync: the ISA's figures, element by element."""
    a, b, c = (RANDOM.integers(-4, 5, size).astype(F32) for size in ((16, 16), (16, 8), (16, 8)))
    registers = np.zeros((10, 32), U32)

    def pair(low, high):
        low, high = (int(torch.tensor(float(x)).bfloat16().view(torch.int16).item()) & 0xFFFF for x in (low, high))
        return low | high << 16

    for lane in range(32):
        group, place = lane // 4, lane % 4
        for number, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            at, first = group + row, 2 * place + column
            registers[number, lane] = pair(a[at, first], a[at, first + 1])
        for number in range(2):
            first = 2 * place + 8 * number
            registers[4 + number, lane] = pair(b[first, group], b[first + 1, group])
        for number in range(4):
            value = c[group + 8 * (number // 2), 2 * place + number % 2]
            registers[6 + number, lane] = value.view(U32)
    for number in range(4):
        body = ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r10, %r11, %r12, %r13}, {%r0, %r1, %r2, %r3}, "
                f"{{%r4, %r5}}, {{%r6, %r7, %r8, %r9}}; mov.b32 %r50, %r{10 + number};")  # fmt: skip
        found = execute(body, list(registers), np.zeros(32, F32))
        lane = np.arange(32)
        assert np.array_equal(found, (a @ b + c)[lane // 4 + 8 * (number // 2), 2 * (lane % 4) + number % 2])


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_to_shared_memory_and_back(transposed):
    """stmatrix of a fragment, ldmatrix of the same addresses: the fragment, or the transposed matrix's."""
    matrix = RANDOM.integers(0, 2**16, (8, 8)).astype(np.uint16)
    fragment = np.ascontiguousarray(matrix).view(U32).reshape(32)
    trans = ".trans" if transposed else ""
    body = ("and.b32 %r1, %r100, 7; shl.b32 %r1, %r1, 4; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2;"
            "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r0};"
            f"ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r50}}, [%r1];")  # fmt: skip
    found = execute(body, [fragment], np.zeros(32, U32), shared=128)
    wanted = matrix.T if transposed else matrix
    assert np.array_equal(found, np.ascontiguousarray(wanted).view(U32).reshape(32))


def test_threads_that_part_meet_again():
    body = """
    setp.lt.s32 %p1, %r100, 10;
    @%p1 bra $low;
    add.s32 %r50, %r0, 1;
    bra $end;
$low:
    sub.s32 %r50, %r0, 1;
$end:
    add.s32 %r50, %r50, %r50;
"""
    values = integers(I32)
    found = execute(body, [values], np.zeros(32, I32))
    assert np.array_equal(found, 2 * (values + np.where(np.arange(32) < 10, -1, 1).astype(I32)))


# What must be noticed.

_SHARED = "shl.b32 %r1, %r100, 2; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2; xor.b32 %r3, %r1, 128;"
FAULTS = {
    "out of bounds": "ld.global.b32 { %r5 }, [ %rd0 + 256 ];",
    "outside of memory": "ld.global.b32 { %r5 }, [ 64 + 0 ];",
    "misaligned": "ld.global.b32 { %r5 }, [ %rd0 + 2 ];",
    "outside of shared memory": f"{_SHARED} st.shared.b32 [ %r1 + 4096 ], %r0;",
    "never written": f"{_SHARED} ld.shared.b32 %r5, [ %r1 + 0 ];",
    # Two warps: a barrier is missing between the store and the other warp's load.
    "never written|nothing waited for it": f"{_SHARED} st.shared.b32 [ %r1 + 0 ], %r0; ld.shared.b32 %r5, [ %r3 + 0 ];",
    # ... and between the load and what overwrites it.
    "still read or written|nothing waited for it": f"{_SHARED} st.shared.b32 [ %r1 + 0 ], %r0; bar.sync 0;"
                             "ld.shared.b32 %r5, [ %r3 + 0 ]; st.shared.b32 [ %r1 + 0 ], %r100;",
    "deadlock": "setp.lt.s32 %p1, %r100, 32; @%p1 bra $skip; bar.sync 0; $skip: ",
    "no mbarrier was initialised": "mbarrier.try_wait.parity.shared.b64 %p1, [global_smem], 0;",
    "more arrivals": "mbarrier.init.shared::cta.b64 [global_smem], 1; mbarrier.arrive.shared.b64 _, [global_smem], 2;",
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_fault_is_named(message, mode):
    body = FAULTS[message]
    threads = 1 if "mbarrier" in body else 64
    with pytest.raises(Fault, match=message):
        execute(body, [np.arange(threads, dtype=U32) + U32(7)], np.zeros(threads, U32), threads, mode, shared=512)


@pytest.mark.parametrize("mode", MODES)
def test_with_barriers_the_same_is_no_fault(mode):
    body = f"{_SHARED} st.shared.b32 [ %r1 + 0 ], %r0; bar.sync 0; ld.shared.b32 %r50, [ %r3 + 0 ]; bar.sync 0;" \
           "st.shared.b32 [ %r1 + 0 ], %r100;"  # fmt: skip
    values = RANDOM.integers(0, 2**32, 64, U32)
    found = execute(body, [values], np.zeros(64, U32), 64, mode, shared=512)
    assert np.array_equal(found, values[np.arange(64) ^ 32])


def test_what_is_not_modelled_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"not modelled: vote\.sync"):
        execute("vote.sync.any.pred %p1, %p2, -1;", [integers(U32)], np.zeros(32, U32))


# Faults planted in a compiled kernel.


def attend(kernel, mode, change=None, length=200):
    """kernel: that of sm_80 or sm_90, or Hopper's own."""
    from lastrerank.kernels import attention

    torch.manual_seed(0)
    dim = 128
    q, k, v = (x.unflatten(1, (-1, dim)) for x in torch.randn(length, 4 * dim).bfloat16().split([256, 128, 128], 1))
    chip = "sm_90" if kernel == "hopper" else kernel
    with patch.dict(attention.OWN, clear=kernel != "hopper"), emulating(chip, mode, change=change):
        return attention.attention(q, k, v, torch.tensor([0, length]).int(), length, None, dim**-0.5)


def replaced(pattern, new, which=0):
    """One occurrence of a pattern in the PTX, which must be there."""

    def change(text):
        found = list(re.finditer(pattern, text, re.S))
        assert found, pattern
        match = found[which]
        return text[: match.start()] + match.expand(new) + text[match.end() :]

    return change


def everywhere(pattern, new):
    def change(text):
        assert re.search(pattern, text)
        return re.sub(pattern, new, text)

    return change


def _without_barriers_in_the_loop(text):
    """From the first matrix product to the last copy that its successors read."""
    start, end = text.index("wgmma.mma_async"), text.rindex("cp.async.bulk")
    return text[:start] + re.sub(r"bar\.sync\s+0;", "", text[start:end]) + text[end:]


def _one_more(match):
    return f"{match[1]}{int(match[2]) + 1}"


def _bytes(factor):
    return everywhere(r"(expect_tx[^;]*, )(\d+);", lambda match: f"{match[1]}{int(int(match[2]) * factor)};")


# By name: the kernels it is planted in, and how.
PLANTED = {
    # A wait that lets one group more be on its way, or none.
    "cp.async": (("sm_80",), everywhere(r"(cp\.async\.wait_group\s+)(\d+)", _one_more)),
    "wgmma": (("sm_90", "hopper"), everywhere(r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+)", _one_more)),
    "mbarrier": (("sm_90", "hopper"), everywhere(r"@!complete bra\.uni waitLoop;|mbarrier\.try_wait[^;]*;", "")),
    # A barrier less: before what was copied is read, and before it is overwritten; where warps have roles, a stage that
    # is filled anew when one of its two readers has left it.
    "barrier before": (
        ("sm_80",), replaced(r"(cp\.async\.wait_group\s+\d+;(?:(?!bar\.sync).)*)bar\.sync\s+0;", r"\1")
    ),
    "barrier after": (("sm_80",), replaced(r"bar\.sync\s+0;((?:(?!bar\.sync).)*cp\.async\.cg)", r"\1", -1)),
    "barriers after": (("sm_90",), _without_barriers_in_the_loop),
    "one reader after": (("hopper",), everywhere(r"(mbarrier\.init[^;]*, )2;", r"\g<1>1;")),
    # An expectation of another size.
    "expects less": (("sm_90", "hopper"), _bytes(0.5)),
    "expects more": (("sm_90", "hopper"), _bytes(2)),
    # A fence less.
    "proxy fence": (("sm_90", "hopper"), everywhere(r"fence\.proxy\.async[^;]*;", "")),
    "register fence": (("sm_90", "hopper"), everywhere(r"wgmma\.fence[^;]*;", "")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "fault"), [(kernel, fault) for fault, (kernels, _) in PLANTED.items() for kernel in kernels]
)
def test_a_planted_fault_is_caught(kernel, fault):
    """However soon or late asynchronous work is done."""
    change = PLANTED[fault][1]
    # A stage is used again from the third step on; the tile that has so many comes first.
    length = 450 if "after" in fault else 200
    for mode in ("eager", "lazy"):
        with pytest.raises(Fault):
            attend(kernel, mode, change, length)


@pytest.mark.parametrize("mode", ["lazy", "random"])
def test_values_whose_tail_is_still_being_cleared_are_not_taken(mode):
    """The second warpgroup's wait for the first, which puts zeros behind a sequence's end."""
    change = replaced(r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 complete, 0, 0;", 2)
    with pytest.raises(Fault, match=r"wgmma.*another warp wrote"):
        attend("hopper", mode, change)


@pytest.mark.parametrize("kernel", ["sm_80", "sm_90", "hopper"])
def test_the_kernel_without_a_planted_fault_passes(kernel):
    """Whichever Triton wrote it: 3.7 has the copy engine write to `shared::cta`, 3.6 to `shared::cluster`."""

    def as_the_other(text):
        there, other = ("cluster", "cta") if "tensor.2d.shared::cluster" in text else ("cta", "cluster")
        assert kernel == "sm_80" or f"tensor.2d.shared::{there}" in text
        return text.replace(f"tensor.2d.shared::{there}", f"tensor.2d.shared::{other}")

    eager, lazy = attend(kernel, "eager"), attend(kernel, "lazy", change=as_the_other)
    assert eager.isfinite().all() and torch.equal(eager, lazy)
