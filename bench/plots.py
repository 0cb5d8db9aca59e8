"""Plots, made from result files only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def plot_end_to_end(path: Path) -> Path:
    """Tokens per second by workload and provider, with quartiles: `<path>.png`."""
    plt = _pyplot()
    report = json.loads(path.read_text())
    rows = [row for row in report["rows"] if "seconds" in row]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(providers)
    for p, provider in enumerate(providers):
        for w, workload in enumerate(workloads):
            for row in rows:
                if row["provider"] == provider and row["workload"] == workload:
                    seconds, tokens = row["seconds"], row["prompt_tokens"]
                    rate = tokens / seconds["median"]
                    ends = [[rate - tokens / seconds["high"]], [tokens / seconds["low"] - rate]]
                    spread = ends if seconds["high"] > seconds["low"] else None  # one run has none
                    axes.bar(w + (p - (len(providers) - 1) / 2) * width, rate, width, yerr=spread, capsize=2,
                             color=_color(provider), edgecolor="white", linewidth=0.4,
                             label=provider if w == 0 else None)  # fmt: skip
    machine = report["machine"]
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("prompt tokens per second")
    axes.set_title(f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, torch {machine['torch']}")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return _save(figure, path)


def plot_roofline(path: Path) -> Path:
    """Our kernels under the two measured ceilings, TFLOP/s over operations a byte: `<path>.png`."""
    plt = _pyplot()
    report = json.loads(path.read_text())
    ceilings = next(row for row in report["rows"] if row["kernel"] == "ceilings")
    rows = [row for row in report["rows"] if row.get("provider") == "lastrerank" and "intensity" in row]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = [2.0**i for i in range(-3, 14)]
    roof = [min(ceilings["tflops"], i * ceilings["gb_per_s"] / 1e3) for i in intensities]
    axes.loglog(intensities, roof, color="black", linewidth=1)
    for index, kernel in enumerate(dict.fromkeys(row["kernel"] for row in rows)):
        own = [row for row in rows if row["kernel"] == kernel]
        axes.scatter([row["intensity"] for row in own], [row["tflops"] for row in own], label=kernel, color=f"C{index}")
    axes.set_xlabel("operations per byte of device memory")
    axes.set_ylabel("TFLOP/s")
    machine = report["machine"]
    axes.set_title(f"{machine['gpu']}, torch {machine['torch']}")
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_load(path: Path) -> Path:
    """Latency and answered requests over offered load: `<path>.png`."""
    plt = _pyplot()
    report = json.loads(path.read_text())
    rows = [row for row in report["rows"] if row["part"] == "load" and "answered_ms" in row]
    alone = next(row["answered_per_s"] for row in report["rows"] if row["part"] == "one at a time")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    offered = [row["offered_per_s"] for row in rows]
    for name in ("p50", "p95", "p99"):
        left.plot(offered, [row["answered_ms"][name] for row in rows], marker="o", label=name)
    left.set_yscale("log")
    left.set_ylabel("milliseconds, answered requests")
    left.legend()
    right.plot(offered, [row["answered_per_s"] for row in rows], marker="o", label="answered")
    refused = [row["refused"] / row["seconds"] for row in rows]
    right.plot(offered, refused, marker="o", label="refused at once (429)")
    right.axhline(alone, color="grey", linestyle=":", label="one at a time")
    right.set_ylabel("requests per second")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("offered requests per second")
    return _save(figure, path)


# Whoever isn't us is grey, each in a shade of its own, the same in every plot.
_SHADES = (
    ("transformers-sdpa-float32", "#5c6770"), ("transformers-eager", "#b9c1c7"), ("transformers", "#7d8890"),
    ("torch.compile-float32", "#4a545b"), ("torch.compile", "#69747c"), ("torchao", "#aab7a8"),
    ("sentence-transformers", "#98a2a9"), ("openvino-float32", "#a9b2b8"), ("openvino-bfloat16", "#70889a"),
    ("openvino", "#93a7b5"), ("onnxruntime-int8", "#8d979e"),
    ("onnxruntime", "#c5ccd1"), ("llama.cpp-q8_0", "#d2d7db"), ("llama.cpp", "#dfe3e6"),
    ("lastrerank-native-int8", "#d1495b"), ("lastrerank-native-bfloat16", "#e8a33d"),
    ("lastrerank-native-unshared", "#9cc3dc"),
    ("lastrerank-native", "#14507a"), ("lastrerank-triton", "#14507a"), ("lastrerank-float8", "#d1495b"),
    ("lastrerank", "#5b9bc4"),
)  # fmt: skip


def _color(provider: str) -> str:
    return next((shade for name, shade in _SHADES if provider.startswith(name)), "#e8ebed")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> Path:
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    _pyplot().close(figure)
    return target
