"""Everything a first meeting with a GPU needs, in under eight minutes; `python -m bench.gpu_check`.

1. every kernel and the whole model against the truth (the test files, on the device)
2. every kernel's time beside its peers
3. end to end against Transformers: eager passes and CUDA graphs
4. memory of one pass of 131k tokens
Each part is reported whether or not another failed; results/gpu_check.json and .csv; exit status 1 if any part failed.
`--tiny` runs the same on tiny shapes, in Triton's interpreter where there is no GPU, so that it is known to work.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import write_results
from lastrerank.speed import interleaved

ROOT = Path(__file__).parent.parent


def correctness(tiny: bool) -> list[dict[str, Any]]:
    """The kernels' tests on this device."""
    command = [sys.executable, "-m", "pytest", "tests/test_triton_kernels.py", "tests/test_graphs.py",
               "-p", "no:cacheprovider", *(["-k", "swiglu or bucket_gives"] if tiny else [])]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    log(f"correctness: {summary}")
    if done.returncode:
        log(done.stdout[-6000:])
        raise RuntimeError(f"the kernels' tests fail: {summary}")
    return [{"part": "correctness", "summary": summary}]


def kernels(tiny: bool, device: torch.device) -> list[dict[str, Any]]:
    from bench import kernels as bench

    if tiny:
        rows = bench.run(["10x100"], lambda shape: 40, device, torch.float32, 64, documents=3)
    else:
        shapes = ["10x100", "100x145", "100x512", "125x1k"]
        rows = bench.run(shapes, bench.prompt_tokens, device, torch.bfloat16, 8192)
    return [{"part": "kernels", **row} for row in rows]


def end_to_end(tiny: bool, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Text in, scores out. Scores are compared with Transformers' first; a shape where they differ is left out."""
    from bench.baseline import TransformersReranker
    from bench.end_to_end import make_requests

    dtype = "float32" if tiny else "bfloat16"
    eager, graphed = ours(folder, device, dtype), ours(folder, device, dtype)
    if device.type == "cuda":
        graphed.warmup()
    plain = TransformersReranker(folder, getattr(torch, dtype), "sdpa", str(device))
    rows = []
    for shape in [(1, 2, 5, 7)] if tiny else [(1, 10, 100, 7), (1, 10, 256, 7), (1, 100, 145, 7), (1, 100, 512, 7)]:
        query, documents = make_requests(*shape, eager)[0]
        name = f"{shape[1]}x{shape[2]}"
        variants: dict[str, Callable[[], Any]] = {
            "transformers sdpa": lambda q=query, d=documents: plain.block(q, d)[2],
            "lastrerank triton": lambda q=query, d=documents: scores(eager, q, d),
            "lastrerank triton graph": lambda q=query, d=documents: scores(graphed, q, d),
        }
        truth, wrong = variants["transformers sdpa"](), []
        for variant, call in variants.items():
            difference = float(abs(call() - truth).max())
            if not difference <= (5e-5 if tiny else 5e-2):
                wrong.append(f"{variant} on {name}: scores differ by {difference:.1e}")
        if wrong:
            rows.append({"part": "end to end", "shape": name, "left_out": "; ".join(wrong)})
            log(rows[-1]["left_out"])
            continue
        times = interleaved(variants, 1 if tiny else 15, warmup=0 if tiny else 2)
        for variant, seconds in times.items():
            ratio = times["transformers sdpa"]["median"] / seconds["median"]
            rows.append({"part": "end to end", "shape": name, "provider": variant, "seconds": seconds, "ratio": ratio})
            log(f"{name:8} {variant:24} {seconds['median'] * 1e3:9.2f} ms  x {ratio:.2f}")
    return rows


def memory(tiny: bool, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Peak above the weights of one list: 63 documents of 2,048 tokens are 131k rows."""
    from bench.end_to_end import make_requests

    reranker = ours(folder, device, "float32" if tiny else "bfloat16")
    query, documents = make_requests(*((1, 2, 5, 7) if tiny else (1, 63, 2048, 7)), reranker)[0]
    scores(reranker, query, documents[:1])
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    started = time.perf_counter()
    scores(reranker, query, documents)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    log(f"{len(documents)} documents: {seconds:.2f} s, {peak / 2**30:.2f} GiB above the weights")
    return [{"part": "memory", "documents": len(documents), "seconds": seconds, "peak_bytes": peak}]


def ours(folder: Path, device: torch.device, dtype: str) -> Any:
    """A reranker on the Triton kernels; on a CPU they are put in place by hand, because there they only interpret."""
    from lastrerank import Reranker
    from lastrerank.model import Model

    if device.type == "cuda":
        return Reranker.from_pretrained(folder, device=str(device), dtype=dtype, backend="triton")
    from lastrerank.ops.triton import TritonOperations

    reranker = Reranker.from_pretrained(folder, device="cpu", dtype=dtype, backend="reference")
    reranker.model = Model(reranker.config, reranker.model.weights, TritonOperations())
    return reranker


def scores(reranker: Any, query: str, documents: list[str]) -> Any:
    from lastrerank import RerankRequest

    return reranker.score_encoded([reranker.encode(RerankRequest(query, documents))])[0].scores


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; in the interpreter without a GPU")
    parser.add_argument("--name", default="gpu_check")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not options.tiny:
            log("no GPU here: python -m bench.gpu_check --tiny runs the same in Triton's interpreter")
            return 1
        if os.environ.get("TRITON_INTERPRET") != "1":
            command = [sys.executable, "-m", "bench.gpu_check", "--tiny", "--name", options.name]
            return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
        sys.path.append(str(ROOT / "tests"))
        from triton_interpreter import repair

        repair()
    from lastrerank.random_checkpoint import write_random_checkpoint

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(folder, "tiny" if options.tiny else "jina-reranker-v3")
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "correctness": lambda: correctness(options.tiny),
            "kernels": lambda: kernels(options.tiny, device),
            "end to end": lambda: end_to_end(options.tiny, device, folder),
            "memory": lambda: memory(options.tiny, device, folder),
        }
        for part, call in parts.items():
            started = time.perf_counter()
            try:
                rows += call()
            except Exception:
                rows.append({"part": part, "failed": traceback.format_exc(limit=-3)})
                log(f"{part}: FAILED\n{traceback.format_exc()}")
            log(f"-- {part}: {time.perf_counter() - started:.0f} s")
    path = write_results(options.name, rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return 1 if any("failed" in row or (row["part"] == "end to end" and "left_out" in row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
