"""Everything a first meeting with a GPU needs; `make gpu-check`, or `python -m bench.gpu_check`.

Each part runs in a process of its own with a time limit, so that a lost device or a hang costs one part alone, and
results are written after each: what the device is (clocks, power, throttling, before and after), the kernels' tests,
the self-check of three shapes with repetitions beside a busy stream, end to end against Transformers, memory of one
pass of 131k tokens, attention by kernel and tile, where a pass's seconds go, and every kernel beside its peers last.
One summary is printed; `results/gpu_check.json` is the file to attach to an issue. Exit status 1 if any part failed.
`--parts` takes some of them alone. `--tiny` runs the same on tiny shapes, in Triton's interpreter where there is no
GPU, so that it is known to work.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.measure import write_results
from lastrerank.speed import interleaved

ROOT = Path(__file__).parent.parent
# What `auto` starts, with the kernels of a checkout that isn't installed.
SELF_CHECK = (
    sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport bench\n"
    "from lastrerank.selfcheck import main\nmain()",
)  # fmt: skip
# Where the parts find the random checkpoints that one of them has written; a part run by itself writes its own.
CHECKPOINTS = "LASTRERANK_GPU_CHECK_FOLDER"
Rows = list[dict[str, Any]]


def device_facts(tiny: bool, device: torch.device) -> Rows:
    """What the driver says of the device: clocks and limits explain a time that is not what was hoped for."""
    fields = ["name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw",
              "power.limit", "clocks_throttle_reasons.active", "temperature.gpu", "memory.total", "memory.used",
              "mig.mode.current", "pcie.link.gen.current", "ecc.mode.current"]  # fmt: skip
    facts: dict[str, Any] = {}
    number = "0"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        number = f"GPU-{properties.uuid}"  # not the driver's first, where CUDA_VISIBLE_DEVICES names another
        facts = {"capability": list(torch.cuda.get_device_capability(device)),
                 "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}  # fmt: skip
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={number}"]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout.strip().split(", ")
        facts |= dict(zip(fields, said, strict=True)) if len(said) == len(fields) else {"nvidia-smi": done.stdout}
    return [facts]


def correctness(tiny: bool, device: torch.device) -> Rows:
    """The kernels' tests on this device."""
    workers = 1
    if device.type == "cuda":  # compilers take the time; tests of rows that lie far apart take 7 GiB each
        workers = max(1, min(8, len(os.sched_getaffinity(0)), torch.cuda.mem_get_info(device)[0] >> 33))
    command = [sys.executable, "-m", "pytest", "tests/test_triton_kernels.py", "tests/test_graphs.py",
               "-p", "no:cacheprovider", *(["-k", "swiglu or bucket_gives"] if tiny else []),
               *(["--numprocesses", str(workers)] if workers > 1 else [])]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    log(f"correctness: {summary}")
    if done.returncode:
        log(done.stdout[-6000:])
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise PartFailedError([{"summary": summary, "tests": failed}])
    return [{"summary": summary}]


def self_check(tiny: bool, device: torch.device) -> Rows:
    """What `auto` asks of this machine, of the published shapes; on a GPU with repetitions, a graph and the time. First
    here, so that what fails is seen, then as `auto` does it: by what this machine is, and in a process of its own."""
    from lastrerank import checks, selfcheck
    from lastrerank.checkpoint import open_checkpoint
    from lastrerank.ops.triton import TritonOperations

    rows = []
    dtype = torch.float32 if tiny else torch.bfloat16
    for shape in ["tiny-v3.5"] if tiny else ["jina-reranker-v3", "jina-reranker-v3.5", "mxbai-rerank-base-v2"]:
        with checkpoint(shape, num_hidden_layers=3) as folder:  # both windows of v3.5
            config = open_checkpoint(folder).config
        started, doing = time.perf_counter(), [""]
        try:
            checks.check(
                TritonOperations(), config, device, dtype, doing.append, (1, 40) if tiny else checks.LENGTHS
            )
            found = "right"
        except Exception as error:
            found = f"{type(error).__name__} when {doing[-1]}: {error}"
        seconds = time.perf_counter() - started
        if found == "right":
            backend = "triton" if device.type == "cuda" else "reference"
            with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, {"XDG_CACHE_HOME": cache}):
                verdict = selfcheck.verdict(backend, config, device, dtype, command=SELF_CHECK)
            found = found if verdict.ok else f"auto would not take it: {verdict.reason}"
        rows.append({"shape": shape, "found": found, "seconds": seconds})
        log(f"{shape}: {found}")
    if any(row["found"] != "right" for row in rows):
        raise PartFailedError(rows)
    return rows


