"""The command line. What programs read is JSON on stdout; everything else goes to stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import ssl
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lastrerank import __version__
from lastrerank.cpus import available_cpus
from lastrerank.show import RANDOM_NOTICE, plain, report_lines, results_table, speed_table

app = typer.Typer(
    help="Rerank documents with last-token rerankers.", no_args_is_help=True, pretty_exceptions_enable=False
)

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, bundled name or Hub id. Default: the embedded checkpoint.")
]
FamilyOption = Annotated[
    str, typer.Option(help="What kind of reranker a checkpoint is that doesn't say it: its prompt and readout.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Of a Hub id: branch, tag or commit.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, int8, float8.")]
BackendOption = Annotated[str, typer.Option(help="auto or the name of a backend (see doctor).")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; default: a container's quota.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Show tokens per document, blocks and timings.")]

# What a command reports as one line: bad input, a file or the network that fails, a library that isn't there.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lastrerank {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")


def default_model() -> Path:
    """The embedded checkpoint."""
    from lastrerank.checkpoint import BUNDLED, BUNDLED_MODELS

    return BUNDLED_MODELS / BUNDLED


def _named(model: str | None) -> str | Path:
    """What --model says, or the embedded checkpoint."""
    if model is not None and not model.strip():
        raise ValueError(f"--model is {model!r}, expected a folder, a bundled name or a Hub id; or no --model")
    return default_model() if model is None else model


@app.command()
def rerank(
    query: Annotated[str | None, typer.Argument(help="What is searched for; not with --requests.")] = None,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A document a file; .jsonl and .ndjson hold one a line (a string or an object with 'text'), .json an "
            "array, .csv and .tsv a table; a folder stands for its files, - for stdin; .gz is unpacked."
        ),
    ] = None,
    model: ModelOption = None,
    top_n: Annotated[int | None, typer.Option(help="Results wanted.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What else the ranking should follow.")] = None,
    column: Annotated[str | None, typer.Option(help="Of tables: which column is the text; `text` without.")] = None,
    max_doc_length: Annotated[int | None, typer.Option(help="Tokens of a document; default: the model's cap.")] = None,
    max_query_length: Annotated[int | None, typer.Option(help="Tokens of the query; default: the model's cap.")] = None,
    orders: Annotated[int, typer.Option(help="Score the mean over this many orders of the list.")] = 1,
    block_size: Annotated[int, typer.Option(help="Documents in one prompt.")] = 125,
    score_threshold: Annotated[float | None, typer.Option(help="Leave out what scores lower.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Many at once: a .jsonl file, a query and its documents a line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Of --requests: the .jsonl file of results; what is there is resumed.")
    ] = None,
    trec: Annotated[Path | None, typer.Option(help="Of --requests: also a TREC run, where all have an id.")] = None,
    return_documents: Annotated[bool, typer.Option(help="Of --requests: results hold the documents.")] = False,
    as_json: JsonOption = False,
    explain: ExplainOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    family: FamilyOption = "auto",
    revision: RevisionOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Rank documents from files, or from stdin: one a line, as text or as JSON. Or a whole file of requests."""
    from lastrerank.documents import read_documents

    options = {"top_n": top_n, "instruction": instruction, "max_doc_length": max_doc_length,
               "max_query_length": max_query_length, "orders": orders, "block_size": block_size,
               "score_threshold": score_threshold}  # fmt: skip
    loading = {"device": device, "dtype": dtype, "backend": backend, "family": family, "revision": revision}
    try:
        if requests is not None:
            if query is not None or output is None:
                raise ValueError("--requests: expected --output, and no query or files")
            if as_json or explain or column is not None:
                raise ValueError("--json, --explain and --column don't go with --requests: results are JSON lines")
            if requests.resolve() in [path.resolve() for path in (output, trec) if path is not None]:
                raise ValueError(f"--output or --trec is {requests}, which holds the requests")
            _run_batch(requests, output, trec, return_documents, model, options, loading, threads)
            return
        if query is None:
            raise ValueError("expected a query and documents, or --requests with --output")
        if output is not None or trec is not None or return_documents:
            raise ValueError("--output, --trec and --return-documents go with --requests")
        documents, names = read_documents(files or [Path("-")], column)
        _run(query, documents, names, model, options, loading, as_json, explain, threads)
    except _EXPECTED as error:
        _fail(error)


