"""What each loss of the paper does to a trained checkpoint; `python -m bench.ablation LISTS --dev FOLDER ...`.

Short runs from the bundled checkpoint, alike but for the losses: the ranking loss alone, with each of the others, and
with all of them (weights of the paper, arXiv 2509.25085). LISTS is a folder of lists that `lastrerank train` or
`lastrerank.training.bundled` made. Dev nDCG@10 of BM25's best 20 in random order, before and after.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.measure import write_results
from bench.quality import DEPTH, DOC_TOKENS
from lastrerank import Reranker
from lastrerank.checkpoint import open_checkpoint
from lastrerank.cli import default_model
from lastrerank.evaluation.report import evaluate
from lastrerank.training.bundled import RECIPE, pool_weights
from lastrerank.training.data import TrainingData, read_training_data
from lastrerank.training.trainer import Trainer, TrainingConfig

PAPER = TrainingConfig()
DISPERSE, DUAL, SIMILAR = {"disperse": PAPER.disperse}, {"dual": PAPER.dual}, {"similar": PAPER.similar}
VARIANTS: dict[str, dict[str, float]] = {
    "rank": {}, "rank + disperse": DISPERSE, "rank + dual": DUAL, "rank + similar": SIMILAR,
    "all four": DISPERSE | DUAL | SIMILAR,
}  # fmt: skip


def dev_ndcg(model: str | Path, folders: list[Path], queries: int) -> dict[str, float]:
    """nDCG@10 of each dataset's dev split, candidates in random order."""
    reranker = Reranker.from_pretrained(model, device="cpu")
    with tempfile.TemporaryDirectory() as output:
        report = evaluate(
            reranker, folders, output, split="dev", orders=("random",), top_k=DEPTH, max_queries=queries,
            max_doc_length=DOC_TOKENS, progress=False,
        )  # fmt: skip
    return {row["dataset"]: row["nDCG@10"] for row in report["rows"] if row["ranking"] == "random"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", type=Path)
    parser.add_argument("--dev", type=Path, nargs="+", required=True, help="BEIR-format folders with a dev split")
    parser.add_argument("--model", default="")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=50, help="a dev set")
    parser.add_argument("--name", default="ablation")
    options = parser.parse_args()
    model = options.model or str(default_model())
    data = read_training_data(options.lists)
    data = TrainingData(data.documents, data.rows, pool_weights(data), data.document_vectors)
    rows: list[dict[str, Any]] = []

    def measured(losses: str, steps: int, checkpoint: str | Path) -> None:
        dev = dev_ndcg(checkpoint, options.dev, options.queries)
        rows.append({"losses": losses, "steps": steps, "mean": sum(dev.values()) / len(dev), "dev": dev})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    measured("none", 0, model)
    for name, losses in VARIANTS.items():
        config = replace(RECIPE, steps=options.steps, rank=PAPER.rank, distill=0.0, embedding=0.0, **losses)
        trainer = Trainer(open_checkpoint(model), data, config)
        trainer.train(io.StringIO())
        with tempfile.TemporaryDirectory() as output:
            trainer.save_checkpoint(output)
            measured(name, options.steps, output)
    write_results(options.name, rows)


if __name__ == "__main__":
    main()