def end_to_end(tiny: bool, device: torch.device) -> Rows:
    """Text in, scores out, of both published shapes; then several lists in one call."""
    rows = []
    for shape in ["tiny"] if tiny else ["jina-reranker-v3", "jina-reranker-v3.5"]:
        with checkpoint(shape) as folder:
            rows += [{"model": shape, **row} for row in _one_model(tiny, device, folder)]
    return rows


def _one_model(tiny: bool, device: torch.device, folder: Path) -> Rows:
    """Text in, scores out. Scores are compared with Transformers' first; a shape where they differ is left out."""
    from bench.baseline import TransformersReranker
    from bench.end_to_end import make_requests

    dtype = "float32" if tiny else "bfloat16"
    eager = graphed = ours(folder, device, dtype, graphs=False)
    if device.type == "cuda":
        graphed = ours(folder, device, dtype)
    fastest = "flash_attention_2" if device.type == "cuda" and find_spec("flash_attn") else "sdpa"
    plain = TransformersReranker(folder, getattr(torch, dtype), fastest, str(device))
    baseline = f"transformers {fastest}"
    float8 = None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        float8 = ours(folder, device, "float8")
    rows = []
    for shape in [(1, 1, 5, 7)] if tiny else [(1, 10, 100, 7), (1, 10, 256, 7), (1, 100, 145, 7), (1, 100, 512, 7)]:
        query, documents = make_requests(*shape, eager)[0]
        name = f"{shape[1]}x{shape[2]}"
        variants: dict[str, Callable[[], Any]] = {
            baseline: lambda q=query, d=documents: plain.block(q, d)[2],
            "lastrerank triton, no graph": lambda q=query, d=documents: scores(eager, q, d),
        }
        if graphed is not eager:
            variants["lastrerank triton"] = lambda q=query, d=documents: scores(graphed, q, d)
        if float8 is not None:
            variants["lastrerank float8"] = lambda q=query, d=documents: scores(float8, q, d)
        truth, wrong = variants[baseline](), []
        for variant, call in variants.items():
            difference = float(abs(call() - truth).max())
            if not difference <= (5e-5 if tiny else 0.2 if "float8" in variant else 5e-2):
                wrong.append(f"{variant} on {name}: scores differ by {difference:.1e}")
        if wrong:
            rows.append({"shape": name, "left_out": "; ".join(wrong)})
            log(rows[-1]["left_out"])
            continue
        runs = 15 if shape[1] * shape[2] < 20_000 else 5  # seconds each
        times = interleaved(variants, 1 if tiny else runs, warmup=0 if tiny else 2)
        for variant, seconds in times.items():
            ratio = times[baseline]["median"] / seconds["median"]
            rows.append({"shape": name, "provider": variant, "seconds": seconds, "ratio": ratio})
            log(f"{name:8} {variant:24} {seconds['median'] * 1e3:9.2f} ms  x {ratio:.2f}")
    return rows + _many_lists(tiny, eager, graphed)


