"""Each kernel's time beside its peers' and its limit; `python -m bench.kernels`, or `make bench-kernels`.

On a GPU: milliseconds, TFLOP/s or GB/s from counted operations or bytes, and the share of what this very device was
measured to reach in a large copy and a large matrix product, with a roofline plot. Outputs are compared first; what
differs is not timed. Without a GPU: what the compiler made of the kernels, and no times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import RESULTS, write_results
from bench.plots import plot_roofline
from lastrerank.speed import spread

# Lists: documents and bare tokens of each, in one prompt. A prompt adds 119 tokens and 14 a document.
SHAPES = {
    "10x100": (10, 100), "10x256": (10, 256), "100x145": (100, 145), "100x256": (100, 256), "100x512": (100, 512),
    "125x1k": (125, 1024), "63x2k": (63, 2048),
}  # fmt: skip
# Of the largest value: what bf16 rounding may make of the same computation.
AGREEMENT = 2e-2
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, WINDOW = 16, 8, 128, 1024, 3072, 1024


def prompt_tokens(shape: str) -> int:
    """Rows of one prompt of a standard shape."""
    documents, tokens = SHAPES[shape]
    return 119 + documents * (14 + tokens)


@dataclass(frozen=True)
class Case:
    """One kernel on one shape: floating-point operations, bytes of device memory that must move, what computes it.

    The provider "reference" is the truth of the others. A kernel that works in place is checked by `check`, which
    returns our largest difference on fresh inputs as a share of the largest value.
    """

    kernel: str
    shape: str
    operations: float
    bytes: float
    providers: dict[str, Callable[[], Any]]
    check: Callable[[], float] | None = None


def cases(tokens: int, shape: str, device: torch.device, dtype: torch.dtype, documents: int) -> list[Case]:
    """Every kernel as the model calls it in a pass of one list of `tokens` rows."""
    from lastrerank.kernels import attention

    from lastrerank.ops import attention_flops
    from lastrerank.ops.reference import ReferenceOperations
    from lastrerank.ops.triton import TritonOperations

    ours, plain, functional = TritonOperations(), ReferenceOperations(), torch.nn.functional
    size = torch.finfo(dtype).bits // 8
    qkv_width = (HEADS + 2 * KV_HEADS) * HEAD_DIM

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, residual, weight, gate_up = (
        randn(tokens, HIDDEN), randn(tokens, HIDDEN), randn(HIDDEN), randn(tokens, 2 * INTERMEDIATE)
    )  # fmt: skip
    qkv, head_weight = randn(tokens, qkv_width), randn(HEAD_DIM)
    table, positions = torch.rand(tokens, HEAD_DIM // 2, device=device), torch.arange(tokens, device=device)
    rope = (head_weight, head_weight, table, table, positions, HEADS, KV_HEADS, 1e-6)
    q, k, v = (
        part.unflatten(1, (-1, HEAD_DIM))
        for part in randn(tokens, qkv_width).split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], 1)
    )
    cu = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    doc_rows = torch.arange(documents, device=device)
    maps = (doc_rows, doc_rows[-1:] + 1, doc_rows * 0, doc_rows[:1] * 0)
    projector = (weight, randn(512, HIDDEN), randn(512, 512), 1e-6)

    def add_norm_check() -> float:
        return _difference(*(o.add_rms_norm(residual.clone(), x, weight, 1e-6)[1] for o in (ours, plain)))

    def rope_check() -> float:
        return _difference(*(o.qk_norm_rope(qkv.clone(), *rope) for o in (ours, plain)))

    row, elements = tokens * HIDDEN * size, tokens * HIDDEN
    rotated = tokens * (HEADS + KV_HEADS) * HEAD_DIM
    found = [
        Case("rms_norm", shape, 4 * elements, 2 * row, {
            "lastrerank": lambda: ours.rms_norm(x, weight, 1e-6),
            "reference": lambda: plain.rms_norm(x, weight, 1e-6),
            "torch rms_norm": lambda: functional.rms_norm(x, (HIDDEN,), weight, 1e-6),
        }),
        Case("add_rms_norm", shape, 5 * elements, 4 * row,
             {"lastrerank": lambda: ours.add_rms_norm(residual, x, weight, 1e-6)}, add_norm_check),
        Case("swiglu", shape, 5 * tokens * INTERMEDIATE, 3 * tokens * INTERMEDIATE * size, {
            "lastrerank": lambda: ours.swiglu(gate_up),
            "reference": lambda: plain.swiglu(gate_up),
        }),
        Case("qk_norm_rope", shape, 7 * rotated, 2 * rotated * size,
             {"lastrerank": lambda: ours.qk_norm_rope(qkv, *rope)}, rope_check),
        Case("score", shape, 2 * (documents + 1) * (HIDDEN + 512) * 512, (HIDDEN + 512) * 512 * size, {
            "lastrerank": lambda: ours.score(x, *maps, *projector)[2],
            "reference": lambda: plain.score(x, *maps, *projector)[2],
        }),
    ]  # fmt: skip
    tiles = attention.tiles(cu, tokens, tokens, HEADS // KV_HEADS, HEAD_DIM, dtype)  # once a pass, not in the time
    for window in (None, WINDOW):
        arguments = (q, k, v, cu, (tokens,), window, HEAD_DIM**-0.5)
        providers = {
            "lastrerank": lambda arguments=arguments: ours.attention(*arguments, tiles=tiles),
            "reference": lambda arguments=arguments: plain.attention(*arguments),
            **attention_peers(*arguments),
        }
        work = attention_flops(cu, window, HEADS, HEAD_DIM)
        moved = 2 * tokens * (HEADS + KV_HEADS) * HEAD_DIM * size
        found.append(Case(f"attention window {window}" if window else "attention", shape, work, moved, providers))
    return found


def _difference(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.float() - truth.float()).abs().max() / truth.float().abs().max())


def attention_peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, lengths: tuple[int, ...],
    window: int | None, scale: float,
) -> dict[str, Callable[[], torch.Tensor]]:  # fmt: skip
    """What else a GPU user could call for one causal sequence. One that is absent says so when it is first called."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    functional = torch.nn.functional
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def sdpa(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                out = functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1)

        return call

    def varlen() -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if window is None else window - 1
        return varlen_attn(q, *wide, cu, cu, max(lengths), max(lengths), scale=scale, window_size=(left, 0))

    def flex() -> torch.Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (j <= i) if window is None else (j <= i) & (i - j < window)

        length = q.shape[0]
        if "flex" not in cache:
            torch._dynamo.reset()  # or a second shape would be compiled for any length, which is another kernel
            mask = torch.compile(create_block_mask)(visible, None, None, length, length, device=q.device)
            cache["flex"] = (torch.compile(flex_attention, dynamic=False), mask)
        compiled, mask = cache["flex"]
        return compiled(*heads, block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    def flash_attn() -> torch.Tensor:
        from lastrerank.ops.flash_attn import FlashAttnOperations

        if "flash-attn" not in cache:
            cache["flash-attn"] = FlashAttnOperations()
        return cache["flash-attn"].attention(q, k, v, cu, lengths, window, scale)

    group = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(group, 1) for x in (k, v)]
    cache: dict[str, Any] = {}
    peers: dict[str, Callable[[], torch.Tensor]] = {"torch varlen": varlen, "flex": flex, "flash-attn": flash_attn}
    if window is None:
        peers |= {"sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION), "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
    return peers


def measure(case: Case, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Check each provider's output, then time it."""
    rows: list[dict[str, Any]] = []
    try:
        truth = case.providers["reference"]() if case.check is None else None
    except torch.OutOfMemoryError as error:
        return [{"kernel": case.kernel, "shape": case.shape, "provider": "all", "left_out": f"no reference: {error}"}]
    for name, call in case.providers.items():
        row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "provider": name}
        rows.append(row)
        try:
            row["difference"] = _difference(call(), truth) if case.check is None else case.check()
            if not row["difference"] <= AGREEMENT:
                row["left_out"] = f"differs from the reference by {row['difference']:.1e} of the largest value"
            else:
                row["milliseconds"] = timed(call)
        except Exception as error:
            row["left_out"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        if "milliseconds" in row:
            seconds = row["milliseconds"]["median"] / 1e3
            row |= {"tflops": case.operations / seconds / 1e12, "gb_per_s": case.bytes / seconds / 1e9,
                    "intensity": case.operations / case.bytes}  # fmt: skip
            shares = (row["tflops"] / ceilings["tflops"], row["gb_per_s"] / ceilings["gb_per_s"])
            row["share_of_ceiling"] = max(shares)
        log(show(row))
    return rows


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds, median and quartiles; on a GPU with the L2 cache emptied before every run."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        median, low, high = do_bench(call, warmup=50, rep=200, quantiles=[0.5, 0.25, 0.75])
        return {"median": median, "low": low, "high": high}
    started = time.perf_counter()
    call()
    return spread([(time.perf_counter() - started) * 1e3])


def measured_ceilings(device: torch.device, dtype: torch.dtype, side: int) -> dict[str, float]:
    """What a large copy (bytes read and written) and a large matrix product reach here."""
    source = torch.randn(side, side, device=device).to(dtype)
    target, other = torch.empty_like(source), torch.randn(side, side, device=device).to(dtype)
    copy = timed(lambda: target.copy_(source))["median"] / 1e3
    product = timed(lambda: source @ other)["median"] / 1e3
    bytes_moved = 2 * source.numel() * source.element_size()
    return {"gb_per_s": bytes_moved / copy / 1e9, "tflops": 2 * side**3 / product / 1e12}


def show(row: dict[str, Any]) -> str:
    head = f"{row['shape']:8} {row['kernel']:22} {row['provider']:16}"
    if "left_out" in row:
        return f"{head} left out: {row['left_out']}"
    return (
        f"{head} {row['milliseconds']['median']:9.4f} ms {row['tflops']:8.2f} TFLOP/s {row['gb_per_s']:8.1f} GB/s "
        f"{row['share_of_ceiling']:6.1%} of the ceiling"
    )


def run(
    shapes: list[str],
    tokens_of: Callable[[str], int],
    device: torch.device,
    dtype: torch.dtype,
    side: int,
    documents: int = 100,
) -> list[dict[str, Any]]:
    """Ceilings, from matrices of `side` rows and columns, then every kernel on every shape."""
    with torch.inference_mode():
        ceilings = measured_ceilings(device, dtype, side)
        log(f"ceilings: copy {ceilings['gb_per_s']:.0f} GB/s, matrix product {ceilings['tflops']:.1f} TFLOP/s")
        rows: list[dict[str, Any]] = [{"kernel": "ceilings", **ceilings}]
        for shape in shapes:
            for case in cases(tokens_of(shape), shape, device, dtype, documents):
                rows += measure(case, ceilings)
    return rows


def profile(device: torch.device, shape: str) -> None:
    """A trace of one call of every kernel, and ncu's counters where ncu is installed."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as tracing

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.inference_mode():
        found = cases(prompt_tokens(shape), shape, device, torch.bfloat16, 100)
        for case in found:
            case.providers["lastrerank"]()
        with tracing(activities=activities, with_flops=True) as trace:
            for case in found:
                case.providers["lastrerank"]()
    path = RESULTS / "kernels_trace.json"
    trace.export_chrome_trace(str(path))
    log(f"trace: {path}")
    if shutil.which("ncu") is None:
        log("no ncu here: no hardware counters")
        return
    ours = "regex:_(attention|rms_norm|swiglu|qk_norm_rope|project|fuse)_kernel"
    command = ["ncu", "--csv", "--set", "basic", "--kernel-name", ours,
               sys.executable, "-m", "bench.kernels", "--once", shape]  # fmt: skip
    counters = subprocess.run(command, capture_output=True, text=True)
    (RESULTS / "kernels_ncu.csv").write_text(counters.stdout)
    log(f"ncu: {RESULTS / 'kernels_ncu.csv'} (exit status {counters.returncode})")


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--profile", metavar="SHAPE", choices=list(SHAPES), help="write a trace, and ncu's counters")
    parser.add_argument("--once", metavar="SHAPE", choices=list(SHAPES), help="one call each; what ncu runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        log("no GPU here, so no times. What the compiler makes of the kernels (python -m bench.compile_kernels):")
        from bench import compile_kernels

        table = RESULTS / f"{compile_kernels.RESULTS}.json"
        if table.is_file():
            compile_kernels.show(json.loads(table.read_text())["rows"])
        return
    device = torch.device("cuda")
    if options.once:
        with torch.inference_mode():
            for case in cases(prompt_tokens(options.once), options.once, device, torch.bfloat16, 100):
                case.providers["lastrerank"]()
        return
    if options.profile:
        profile(device, options.profile)
        return
    rows = run(options.shapes, prompt_tokens, device, torch.bfloat16, 8192)
    plot_roofline(write_results("kernels_gpu", rows))


if __name__ == "__main__":
    main()
