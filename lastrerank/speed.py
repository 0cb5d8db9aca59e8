"""`lastrerank bench`: how fast a checkpoint runs on this machine, by every backend that can run it here."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lastrerank import ops
from lastrerank.reranker import Reranker, RerankRequest, default_dtype, resolve_device

# What counts as the reference's scores in float32: attention's logits of 700 leave some 3e-5.
SAME = 2e-4


def measure(
    model: str | Path,
    *,
    device: str = "auto",
    documents: int = 16,
    doc_tokens: int = 128,
    lists: int = 1,
    runs: int = 5,
    family: str = "auto",
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """Score the same lists by every backend and dtype that runs here, taking turns, and compare the scores.

    Args:
        model: folder, bundled name or Hub id.
        documents: of a list; parts of real help pages, cut at exactly `doc_tokens` tokens.
        lists: scored in one call.
        runs: timed calls of each, after one that is not.
        family, revision: as in `Reranker.from_pretrained`.

    Returns:
        A row each: backend, dtype, prompt tokens, seconds (median and quartiles), tokens a second, and what they cost
        against the reference in fp32: the largest difference of a score, and Kendall's tau of the rankings, the lists'
        mean.

    Raises:
        ValueError: a count is not positive, or the checkpoint can't be read.
    """
    for name, value in (("documents", documents), ("doc_tokens", doc_tokens), ("lists", lists), ("runs", runs)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    target = resolve_device(device)
    dtype = default_dtype(target)
    available = [name for name, reason in ops.availability(target, getattr(torch, dtype)).items() if reason is None]
    variants = [(name, dtype) for name in available] + [
        ("native", other) for other in ("bfloat16", "int8") if "native" in available
    ]
    same: dict[str, Any] = {"device": device, "family": family, "revision": revision}
    loading: list[dict[str, Any]] = [{"backend": name, "dtype": own} for name, own in variants]
    loaded = {f"{o['backend']} {o['dtype']}": Reranker.from_pretrained(model, **same, **o) for o in loading}
    truth = loaded.get("reference float32") or Reranker.from_pretrained(
        model, backend="reference", dtype="float32", **same
    )
    requests = _requests(lists, documents, doc_tokens, truth)
    expected = _scores(truth, requests)
    tokens = sum(truth.encode(request).num_tokens for request in requests)
    found = {name: _scores(r, requests) for name, r in loaded.items()}
    cost = {name: _cost(scores, expected, lists) for name, scores in found.items()}
    times = interleaved({name: partial(_scores, r, requests) for name, r in loaded.items()}, runs)
    return [
        {"backend": backend, "dtype": own, "device": str(target), "prompt_tokens": tokens,
         "seconds": times[f"{backend} {own}"], "tokens_per_s": tokens / times[f"{backend} {own}"]["median"],
         **cost[f"{backend} {own}"]}
        for backend, own in variants
    ]  # fmt: skip


def recommendation(rows: list[dict[str, Any]]) -> str:
    """What of `measure`'s rows to use here: the fastest that gives the reference's scores (where the reference runs in
    16 bits: is at most twice as far from its scores in float32), and what is faster, at which cost in agreement."""
    by_speed = sorted(rows, key=lambda row: -row["tokens_per_s"])
    own = next(row["max_difference"] for row in rows if row["backend"] == "reference")
    same = next(row for row in by_speed if row["max_difference"] <= max(SAME, 2 * own))
    parts = [f"use backend={same['backend']!r}, dtype={same['dtype']!r}: the fastest with the reference's scores"]
    for row in by_speed[: by_speed.index(same)]:
        faster = row["tokens_per_s"] / same["tokens_per_s"]
        parts.append(
            f"dtype={row['dtype']!r} on {row['backend']!r} is {faster:.2f} x as fast; its scores are up to "
            f"{row['max_difference']:.1e} off, its rankings agree to a Kendall's tau of {row['tau']:.3f}"
        )
    return "; ".join(parts)


def kendall_tau(a: list[int], b: list[int]) -> float:
    """Of two orders of the same items, without ties; of one item 1."""
    place = {item: n for n, item in enumerate(b)}
    agree = sum(place[x] < place[y] for x, y in combinations(a, 2))
    pairs = len(a) * (len(a) - 1) // 2
    return 2 * agree / pairs - 1 if pairs else 1.0


def interleaved(variants: Mapping[str, Callable[[], Any]], runs: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Time each variant `runs` times, taking turns. Seconds: median, and the quartiles as spread."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + runs):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of at least one value."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0], "runs": 1}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "runs": len(values)}


def _cost(scores: np.ndarray, expected: np.ndarray, lists: int) -> dict[str, float]:
    """Of `lists` lists of as many documents each."""
    orders = [np.argsort(-each.reshape(lists, -1), axis=1, kind="stable").tolist() for each in (scores, expected)]
    taus = [kendall_tau(a, b) for a, b in zip(*orders, strict=True)]
    return {"max_difference": float(np.abs(scores - expected).max()), "tau": statistics.mean(taus)}


def _requests(lists: int, documents: int, doc_tokens: int, reranker: Reranker) -> list[RerankRequest]:
    example = json.loads((Path(__file__).parent / "demo.json").read_text(encoding="utf-8"))
    words = " ".join(document["text"] for document in example["documents"]).split()
    texts = []
    for number in range(lists * documents):
        start = 37 * number % len(words)
        turned = words[start:] + words[:start]
        # A word is at least one token.
        texts.append(" ".join((turned * (doc_tokens // len(turned) + 1))[:doc_tokens]))
    return [
        RerankRequest(example["query"], texts[i : i + documents], max_doc_length=doc_tokens)
        for i in range(0, len(texts), documents)
    ]


def _scores(reranker: Reranker, requests: list[RerankRequest]) -> np.ndarray:
    found = reranker.score_encoded([reranker.encode(r) for r in requests])
    return np.concatenate([scored.scores if scored.raw is None else scored.raw for scored in found])
