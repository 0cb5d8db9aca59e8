"""Whenever a save, an evaluation or a training is killed, what is found afterwards is the old or the new, never a
mixture, and what was begun is finished as if nobody had touched it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = {"save": 170, "eval": 24, "train": 12}


@pytest.mark.parametrize("what", KILLS)
def test_killed_at_random_moments(what, tmp_path):
    script = Path(__file__).with_name("interrupted.py")
    done = subprocess.run(
        [sys.executable, str(script), what, str(tmp_path), str(KILLS[what])], capture_output=True, text=True,
        timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], found
    assert found["at_work"] >= KILLS[what] // 3, found  # else nothing was interrupted
