"""End to end against Transformers: the same text in, scores out, interleaved; `python -m bench.end_to_end`.

Weights are random, in the published shape: speed and memory don't depend on their values. Scores of the same inputs
are compared first; a provider whose scores differ prints no speed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import PeakMemory, give_back_freed, resident, write_results
from bench.plots import plot_end_to_end
from bench.providers import COMPILING, PROVIDERS, Request, UnavailableError
from lastrerank.speed import interleaved, spread

# Lists in one call, documents of each, bare tokens of a document and of the query.
WORKLOADS = {
    "512 tokens": (1, 5, 60, 7),
    "2,048 tokens": (1, 16, 106, 7),
    "8,192 tokens": (1, 64, 112, 7),
    "32,768 tokens": (1, 100, 312, 7),
    "16 lists of 150": (16, 1, 20, 7),
    "one short document": (1, 1, 20, 7),
    "100 x 128, query of 10": (1, 100, 128, 10),
    "100 x 128, query of 200": (1, 100, 128, 200),
    "100 x 512, query of 10": (1, 100, 512, 10),
}
SHORT = ("512 tokens", "2,048 tokens", "16 lists of 150")
# By the error rule's spirit: fp32 must agree; 16 bit and int8 are judged by ranking elsewhere and only bounded here.
AGREEMENT = {"float32": 5e-5, "bfloat16": 5e-2, "f16": 5e-2, "bf16": 5e-2, "int8": 2e-1, "q8_0": 2e-1, "q4_0": 2e-1}
# Raw scores of pairs are logits, not cosines: random ones spread over about 1.5.
LOGITS = 8.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="jina-reranker-v3")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--workloads", nargs="+", default=SHORT, choices=list(WORKLOADS))
    parser.add_argument("--once", type=float, default=30.0, help="Seconds of a pass above which it is timed once.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every provider, on the CPU")
    parser.add_argument("--name", default="end_to_end_cpu" if not torch.cuda.is_available() else "end_to_end_gpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    from lastrerank import Reranker
    from lastrerank.random_checkpoint import write_random_checkpoint

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        log(f"writing a random {options.shape} checkpoint")
        write_random_checkpoint(folder, options.shape)
        # Only to make texts of the wanted lengths and to count prompt tokens.
        encoder = Reranker.from_pretrained(folder, backend="reference", dtype="bfloat16")
        scorers = {}
        for name in options.providers:
            started = time.perf_counter()
            try:
                scorers[name] = PROVIDERS[name](Path(folder))
                give_back_freed()  # gigabytes after a conversion
                log(f"{name}: loaded in {time.perf_counter() - started:.1f} s, "
                    f"{resident() / 2**30:.1f} GiB in all")  # fmt: skip
            except UnavailableError as reason:
                log(f"{name}: left out: {reason}")
        for workload in options.workloads:
            requests = make_requests(*WORKLOADS[workload], encoder)
            tokens = sum(encoder.encode(as_request(r)).num_tokens for r in requests)
            scale = 1.0 if encoder.family.name.startswith("listwise") else LOGITS
            rows += measure(workload, requests, tokens, scorers, options.runs, options.once, scale)
            path = write_results(options.name, rows)  # a long bench may be stopped
    plot_end_to_end(path)


def measure(
    workload: str,
    requests: list[Request],
    tokens: int,
    scorers: Any,
    runs: int,
    once_above: float = 30.0,
    scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Check, with the peak of memory, then time. scale: of scores, against cosines."""
    truth, agreeing, once, rows = None, {}, {}, []
    for name, scorer in scorers.items():
        if name in COMPILING:
            scorer(requests)
        started = time.perf_counter()
        with PeakMemory() as memory:
            scores = np.concatenate(scorer(requests))
        seconds = time.perf_counter() - started
        truth = scores if truth is None else truth
        difference = float(np.abs(scores - truth).max())
        bound = scale * AGREEMENT[name.rsplit("-", 1)[1]]
        rows.append({"workload": workload, "provider": name, "prompt_tokens": tokens, "max_difference": difference,
                     "peak_bytes_above_weights": memory.peak})  # fmt: skip
        if difference <= bound and seconds > once_above:
            once[name] = spread([seconds])
        elif difference <= bound:
            agreeing[name] = lambda scorer=scorer: scorer(requests)
        else:
            log(f"{name}: scores differ by {difference:.1e} on {workload}, more than {bound:.0e}: not timed")
    times = interleaved(agreeing, runs, warmup=0) | once  # the checked pass warmed up
    base = times.get("transformers-sdpa-float32")
    for row in rows:
        timing = times.get(row["provider"])
        if timing is not None:
            row |= {"seconds": timing, "tokens_per_s": tokens / timing["median"]}
            row["ratio"] = base["median"] / timing["median"] if base else None
        log(f"{workload:16} {row['provider']:30} {row.get('tokens_per_s', float('nan')):8.1f} tokens/s "
            f"x {row.get('ratio') or float('nan'):.2f}  peak {row['peak_bytes_above_weights'] / 2**20:.0f} MiB  "
            f"difference {row['max_difference']:.1e}")  # fmt: skip
    return rows


def make_requests(lists: int, documents: int, doc_tokens: int, query_tokens: int, encoder: Any) -> list[Request]:
    """Lists of documents of exactly `doc_tokens` bare tokens: common English words, one token each by any
    byte-level tokenizer; a single letter begins, as a word that no space stands before may be several."""
    rng, cut = random.Random(0), encoder.encoder.pieces.texts.cut
    common = "the of and to in is for on that with as it by at from this an are was be have"
    words = [f" {word}" for word in common.split() if cut([f" {word}"], 10)[0].length == 1]
    requests = []
    for _ in range(lists):
        texts = ["a" + "".join(rng.choices(words, k=doc_tokens - 1)) for _ in range(documents)]
        query = "a" + "".join(rng.choices(words, k=query_tokens - 1))
        assert all(c.length == doc_tokens for c in cut(texts, 10**6))
        assert cut([query], 10**6)[0].length == query_tokens
        requests.append((query, texts))
    return requests


def as_request(request: Request) -> Any:
    from lastrerank import RerankRequest

    return RerankRequest(*request)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
