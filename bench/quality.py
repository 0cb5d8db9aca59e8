"""What the bundled checkpoint is worth; `python -m bench.quality DATA`, DATA holding BEIR-format folders.

BM25's best 20 are reranked in the three input orders, documents cut at 1,024 tokens, and again in int8; rankings of the
backends and dtypes are compared by Kendall's tau. Without a first stage's scores blended in anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import write_results
from lastrerank import Reranker
from lastrerank.cli import default_model
from lastrerank.evaluation.beir import read_beir
from lastrerank.evaluation.report import evaluate, plot
from lastrerank.evaluation.run import bm25_candidates, evaluate_ranking, ordered
from lastrerank.speed import kendall_tau

DEV = ("lo-help-en-us", "lo-help-de", "lo-help-ja", "debian-en")
DEPTH, DOC_TOKENS = 20, 1024
COMMON: dict[str, Any] = {"top_k": DEPTH, "max_doc_length": DOC_TOKENS, "progress": False}
PARTS = ("chance", "dev", "zero-shot", "agreement")


def agreement(root: Path, model: str, queries: int) -> list[dict[str, Any]]:
    """Every backend and dtype here against the reference in fp32, on real lists in random order."""
    truth = Reranker.from_pretrained(model, device="cpu", backend="reference", dtype="float32")
    others = {}
    compared = ("native", "float32"), ("native", "bfloat16"), ("native", "int8"), ("reference", "bfloat16")
    for backend, dtype in compared:
        try:
            others[f"{backend} {dtype}"] = Reranker.from_pretrained(model, device="cpu", backend=backend, dtype=dtype)
        except RuntimeError as reason:
            log(f"{backend} {dtype}: left out: {reason}")
    rows = []
    for name in DEV:
        dataset = read_beir(root / name, "dev", max_queries=queries)
        lists = ordered(bm25_candidates(dataset, DEPTH), "random")
        requests = [{"query": dataset.queries[q], "documents": [dataset.documents[d] for d in names],
                     "max_doc_length": DOC_TOKENS} for q, names in lists.items() if len(names) > 1]  # fmt: skip
        expected = truth.rerank_many(requests, progress=False)
        for which, reranker in others.items():
            found = reranker.rerank_many(requests, progress=False)
            pairs = list(zip(found, expected, strict=True))
            taus = [kendall_tau([r["index"] for r in a], [r["index"] for r in b]) for a, b in pairs]
            gaps = np.concatenate([_scores(a) - _scores(b) for a, b in pairs])
            rows.append(
                {"part": "agreement", "dataset": name, "what": which, "lists": len(taus),
                 "mean_tau": float(np.mean(taus)), "min_tau": min(taus), "max_difference": float(np.abs(gaps).max()),
                 "rms_difference": float(np.sqrt((gaps**2).mean()))}
            )  # fmt: skip
            log(json.dumps(rows[-1]))
    return rows


def _scores(results: list[dict[str, Any]]) -> np.ndarray:
    return np.array([r["relevance_score"] for r in sorted(results, key=lambda r: r["index"])])


def chance(root: Path, queries: int, orders: int = 10) -> list[dict[str, Any]]:
    """What the candidates are worth unranked: the mean over seeded random orders."""
    rows = []
    for name in DEV:
        dataset = read_beir(root / name, "dev", max_queries=queries)
        candidates = bm25_candidates(dataset, DEPTH)
        found = [evaluate_ranking(dataset, ordered(candidates, "random", seed))[0] for seed in range(orders)]
        means = {metric: float(np.mean([means[metric] for means in found])) for metric in ("nDCG@10", "RR@10")}
        rows.append({"part": "chance", "dataset": name, "split": "dev", "queries": len(dataset.queries),
                     "ranking": "chance", **means})  # fmt: skip
    log_rows(rows)
    return rows


def dev(root: Path, model: str, queries: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings, and the dev sets in every input order in fp32, in random order in int8."""
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for dtype, orders in (("float32", ("descending", "ascending", "random")), ("int8", ("random",))):
        try:
            reranker = Reranker.from_pretrained(model, device="cpu", dtype=dtype)
        except RuntimeError as reason:
            log(f"{dtype}: left out: {reason}")
            continue
        with tempfile.TemporaryDirectory() as output:
            report = evaluate(
                reranker, [root / name for name in DEV], Path(output), split="dev", orders=orders,
                max_queries=queries, **COMMON,
            )  # fmt: skip
        settings = settings or report["settings"]
        rows += [{"part": "dev", "dtype": dtype, **row} for row in report["rows"]]
        log_rows(report["rows"])
    return settings, rows


def zero_shot(root: Path, model: str, queries: int) -> list[dict[str, Any]]:
    """Test sets of other kinds of text, two of them across languages, in random order in fp32."""
    rows: list[dict[str, Any]] = []
    reranker = Reranker.from_pretrained(model, device="cpu")
    for name, query_name in (("cranfield", None), ("xquad-de", "xquad-en"), ("xquad-en", "xquad-de")):
        with tempfile.TemporaryDirectory() as output:
            report = evaluate(
                reranker, [root / name], Path(output), split="test", orders=("random",),
                query_folder=root / query_name if query_name else None, max_queries=queries, **COMMON,
            )  # fmt: skip
        rows += [{"part": "zero-shot", "dtype": "float32", **row} for row in report["rows"]]
        log_rows(report["rows"])
    return rows


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--queries", type=int, default=200, help="a dev set, sampled with seed 0")
    parser.add_argument("--zero-shot-queries", type=int, default=100)
    parser.add_argument("--agreement-queries", type=int, default=50, help="a dev set, for Kendall's tau")
    parser.add_argument("--name", default="quality")
    options = parser.parse_args(arguments)
    model = options.model or str(default_model())
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    if "chance" in options.parts:
        rows += chance(options.data, options.queries)
    if "dev" in options.parts:
        settings, found = dev(options.data, model, options.queries)
        rows += found
    if "zero-shot" in options.parts:
        rows += zero_shot(options.data, model, options.zero_shot_queries)
    if "agreement" in options.parts:
        rows += agreement(options.data, model, options.agreement_queries)
    path = write_results(options.name, rows)
    shown = [row for row in rows if row["part"] == "dev" and row["dtype"] == "float32"]
    if shown:
        plot({"settings": settings, "rows": shown}, path.with_suffix(".png"))


def log_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        log(f"{row['dataset']:22} {row['ranking']:12} nDCG@10 {row['nDCG@10']:.3f}  MRR@10 {row['RR@10']:.3f}")


if __name__ == "__main__":
    main()
