"""`lastrerank eval`: datasets and input orders through one reranker, to a table, a plot and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lastrerank.evaluation.beir import BeirDataset, check_names, read_beir
from lastrerank.evaluation.contenders import Contender
from lastrerank.evaluation.run import (
    METRICS,
    Ranking,
    bm25_candidates,
    check_order,
    evaluate_ranking,
    ordered,
    read_trec_run,
    rerank_run,
)
from lastrerank.kept import write_file, write_records
from lastrerank.reranker import Reranker


def first_stage(
    folders: Sequence[str | os.PathLike[str]],
    *,
    split: str = "test",
    query_folder: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    top_k: int = 100,
    max_queries: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], Iterator[tuple[BeirDataset, Ranking]]]:
    """Settings, and datasets with the candidates of their queries, one read at a time; arguments and errors as of
    `evaluate`."""
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    check_names(folders, "folders")

    def searched() -> Iterator[tuple[BeirDataset, Ranking]]:
        for folder in folders:
            dataset = read_beir(folder, split, query_folder=query_folder, max_queries=max_queries, seed=seed)
            yield dataset, bm25_candidates(dataset, top_k) if run is None else read_trec_run(run, dataset, top_k)

    settings = {
        "split": split, "first_stage": "bm25" if run is None else Path(run).name, "top_k": top_k,
        "max_queries": max_queries, "seed": seed,
    }  # fmt: skip
    return settings, searched()


def evaluate(
    model: Reranker | Contender,
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    split: str = "test",
    query_folder: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    top_k: int = 100,
    orders: Sequence[str] = ("descending",),
    max_queries: int | None = None,
    max_doc_length: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Rerank and score every dataset in every input order.

    Args:
        model: what ranks.
        folders: BEIR-format datasets.
        output: folder for the runs (resumed if they are there), `results.json`, `results.png` and `per_query.jsonl`.
        split: of the qrels.
        query_folder: queries and judgements of another folder, for cross-lingual evaluation.
        run: TREC run file of the first stage; BM25 without one.
        top_k: candidates a query.
        orders: in which the reranker sees the candidates: "descending", "ascending", "random".
        max_queries: a seeded sample of the judged queries.
        max_doc_length: cap in tokens; the checkpoint's own without one.
        seed: of the sample and the random order.

    Returns:
        The report that `results.json` holds: settings, and a row a dataset for the first stage and each order.

    Raises:
        ValueError: a dataset, the run file or an argument is bad.
    """
    settings, judged = first_stage(
        folders, split=split, query_folder=query_folder, run=run, top_k=top_k, max_queries=max_queries, seed=seed
    )
    return rerank_and_score(
        model, settings, judged, output, orders=orders, max_doc_length=max_doc_length, progress=progress
    )


def rerank_and_score(
    model: Reranker | Contender,
    settings: Mapping[str, Any],
    judged: Iterable[tuple[BeirDataset, Ranking]],
    output: str | os.PathLike[str],
    *,
    orders: Sequence[str] = ("descending",),
    max_doc_length: int | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """What `evaluate` does with what `first_stage` gives."""
    for order in orders:
        check_order(order)
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    settings = {**model.identity(), **settings}
    rows: list[dict[str, Any]] = []
    per_query: list[dict[str, Any]] = []
    for dataset, found in judged:
        means, each = evaluate_ranking(dataset, found)
        base = {"dataset": dataset.name, "split": settings["split"], "queries": len(dataset.queries)}
        rows.append(base | {"ranking": "first stage", **means})
        per_query += [base | {"ranking": "first stage", "query": q, **values} for q, values in each.items()]
        for order in orders:
            shown = ordered(found, order, settings["seed"])
            path = target / f"{dataset.name.replace('>', '-to-')}-{order}.jsonl"
            done = rerank_run(
                model, dataset, shown, path, settings | {"dataset": dataset.name, "order": order},
                max_doc_length=max_doc_length, progress=progress,
            )  # fmt: skip
            means, each = evaluate_ranking(dataset, done.ranking)
            row = base | {"ranking": order, **means, "prompt_tokens": done.prompt_tokens, "seconds": done.seconds}
            rows.append(row | {"resumed": done.resumed})
            per_query += [base | {"ranking": order, "query": q, **values} for q, values in each.items()]
    report = {"settings": settings, "rows": rows}
    write_file(target / "results.json", json.dumps(report, indent=1) + "\n")
    write_records(target / "per_query.jsonl", per_query)
    plot(report, target / "results.png")
    return report


def pyplot() -> Any:
    """Matplotlib's, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# What is ours beside each other, and what isn't.
SHADES, GREYS = ("#14507a", "#5b9bc4", "#d1495b", "#9cc3dc"), ("#b9c1c7", "#7d8890", "#98a2a9", "#5c6770")


def plot(report: dict[str, Any], path: Path) -> None:
    """nDCG@10 by dataset: first stage and each order beside each other."""
    plt = pyplot()
    rows = report["rows"]
    datasets, rankings = (list(dict.fromkeys(row[key] for row in rows)) for key in ("dataset", "ranking"))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(datasets), 4), layout="constrained")
    width = 0.8 / len(rankings)
    for r, ranking in enumerate(rankings):
        own = {row["dataset"]: row["nDCG@10"] for row in rows if row["ranking"] == ranking}
        places = [d + (r - (len(rankings) - 1) / 2) * width for d in range(len(datasets))]
        shade = GREYS[0] if ranking == "first stage" else SHADES[(r - 1) % len(SHADES)]
        axes.bar(places, [own[d] for d in datasets], width, label=ranking, color=shade)
    axes.set_xticks(range(len(datasets)), datasets, rotation=15)
    axes.set_ylabel("nDCG@10")
    s = report["settings"]
    axes.set_title(f"{s['model']}, {s['first_stage']} top {s['top_k']}, {s['split']}", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(report: dict[str, Any]) -> Any:
    """The report for people, as a rich table."""
    from rich.table import Table

    s = report["settings"]
    title = f"{s['model']} over {s['first_stage']} top {s['top_k']}, {s['split']} split"
    shown = Table(title=title, title_justify="left")
    for column in ("dataset", "queries", "ranking"):
        shown.add_column(column)
    for metric in METRICS:
        shown.add_column(metric, justify="right")
    shown.add_column("tokens/s", justify="right")
    for row in report["rows"]:
        rate = f"{row['prompt_tokens'] / row['seconds']:.0f}" if row.get("prompt_tokens") else ""
        shown.add_row(
            row["dataset"], str(row["queries"]), row["ranking"], *(f"{row[metric]:.4f}" for metric in METRICS), rate
        )
    return shown