def _many_lists(tiny: bool, eager: Any, graphed: Any) -> Rows:
    """Sixteen lists packed in one call, beside one call each."""
    from bench.end_to_end import as_request, make_requests

    requests = [as_request(request) for request in make_requests(*((2, 1, 3, 7) if tiny else (16, 10, 100, 7)), eager)]
    variants: dict[str, Callable[[], Any]] = {"packed": lambda: eager.rerank_many(requests)}
    if graphed is not eager:
        variants["one by one, no graphs"] = lambda: [eager.rerank_many([request]) for request in requests]
        variants["one by one"] = lambda: [graphed.rerank_many([request]) for request in requests]
    times = interleaved(variants, 1 if tiny else 10, warmup=0 if tiny else 2)
    return [{"shape": f"{len(requests)} lists", "provider": name, "seconds": seconds}
            for name, seconds in times.items()]  # fmt: skip


def memory(tiny: bool, device: torch.device) -> Rows:
    """Peak above the weights of one list: 63 documents of 2,048 tokens are 131k rows."""
    from bench.end_to_end import make_requests

    with checkpoint("tiny" if tiny else "jina-reranker-v3") as folder:
        reranker = ours(folder, device, "float32" if tiny else "bfloat16")
    query, documents = make_requests(*((1, 1, 5, 7) if tiny else (1, 63, 2048, 7)), reranker)[0]
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
    return [{"documents": len(documents), "seconds": seconds, "peak_bytes": peak}]


# Attention as models ask for it: rows of one sequence, query heads, key heads, their width, window.
_ATTENTION = [
    (2048, 16, 8, 128, None), (8192, 16, 8, 128, None), (16384, 16, 8, 128, None), (52719, 16, 8, 128, None),
    (16384, 16, 8, 128, 1024), (8192, 14, 2, 64, None), (8192, 32, 8, 128, None),
]  # fmt: skip
# (rows, keys, warps, stages, tiles of a step) to try beside the committed one.
_TILES = [
    (128, 64, 8, 3, 1), (128, 64, 8, 2, 1), (128, 64, 8, 3, 2), (128, 32, 8, 3, 1), (64, 64, 4, 3, 1), (64, 64, 4, 2, 2)
]


