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

# The chips compiled here; the committed tables have more.
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
# What is known to spill, by version of Triton: 40 bytes, which no tile that was tried avoids.
SPILLS = {"3.7.1": {("sm_120", "attention continued window")}}
TABLES = sorted((ROOT / "bench" / "results").glob("kernels_compiled_triton_*.json"))


@pytest.fixture(scope="module")
def report():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "import json; from bench.compile_kernels import *; from bench.measure import machine\n"
         f"print(json.dumps([table({list(MATRIX)}), {{c: s[0] for c, s in SHARED.items()}}, RESULTS]))"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(report):
    return report[0]


def test_every_kernel_compiles_for_every_chip(rows):
    names = {"_rms_norm_kernel", "_qk_norm_rope_kernel", "_swiglu_kernel", "_attention_kernel", "_project_kernel",
             "_fuse_kernel", "_logit_kernel"}  # fmt: skip
    for chip in MATRIX:
        own = {"_hopper_attention_kernel"} if chip == "sm_90" else set()
        assert {row["kernel"] for row in rows if row["chip"] == chip} == names | own


def test_nothing_spills(rows):
    assert [row for row in rows if row["spilled_bytes"]] == []


def test_shared_memory_fits(report):
    rows, limits, _ = report
    assert [row for row in rows if row["shared_bytes"] > limits[row["chip"]]] == []
    assert all(row["occupancy"] > 0 for row in rows)


def test_warps_of_a_norm_share_no_row(rows):
    """Those of 1,024 that are compiled here: a sum over several warps would go through shared memory and wait."""
    norms = [row for row in rows if row["kernel"] == "_rms_norm_kernel"]
    assert {row["chip"] for row in norms} == set(MATRIX)
    assert [row for row in norms if row["shared_bytes"] or row["warps"] != 1] == []


def test_attention_on_hopper_is_not_serialised_and_hides_its_exponentials(rows):
    """Half of a step's exponentials run under the product of the other half; ptxas adds no wait of its own. Where warps
    have roles, none of their own products hides them: those of the other warpgroup do."""
    attention = [row for row in rows if row["chip"] == "sm_90" and "products" in row]
    roles = [row for row in attention if row["kernel"] == "_hopper_attention_kernel"]
    assert len(roles) == 8 and len(attention) >= 12  # of five forms, three also beside what continues others
    for row in attention:
        assert row["waits"] <= row["products"] // 3, row
        assert row["exponentials_under_products"] >= 28 or row in roles, row
    assert {row["stages"] for row in roles} == {2}
    assert {row["warps"] for row in roles} == {12}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_committed_tables_are_of_every_chip_and_without_spills(path):
    table = json.loads(path.read_text())
    rows, known = table["rows"], SPILLS.get(table["machine"]["triton"], set())
    chips = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942"}
    assert {row["chip"] for row in rows} == chips
    assert {(row["chip"], row["launch"]) for row in rows if row["spilled_bytes"]} == known
    assert len({row["launch"] for row in rows}) >= 28


def test_16_bit_attention_uses_the_matrix_unit(rows):
    attention = [row for row in rows if row["kernel"] == "_attention_kernel" and "float32" not in row["launch"]]
    assert len(attention) == 12 * len(MATRIX)
    for row in attention:
        # The few read rows are fewer than a Hopper product has: they go through the older instruction.
        small = "rows" in row["launch"] and row["chip"].startswith("sm_")
        assert ("mma.sync" if small else MATRIX[row["chip"]]) in row["matrix_instructions"], row


def test_row_kernels_load_16_bytes_at_once(rows):
    for row in rows:
        if row["chip"].startswith("sm_") and row["kernel"] != "_fuse_kernel":
            assert row["loads_of_16_bytes"] > 0, row


def test_the_committed_table_is_what_the_compiler_gives(report):
    rows, _, name = report
    path = ROOT / "bench" / "results" / f"{name}.json"
    if path not in TABLES:
        pytest.skip(f"there are tables of {[table.stem for table in TABLES]}, here is {name}")
    committed = [row for row in json.loads(path.read_text())["rows"] if row["chip"] in MATRIX]
    assert {json.dumps(row) for row in rows} == {json.dumps(row) for row in committed}


def test_lengths_do_not_recompile():
    """Passes of any length, 1 and multiples of 16 among them, run the same compiled kernels."""
    code = (
        "import torch\n"
        "from bench.compile_kernels import TARGETS, compiling_for\n"
        "from lastrerank.kernels import attention, logit, qk_norm_rope, rms_norm, score, swiglu\n"
        "kinds = set()\n"
        "for rows in (1, 16, 37):\n"
        "    x, w = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)\n"
        "    cu = torch.tensor([0, rows], dtype=torch.int32)\n"
        "    q = torch.zeros(rows, 4, 64, dtype=torch.bfloat16)\n"
        "    maps = [torch.arange(rows), torch.tensor([0]), torch.zeros(rows).long(), torch.tensor([0])]\n"
        "    table, w2 = torch.zeros(rows, 32), torch.zeros(64, 64, dtype=torch.bfloat16)\n"
        "    with compiling_for(TARGETS['sm_90']) as compiled:\n"
        "        rms_norm.rms_norm(x, w, 1e-6)\n"
        "        swiglu.swiglu(x)\n"
        "        attention.attention(q, q[:, :2].contiguous(), q[:, :2].contiguous(), cu, rows, None, 1.0)\n"
        "        qk_norm_rope.qk_norm_rope(q.flatten(1), w, w, table, table, torch.arange(rows), 2, 1, 1e-6)\n"
        "        score.score(x, *maps, w, w2, w2, 1e-6)\n"
        "        logit.logit(x, w, w.float(), 1e-6)\n"
        "    kinds |= {(k.metadata.name, k.hash) for k in compiled}\n"
        "print(len({name for name, _ in kinds}), len(kinds))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, kinds = map(int, done.stdout.split())
    assert names == 7 and kinds == 8  # the two projections differ: gather, norm and ReLU are the first one's
