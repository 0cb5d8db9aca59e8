"""Every kernel's compiled code, executed by the emulator on small inputs: against the fp64 truth by the error rule, and
the same bits whether asynchronous work is done early, late or at random. `make test-emulated` runs the kernels' whole
test file this way.
"""

from __future__ import annotations

import sys

import pytest
import torch
import truth
from packs import prefixes_of

pytest.importorskip("triton", reason="Triton is not installed")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux", allow_module_level=True)

from emulator import MODES, emulating
from lastrerank.kernels.rms_norm import quantized_rows
from lastrerank.kernels.swiglu import quantized_swiglu

from lastrerank.ops.triton import TritonOperations

operations, portable_operations = TritonOperations(), TritonOperations(portable=True)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seed_and_no_grad():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def executed(call, chip="sm_90"):
    """The result, the same in every mode; call is given nothing and must leave its inputs as they are."""
    results = []
    for mode in MODES:
        with emulating(chip, mode) as launches:
            results.append(call())
        assert launches
    for other in results[1:]:
        for a, b in zip(parts(results[0]), parts(other), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return results[0]


def operations_of(portable):
    return portable_operations if portable else operations


def parts(result):
    return result if isinstance(result, tuple) else (result,)


def randn(*size, dtype=BF16, scale=1.0, offset=0.0):
    return (torch.randn(size) * scale + offset).to(dtype)


def check(found, function, *arguments, scale=None):
    truth.assert_error_rule(found, function(*truth.upcast(*arguments)), function(*arguments), scale)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_norms_and_gate(chip):
    x, y, weight = randn(5, 1024, scale=3), randn(5, 1024), randn(1024, scale=0.1, offset=1)
    normed = executed(lambda: operations.rms_norm(x, weight, 1e-6), chip)
    check(normed, lambda a, w: truth.rms_norm(a, w, 1e-6), x, weight)
    check(executed(lambda: operations.swiglu(x), chip), truth.swiglu, x)
    total = x + y
    both = executed(lambda: operations.add_rms_norm(x.clone(), y, weight, 1e-6), chip)
    assert torch.equal(both[0], total)
    check(both[1], lambda a, w: truth.rms_norm(a, w, 1e-6), total, weight)


def test_quantised_rows():
    x, weight = randn(5, 1024, scale=3), randn(1024, scale=0.1, offset=1)
    for found, exact in (
        (executed(lambda: quantized_rows(x)), x.double()),
        (executed(lambda: quantized_rows(x, None, weight, 1e-6)), truth.rms_norm(x.double(), weight.double(), 1e-6)),
        (executed(lambda: quantized_swiglu(x)), truth.swiglu(x.double())),
    ):
        values, scale = found
        error = (values.double() * scale - exact).abs()
        assert (error <= exact.abs() * 2**-4 + scale * 2**-10 + 2e-2 * scale).all()


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_rotary_heads(chip):
    qkv, weight = randn(3, 4 * 128, scale=2), randn(128, scale=0.1, offset=1)
    cos, sin, positions = torch.rand(9, 64), torch.rand(9, 64), torch.tensor([3, 0, 8])
    fixed = (positions, 2, 1, 1e-6)
    found = executed(lambda: operations.qk_norm_rope(qkv.clone(), weight, weight, cos, sin, *fixed), chip)
    check(found, lambda *x: truth.qk_norm_rope(*x, *fixed), qkv, weight, weight, cos, sin)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_readouts(chip):
    hidden, norm, w1, w2 = randn(7, 256), randn(256, offset=1), randn(64, 256, scale=1 / 16), randn(64, 64, scale=1 / 8)
    maps = [torch.tensor(m) for m in ([0, 1, 3, 4], [2, 5], [0, 0, 1, 1], [0, 0])]
    found = executed(lambda: operations.score(hidden, *maps, norm, w1, w2, 1e-6), chip)
    exact = truth.score(hidden.double(), *maps, *truth.upcast(norm, w1, w2), 1e-6)
    plain = truth.score(hidden.float(), *maps, norm.float(), w1.float(), w2.float(), 1e-6)
    terms = truth.projection_terms(hidden.double(), *truth.upcast(norm, w1, w2), 1e-6)
    for own, one, other, scale in zip(found, exact, plain, (terms, terms, 1.0), strict=True):
        truth.assert_error_rule(own, one, other, scale)
    vector = torch.randn(256) / 16
    logits = executed(lambda: operations.logit(hidden, norm, vector, 1e-6), chip)
    exact = truth.logit(*truth.upcast(hidden, norm, vector), 1e-6)
    plain = truth.logit(hidden.float(), norm, vector, 1e-6)
    truth.assert_error_rule(logits, exact, plain, truth.logit_terms(hidden, norm, vector))


def packed(lengths, dim, dtype=BF16, poison=0, group=2):
    """q, k, v as views of one projection, with NaN rows behind the last sequence and NaN columns beside."""
    rows, width = sum(lengths) + poison, (group + 2) * dim
    wide = torch.full((rows, width + 32), float("nan"), dtype=dtype)
    wide[: sum(lengths), :width] = randn(sum(lengths), width, dtype=dtype)
    q, k, v, _ = wide.split([group * dim, dim, dim, 32], 1)
    return [x.unflatten(1, (-1, dim)) for x in (q, k, v)], torch.tensor([0, *lengths]).cumsum(0).int()


# In 600 tokens every stage of Hopper's pipeline comes round twice, in 420 the portable kernel has three steps of keys.
@pytest.mark.parametrize(("chip", "portable", "longest", "window", "dim", "dtype", "group"), [
    ("sm_90", False, 600, None, 128, BF16, 2), ("sm_90", False, 200, 100, 128, torch.float16, 5),
    ("sm_90", False, 200, 200, 64, BF16, 7), ("sm_90", False, 420, None, 64, BF16, 1),
    ("sm_90", True, 420, None, 128, BF16, 2), ("sm_90", True, 420, 100, 128, torch.float16, 2),
    ("sm_90", True, 420, None, 64, BF16, 2),
    ("sm_80", True, 130, None, 128, BF16, 2), ("sm_80", True, 130, 100, 64, BF16, 2),
])  # fmt: skip
def test_attention(chip, portable, longest, window, dim, dtype, group):
    lengths = (1, 0, 64, longest)
    (q, k, v), cu = packed(lengths, dim, dtype, poison=70, group=group)
    own, operations = slice(sum(lengths)), operations_of(portable)
    arguments = (cu, (*lengths,), window, dim**-0.5)

    def call():
        out = torch.full(q.shape, float("nan"), dtype=dtype)
        return operations.attention(q, k, v, *arguments, out=out)[own]

    found = executed(call, chip)
    check(found, lambda *x: truth.attention(*x, lengths, window, dim**-0.5), q[own], k[own], v[own])
    if chip == "sm_90" and window is None:
        with emulating(chip) as launches:
            over = operations.attention(q, k, v, *arguments, out=q)
        assert torch.equal(over[own], found)
        assert launches[0].kernel == ("_attention_kernel" if portable else "_hopper_attention_kernel")


def test_attention_in_fp32():
    (q, k, v), cu = packed((3, 50), 64, torch.float32)
    found = executed(lambda: operations.attention(q, k, v, cu, (3, 50), None, 0.125))
    check(found, lambda *x: truth.attention(*x, (3, 50), None, 0.125), q, k, v)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("window", [None, 63])
def test_attention_of_read_rows(chip, window):
    lengths = (2, 165, 1, 40)
    (q, k, v), cu = packed(lengths, 128)
    rows = torch.tensor([1, 9, 80, 166, 167, 207])
    q = q[rows].contiguous()
    found = executed(lambda: operations.attention(q, k, v, cu, lengths, window, 128**-0.5, rows=rows), chip)
    check(found, lambda *x: truth.attention(*x, lengths, window, 128**-0.5, rows), q, k, v)


def test_attention_of_sequences_that_continue_others():
    lengths = (70, 30, 150)
    (q, k, v), cu = packed(lengths, 64)
    prefixes = prefixes_of(lengths, [None, 0, 0], q.device)
    found = executed(lambda: operations.attention(q, k, v, cu, lengths, None, 0.125, prefixes=prefixes))
    check(found, lambda *x: truth.attention(*x, lengths, None, 0.125, None, prefixes.host), q, k, v)


def test_what_others_continue_chooses_no_kernel():
    """Of a pass whose other sequences continue one, the rest is what it is without them."""
    lengths = (70, 30, 150)
    (q, k, v), cu = packed(lengths, 64)
    with emulating("sm_90") as launches:
        alone = operations.attention(q, k, v, cu, lengths, None, 0.125)
        together = operations.attention(
            q, k, v, cu, lengths, None, 0.125, prefixes=prefixes_of(lengths, [None, 0, None], q.device)
        )
    assert [launch.kernel for launch in launches] == [
        "_hopper_attention_kernel", "_hopper_attention_kernel", "_attention_kernel"
    ]  # fmt: skip
    assert torch.equal(together[:70], alone[:70]) and torch.equal(together[100:], alone[100:])
    assert not torch.equal(together[70:100], alone[70:100])


def test_without_the_copy_engine_the_bits_are_the_same():
    """Rows that are not aligned for it are fetched by ordinary copies, by another compiled kernel."""
    (q, k, v), cu = packed((300,), 64)
    shifted = []
    for x in (k, v):
        apart = torch.full((300, 68), float("nan"), dtype=BF16)  # a stride that is no multiple of 16 bytes
        apart[:, 2:66] = x.flatten(1)
        shifted.append(apart[:, 2:66].unflatten(1, (1, 64)))
    with emulating("sm_90"):
        fetched = portable_operations.attention(q, k, v, cu, (300,), None, 0.1)
        copied = portable_operations.attention(q, *shifted, cu, (300,), None, 0.1)
    assert torch.equal(fetched, copied)


@pytest.mark.parametrize("portable", [False, True])
def test_neighbours_change_no_bit(portable):
    (q, k, v), _ = packed((70, 300, 65), 128)
    own, operations = slice(70, 370), operations_of(portable)
    with emulating("sm_90"):
        alone = operations.attention(q[own], k[own], v[own], torch.tensor([0, 300]).int(), (300,), None, 0.1)
        for x in (q, k, v):
            x[:70], x[370:] = float("nan"), float("nan")
        cu = torch.tensor([0, 70, 370, 435]).int()
        together = operations.attention(q, k, v, cu, (70, 300, 65), None, 0.1)
    assert torch.equal(together[own], alone)
