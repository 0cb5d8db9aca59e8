"""Peak memory of a pass above the loaded weights, each provider in a process of its own; `python -m bench.memory`.

What is resident after loading and one short pass, above an interpreter with PyTorch, is what the loaded model takes;
the peak is what the long pass adds. Scores of the providers are compared as in `bench.end_to_end`.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.end_to_end import AGREEMENT, WORKLOADS, log, make_requests
from bench.measure import PeakMemory, give_back_freed, resident, write_results
from bench.providers import PROVIDERS, UnavailableError

DEFAULT = ("transformers-sdpa-float32", "lastrerank-reference-float32", "lastrerank-native-float32",
           "lastrerank-native-bfloat16", "lastrerank-native-int8")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="jina-reranker-v3")
    parser.add_argument("--workload", default="2,048 tokens", choices=list(WORKLOADS))
    parser.add_argument("--providers", nargs="+", default=DEFAULT, choices=list(PROVIDERS))
    parser.add_argument("--name", default="memory_cpu")
    parser.add_argument("--one", nargs=2, metavar=("PROVIDER", "FOLDER"), help="measure one here; used by itself")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]), options.workload)))
        return
    from lastrerank.random_checkpoint import write_random_checkpoint

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(folder, options.shape)
        for provider in options.providers:
            command = [sys.executable, "-m", "bench.memory", "--workload", options.workload, "--one", provider, folder]
            files = sorted(Path(folder).iterdir())
            row = in_a_process(command)
            if sorted(Path(folder).iterdir()) != files:  # it converted the checkpoint first
                row = in_a_process(command)
            if "scores" in row:
                truth = rows[0]["scores"] if rows else row["scores"]
                row["max_difference"] = float(np.abs(np.subtract(row["scores"], truth)).max())
                if row["max_difference"] > AGREEMENT[provider.rsplit("-", 1)[1]]:
                    raise SystemExit(f"{provider}: scores differ by {row['max_difference']:.1e}: not measured")
                loaded, peak = (row[name] / 2**20 for name in ("loaded_bytes", "peak_bytes"))
                log(f"{provider:30} {peak:7.0f} MiB above the loaded model's {loaded:.0f}, "
                    f"{1024 * peak / row['prompt_tokens']:.0f} KiB a token")  # fmt: skip
                rows.append(row)
            else:
                log(f"{provider}: left out: {row['unavailable']}")
    for row in rows:
        del row["scores"]
    write_results(options.name, rows)


def in_a_process(command: list[str]) -> dict:
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(provider: str, folder: Path, workload: str) -> dict:
    from lastrerank import Reranker, RerankRequest

    tokenizing = Reranker.from_pretrained(folder, backend="reference", dtype="bfloat16")
    requests = make_requests(*WORKLOADS[workload], tokenizing)
    tokens = sum(tokenizing.encode(RerankRequest(*request)).num_tokens for request in requests)
    del tokenizing
    gc.collect()
    give_back_freed()  # what is held back would be taken for the provider's, or hide some of it
    before = resident()
    try:
        scorer = PROVIDERS[provider](folder)
    except UnavailableError as reason:
        return {"provider": provider, "unavailable": str(reason)}
    scorer([("a short one", ["to touch what is touched once"])])
    with PeakMemory() as memory:
        scores = np.concatenate(scorer(requests))
    return {"provider": provider, "workload": workload, "prompt_tokens": tokens, "peak_bytes": memory.peak,
            "loaded_bytes": memory.start - before, "scores": scores.tolist()}  # fmt: skip


if __name__ == "__main__":
    main()
