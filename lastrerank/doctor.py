"""What this machine can do, checked: versions, devices, backends, and numbers compared."""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lastrerank import Reranker, __version__, ops
from lastrerank.reranker import resolve_device

# jina-reranker-v3.5 in fp32 through its published Transformers package.
GOLDEN_QUERY = "What is the capital city of France?"
GOLDEN_DOCUMENTS = (
    "Paris is the capital and most populous city of France.",
    "The Rhine is a river in Central and Western Europe.",
    "Photosynthesis converts light energy into chemical energy.",
)
GOLDEN_SCORES = (0.521538, -0.138701, -0.118413)
GOLDEN_VECTOR = (2.566754, -1.079753, 1.213184)

_SELF_CHECK_TOLERANCE = {"cpu": 2e-5, "cuda": 2e-2}


def examine(device: str = "auto") -> dict[str, Any]:
    """Versions, device, why each backend is or isn't available, and a random tiny model scored by each that is."""
    target = resolve_device(device)
    dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    versions = {"lastrerank": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = platform.processor() or platform.machine()
    if target.type == "cuda":
        name = torch.cuda.get_device_name(target)
    backends = ops.availability(target, dtype)
    return {
        "versions": versions,
        "device": f"{target} ({name}), {torch.get_num_threads()} threads",
        "backends": backends,
        "self_check": _self_check(target, [b for b, reason in backends.items() if reason is None]),
    }


def _self_check(device: torch.device, backends: list[str]) -> dict[str, Any]:
    from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

    documents = [GOLDEN_DOCUMENTS[i % 3] * (1 + i % 7) for i in range(40)]
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(folder, "tiny-v3.5", tokenizer=small_tokenizer())
        truth = _scores(Reranker.from_pretrained(folder, device="cpu", backend="reference"), documents)
        difference = {
            backend: max(abs(a - b) for a, b in zip(
                truth, _scores(Reranker.from_pretrained(folder, device=str(device), backend=backend), documents),
                strict=True))
            for backend in backends
        }  # fmt: skip
    return {"ok": all(d <= _SELF_CHECK_TOLERANCE[device.type] for d in difference.values()), "difference": difference}


def verify_checkpoint(id_or_path: str | Path, device: str = "auto") -> dict[str, Any]:
    """Compare jina-reranker-v3.5 in fp32 with its published scores and first vector components."""
    reranker = Reranker.from_pretrained(id_or_path, device=device, dtype="float32")
    results = reranker.rerank(GOLDEN_QUERY, GOLDEN_DOCUMENTS, return_embeddings=True)
    by_index = {result["index"]: result for result in results}
    scores = [by_index[i]["relevance_score"] for i in range(3)]
    difference = max(abs(a - b) for a, b in zip(scores, GOLDEN_SCORES, strict=True))
    vector = [float(x) for x in by_index[0]["embedding"][:3]]
    off = max(abs(a - b) for a, b in zip(vector, GOLDEN_VECTOR, strict=True))
    message = (
        f"scores {', '.join(f'{s:.6f}' for s in scores)} differ by at most {difference:.1e} from the published ones, "
        f"vector components by {off:.1e}"
    )
    return {"ok": difference < 1e-3 and off < 1e-2, "scores": scores, "vector": vector, "message": message}


def _scores(reranker: Reranker, documents: list[str]) -> list[float]:
    results = sorted(reranker.rerank(GOLDEN_QUERY, documents, block_size=13), key=lambda r: r["index"])
    return [result["relevance_score"] for result in results]
