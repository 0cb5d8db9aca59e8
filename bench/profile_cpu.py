"""Where a pass of the native backend spends its time, by operation; `python -m bench.profile_cpu`.

Seconds of each operation in whole passes, how many GFLOP/s the products reach, and the processor's peaks to judge them
by: products that never leave the registers (`peak.cpp`, compiled here; left out without a compiler).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.end_to_end import WORKLOADS, as_request, log, make_requests
from bench.measure import write_results
from lastrerank import Reranker
from lastrerank.ops import attention_flops
from lastrerank.ops.native import Int8Weight, NativeOperations, PackedWeight
from lastrerank.random_checkpoint import write_random_checkpoint


def peaks(threads: int) -> dict[str, float]:
    """Billions of operations a second on `threads` threads, by dtype; those that the processor has units for, none
    without a compiler."""
    source = Path(__file__).parent / "peak.cpp"
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peak")
        try:
            subprocess.run(["g++", "-O2", "-march=native", str(source), "-pthread", "-o", program], check=True)
        except (OSError, subprocess.CalledProcessError) as reason:
            log(f"no peaks: {reason}")
            return {}
        lines = subprocess.run([program, str(threads)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name: float(rate) for name, rate in (line.split() for line in lines.splitlines())}


def linear_flops(weight: Any, x: torch.Tensor, *_: Any) -> int:
    return 2 * len(x) * weight.in_features * weight.out_features


def call_flops(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, lengths: Any,
               window: int | None, scale: float, rows: torch.Tensor | None = None, **__: Any) -> int:  # fmt: skip
    """Of a call of `NativeOperations.attention`."""
    return attention_flops(cu_seqlens, window, q.shape[1], q.shape[2], rows)


class Stopwatch:
    """Seconds of each operation while entered, or, counting, its floating-point operations.

    Not both: to count takes PyTorch's threads, which then wait actively and slow the operation that follows.
    """

    METHODS = (
        (PackedWeight, "multiply", "linears", linear_flops),  # with SwiGLU, where that is computed in one
        (Int8Weight, "multiply", "linears", linear_flops),
        (NativeOperations, "attention", "attention", call_flops),
        (NativeOperations, "rms_norm", "rms_norm", None),
        (NativeOperations, "add_rms_norm", "add_rms_norm", None),
        (NativeOperations, "qk_norm_rope", "qk_norm_rope", None),
        (NativeOperations, "swiglu", "swiglu", None),
        (NativeOperations, "score", "score", None),
    )

    def __init__(self, counting: bool = False) -> None:
        self.counting = counting

    def __enter__(self) -> Stopwatch:
        self.seconds: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self._originals = [(owner, name, getattr(owner, name)) for owner, name, *_ in self.METHODS]
        for owner, name, label, count in self.METHODS:
            setattr(owner, name, self._timed(getattr(owner, name), label, count))
        return self

    def _timed(self, method: Callable[..., Any], label: str, count: Callable[..., int] | None) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.counting and count is not None:
                self.flops[label] += count(*args, **kwargs)
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds[label] += time.perf_counter() - started
            return result

        return timed

    def __exit__(self, *exc: object) -> None:
        for owner, name, method in self._originals:
            setattr(owner, name, method)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="jina-reranker-v3")
    parser.add_argument("--workloads", nargs="+", default=("512 tokens", "2,048 tokens"), choices=list(WORKLOADS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--name", default="profile_cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = [
        {"operation": "peak", "dtype": dtype, "gflops": rate} for dtype, rate in peaks(options.threads).items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(folder, options.shape)
        for dtype in ("float32", "bfloat16", "int8"):
            reranker = Reranker.from_pretrained(folder, device="cpu", backend="native", dtype=dtype)
            for workload in options.workloads:
                requests = [as_request(request) for request in make_requests(*WORKLOADS[workload], reranker)]
                tokens = sum(reranker.encode(request).num_tokens for request in requests)
                what = {"dtype": dtype, "workload": workload, "prompt_tokens": tokens}
                rows += profile(reranker, requests, what, options.runs)
    for row in rows:
        share = f"{row['share']:6.1%} of {row['pass_seconds']:.2f} s" if "share" in row else ""
        speed = f"{row['gflops']:5.0f} GFLOP/s" if "gflops" in row else ""
        log(f"{row.get('workload', ''):16} {row.get('dtype', ''):8} {row['operation']:14} {share} {speed}")
    write_results(options.name, rows)


def profile(reranker: Reranker, requests: list[Any], what: dict[str, Any], runs: int) -> list[dict[str, Any]]:
    """A row an operation: medians over passes, after one that counts and warms up."""
    with Stopwatch(counting=True) as counted:
        reranker.rerank_many(requests, progress=False)
    passes = []
    for _ in range(runs):
        with Stopwatch() as watch:
            started = time.perf_counter()
            reranker.rerank_many(requests, progress=False)
            seconds = time.perf_counter() - started
        passes.append((seconds, watch))
    whole = statistics.median(seconds for seconds, _ in passes)
    rows = []
    for operation in passes[0][1].seconds:
        seconds = statistics.median(watch.seconds[operation] for _, watch in passes)
        row = what | {"operation": operation, "seconds": seconds, "pass_seconds": whole, "share": seconds / whole}
        if operation in counted.flops:
            row["gflops"] = counted.flops[operation] / seconds / 1e9
        rows.append(row)
    return sorted(rows, key=lambda row: -row["seconds"])


if __name__ == "__main__":
    main()
