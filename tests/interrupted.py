"""Kills children at random moments of a job that writes; run by `test_interrupted.py` in a process of its own.

    python interrupted.py save|eval|train FOLDER KILLS

Children are forked from a process that has everything loaded, so that a kill falls into the job and not into imports.
Prints a JSON object: how many were killed while at work, and what was found afterwards that should not be.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

from lastrerank import Reranker  # noqa: E402
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint  # noqa: E402

DOCUMENTS = ["one document", "another", "a third one"]
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "projector": (16, 16), "max_position_embeddings": 1024,
        "lastrerank": {"max_query_length": 32, "max_doc_length": 64}}  # fmt: skip


def checkpoint(folder: Path, seed: int, **overrides: object) -> Path:
    return write_random_checkpoint(
        folder, SIZE, tokenizer=small_tokenizer(), dtype=torch.float32, seed=seed, overrides=overrides
    )


def child_of(job: Callable[[], None]) -> int:
    """Start a job, silent, in a child; its exit status is 1 where the job raised."""
    child = os.fork()
    if child == 0:
        status = 1
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            job()
            status = 0
        finally:
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(job: Callable[[], None], seconds: float) -> bool:
    """Run a job in a child and kill it; whether it was still at work."""
    child = child_of(job)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = exit_status(child)
    assert status in (0, -signal.SIGKILL), status
    return status == -signal.SIGKILL


def duration(job: Callable[[], None]) -> float:
    """Of a whole run in a child, in seconds."""
    started = time.perf_counter()
    assert exit_status(child_of(job)) == 0
    return time.perf_counter() - started


def scores(folder: Path) -> list[float]:
    return [r["relevance_score"] for r in Reranker.from_pretrained(folder, backend="reference").rerank("q", DOCUMENTS)]


def save(root: Path, kills: int) -> dict[str, object]:
    """Two checkpoints that take each other's place: what loads is one of them, whole, and the user's files are
    there."""
    folders = [checkpoint(root / str(seed), seed, rope_theta=theta) for seed, theta in ((1, 1e6), (2, 10.0))]
    models = [Reranker.from_pretrained(folder, backend="reference") for folder in folders]
    whole = [scores(folder) for folder in folders]
    target, wrong, at_work = root / "target", [], 0
    shutil.copytree(folders[0], target)
    (target / "README.md").write_text("the user's")
    seconds = min(duration(lambda: models[0].save_pretrained(target)) for _ in range(3))  # not of a slow moment
    rng = random.Random(0)
    for number in range(kills):
        at_work += killed_at(lambda n=number: models[n % 2].save_pretrained(target), rng.uniform(0, 1.2 * seconds))
        try:
            if scores(target) not in whole:
                wrong.append("a mixture")
            if (target / "README.md").read_text() != "the user's":
                wrong.append("the user's file is lost")
        except (ValueError, OSError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
    return {"at_work": at_work, "wrong": wrong, "seconds": seconds}


def evaluate(root: Path, kills: int) -> dict[str, object]:
    """A run that is killed and started again until it is done is the run that nobody touched."""
    from lastrerank.evaluation.beir import BeirDataset
    from lastrerank.evaluation.run import rerank_run

    documents = {f"d{i}": f"text number {i} about things " * (1 + i % 4) for i in range(40)}
    queries = {f"q{i}": f"query {i}" for i in range(120)}
    dataset = BeirDataset("made", "test", documents, queries, {q: {"d1": 1} for q in queries})
    candidates = {q: [f"d{(i * 7 + j) % 40}" for j in range(6)] for i, q in enumerate(queries)}
    model = Reranker.from_pretrained(checkpoint(root / "model", 1), backend="reference")
    model.identity()

    def job(path: Path) -> None:
        rerank_run(model, dataset, candidates, path, {}, progress=False)

    path, wrong, at_work = root / "run.jsonl", [], 0
    seconds = duration(lambda: job(root / "whole.jsonl"))
    whole = (root / "whole.jsonl").read_text()
    rng = random.Random(0)
    for number in range(kills):
        at_work += killed_at(lambda: job(path), rng.uniform(0, 0.5 * seconds))
        if number % 4 == 3 or (path.exists() and path.read_text() == whole):
            job(path)
            if path.read_text() != whole:
                wrong.append(f"after {number + 1} kills another run")
            path.unlink()
    return {"at_work": at_work, "wrong": wrong, "seconds": seconds}


def train(root: Path, kills: int) -> dict[str, object]:
    """A training that is killed and started again until it is done ends with the weights of one that nobody touched."""
    import matplotlib.pyplot  # noqa: F401 (seconds that no child should spend)
    import torch._dynamo  # noqa: F401

    from lastrerank.training.run import train as run_training
    from lastrerank.training.trainer import TrainingConfig

    data = root / "data"
    data.mkdir()
    rows = [{"id": i, "text": f"page {i} about {'abcdef'[i % 6]} and more"} for i in range(24)]
    lists = [{"query": f"about {'abcdef'[i % 6]}", "positive": i, "negatives": [(i + k) % 24 for k in (1, 2, 3)]}
             for i in range(24)]  # fmt: skip
    for name, lines in (("documents", rows), ("lists", lists)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    start = checkpoint(root / "start", 1)
    config = TrainingConfig(steps=9, lists_per_step=1, hard=2, easy=1, doc_tokens=16, query_tokens=8)

    def job(output: Path) -> None:
        run_training(start, data, output, config, every=3, progress=False)

    wrong, at_work, number = [], 0, 0
    duration(lambda: job(root / "first"))
    seconds = duration(lambda: job(root / "whole"))
    whole = (root / "whole" / "last" / "model.safetensors").read_bytes()
    rng = random.Random(0)
    while number < kills:
        output = root / f"out{number}"
        killed = True
        while killed and number < kills:
            killed = killed_at(lambda o=output: job(o), rng.uniform(0, 0.5 * seconds))
            at_work, number = at_work + killed, number + 1
            if (output / "last").exists():
                try:
                    scores(output / "last")
                except ValueError as error:
                    wrong.append(f"last: {error}")
        duration(lambda o=output: job(o))
        if (output / "last" / "model.safetensors").read_bytes() != whole:
            wrong.append(f"after {number} kills other weights")
        shutil.rmtree(output)
    return {"at_work": at_work, "wrong": wrong, "seconds": seconds}


if __name__ == "__main__":
    what, where, count = sys.argv[1:]
    print(json.dumps({"save": save, "eval": evaluate, "train": train}[what](Path(where), int(count))))
