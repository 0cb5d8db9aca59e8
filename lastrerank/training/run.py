"""`lastrerank train`: from raw pairs or lists to a checkpoint, resumed if interrupted, watched on dev sets.

The output folder holds `recipe.json`, `log.jsonl`, `state.pt`, `progress.png`, `last/` and, with dev sets,
`best/`: the checkpoint of the best dev nDCG@10 so far, which is what early stopping keeps. A training of low-rank
updates leaves them in `last-adapter/` and `best-adapter/` as well, as PEFT has them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lastrerank.checkpoint import open_checkpoint, resolve
from lastrerank.evaluation.beir import BeirDataset, check_names, read_beir
from lastrerank.evaluation.run import Ranking, bm25_candidates, evaluate_ranking, ordered
from lastrerank.kept import digest, locked, read_records, write_file, write_records
from lastrerank.progress import Progress
from lastrerank.reranker import Reranker
from lastrerank.training.data import read_pairs, read_training_data, write_lists
from lastrerank.training.decoder import check_layers, decoder_digest, is_decoder, listwise_start
from lastrerank.training.mining import Pair, mine_lists, rank_negatives
from lastrerank.training.trainer import Trainer, TrainingConfig

logger = logging.getLogger("lastrerank")

# Dev sets: a seeded sample of judged queries, BM25's best, in random order, so that the first stage's order is no help.
DEV_QUERIES, DEV_DEPTH = 50, 20


def train(
    start: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: TrainingConfig,
    *,
    weights: Mapping[str, float] | None = None,
    dev: Sequence[str | os.PathLike[str]] = (),
    layers: int | None = None,
    every: int = 200,
    dev_queries: int = DEV_QUERIES,
    patience: int | None = None,
    device: str = "cpu",
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a checkpoint on lists, from where an interrupted training in `output` stopped.

    Args:
        start: checkpoint to begin with; or a plain pretrained decoder (Qwen3, Qwen2, Llama), which gets the prompt's
            control tokens and a projector (see `lastrerank.training.decoder`) and is kept in `output/start`.
        layers: of a plain decoder, the first of them are kept; None for all.
        data: folder of lists (see `lastrerank.training.data`); one of raw pairs is mined into `output/lists` first.
        output: folder for everything that is written.
        config: the recipe.
        weights: relative frequency of each pool of lists.
        dev: BEIR-format folders with a `dev` split, scored at the start and every `every` steps.
        dev_queries: a seeded sample of as many queries a set; documents are cut as in training.
        patience: stop after this many looks at dev since the best; only with dev sets.
        device: torch device.

    Returns:
        The last line of the log: step, and with dev sets their nDCG@10 and the best mean so far.

    Raises:
        ValueError: an argument is none that can be, data are malformed, or `output` holds a training from another
            start, by another recipe or on other data, is in use, or is damaged.
    """
    for name, value in (("every", every), ("dev_queries", dev_queries), ("patience", patience)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    if patience is not None and not dev:
        raise ValueError(f"patience is {patience}, but there is no dev set to look at")
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    with locked(target / "train", "this training's folder"):
        return _train(
            start, Path(data), target, config, weights, dev, layers, every, dev_queries, patience, device, progress
        )


def _train(
    start: str | os.PathLike[str],
    data: Path,
    target: Path,
    config: TrainingConfig,
    weights: Mapping[str, float] | None,
    dev: Sequence[str | os.PathLike[str]],
    layers: int | None,
    every: int,
    dev_queries: int,
    patience: int | None,
    device: str,
    progress: bool | None,
) -> dict[str, Any]:
    plain = is_decoder(start)
    if plain:
        start = resolve(start)[1]  # once: a Hub id is asked for over the network
        check_layers(start, layers)
    elif layers is not None:
        raise ValueError(f"layers is {layers}: {start} is no plain decoder, all of its layers are trained")
    begin = None if plain else open_checkpoint(start)
    check_names(dev, "dev")
    sets = [_DevSet(read_beir(folder, "dev", max_queries=dev_queries), config.doc_tokens) for folder in dev]
    # What the weights at a step depend on, beside the recipe.
    identity: dict[str, Any] = {
        "start": decoder_digest(start, layers) if begin is None else begin.digest(),
        "data": data_digest(data), "weights": dict(weights) if weights else None,
        "dev": [digest(s.dataset.name, s.dataset.queries, s.dataset.qrels, s.dataset.documents) for s in sets],
    }  # fmt: skip
    lists = data
    if not any((lists / f"lists.jsonl{suffix}").is_file() for suffix in ("", ".gz")):
        lists = mine_folder(data, target / "lists", progress=progress)
        identity["mined"] = data_digest(lists)
    training_data = read_training_data(lists, dict(weights) if weights else None)
    state, log_path = target / "state.pt", target / "log.jsonl"
    if begin is None:
        if not state.is_file():
            listwise_start(start, target / "start", training_data, config, layers=layers)
        elif not (target / "start").is_dir():
            raise ValueError(f"{state} is of a training with another start: name another output, or remove it")
        begin = open_checkpoint(target / "start")
        identity["made"] = begin.digest()  # configuration and tokenizer are read from there
    trainer = Trainer(begin, training_data, config, device, identity)
    records: list[dict[str, Any]] = []
    if state.is_file():
        trainer.load_state(state)
        records = [row for row in _read_log(log_path) if row["step"] <= trainer.step]
        steps = sum("grad_norm" in row for row in records)
        if sets and steps != trainer.step:
            raise ValueError(f"{log_path} has {steps} of the {trainer.step} steps that {state} has made, so the best "
                             "so far isn't known: put it back, or name another output")  # fmt: skip
        logger.warning("%s: going on from step %d of %d", target, trainer.step, config.steps)
    write_records(log_path, records)
    write_file(target / "recipe.json", json.dumps(asdict(config), indent=1) + "\n")
    steps = config.steps - trainer.step
    with log_path.open("a", encoding="utf-8") as log, Progress("training", "steps", progress, steps) as bar:

        def look() -> None:
            trainer.save_checkpoint(target / "last")
            if config.lora_rank:
                trainer.save_adapter(target / "last-adapter")
            if sets:
                scores = {s.dataset.name: s.ndcg(target / "last", device) for s in sets}
                mean = sum(scores.values()) / len(sets)
                log.write(json.dumps({"step": trainer.step, "dev": scores, "dev_mean": mean}) + "\n")
                log.flush()
                if _best(_read_log(log_path))[1] == 0:
                    trainer.save_checkpoint(target / "best")
                    if config.lora_rank:
                        trainer.save_adapter(target / "best-adapter")
            os.fsync(log.fileno())  # a state without its log would not know the best
            trainer.save_state(state)
            plot(_read_log(log_path), target / "progress.png")

        if not records:  # the start itself: a training that only harms must show
            look()
        while trainer.step < config.steps and (patience is None or _best(_read_log(log_path))[1] < patience):
            trainer.train(log, until=trainer.step + every, on_step=lambda: bar.advance(1))
            look()
    result = {"step": trainer.step, "output": str(target)}
    records = _read_log(log_path)
    return result | ({"best_dev_ndcg": _best(records)[0], **records[-1]} if sets else {})


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Records that steps and looks have written.

    Raises:
        ValueError: one is none; the message names file and line.
    """
    records = read_records(path)
    for number, row in enumerate(records, 1):
        mean = row.get("dev_mean", 0.0)
        if type(row.get("step")) is not int or not isinstance(mean, float) or not math.isfinite(mean):
            raise ValueError(f"{path}:{number}: no record of a training: {str(row)[:80]}")
    return records


def data_digest(folder: Path) -> str:
    """Of every file that training reads there."""
    stems = ("lists.jsonl", "pairs.jsonl", "documents.jsonl")
    names = [stem + suffix for stem in stems for suffix in ("", ".gz")]
    return digest(*(part for name in names if (folder / name).is_file() for part in (name, folder / name)))


class _DevSet:
    def __init__(self, dataset: BeirDataset, doc_tokens: int) -> None:
        self.dataset, self.doc_tokens = dataset, doc_tokens
        self.candidates: Ranking = ordered(bm25_candidates(dataset, DEV_DEPTH), "random")

    def ndcg(self, checkpoint: Path, device: str) -> float:
        reranker = Reranker.from_pretrained(checkpoint, device=device)
        cap = min(self.doc_tokens, reranker.encoder.max_doc_length)
        results = reranker.rerank_many(
            [{"query": self.dataset.queries[q], "documents": [self.dataset.documents[d] for d in names],
              "max_doc_length": cap} for q, names in self.candidates.items()], progress=False,
        )  # fmt: skip
        ranking = {
            q: [names[r["index"]] for r in rows]
            for (q, names), rows in zip(self.candidates.items(), results, strict=True)
        }
        return evaluate_ranking(self.dataset, ranking)[0]["nDCG@10"]


def mine_folder(
    pairs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    depth: int = 20,
    limit: int | None = None,
    model: Reranker | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Path:
    """Raw pairs to lists: BM25's negatives, or with a model the hardest of them in its eyes.

    Args:
        pairs: folder with `pairs.jsonl` (`query`, `positive` = a document's id, optionally `pool`, or `source` and
            `lang`, which then name the pool) and `documents.jsonl` (`id`, `text`), plain or gzip.
        output: folder for `lists.jsonl` and `documents.jsonl`.
        depth: negatives kept.
        limit: at most this many pairs, a seeded sample.
        model: reranks `2 * depth` of BM25's and keeps its best.

    Raises:
        ValueError: a file is missing or malformed.
    """
    documents, rows = read_pairs(pairs)
    known = [Pair(row["query"], row["positive"], row["pool"]) for row in rows]
    if limit is not None and limit < len(known):
        known = random.Random(seed).sample(known, limit)
    lists = mine_lists(documents, known, depth=depth if model is None else 2 * depth, progress=progress)
    if model is not None:
        lists = rank_negatives(model, documents, lists, depth, progress=progress)
    return write_lists(output, documents, lists)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses a step, smoothed, and dev nDCG@10."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    steps = [row for row in records if "grad_norm" in row]
    window = max(1, len(steps) // 50)
    for name in ("rank", "disperse", "dual", "similar", "distill"):
        own = [(row["step"], row[name]) for row in steps if name in row]
        means = [sum(v for _, v in own[i : i + window]) / len(own[i : i + window]) for i in range(0, len(own), window)]
        if own:
            above.plot([own[i][0] for i in range(0, len(own), window)], means, label=name)
    above.set_ylabel(f"loss, means of {window} steps")
    if steps:
        above.legend(fontsize=8)
    looks = [row for row in records if "dev" in row]
    for name in looks[0]["dev"] if looks else ():
        below.plot([row["step"] for row in looks], [row["dev"][name] for row in looks], marker=".", label=name)
    if looks:
        below.legend(fontsize=8)
    below.set_ylabel("dev nDCG@10, random order")
    below.set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _best(records: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Best dev mean so far, and how many looks ago it was."""
    means = [row["dev_mean"] for row in records if "dev_mean" in row]
    return (max(means), len(means) - 1 - means.index(max(means))) if means else (float("-inf"), 0)