@app.command()
def demo(
    model: ModelOption = None,
    as_json: JsonOption = False,
    explain: ExplainOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Rank real help pages in several languages for a question, with the embedded checkpoint."""
    example = json.loads((Path(__file__).parent / "demo.json").read_text(encoding="utf-8"))
    names = [f"{d['language']} {d['page']}" for d in example["documents"]]
    loading = {"device": device, "dtype": dtype, "backend": backend}
    try:
        _run(example["query"], example["documents"], names, model, {}, loading, as_json, explain, None)
    except _EXPECTED as error:
        _fail(error)


@app.command(name="eval")
def evaluate(
    datasets: Annotated[list[Path], typer.Argument(help="BEIR-format folders: corpus, queries, qrels.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Folder, bundled name or Hub id; several times to compare.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="cross-encoder:ID by sentence-transformers, late-interaction:ID by PyLate; several times."),
    ] = None,
    published: Annotated[bool, typer.Option(help="Print the papers' figures as well.")] = False,
    split: Annotated[str, typer.Option(help="Which qrels file.")] = "test",
    queries_from: Annotated[Path | None, typer.Option(help="A folder whose queries and qrels are used.")] = None,
    run: Annotated[Path | None, typer.Option(help="TREC run file of the first stage; BM25 without one.")] = None,
    top_k: Annotated[int, typer.Option(help="Candidates reranked a query.")] = 100,
    order: Annotated[
        list[str] | None, typer.Option(help="descending (default), ascending, random; may be given several times.")
    ] = None,
    max_queries: Annotated[int | None, typer.Option(help="A seeded sample of this many queries.")] = None,
    max_doc_length: Annotated[int | None, typer.Option(help="Tokens of a document; default: the model's cap.")] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for runs, results and the plot; what is there is resumed.")
    ] = Path("eval-results"),
    seed: Annotated[int, typer.Option(help="Of the sample and the random order.")] = 0,
    as_json: JsonOption = False,
    family: FamilyOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    revision: RevisionOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Rerank BEIR-format datasets and score the result: nDCG@10, MRR@10, MAP, recall. Several models are compared."""
    from lastrerank import Reranker
    from lastrerank.evaluation import compare, contenders, report

    loading: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "family": family,
                               "revision": revision}  # fmt: skip

    def own(name: str) -> contenders.Contender:
        return contenders.Own(Reranker.from_pretrained(name, **loading))

    options: dict[str, Any] = {
        "split": split, "query_folder": queries_from, "run": run, "top_k": top_k, "orders": order or ["descending"],
        "max_queries": max_queries, "max_doc_length": max_doc_length, "seed": seed,
    }  # fmt: skip
    models = model or ([] if peer else [str(default_model())])
    try:
        _set_threads(threads)
        models = [str(_named(name)) for name in models]
        if len(models) != 1 and (revision is not None or family != "auto"):
            what = f"--revision {revision}" if revision is not None else f"--family {family}"
            raise ValueError(f"{what} beside {len(models)} models of ours: expected one, whose it is")
        if not models and (dtype != "auto" or backend != "auto"):
            raise ValueError(f"--dtype {dtype}, --backend {backend} beside no model of ours: peers have their own")
        for name in peer or ():  # before any work is done
            contenders.check_peer(name)
            if max_doc_length is not None:
                raise ValueError(f"--max-doc-length: {name} cuts by its own tokenizer, not by a cap in ours")
        named = {name: Path(name).resolve().name if Path(name).is_dir() else name for name in models}
        if len(set(named.values())) < len(models):
            named = {name: name for name in models}
        loaders = {named[name]: partial(own, name) for name in models}
        loaders |= {name: partial(contenders.peer, name, device) for name in peer or ()}
        if len(loaders) < len(models) + len(peer or ()):
            raise ValueError(f"models are {[*models, *(peer or ())]}, expected different names")
        if len(loaders) == 1:
            found = report.evaluate(next(iter(loaders.values()))(), datasets, output, **options)
        else:
            found = compare.compare(loaders, datasets, output, **options)
    except _EXPECTED as error:
        _fail(error, "" if isinstance(error, ImportError) and "pip install" in str(error) else "eval")
    if as_json:
        print(json.dumps(found | ({"published": compare.PUBLISHED} if published else {})))
    else:
        from rich.console import Console

        console = Console(width=max(120, Console().width))
        console.print(report.table(found) if len(loaders) == 1 else compare.table(found))
        if published:
            console.print(compare.published_table())
        print(f"runs, results and the plot are in {output}", file=sys.stderr)


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Folder of lists, or of raw pairs and documents (mined by BM25 first).")],
    start: Annotated[
        str, typer.Option(help="Checkpoint to begin with, or a plain pretrained decoder: folder, bundled name, Hub id.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, log, plot; what is there goes on.")],
    recipe: Annotated[
        Path | None, typer.Option(help="JSON object of TrainingConfig's fields; the paper's losses without one.")
    ] = None,
    dev: Annotated[list[Path] | None, typer.Option(help="BEIR folder with a dev split; several times.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of a plain decoder: how many of its first layers.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between saving and looking at dev.")] = 200,
    dev_queries: Annotated[int, typer.Option(min=1, help="Queries a dev set, a seeded sample.")] = 50,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after this many looks without a new best.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train or fine-tune a checkpoint (full, or LoRA by the recipe's lora_rank) with the paper's objective."""
    try:
        _set_threads(None)
        from lastrerank.training.run import train as run_training
        from lastrerank.training.trainer import TrainingConfig

        config = TrainingConfig.from_file(recipe) if recipe else TrainingConfig()
        result = run_training(
            start, data, output, config, dev=dev or [], layers=layers, every=every, dev_queries=dev_queries,
            patience=patience, device=device,
        )  # fmt: skip
    except _EXPECTED as error:
        _fail(error, "train")
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{result['step']} steps; checkpoints, log and plot are in {output}", file=sys.stderr)


@app.command()
def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any free one, which is logged.")] = 8000,
    uds: Annotated[str | None, typer.Option(help="A Unix socket's path, instead of host and port.")] = None,
    model_name: Annotated[
        list[str] | None, typer.Option(help="What else requests may call the model; several times.")
    ] = None,
    any_model: Annotated[bool, typer.Option(help="Requests may name any model.")] = False,
    max_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a pass; default: from the memory.")
    ] = None,
    max_queue_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that may wait; default: 32 passes.")
    ] = None,
    max_request_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a request; default: 16 times what may wait.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 32 * 2**20,
    max_total_body: Annotated[int, typer.Option(min=1, help="Bytes of all requests in flight.")] = 128 * 2**20,
    max_documents: Annotated[int, typer.Option(min=1, help="Documents of a request.")] = 2000,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections at once.")] = 1000,
    request_timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 300.0,
    keep_alive: Annotated[float, typer.Option(help="Seconds that an idle connection is kept.")] = 75.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds for requests in flight on SIGTERM.")] = 30.0,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call (CORS); several times; * for all.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path under which a proxy shows the server.")] = "",
    ssl_certfile: Annotated[str | None, typer.Option(help="Certificate, for HTTPS.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Its key.")] = None,
    deterministic: Annotated[bool, typer.Option(help="Bitwise the same scores alone and in company.")] = False,
    family: FamilyOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    revision: RevisionOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve a model over HTTP: /v1/rerank, /score, /metrics, a page to try it at /. API key: LASTRERANK_API_KEY."""
    started = time.perf_counter()
    bound, at_sigterm = None, signal.getsignal(signal.SIGTERM)
    try:
        from lastrerank.server import listen
        from lastrerank.server.limits import Limits

        listen.log_as_json()
        for name, seconds in (("--keep-alive", keep_alive), ("--drain-timeout", drain_timeout)):
            if not (math.isfinite(seconds) and 0 <= seconds <= 86_400):
                raise ValueError(f"{name} is {seconds}, expected seconds, 0 to 86400")
        if not root_path.isascii():
            raise ValueError(f"--root-path is {root_path!r}, expected ASCII: encode it as in a URL")
        limits = Limits(
            max_body=max_body, max_total_body=max_total_body, max_documents=max_documents,
            max_connections=max_connections, request_seconds=request_timeout,
        )  # fmt: skip
        if (ssl_certfile is None) != (ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile: expected both or none")
        if ssl_certfile is not None:
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(ssl_certfile, ssl_keyfile)
            except OSError as error:
                raise ValueError(f"{ssl_certfile} and {ssl_keyfile}: no certificate and key: {error}") from error
        limits = replace(limits, max_connections=listen.possible_connections(max_connections))
        api_key = os.environ.get("LASTRERANK_API_KEY", "").strip() or None
        if api_key is None and "LASTRERANK_API_KEY" in os.environ:
            listen.log({"message": "LASTRERANK_API_KEY is set and blank: everyone is served"}, logging.WARNING)
        bound = listen.bind(host, port, uds)  # before the model, so that a taken port shows at once
        # While it loads, SIGTERM takes a Unix socket's path with it; then it drains.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        from lastrerank import Reranker
        from lastrerank.engine import Engine
        from lastrerank.server import create_app

        _set_threads(threads)
        loading: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "family": family,
                                   "deterministic": deterministic, "revision": revision}  # fmt: skip
        loaded = Reranker.from_pretrained(_named(model), **loading)
        loaded.warmup()
        engine = Engine(
            loaded, max_batch_tokens=max_batch_tokens, max_queue_tokens=max_queue_tokens,
            max_request_tokens=max_request_tokens,
        )  # fmt: skip
        if isinstance(bound, listen.UnixSocket) and not bound.is_there:
            raise ValueError(f"uds is {uds!r}, which another server has taken meanwhile")
    except BaseException as error:
        if bound is not None:
            listen.release(bound)
        if isinstance(error, _EXPECTED):
            _fail(error, "serve")
        raise
    finally:
        signal.signal(signal.SIGTERM, at_sigterm)
    started_with = [model] if model is not None and not Path(model).is_dir() else []  # may be an alias
    names = list(dict.fromkeys([loaded.checkpoint.name, *(model_name or ()), *started_with]))
    application = create_app(
        engine, model_name=[*(model_name or ())[:1], *names], any_model=any_model, limits=limits,
        api_key=api_key, allow_origins=allow_origin or (),
        drain_seconds=drain_timeout,
    )  # fmt: skip
    entry = {"message": "ready", "model": names, "address": listen.address(bound, has_tls=ssl_certfile is not None),
             "seconds": round(time.perf_counter() - started, 2)}  # fmt: skip
    listen.log(entry)
    listen.serve(
        application, engine, bound, limits, drain_seconds=drain_timeout, keep_alive=keep_alive, root_path=root_path,
        certificate=ssl_certfile, key=ssl_keyfile,
    )  # fmt: skip


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder, bundled name or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; a checkpoint in it is replaced.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or int8.")] = "int8",
    family: FamilyOption = "auto",
    revision: RevisionOption = None,
) -> None:
    """Write a checkpoint in another dtype: int8 is quantised, and refused by other programs."""
    from lastrerank import Reranker

    try:
        if dtype not in ("float32", "bfloat16", "float16", "int8"):
            raise ValueError(f"dtype is {dtype!r}, expected one of float32, bfloat16, float16, int8")
        backend = "native" if dtype == "int8" else "reference"
        loading: dict[str, Any] = {"dtype": dtype, "backend": backend, "family": family, "revision": revision}
        loaded = Reranker.from_pretrained(model, device="cpu", **loading)
        loaded.save_pretrained(output)
    except _EXPECTED as error:
        _fail(error)
    print(f"{output} holds {model} in {dtype}; in that it is run with --dtype {dtype}", file=sys.stderr)


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="Hub id.")],
    revision: RevisionOption = None,
) -> None:
    """Fetch a checkpoint from the Hub, and print the folder that it is in; no code is fetched."""
    from lastrerank import adapters
    from lastrerank.checkpoint import resolve, resolve_base
    from lastrerank.stored import read_json

    try:
        folder = resolve(model, revision)[1]
        if adapters.is_adapter(folder):
            adapter = adapters.read_adapter(folder)  # of no use without its base
            read_json(resolve_base(adapter)[1] / "config.json")
        else:
            read_json(folder / "config.json")
        print(folder)
    except _EXPECTED as error:
        _fail(error)


