"""What this machine can do, checked: versions, devices, backends, and numbers compared."""

from __future__ import annotations

import platform
import re
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lastrerank import Reranker, __version__, ops, selfcheck
from lastrerank.checkpoint import BUNDLED, open_checkpoint, resolve
from lastrerank.goldens import GOLDENS, golden_of
from lastrerank.reranker import DTYPES, default_dtype, resolve_device

_SELF_CHECK_TOLERANCE = {"cpu": 2e-5, "cuda": 2e-2}


def examine(device: str = "auto", model: str | Path = BUNDLED) -> dict[str, Any]:
    """Versions, device, why each backend is or isn't available, a random tiny model scored by each that is; on a CPU
    with which instructions and how fast its kernels multiply; on a GPU whether the compiled kernels are found right for
    the shape of `model`, which is what "auto" goes by."""
    target = resolve_device(device)
    dtype = DTYPES[default_dtype(target)]
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
        "products": _products() if target.type == "cpu" and backends["native"] is None else None,
        "kernels": _kernels(target, dtype, model) if target.type == "cuda" else None,
        "self_check": _self_check(target, [b for b, reason in backends.items() if reason is None]),
    }


def _products() -> dict[str, Any]:
    """The instruction set that the native backend takes here, and the billions of operations a second that its products
    reach in each dtype, in a layer's shape, weights bf16 numbers as published ones are: the best of five."""
    from lastrerank.ops.native import NativeOperations

    rows, width, outputs = 512, 1024, 3072
    x, weight = torch.randn(rows, width, device="cpu"), torch.randn(outputs, width, device="cpu").bfloat16()
    rates, name = {}, ""
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        operations = NativeOperations(dtype)
        name, packed, times = operations.kernels.name.decode(), operations.prepare(weight), []
        for _ in range(5):
            started = time.perf_counter()
            with torch.inference_mode():
                operations.linear(x, packed)
            times.append(time.perf_counter() - started)
        rates[str(dtype).removeprefix("torch.")] = 2 * rows * width * outputs / min(times) / 1e9
    return {"instruction_set": name, "rates": rates}


def _kernels(device: torch.device, dtype: torch.dtype, model: str | Path) -> dict[str, Any]:
    """The verdict of `lastrerank.selfcheck` on the kernels that "auto" takes, or would if it were a good one, made now
    if there is none; with it the one that refused those it takes first."""
    if selfcheck.is_off():
        return {"backend": "triton", "unchecked": f"{selfcheck.SWITCH} says so"}
    source = open_checkpoint(model)
    found: dict[str, Any] = {}
    for backend in ops.CHECKED:
        try:
            ops.select(backend, device, dtype, source.config)
        except RuntimeError as reason:
            return found or {"backend": backend, "unchecked": str(reason)}
        verdict = asdict(selfcheck.verdict(backend, source.config, device, dtype))
        refused = {"refused": found} if found else {}
        found = {"backend": backend, "model": source.name, **verdict, **refused}
        if found["ok"] or not found["lasting"]:
            break
    return found


def _self_check(device: torch.device, backends: list[str]) -> dict[str, Any]:
    from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

    documents = [GOLDENS[0].documents[i % 3] * (1 + i % 7) for i in range(40)]
    difference: dict[str, float] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(folder, "tiny-v3.5", tokenizer=small_tokenizer())

        def scores(**loading: Any) -> list[float]:
            return _scores(Reranker.from_pretrained(folder, **loading), documents)

        truth = scores(device="cpu", backend="reference")
        for backend in backends:
            try:
                found = scores(device=str(device), backend=backend)
            except Exception as error:  # whatever a compiler or a driver says: the report goes on
                failed[backend] = f"{type(error).__name__}: {selfcheck.line_that_says_it(error)}"
            else:
                difference[backend] = max(abs(a - b) for a, b in zip(truth, found, strict=True))
    right = all(d <= _SELF_CHECK_TOLERANCE[device.type] for d in difference.values())
    return {"ok": right and not failed, "difference": difference, "failed": failed}


def verify_checkpoint(id_or_path: str | Path, device: str = "auto") -> dict[str, Any]:
    """Compare a checkpoint in fp32 with what is published of it (`lastrerank.goldens`).

    Raises:
        ValueError: nothing is published of it that is known here.
    """
    name, _ = resolve(id_or_path)
    golden = golden_of(name)
    if golden is None:
        known = (re.sub(r"\\|\(.*?\)\?", "", golden.checkpoints) for golden in GOLDENS)  # names, of patterns of them
        raise ValueError(f"{name}: no scores are known of it, only of {', '.join(known)}")
    reranker = Reranker.from_pretrained(id_or_path, device=device, dtype="float32")
    results = reranker.rerank(golden.query, golden.documents, return_embeddings=bool(golden.vector))
    by_index = {result["index"]: result for result in results}
    ordered = [by_index[i] for i in range(len(golden.documents))]
    scores = [result.get("raw_score", result["relevance_score"]) for result in ordered]
    difference = max(abs(a - b) for a, b in zip(scores, golden.scores, strict=True))
    message = (
        f"{name}: scores {', '.join(f'{s:.6f}' for s in scores)} differ by at most {difference:.1e} from those of "
        f"{golden.source} (allowed: {golden.tolerance:g})"
    )
    report = {"ok": difference <= golden.tolerance, "scores": scores, "published": list(golden.scores)}
    if golden.vector:
        found = ordered[0]["embedding"]
        assert found is not None
        vector = [float(x) for x in found[: len(golden.vector)]]
        off = max(abs(a - b) for a, b in zip(vector, golden.vector, strict=True))
        message += f", vector components by {off:.1e}"
        report |= {"ok": report["ok"] and off < 1e-2, "vector": vector}
    return report | {"message": message}


def _scores(reranker: Reranker, documents: list[str]) -> list[float]:
    results = sorted(reranker.rerank(GOLDENS[0].query, documents, block_size=13), key=lambda r: r["index"])
    return [result["relevance_score"] for result in results]
