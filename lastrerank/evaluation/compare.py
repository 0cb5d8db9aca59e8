"""Several models on the same candidates: one table, one plot, and whether their differences are more than chance."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

from lastrerank.evaluation.beir import BeirDataset
from lastrerank.evaluation.contenders import PEERS, Contender
from lastrerank.evaluation.report import GREYS, SHADES, first_stage, pyplot, rerank_and_score
from lastrerank.evaluation.run import Ranking, check_order
from lastrerank.kept import read_records, write_file

# nDCG@10 as the papers and cards give it, beside what is measured: means over whole benchmarks, each by its author's
# harness and first stage. jina: the card of jina-reranker-v3 (arXiv 2509.25085) and of v3.5.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "jina-reranker-v3.5": {"BEIR": 63.20},
    "jina-reranker-v3": {"BEIR": 61.94, "MIRACL": 66.83, "MKQA": 67.92, "CoIR": 70.64},
    "jina-reranker-v2": {"BEIR": 57.06, "MIRACL": 63.65, "MKQA": 67.90, "CoIR": 56.14},
    "jina-reranker-m0": {"BEIR": 58.95, "MIRACL": 66.75, "MKQA": 68.19, "CoIR": 63.55},
    "bge-reranker-v2-m3": {"BEIR": 56.51, "MIRACL": 69.32, "MKQA": 67.88, "CoIR": 36.28},
    "mxbai-rerank-base-v2": {"BEIR": 58.40, "MIRACL": 55.32, "MKQA": 64.24, "CoIR": 65.71},
    "mxbai-rerank-large-v2": {"BEIR": 61.44, "MIRACL": 57.94, "MKQA": 67.06, "CoIR": 70.87},
    "Qwen3-Reranker-0.6B": {"BEIR": 56.28, "MIRACL": 57.70, "MKQA": 65.34, "CoIR": 65.18},
    "Qwen3-Reranker-4B": {"BEIR": 61.16, "MIRACL": 67.52, "MKQA": 67.52, "CoIR": 73.91},
}


def compare(
    contenders: Mapping[str, Callable[[], Contender]],
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    **options: Any,
) -> dict[str, Any]:
    """Evaluate each model, one loaded at a time, and put the results beside each other.

    Args:
        contenders: what loads each model, by the name it is to have; the first is what the others are tested against.
        folders: BEIR-format datasets.
        output: folder; each model's runs are in one of its own (resumed if they are there), `results.json` and
            `results.png` hold all.
        options: of `evaluate`, the same for all.

    Returns:
        settings; rows, a dataset, order and model each; differences, of every pair of models in nDCG@10 of the same
        queries, with the p-value of a two-sided paired t-test, None where it has no meaning.

    Raises:
        ValueError: fewer than two models, or what `evaluate` raises.
    """
    from scipy.stats import ttest_rel  # if it is missing that shows before any work is done

    if len(contenders) < 2:
        raise ValueError(f"{len(contenders)} model, expected two or more to compare")
    target = Path(output)
    slugs = {name: re.sub(r"[^\w.-]+", "-", name).strip("-") for name in contenders}
    if len(set(slugs.values())) < len(slugs):
        raise ValueError(f"models are {list(contenders)}: expected names that make different folders")
    rows: list[dict[str, Any]] = []
    each: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    # Once for all models, and before the first is loaded; of the documents those that are candidates.
    for order in options.get("orders", ()):
        check_order(order)
    ranking = {name: options.pop(name) for name in ("orders", "max_doc_length", "progress") if name in options}
    settings, searched = first_stage(folders, **options)
    judged = [(_of_candidates(dataset, candidates), candidates) for dataset, candidates in searched]
    for number, (name, load) in enumerate(contenders.items()):
        contender = load()
        report = rerank_and_score(contender, settings, judged, target / slugs[name], **ranking)
        for row in report["rows"]:
            if row["ranking"] != "first stage":
                rows.append(row | {"model": name, "parameters": contender.parameters, **_run_by(report["settings"])})
            elif number == 0:
                rows.append(row | {"model": "first stage", "ranking": ""})
        for line in read_records(target / slugs[name] / "per_query.jsonl"):
            if line["ranking"] != "first stage":
                where = each.setdefault((line["dataset"], line["ranking"]), {})
                where.setdefault(name, {})[line["query"]] = line["nDCG@10"]
        del contender
        gc.collect()  # models of other libraries hold themselves in circles
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    rows.sort(key=lambda row: datasets.index(row["dataset"]))
    differences = [
        {"dataset": dataset, "ranking": ranking, "model": b, "against": a}
        | _paired(by_model[a], by_model[b], ttest_rel)
        for (dataset, ranking), by_model in each.items() for a, b in combinations(by_model, 2)
    ]  # fmt: skip
    report = {"settings": settings, "rows": rows, "differences": differences}
    write_file(target / "results.json", json.dumps(report, indent=1) + "\n")
    plot(report, target / "results.png")
    return report


def _of_candidates(dataset: BeirDataset, candidates: Ranking) -> BeirDataset:
    named = {name for names in candidates.values() for name in names}
    return replace(dataset, documents={name: text for name, text in dataset.documents.items() if name in named})


def _run_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("digest", "dtype", "backend", "rounding") if name in settings}


def _paired(a: Mapping[str, float], b: Mapping[str, float], test: Callable[..., Any]) -> dict[str, Any]:
    """Mean of b less a over their queries, and the p-value of a paired test."""
    first, second = [a[query] for query in a], [b[query] for query in a]
    difference = sum(second) / len(second) - sum(first) / len(first)
    if len(first) < 2 or len({y - x for x, y in zip(first, second, strict=True)}) < 2:  # no spread to test against
        return {"difference": difference, "p": None, "queries": len(first)}
    return {"difference": difference, "p": float(test(second, first).pvalue), "queries": len(first)}


def plot(report: dict[str, Any], path: Path) -> None:
    """nDCG@10 by dataset and order: a bar a model."""
    plt = pyplot()
    rows = report["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    places = list(dict.fromkeys((row["dataset"], row["ranking"]) for row in rows if row["ranking"]))
    figure, axes = plt.subplots(figsize=(3 + 1.6 * len(places), 4), layout="constrained")
    width = 0.8 / len(models)
    # Ours strong, other libraries' and the first stage grey, as in every plot of this project.
    shades, greys = cycle(SHADES), cycle(GREYS)
    colors = {model: next(greys if model.partition(":")[0] in ("first stage", *PEERS) else shades) for model in models}
    for m, model in enumerate(models):
        own = {(row["dataset"], row["ranking"]): row["nDCG@10"] for row in rows if row["model"] == model}
        values = [own.get(place, own.get((place[0], ""), 0.0)) for place in places]
        at = [p + (m - (len(models) - 1) / 2) * width for p in range(len(places))]
        axes.bar(at, values, width, label=model, color=colors[model])
    axes.set_xticks(range(len(places)), [f"{dataset}\n{ranking}" for dataset, ranking in places])
    axes.set_ylabel("nDCG@10")
    s = report["settings"]
    axes.set_title(f"{s['first_stage']} top {s['top_k']}, {s['split']}", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(report: dict[str, Any]) -> Any:
    """The report for people, as a rich table; p-values are against the first model."""
    from rich.table import Table

    s, rows = report["settings"], report["rows"]
    first = next(row["model"] for row in rows if row["ranking"])
    title = f"{s['first_stage']} top {s['top_k']}, {s['split']} split; p of a paired t-test against {first}"
    shown = Table(title=title, title_justify="left")
    for column in ("dataset", "queries", "order", "model"):
        shown.add_column(column)
    for column in ("nDCG@10", "p", "R@10", "parameters", "dtype", "tokens/s"):
        shown.add_column(column, justify="right")
    p_values = {
        (d["dataset"], d["ranking"], d["model"]): d["p"] for d in report["differences"] if d["against"] == first
    }
    for row in rows:
        p = p_values.get((row["dataset"], row["ranking"], row["model"]))
        parameters = f"{row['parameters'] / 1e6:,.0f} M" if "parameters" in row else ""
        # What was ranked by an earlier start took no time in this one.
        rate = f"{row['prompt_tokens'] / row['seconds']:.0f}" if row.get("prompt_tokens") else ""
        shown.add_row(
            row["dataset"], str(row["queries"]), row["ranking"], row["model"], f"{row['nDCG@10']:.4f}",
            "" if p is None else f"{p:.3g}", f"{row['R@10']:.4f}", parameters,
            str(row.get("dtype", "")).removeprefix("torch."), rate,
        )  # fmt: skip
    return shown


def published_table() -> Any:
    """`PUBLISHED`, as a rich table that says so."""
    from rich.table import Table

    shown = Table(title="As published, not measured here: nDCG@10 over whole benchmarks", title_justify="left")
    shown.add_column("model")
    benchmarks = list(dict.fromkeys(name for values in PUBLISHED.values() for name in values))
    for name in benchmarks:
        shown.add_column(name, justify="right")
    for model, values in PUBLISHED.items():
        shown.add_row(model, *(f"{values[name]:.2f}" if name in values else "" for name in benchmarks))
    return shown