@app.command()
def bench(
    model: ModelOption = None,
    documents: Annotated[int, typer.Option(help="Documents of a list.")] = 16,
    doc_tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 128,
    lists: Annotated[int, typer.Option(help="Lists scored in one call.")] = 1,
    runs: Annotated[int, typer.Option(help="Timed calls of each backend.")] = 5,
    family: FamilyOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """How fast a model runs here, by every backend, and how far the scores are from the reference's."""
    from lastrerank.speed import measure, recommendation

    try:
        _set_threads(threads)
        rows = measure(
            _named(model), device=device, documents=documents, doc_tokens=doc_tokens, lists=lists, runs=runs,
            family=family, revision=revision,
        )  # fmt: skip
    except _EXPECTED as error:
        _fail(error)
    if as_json:
        print(json.dumps(rows))
        return
    from rich.console import Console

    Console().print(speed_table(rows))
    print(recommendation(rows))


@app.command()
def doctor(
    verify: Annotated[str, typer.Option(help="Folder or Hub id to compare with published scores.")] = "",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What this machine has, which backends serve it and why others don't, and a numeric self-check."""
    from lastrerank.doctor import examine, verify_checkpoint

    try:
        report = examine(device, verify) if verify else examine(device)
        if verify:
            report["verify"] = verify_checkpoint(verify, device)
    except _EXPECTED as error:
        _fail(error)
    if as_json:
        print(json.dumps(report))
    else:
        print("\n".join(report_lines(report)))
    parts = (report["self_check"], report["kernels"] or {}, report.get("verify", {}))
    bad = not all(part.get("ok", True) for part in parts)
    raise typer.Exit(1 if bad else 0)


def _run(
    query: str,
    documents: list[Any],
    names: list[str],
    model: str | None,
    options: dict[str, Any],
    loading: dict[str, Any],
    as_json: bool,
    explain: bool,
    threads: int | None,
) -> None:
    from lastrerank import Reranker, RerankRequest
    from lastrerank.reranker import ranked

    started = time.perf_counter()
    request = RerankRequest.of(RerankRequest(query, documents, **options))
    _set_threads(threads)
    loaded = Reranker.from_pretrained(_named(model), **loading)
    load_seconds = time.perf_counter() - started
    started = time.perf_counter()
    encoded = loaded.encode(request)
    tokenise_seconds = time.perf_counter() - started
    started = time.perf_counter()
    results = ranked(request, loaded.score_encoded([encoded], documents=len(documents))[0])
    score_seconds = time.perf_counter() - started
    random = bool((loaded.checkpoint.raw_config.get("lastrerank") or {}).get("random"))
    blocks, computed = [len(block.doc_rows) for block in encoded.blocks], encoded.rows(loaded.max_batch_tokens)
    details = {
        "model": loaded.checkpoint.name, "random": random, "backend": loaded.backend, "dtype": loaded.dtype,
        "device": str(loaded.device), "prompt_tokens": encoded.num_tokens,
        "rows": computed, "query_cut": encoded.query_cut, "blocks": blocks,
        "load_ms": 1e3 * load_seconds, "tokenise_ms": 1e3 * tokenise_seconds, "score_ms": 1e3 * score_seconds,
    }  # fmt: skip
    if as_json:
        rows = [
            {"index": r["index"], "name": names[r["index"]], "relevance_score": r["relevance_score"],
             **({"raw_score": r["raw_score"]} if "raw_score" in r else {}), "document": r["document"],
             **({"tokens": encoded.doc_tokens[r["index"]], "cut": encoded.cut[r["index"]]} if explain else {})}
            for r in results
        ]  # fmt: skip
        print(json.dumps({"query": query, "results": rows, **(details if explain else {})}, ensure_ascii=False))
        if random:
            print(RANDOM_NOTICE, file=sys.stderr)
        return
    from rich.console import Console

    console = Console()
    console.print(results_table(query, results, names, encoded, explain))
    if explain:
        console.print(plain(
            f"{details['prompt_tokens']} prompt tokens in {_blocks(blocks)}"
            f"{f', {computed} of them computed' if computed < encoded.num_tokens else ''}; "
            f"model {details['model']}, {details['dtype']}, backend {details['backend']} on {details['device']}; "
            f"load {details['load_ms']:.0f} ms, tokenise {details['tokenise_ms']:.1f} ms, "
            f"score {details['score_ms']:.1f} ms"),
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if random:
        console.print(RANDOM_NOTICE, style="bold yellow")


def _run_batch(
    source: Path, output: Path, trec: Path | None, return_documents: bool, model: str | None, options: dict[str, Any],
    loading: dict[str, Any], threads: int | None,
) -> None:  # fmt: skip
    from lastrerank import Reranker
    from lastrerank.batch import read_requests, rerank_file

    wanted = read_requests(source, {name: value for name, value in options.items() if value is not None})
    _set_threads(threads)
    loaded = Reranker.from_pretrained(_named(model), **loading)
    print(json.dumps(rerank_file(loaded, wanted, output, trec=trec, return_documents=return_documents)))


def _blocks(sizes: list[int]) -> str:
    if len(sizes) > 8 and set(sizes) == {1}:
        return f"{len(sizes)} block(s) of one document"
    return f"{len(sizes)} block(s) {sizes}"


def _set_threads(threads: int | None) -> None:
    """As many as wanted; else, unless the environment says it, no more than a container's quota allows."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


def _fail(error: Exception, extra: str = "") -> NoReturn:
    """One line, and exit status 2."""
    message = str(error) or type(error).__name__
    if isinstance(error, ImportError) and extra:
        from lastrerank.integrations import install_command

        message += f": {install_command(extra)}"
    print(plain(f"lastrerank: {message}"), file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of `lastrerank`."""
    app()
