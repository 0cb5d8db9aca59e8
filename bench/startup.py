"""How long a person waits at the start, by the bundled checkpoint on the CPU; `python -m bench.startup`.

From the moment at which `import torch` has returned, in a new process each time: until the first score, and until a
server answers that it is ready.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import write_results
from bench.serving import serving
from lastrerank.cli import default_model
from lastrerank.speed import spread

FIRST_SCORE = """
import sys, time, torch
started = time.perf_counter()
from lastrerank import Reranker
reranker = Reranker.from_pretrained(sys.argv[1], device="cpu", dtype=sys.argv[2])
loaded = time.perf_counter()
reranker.rerank("how do I number pages", ["Insert a page number in the footer.", "Sort the rows of a table."])
print(loaded - started, time.perf_counter() - started)
"""


def first_score(model: str, dtype: str) -> tuple[float, float]:
    """Seconds until the model is loaded, and until its first score."""
    command = [sys.executable, "-c", FIRST_SCORE, model, dtype]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    loaded, scored = map(float, output.split())
    return loaded, scored


def ready(model: str) -> float:
    """Seconds until `/ready` answers 200."""
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder) / "imported"
        note = f"import pathlib, time, torch; pathlib.Path({str(stamp)!r}).write_text(str(time.time()))"
        with serving("--model", model, first=note):
            return time.time() - float(stamp.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="default: the bundled checkpoint")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--name", default="startup_cpu")
    options = parser.parse_args()
    model = options.model or str(default_model())
    rows = []
    for dtype in ("float32", "int8"):
        times = [first_score(model, dtype) for _ in range(options.runs)]
        for what, values in zip(("loaded", "first score"), zip(*times, strict=True), strict=True):
            rows.append({"what": what, "dtype": dtype, "seconds": spread(list(values))})
    rows.append({"what": "server ready", "dtype": "float32",
                 "seconds": spread([ready(model) for _ in range(options.runs)])})  # fmt: skip
    for row in rows:
        print(f"{row['what']:14} {row['dtype']:8} {row['seconds']['median']:.2f} s", file=sys.stderr)
    write_results(options.name, rows)


if __name__ == "__main__":
    main()
