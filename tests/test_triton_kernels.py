"""Triton kernels against the fp64 truth by the error rule: on a GPU where there is one, else in Triton's interpreter.

In a process of its own where the interpreter is needed, because Triton reads `TRITON_INTERPRET` when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import truth

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if not INTERPRET and DEVICE == "cpu":

    def test_in_the_interpreter():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"],
            env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:]
        assert " passed" in done.stdout

else:
    from lastrerank.kernels.rms_norm import add_rms_norm, rms_norm

    # The interpreter's casts to bf16 truncate (Triton 3.6), so bf16 is checked on a GPU only.
    DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", [1, 2, 63, 129])
    @pytest.mark.parametrize("width", [64, 1000, 1024])
    def test_rms_norm(dtype, rows, width):
        torch.manual_seed(rows * width)
        wide = torch.full((rows, width + 32), float("nan"), dtype=dtype, device=DEVICE)
        wide[:, :width] = 3 * torch.randn(rows, width)
        x, weight = wide[:, :width], (1 + 0.1 * torch.randn(width)).to(DEVICE, dtype)
        expected = truth.rms_norm(x.double(), weight.double(), 1e-6)
        truth.assert_error_rule(rms_norm(x, weight, 1e-6), expected, truth.rms_norm(x, weight, 1e-6))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", [1, 65])
    def test_add_rms_norm(dtype, rows):
        torch.manual_seed(rows)
        residual, x = (torch.randn(rows, 1024, device=DEVICE).to(dtype) for _ in range(2))
        weight = (1 + 0.1 * torch.randn(1024)).to(DEVICE, dtype)
        total = residual + x
        updated, out = add_rms_norm(residual, x, weight, 1e-6)
        assert updated is residual and torch.equal(residual, total)
        expected = truth.rms_norm(total.double(), weight.double(), 1e-6)
        truth.assert_error_rule(out, expected, truth.rms_norm(total, weight, 1e-6))

    def test_bad_shapes_are_named():
        x = torch.randn(4, 8, device=DEVICE)
        with pytest.raises(ValueError, match=r"weight \(7,\)"):
            rms_norm(x, torch.ones(7, device=DEVICE), 1e-6)
        with pytest.raises(ValueError, match="rows must be contiguous"):
            rms_norm(x.t(), torch.ones(4, device=DEVICE), 1e-6)
