"""Ray: an online deployment on Ray Serve, and offline reranking of a whole dataset; `pip install 'lastrerank[ray]'`.

    serve.run(deployment("jinaai/jina-reranker-v3", replicas=4, gpus=1), route_prefix="/")
    rerank_dataset("model", dataset, candidates, "runs/shards", workers=8, gpus=1)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lastrerank.engine import Engine
from lastrerank.evaluation.beir import BeirDataset
from lastrerank.evaluation.run import Ranking, rerank_run
from lastrerank.integrations import needs
from lastrerank.reranker import Reranker

with needs("ray"):
    import ray
    from ray import serve


def deployment(
    model: str,
    *,
    replicas: int | None = None,
    autoscaling: dict[str, Any] | None = None,
    cpus: float = 1,
    gpus: float = 0,
    max_ongoing_requests: int = 64,
    engine: dict[str, Any] | None = None,
    api_key: str | None = None,
    limits: dict[str, Any] | None = None,
    **arguments: Any,
) -> serve.Application:
    """The routes of `lastrerank serve` as an application for `serve.run`, an engine in every replica.

    Args:
        model: folder (on every node), bundled name or Hub id.
        replicas: fixed number; or `autoscaling`: Ray Serve's autoscaling settings. Default: one replica.
        cpus: of a replica, which uses that many threads.
        gpus: of a replica.
        max_ongoing_requests: sent to a replica at once; its engine packs them.
        engine: arguments of `Engine`.
        api_key: as in `create_app`.
        limits: arguments of `lastrerank.server.Limits`.
        arguments: of `Reranker.from_pretrained`.

    Raises:
        ValueError: replicas is less than 1, or there is `autoscaling` beside it.
    """
    if replicas is not None and (replicas < 1 or autoscaling):
        raise ValueError(f"replicas is {replicas}, expected 1 or more, or autoscaling instead of it")
    fixed = 1 if replicas is None else replicas
    scale: dict[str, Any] = {"autoscaling_config": autoscaling} if autoscaling else {"num_replicas": fixed}

    def application() -> Any:
        import torch

        from lastrerank.server import Limits, create_app

        if not gpus:
            torch.set_num_threads(max(1, int(cpus)))
        reranker = Reranker.from_pretrained(model, **arguments)
        reranker.warmup()
        return create_app(
            Engine(reranker, **(engine or {})), model_name=reranker.checkpoint.name, api_key=api_key,
            limits=Limits(**(limits or {})),
        )  # fmt: skip

    class Replica:
        """Health is the engine's: Ray replaces a replica whose passes have stopped."""

        def __init__(self) -> None:
            self.app = application()

        def check_health(self) -> None:
            if not self.app.state.engine.alive:
                raise RuntimeError("the engine has stopped")

        async def __call__(self, request: Any) -> Any:
            return await _forward(self.app, request)

    built = serve.deployment(
        Replica, name="lastrerank", ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=max_ongoing_requests, health_check_period_s=5, **scale,
    )  # fmt: skip
    return built.bind()


async def _forward(app: Any, request: Any) -> Any:
    """One HTTP request through the application inside the replica."""
    from starlette.responses import Response

    body = await request.body()
    pending = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return pending.pop() if pending else await request.receive()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(request.scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    response = Response(content, sent[0]["status"])
    response.raw_headers = list(sent[0]["headers"])
    return response


def rerank_dataset(
    model: str,
    dataset: BeirDataset,
    candidates: Ranking,
    output: str | Path,
    *,
    shards: int = 16,
    workers: int = 2,
    cpus: float = 1,
    gpus: float = 0,
    max_doc_length: int | None = None,
    **arguments: Any,
) -> Ranking:
    """Rerank every query's candidates on a cluster, shard by shard, by Ray Data.

    A shard is a run file in `output` (on storage that all nodes share), written a query at a time: a job that is
    started again, or a worker that is replaced, goes on where it stopped.

    Args:
        shards: files the queries are split into.
        workers: actors, each with a model of its own, on `cpus` and `gpus`.
        arguments: of `Reranker.from_pretrained`.

    Returns:
        Document ids of each query, best first.
    """
    target = Path(output).absolute()
    target.mkdir(parents=True, exist_ok=True)
    # The model's identity and the texts' are added by `rerank_run`, of what a worker has loaded.
    settings = {"dataset": dataset.name, "split": dataset.split, "shards": shards}
    shared = ray.put(dataset)
    names = list(candidates)
    rows = [{"shard": n, "queries": json.dumps({q: candidates[q] for q in names[n::shards]})} for n in range(shards)]

    class Worker:
        def __init__(self) -> None:
            import torch

            if not gpus:
                torch.set_num_threads(max(1, int(cpus)))
            self.reranker = Reranker.from_pretrained(model, **arguments)
            self.dataset = ray.get(shared)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            own = json.loads(row["queries"])
            path = target / f"shard-{row['shard']:04d}.jsonl"
            run = rerank_run(
                self.reranker, self.dataset, own, path, settings | {"shard": int(row["shard"])},
                max_doc_length=max_doc_length, progress=False,
            )  # fmt: skip
            return {"ranking": json.dumps(run.ranking)}

    found: Ranking = {}
    data = ray.data.from_items(rows, override_num_blocks=shards)
    for row in data.map(Worker, concurrency=workers, num_cpus=cpus, num_gpus=gpus).iter_rows():
        found |= json.loads(row["ranking"])
    return {query: found[query] for query in names}
