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


def test_pages_show_the_examples_as_they_are():
    """In the pages themselves, so that a page reads the same wherever it is rendered."""
    pages = {"README.md": ["first"], "docs/index.md": ["first"], "docs/python.md": [path.stem for path in EXAMPLES]}
    for page, names in pages.items():
        snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
        for name in names:
            assert (ROOT / "docs" / "examples" / f"{name}.py").read_text(encoding="utf-8") in snippets, (page, name)
    for page in (ROOT / "docs").rglob("*.md"):
        assert not re.search(r"^--8<--|^=== ", page.read_text(encoding="utf-8"), re.MULTILINE), page


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
