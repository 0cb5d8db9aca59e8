"""How the package installs and imports."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def python(code: str, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_never_shadow_the_published_package_of_that_name():
    """From the repository root, where a folder `kernels` lies on sys.path: it is no package, and a real one wins."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import sys, pathlib, tempfile\n"
        "d = pathlib.Path(tempfile.mkdtemp()); (d / 'kernels').mkdir()\n"
        "(d / 'kernels' / '__init__.py').write_text('published = True')\n"
        "sys.path.append(str(d))\n"
        "import kernels; print(kernels.published)"
    )
    assert python(code, ROOT).strip() == "True"
    assert python("import lastrerank.kernels as k; print(list(k.__path__))", ROOT).strip().endswith("kernels']")


def test_importing_needs_little():
    code = (
        "import sys, time, torch; start = time.perf_counter(); import lastrerank\n"
        "print([m for m in ('triton', 'transformers', 'huggingface_hub', 'rich', 'typer') if m in sys.modules])"
    )
    # torch itself may import triton; what we may not do is import more than it did.
    alone = python("import sys, torch; print([m for m in ('triton',) if m in sys.modules])", ROOT)
    assert python(code, ROOT).replace(alone.strip().strip("[]"), "").strip().strip("[], ") == ""


def test_a_cuda_build_of_torch_fits_beside_everything_declared():
    """It brings a Triton of its own version (2.11: 3.6.0, 2.13: 3.7.1) and NVIDIA's libraries: nothing here may pin
    one. `make test` could not be resolved there otherwise."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text[text.index("[project.optional-dependencies]") : text.index("[project.urls]")]
    groups = text[text.index("[dependency-groups]") : text.index("[tool.scikit-build]")]
    required = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    declared = re.findall(r'"([\w.-]+)[^"]*"', required + extras + groups)
    constrained = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert "pytest" in declared and "torch" in constrained  # the expressions find something
    assert "serve" in extras and "pytest" not in extras  # what developing needs is not published
    brought = re.compile(r"triton|pytorch-triton|nvidia|cuda")
    assert [name for name in declared + constrained if brought.match(name)] == []


@pytest.mark.parametrize(
    ("adapter", "library", "extra"),
    [("haystack", "haystack", "haystack"), ("langchain", "langchain_core", "langchain"),
     ("llama_index", "llama_index", "llama-index"), ("mteb", "mteb", "mteb"), ("ray", "ray", "ray"),
     ("rerankers", "rerankers", "rerankers")],
)  # fmt: skip
def test_an_adapter_without_its_library_says_how_it_is_installed(adapter, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"lastrerank.integrations.{adapter}", raising=False)
    command = re.escape(f"{sys.executable} -m pip install 'lastrerank[{extra}]'")  # right without an activation, too
    with pytest.raises(ModuleNotFoundError, match=rf"{library}.*{command}"):
        importlib.import_module(f"lastrerank.integrations.{adapter}")


def test_root_folders():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode == 0:
        folders = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line}
        assert {f for f in folders if not f.startswith(".")} <= {
            "csrc", "lastrerank", "kernels", "tests", "bench", "docs"}
