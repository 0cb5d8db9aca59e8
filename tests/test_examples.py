"""The documentation's examples, and README's first one, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not list(tmp_path.iterdir())


def test_readmes_first_snippet_is_the_first_example():
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert snippet == (ROOT / "docs" / "examples" / "first.py").read_text(encoding="utf-8")


def test_pages_and_code_that_the_documentation_names_exist():
    """mkdocs checks its own links; this one the files named in prose."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:lastrerank|kernels|tests|bench|docs|csrc)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), (page, name)
        for name in re.findall(r"\]\((?!http|#)([\w./-]+)\)", text):
            assert (page.parent / name).exists(), (page, name)
        for target in re.findall(r"`make ([\w-]+)`", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (page, target)
