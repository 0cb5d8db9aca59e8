"""Shared fixtures: random checkpoints, real text, and which devices there are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lastrerank import Reranker
from lastrerank.random_checkpoint import qwen3_tokenizer, small_tokenizer, write_random_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.append(str(ROOT))  # for `bench`, at the end: the repository root must not shadow installed packages
import bench  # noqa: E402, F401 (finds the kernels of a checkout that isn't installed)

# What decides whether a change lands says the same of the same change; `HYPOTHESIS_PROFILE=default` looks further.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Workers share the cores: threads that wait for each other cost more than they give.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    own_threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(own_threads))  # of processes that tests start, too
    torch.set_num_threads(own_threads)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first: where tests run in parallel, nobody waits for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("takes_minutes") is None)


@pytest.fixture(scope="session")
def texts() -> list[dict[str, str]]:
    """Real snippets in ten languages, with `lang`, `kind` and `text`."""
    lines = (Path(__file__).parent / "data" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def documents(texts: list[dict[str, str]]) -> list[str]:
    return [row["text"] for row in texts if row["kind"] == "document"]


@pytest.fixture(scope="session")
def tokenizer():
    """Qwen3's where the test extra brought it, else the small one."""
    return qwen3_tokenizer() or small_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random v3 checkpoint with the real tokenizer, fp32 weights."""
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v3.5's windowed layers."""
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny35"), "tiny-v3.5", dtype=torch.float32)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a small vocabulary and context: quick to load, with its own caps."""
    overrides = {"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256}}
    return write_random_checkpoint(
        tmp_path_factory.mktemp("small"), "tiny", tokenizer=small_tokenizer(), dtype=torch.float32, overrides=overrides
    )


@pytest.fixture(scope="session")
def reranker(tiny: Path) -> Reranker:
    return Reranker.from_pretrained(tiny, device="cpu", backend="reference")


@pytest.fixture(scope="session")
def small_reranker(small: Path) -> Reranker:
    return Reranker.from_pretrained(small, device="cpu")
