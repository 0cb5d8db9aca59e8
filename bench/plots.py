"""Plots, made from result files only."""

from __future__ import annotations

import json
from pathlib import Path


def plot_end_to_end(path: Path) -> Path:
    """Tokens per second by workload and provider, with quartiles: `<path>.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
                    error = [[rate - tokens / seconds["high"]], [tokens / seconds["low"] - rate]]
                    axes.bar(w + (p - (len(providers) - 1) / 2) * width, rate, width, color=f"C{p}", yerr=error,
                             capsize=2, label=provider if w == 0 else None)  # fmt: skip
    machine = report["machine"]
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("prompt tokens per second")
    axes.set_title(f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, torch {machine['torch']}")
    axes.legend(fontsize=8)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