def attention(tiny: bool, device: torch.device) -> Rows:
    """Attention by kernel: what this chip has of its own, the portable one by its tile and by others, cuDNN's. Short
    sequences are bound by their launches here, which a graph does away with."""
    from lastrerank.kernels import attention as kernel

    from bench import kernels as bench
    from lastrerank.ops import attention_flops
    from lastrerank.ops.reference import ReferenceOperations

    chip, dtype = kernel.chip(), torch.float32 if tiny else torch.bfloat16
    ceilings, rows = bench.measured_ceilings(device, dtype, 64 if tiny else 8192), []
    for length, heads, kv_heads, dim, window in [(40, 4, 2, 64, None)] if tiny else _ATTENTION:
        widths = [heads * dim, kv_heads * dim, kv_heads * dim]
        packed = torch.randn(length, sum(widths), device=device).to(dtype)
        q, k, v = (part.unflatten(1, (-1, dim)) for part in packed.split(widths, 1))
        starts = torch.tensor([0, length], dtype=torch.int32, device=device)
        arguments = (q, k, v, starts, (length,), window, dim**-0.5)

        def by(tile: Any, arguments: Any = arguments) -> Callable[[], Any]:
            """The portable kernel by a tile; None: what the launcher chooses."""
            q, k, v, starts, (length,), window, scale = arguments
            tiles = {chip: tile} if tile else {}
            with patch.dict(kernel.TILES, tiles):  # once a pass, so not timed
                work = kernel.tiles(starts, length, length, q.shape[1] // k.shape[1], q.shape[2], q.dtype)

            def call() -> Any:
                with patch.dict(kernel.TILES, tiles):
                    return kernel.attention(
                        q, k, v, starts, length, window, scale, tiles=work, portable=tile is not None
                    )

            return call

        providers: dict[str, Callable[[], Any]] = {"reference": lambda a=arguments: ReferenceOperations().attention(*a)}
        if chip in kernel.OWN:
            providers["own"] = by(None)
        for tile in dict.fromkeys([kernel.tile_of(dtype, dim, False), *([] if tiny else _TILES)]):
            providers[f"portable {tile}"] = by(tile)
        if device.type == "cuda" and window is None:
            providers["sdpa cudnn"] = bench.attention_peers(*arguments)["sdpa cudnn"]
        moved = 2 * length * (heads + kv_heads) * dim * dtype.itemsize
        operations = attention_flops(starts, window, heads, dim)
        name = f"{length} x {heads}/{kv_heads} x {dim}, window {window}"
        rows += bench.measure(bench.Case("attention", name, operations, moved, providers), ceilings)
    return rows


def seconds(tiny: bool, device: torch.device) -> Rows:
    """Where the time of one pass goes, by the profiler: kernels of an eager pass and of a graph's replay."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from bench.end_to_end import make_requests

    rows = []
    with checkpoint("tiny" if tiny else "jina-reranker-v3") as folder:
        passes = {"eager": ours(folder, device, "float32" if tiny else "bfloat16", graphs=False)}
        if device.type == "cuda":
            passes["graph"] = ours(folder, device, "bfloat16")
    for shape in [(1, 1, 5, 7)] if tiny else [(1, 10, 100, 7), (1, 100, 145, 7)]:
        query, documents = make_requests(*shape, passes["eager"])[0]
        for name, reranker in passes.items():
            scores(reranker, query, documents)
            activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
            with profile(activities=activities) as found:
                scores(reranker, query, documents)
            kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
            times = {e.key: e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total
                     for e in found.key_averages() if e.device_type == kind}  # fmt: skip
            longest = sorted(times.items(), key=lambda item: -item[1])[:15]
            rows.append({"shape": f"{shape[1]}x{shape[2]}", "pass": name,
                         "microseconds": {key[:80]: round(value, 1) for key, value in longest},
                         "sum_microseconds": round(sum(times.values()), 1)})  # fmt: skip
    return rows


@contextmanager
def checkpoint(shape: str, **overrides: Any) -> Iterator[Path]:
    """A random one of a shape, for as long as it is loaded; one as it is published is written once for all parts."""
    from lastrerank.random_checkpoint import write_random_checkpoint

    if "tiny" in shape:
        overrides["num_hidden_layers"] = 2
    with tempfile.TemporaryDirectory() as name:
        kept = Path(os.environ.get(CHECKPOINTS, name), shape)
        if overrides:
            yield write_random_checkpoint(name, shape, overrides=overrides)
        else:  # parts run one after another
            yield kept if (kept / "tokenizer.json").exists() else write_random_checkpoint(kept, shape)


def kernels(tiny: bool, device: torch.device) -> Rows:
    """Every kernel's time, beside its peers'."""
    from bench import kernels as bench

    if tiny:
        rows = bench.run(["10x100"], lambda shape: 40, device, torch.float32, 64, documents=3)
    else:
        shapes = ["10x100", "100x145", "100x512", "125x1k"]
        rows = bench.run(shapes, bench.prompt_tokens, device, torch.bfloat16, 8192)
    return rows


def ours(folder: Path, device: torch.device, dtype: str, graphs: bool = True) -> Any:
    """A reranker on the Triton kernels; on a CPU they are put in place by hand, because there they only interpret."""
    from lastrerank import Reranker
    from lastrerank.model import Model

    if device.type == "cuda":
        reranker = Reranker.from_pretrained(folder, device=str(device), dtype=dtype, backend="triton")
        if not graphs:
            reranker._graphs = None
        return reranker
    from lastrerank.ops.triton import TritonOperations

    reranker = Reranker.from_pretrained(folder, device="cpu", dtype=dtype, backend="reference")
    reranker.model = Model(reranker.config, reranker.model.weights, TritonOperations())
    return reranker


def scores(reranker: Any, query: str, documents: list[str]) -> Any:
    from lastrerank import RerankRequest

    return reranker.score_encoded([reranker.encode(RerankRequest(query, documents))])[0].scores


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class PartFailedError(Exception):
    """A part that has rows to show and failed all the same."""

    def __init__(self, rows: Rows) -> None:
        super().__init__("see its rows")
        self.rows = rows


# In order, with seconds that each may take on a GPU: what must be known first, peers last.
PARTS: dict[str, tuple[Callable[[bool, torch.device], Rows], float]] = {
    "device": (device_facts, 60), "correctness": (correctness, 600), "self-check": (self_check, 300),
    "end to end": (end_to_end, 300), "memory": (memory, 120), "attention": (attention, 240), "seconds": (seconds, 120),
    "kernels": (kernels, 600), "device after": (device_facts, 60),
}  # fmt: skip


def run_part(part: str, tiny: bool) -> int:
    """In a process of its own: the part's rows as JSON on standard output."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        sys.path.append(str(ROOT / "tests"))
        from triton_interpreter import repair

        repair()
    try:
        print(json.dumps(PARTS[part][0](tiny, device)))
    except PartFailedError as failure:
        print(json.dumps(failure.rows))
        return 1
    return 0


def in_its_process(part: str, tiny: bool, limit: float, checkpoints: str) -> Rows:
    """The part's rows, and one that says how it failed if it did."""
    command = [sys.executable, "-m", "bench.gpu_check", "--part", part, *(["--tiny"] if tiny else [])]
    environment = os.environ | {CHECKPOINTS: checkpoints}
    environment |= {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, start_new_session=True)
        try:
            failed = f"status {process.returncode}" if process.wait(limit) else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the tests that it may have started
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it longer
                process.wait(10)
            failed = f"no end within {limit:g} s"
        output.seek(0)
        written = output.read().strip().splitlines()
    rows = json.loads(written[-1]) if written and written[-1].startswith("[") else []
    if not rows and failed is None:
        failed = "it said nothing"
    return [{"part": part, **row} for row in [*rows, *([] if failed is None else [{"failed": failed}])]]


def summary(rows: Rows) -> list[str]:
    """What a person reads first."""
    facts: dict[str, Any] = next((row for row in rows if row["part"] == "device"), {})
    lines = [f"device        {facts.get('name', 'no GPU')}, driver {facts.get('driver_version', 'none')}"]
    lines += [f"correctness   {row['summary']}" for row in rows if "summary" in row]
    lines += [f"self-check    {row['shape']}: {row['found']}" for row in rows if "found" in row]
    for row in rows:
        if row["part"] == "end to end" and "ratio" in row:
            milliseconds = f"{row['seconds']['median'] * 1e3:.2f} ms, {row['ratio']:.2f} x the baseline"
            lines.append(f"end to end    {row['model']} {row['shape']} {row['provider']}: {milliseconds}")
    lines += [f"memory        {row['peak_bytes'] / 2**30:.2f} GiB above the weights, {row['documents']} documents"
              for row in rows if "peak_bytes" in row]  # fmt: skip
    lines += [f"FAILED        {row['part']}: {row['failed']}" for row in rows if "failed" in row]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; in the interpreter without a GPU")
    parser.add_argument("--name", default="gpu_check")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="these alone")
    parser.add_argument("--part", choices=list(PARTS), help="one part, here: its rows on standard output")
    options = parser.parse_args(arguments)
    if options.part is not None:
        return run_part(options.part, options.tiny)
    if not torch.cuda.is_available() and not options.tiny:
        log("no GPU here: python -m bench.gpu_check --tiny runs the same in Triton's interpreter")
        return 1
    rows: Rows = []
    with tempfile.TemporaryDirectory() as checkpoints:
        for part in options.parts:
            started = time.perf_counter()
            rows += in_its_process(part, options.tiny, PARTS[part][1], checkpoints)
            path = write_results(options.name, rows)
            log(f"-- {part}: {time.perf_counter() - started:.0f} s")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    log("\n".join([*summary(rows), f"everything is in {path}: attach this file to an issue"]))
    return 1 if any("failed" in row or (row["part"] == "end to end" and "left_out" in row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
