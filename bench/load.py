"""A server under load; `make test-load`, or `python -m bench.load --model FOLDER`.

Open loop: requests are sent at their times whether or not earlier ones have been answered, as users do. Every answer is
checked against the one computed alone. First what one request at a time reaches, then offered loads as multiples of
that; then many requests on a tiny model, for the server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.measure import resident, write_results
from bench.plots import plot_load
from bench.serving import serving

TEXTS = Path(__file__).parent.parent / "tests" / "data" / "texts.jsonl"


def pool_of_requests(
    model: str, count: int, documents: int, length: int = 400
) -> list[tuple[dict[str, Any], dict[int, float]]]:
    """Bodies of real texts cut at `length` characters, and the scores of each computed alone."""
    from lastrerank import Reranker

    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    queries = [row["text"] for row in rows if row["kind"] == "query"] or ["how do I print"]
    texts = [row["text"][:length] for row in rows if row["kind"] == "document"]
    rng, reranker = random.Random(0), Reranker.from_pretrained(model)
    pool = []
    for _ in range(count):
        body = {"query": rng.choice(queries), "documents": rng.sample(texts, min(documents, len(texts)))}
        alone = reranker.rerank(body["query"], body["documents"], progress=False)
        pool.append((body, {r["index"]: r["relevance_score"] for r in alone}))
    return pool


async def one(
    client: httpx.AsyncClient, address: str, body: dict[str, Any], expected: dict[int, float]
) -> tuple[str, float]:
    """("answered" | "refused" | "failed" | "wrong", seconds)."""
    started = time.perf_counter()
    try:
        response = await client.post(f"{address}/v2/rerank", json=body)
    except httpx.TransportError:
        return "failed", time.perf_counter() - started
    seconds = time.perf_counter() - started
    if response.status_code == 429:
        return "refused", seconds
    if response.status_code != 200:
        return "failed", seconds
    got = {r["index"]: r["relevance_score"] for r in response.json()["results"]}
    right = got.keys() == expected.keys() and all(abs(got[i] - expected[i]) <= 1e-5 for i in got)
    return ("answered" if right else "wrong"), seconds


async def closed_loop(address: str, pool: list[Any], seconds: float) -> float:
    """Requests a second of one patient user."""
    async with httpx.AsyncClient(timeout=120) as client:
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            outcome, _ = await one(client, address, *pool[done % len(pool)])
            if outcome != "answered":
                raise RuntimeError(f"a lonely request was {outcome}")
            done += 1
        return done / (time.perf_counter() - started)


async def open_loop(address: str, pool: list[Any], rate: float, seconds: float) -> dict[str, Any]:
    """Poisson arrivals at `rate` a second for `seconds`; waits for every answer."""
    rng = random.Random(1)
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=2000)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        tasks, started, due = [], time.perf_counter(), 0.0
        while due < seconds:
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(client, address, *rng.choice(pool))))
            due += rng.expovariate(rate)
        outcomes = await asyncio.gather(*tasks)
        elapsed = time.perf_counter() - started
    counts = {name: sum(o == name for o, _ in outcomes) for name in ("answered", "refused", "failed", "wrong")}
    row: dict[str, Any] = {"offered_per_s": rate, "seconds": elapsed, **counts,
                           "answered_per_s": counts["answered"] / elapsed}  # fmt: skip
    for name in ("answered", "refused"):
        times = [s for o, s in outcomes if o == name]
        if times:
            row[f"{name}_ms"] = dict(zip(("p50", "p95", "p99"), (1e3 * np.percentile(times, [50, 95, 99])).tolist(),
                                         strict=True))  # fmt: skip
    return row


def memory_over_requests(model: str, count: int, concurrency: int = 16) -> dict[str, Any]:
    """The server's memory after a tenth of the requests, then at ten points to the end."""
    pool = pool_of_requests(model, 40, 3, length=40)

    async def some(address: str, number: int) -> list[str]:
        gate = asyncio.Semaphore(concurrency)

        async def bounded(i: int) -> str:
            async with gate:
                return (await one(client, address, *pool[i % len(pool)]))[0]

        async with httpx.AsyncClient(timeout=120) as client:
            return await asyncio.gather(*(bounded(i) for i in range(number)))

    with serving("--model", model) as (address, process):
        outcomes, points = [], []
        for _ in range(10):
            outcomes += asyncio.run(some(address, count // 10))
            points.append(resident(process.pid))
            log(f"{len(outcomes)} requests: {points[-1] / 2**20:.1f} MiB")
    return {"part": "memory", "requests": len(outcomes), "wrong": sum(o != "answered" for o in outcomes),
            "resident_bytes": points}  # fmt: skip


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="default: the bundled checkpoint")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1, 2, 4], help="multiples of one at a time")
    parser.add_argument("--memory-requests", type=int, default=10_000)
    parser.add_argument("--max-queue-tokens", type=int, default=16_000)
    parser.add_argument("--name", default="load_cpu")
    options = parser.parse_args(arguments)
    from lastrerank.cli import default_model
    from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

    model = options.model or str(default_model())
    pool = pool_of_requests(model, 100, options.documents)
    rows: list[dict[str, Any]] = []
    with serving("--model", model, "--max-queue-tokens", str(options.max_queue_tokens)) as (address, _):
        asyncio.run(closed_loop(address, pool, min(5.0, options.seconds)))
        alone = asyncio.run(closed_loop(address, pool, min(20.0, options.seconds)))
        log(f"one at a time: {alone:.1f} requests/s")
        rows.append({"part": "one at a time", "answered_per_s": alone})
        for load in options.loads:
            row = {"part": "load", "load": load, **asyncio.run(open_loop(address, pool, load * alone, options.seconds))}
            rows.append(row)
            log(json.dumps(row))
        metrics = httpx.get(f"{address}/metrics").text
        counted = {n: float(v) for n, v in re.findall(r"^lastrerank_engine_(\w+)_total (\S+)", metrics, re.M)}
        rows.append({"part": "engine", **counted})
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(folder, "tiny", tokenizer=small_tokenizer())
        rows.append(memory_over_requests(folder, options.memory_requests))
    plot_load(write_results(options.name, rows))
    bad = sum(row.get("wrong", 0) + row.get("failed", 0) for row in rows if row["part"] in ("load", "memory"))
    if bad:
        log(f"{bad} requests were answered wrongly or not at all")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
