"""Every kernel compiled for the chips served, without a GPU: nothing spills, everything fits, the right instructions.

In a process of its own, because Triton decides at import whether it compiles or interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@pytest.fixture(scope="module")
def report():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "import json; from bench.compile_kernels import *; from bench.measure import machine\n"
         "print(json.dumps([table(list(TARGETS)), SHARED_OF_A_BLOCK, machine()]))"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(report):
    return report[0]


def test_every_kernel_compiles_for_every_chip(rows):
    names = {"_rms_norm_kernel", "_qk_norm_rope_kernel", "_swiglu_kernel", "_attention_kernel", "_project_kernel",
             "_fuse_kernel"}  # fmt: skip
    for chip in MATRIX:
        assert {row["kernel"] for row in rows if row["chip"] == chip} == names


def test_nothing_spills(rows):
    assert [row for row in rows if row["spilled_bytes"]] == []


def test_shared_memory_fits(report):
    rows, limits, _ = report
    assert [row for row in rows if row["shared_bytes"] > limits[row["chip"]]] == []
    assert all(row["occupancy"] > 0 for row in rows)


def test_16_bit_attention_uses_the_matrix_unit(rows):
    attention = [row for row in rows if row["kernel"] == "_attention_kernel" and "float32" not in row["launch"]]
    assert len(attention) == 7 * len(MATRIX)
    for row in attention:
        assert MATRIX[row["chip"]] in row["matrix_instructions"], row


def test_row_kernels_load_16_bytes_at_once(rows):
    for row in rows:
        if row["chip"].startswith("sm_") and row["kernel"] != "_fuse_kernel":
            assert row["loads_of_16_bytes"] > 0, row


def test_the_committed_table_is_what_the_compiler_gives(report):
    rows, _, machine = report
    committed = json.loads((ROOT / "bench" / "results" / "kernels_compiled.json").read_text())
    if committed["machine"]["triton"] != machine["triton"]:
        pytest.skip(f"the table was made with Triton {committed['machine']['triton']}, here is {machine['triton']}")
    assert rows == committed["rows"]
