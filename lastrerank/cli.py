"""The command line. What programs read is JSON on stdout; everything else goes to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Rerank documents with last-token listwise rerankers.", no_args_is_help=True, pretty_exceptions_enable=False
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Folder, bundled name or Hub id. Default: the embedded checkpoint.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, int8, float8.")]
BackendOption = Annotated[str, typer.Option(help="auto or the name of a backend (see doctor).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Show tokens per document, blocks and timings.")]

RANDOM_NOTICE = "The weights are random: the order means nothing."


@app.callback()
def _main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")


def default_model() -> Path:
    """The embedded checkpoint."""
    from lastrerank.checkpoint import BUNDLED_MODELS

    return BUNDLED_MODELS / "lastrerank-13m"


@app.command()
def rerank(
    query: Annotated[str, typer.Argument(help="What is searched for.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="A document a file; .jsonl files hold one a line (a string or an object with 'text')."),
    ] = None,
    model: ModelOption = "",
    top_n: Annotated[int | None, typer.Option(help="Results wanted.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What else the ranking should follow.")] = None,
    as_json: JsonOption = False,
    explain: ExplainOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Rank documents from files, or from stdin: one a line, as text or as JSON."""
    documents, names = _read(files)
    _run(query, documents, names, model, top_n, instruction, as_json, explain, device, dtype, backend)


@app.command()
def demo(
    model: ModelOption = "",
    as_json: JsonOption = False,
    explain: ExplainOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Rank real help pages in several languages for a question, with the embedded checkpoint."""
    example = json.loads((Path(__file__).parent / "demo.json").read_text(encoding="utf-8"))
    names = [f"{d['language']} {d['page']}" for d in example["documents"]]
    _run(example["query"], example["documents"], names, model, None, None, as_json, explain, device, dtype, backend)


@app.command(name="eval")
def evaluate(
    datasets: Annotated[list[Path], typer.Argument(help="BEIR-format folders: corpus, queries, qrels.")],
    model: ModelOption = "",
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
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Rerank BEIR-format datasets and score the result: nDCG@10, MRR@10, MAP, recall."""
    from lastrerank import Reranker
    from lastrerank.evaluation.report import evaluate as evaluate_all
    from lastrerank.evaluation.report import table

    try:
        loaded = Reranker.from_pretrained(model or default_model(), device=device, dtype=dtype, backend=backend)
        report = evaluate_all(
            loaded, datasets, output, split=split, query_folder=queries_from, run=run, top_k=top_k,
            orders=order or ["descending"], max_queries=max_queries, max_doc_length=max_doc_length, seed=seed,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        _fail(error)
    if as_json:
        print(json.dumps(report))
    else:
        from rich.console import Console

        Console(width=max(120, Console().width)).print(table(report))
        print(f"runs, results and the plot are in {output}", file=sys.stderr)


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Folder of lists, or of raw pairs and documents (mined by BM25 first).")],
    start: Annotated[str, typer.Option(help="Checkpoint to begin with: folder, bundled name or Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, log, plot; what is there goes on.")],
    recipe: Annotated[
        Path | None, typer.Option(help="JSON object of TrainingConfig's fields; the paper's losses without one.")
    ] = None,
    dev: Annotated[list[Path] | None, typer.Option(help="BEIR folder with a dev split; several times.")] = None,
    every: Annotated[int, typer.Option(help="Steps between saving and looking at dev.")] = 200,
    patience: Annotated[int | None, typer.Option(help="Stop after this many looks without a new best.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train or fine-tune a checkpoint (full, or LoRA by the recipe's lora_rank) with the paper's objective."""
    from lastrerank.training.run import train as run_training
    from lastrerank.training.trainer import TrainingConfig

    try:
        given = json.loads(recipe.read_text(encoding="utf-8")) if recipe else {}
        if isinstance(given.get("temperature"), list):
            given["temperature"] = tuple(given["temperature"])
        config = TrainingConfig(**given)
        result = run_training(start, data, output, config, dev=dev or [], every=every, patience=patience, device=device)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        _fail(error)
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{result['step']} steps; checkpoints, log and plot are in {output}", file=sys.stderr)


@app.command()
def serve(
    model: ModelOption = "",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any free one, which is logged.")] = 8000,
    model_name: Annotated[str, typer.Option(help="What requests may call the model; default: the folder's name.")] = "",
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a pass; default: from the memory.")] = None,
    max_queue_tokens: Annotated[int | None, typer.Option(help="Tokens that may wait; default: 32 passes.")] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 32 * 2**20,
    max_documents: Annotated[int, typer.Option(help="Documents of a request.")] = 2000,
    request_timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 300.0,
    drain_timeout: Annotated[int, typer.Option(help="Seconds for requests in flight on SIGTERM.")] = 30,
    deterministic: Annotated[bool, typer.Option(help="Bitwise the same scores alone and in company.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
) -> None:
    """Serve a model over HTTP: /v1/rerank, /score, /metrics, a page to try it at /. API key: LASTRERANK_API_KEY."""
    from lastrerank import Reranker
    from lastrerank.engine import Engine

    try:
        import uvicorn

        from lastrerank.server import Limits, create_app
    except ImportError as error:
        _fail(RuntimeError(f"{error}: pip install 'lastrerank[serve]'"))
    logging.getLogger("lastrerank").setLevel(logging.INFO)
    started = time.perf_counter()
    try:
        loaded = Reranker.from_pretrained(
            model or default_model(), device=device, dtype=dtype, backend=backend, deterministic=deterministic
        )
        loaded.warmup()
        engine = Engine(loaded, max_batch_tokens=max_batch_tokens, max_queue_tokens=max_queue_tokens)
    except (ValueError, TypeError, RuntimeError) as error:
        _fail(error)
    name = model_name or loaded.checkpoint.folder.name
    limits = Limits(max_body=max_body, max_documents=max_documents, request_seconds=request_timeout)
    application = create_app(
        engine, model_name=name, api_key=os.environ.get("LASTRERANK_API_KEY") or None, limits=limits
    )
    print(f"lastrerank: {name} ready after {time.perf_counter() - started:.2f} s", file=sys.stderr, flush=True)
    uvicorn.run(
        application, host=host, port=port, log_level="info", access_log=False, timeout_graceful_shutdown=drain_timeout
    )


@app.command()
def bench(
    model: ModelOption = "",
    documents: Annotated[int, typer.Option(help="Documents of a list.")] = 16,
    doc_tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 128,
    lists: Annotated[int, typer.Option(help="Lists scored in one call.")] = 1,
    runs: Annotated[int, typer.Option(help="Timed calls of each backend.")] = 5,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """How fast a model runs here, by every backend, and how far the scores are from the reference's."""
    from lastrerank.speed import measure

    try:
        rows = measure(
            model or default_model(), device=device, documents=documents, doc_tokens=doc_tokens, lists=lists, runs=runs
        )
    except (ValueError, RuntimeError) as error:
        _fail(error)
    if as_json:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['prompt_tokens']} prompt tokens on {rows[0]['device']}", title_justify="left")
    for name in ("backend", "dtype"):
        table.add_column(name)
    for name in ("median ms", "quartiles", "tokens/s", "difference"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            row["backend"], row["dtype"], f"{1e3 * seconds['median']:.1f}",
            f"{1e3 * seconds['low']:.1f} to {1e3 * seconds['high']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['max_difference']:.1e}",
        )  # fmt: skip
    Console().print(table)


@app.command()
def doctor(
    verify: Annotated[str, typer.Option(help="Folder or Hub id to compare with published scores.")] = "",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What this machine has, which backends serve it and why others don't, and a numeric self-check."""
    from lastrerank.doctor import examine, verify_checkpoint

    try:
        report = examine(device)
        if verify:
            report["verify"] = verify_checkpoint(verify, device)
    except (ValueError, TypeError) as error:
        _fail(error)
    if as_json:
        print(json.dumps(report))
    else:
        _print_report(report)
    bad = not report["self_check"]["ok"] or not report.get("verify", {}).get("ok", True)
    raise typer.Exit(1 if bad else 0)


def _run(
    query: str,
    documents: list[Any],
    names: list[str],
    model: str,
    top_n: int | None,
    instruction: str | None,
    as_json: bool,
    explain: bool,
    device: str,
    dtype: str,
    backend: str,
) -> None:
    from lastrerank import Reranker, RerankRequest
    from lastrerank.reranker import ranked

    started = time.perf_counter()
    try:
        loaded = Reranker.from_pretrained(model or default_model(), device=device, dtype=dtype, backend=backend)
        load_seconds = time.perf_counter() - started
        request = RerankRequest.of(RerankRequest(query, documents, top_n=top_n, instruction=instruction))
        started = time.perf_counter()
        encoded = loaded.encode(request)
        tokenise_seconds = time.perf_counter() - started
        started = time.perf_counter()
        results = ranked(request, loaded.score_encoded([encoded])[0])
        score_seconds = time.perf_counter() - started
    except (ValueError, TypeError, RuntimeError) as error:
        _fail(error)
    random = bool((loaded.checkpoint.raw_config.get("lastrerank") or {}).get("random"))
    details = {
        "model": loaded.checkpoint.folder.name, "random": random, "backend": loaded.backend, "dtype": loaded.dtype,
        "device": str(loaded.device), "prompt_tokens": encoded.num_tokens, "query_cut": encoded.query_cut,
        "blocks": [len(block.doc_rows) for block in encoded.blocks],
        "load_ms": 1e3 * load_seconds, "tokenise_ms": 1e3 * tokenise_seconds, "score_ms": 1e3 * score_seconds,
    }  # fmt: skip
    if as_json:
        rows = [
            {"index": r["index"], "name": names[r["index"]], "relevance_score": r["relevance_score"],
             **({"tokens": encoded.doc_tokens[r["index"]], "cut": encoded.cut[r["index"]]} if explain else {})}
            for r in results
        ]  # fmt: skip
        print(json.dumps({"query": query, "results": rows, **(details if explain else {})}, ensure_ascii=False))
        if random:
            print(RANDOM_NOTICE, file=sys.stderr)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=Text(query), title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    if explain:
        table.add_column("tokens", justify="right")
    table.add_column("document", overflow="fold")
    for place, result in enumerate(results, 1):
        index = result["index"]
        text = result["document"] if isinstance(result["document"], str) else result["document"]["text"]
        cells = [str(place), f"{result['relevance_score']:+.4f}"]
        if explain:
            cells.append(f"{encoded.doc_tokens[index]}{' (cut)' if encoded.cut[index] else ''}")
        table.add_row(*cells, Text(f"[{names[index]}] {' '.join(text[:200].split())[:110]}"))
    console.print(table)
    if explain:
        console.print(
            f"{details['prompt_tokens']} prompt tokens in {len(encoded.blocks)} block(s) {details['blocks']}; "
            f"model {details['model']}, {details['dtype']}, backend {details['backend']} on {details['device']}; "
            f"load {details['load_ms']:.0f} ms, tokenise {details['tokenise_ms']:.1f} ms, "
            f"score {details['score_ms']:.1f} ms",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if random:
        console.print(RANDOM_NOTICE, style="bold yellow")


def _read(files: list[Path] | None) -> tuple[list[Any], list[str]]:
    """Documents and a name for each."""
    documents: list[Any] = []
    names: list[str] = []
    if not files:
        if sys.stdin.isatty():
            _fail(ValueError("no documents: name files, or pipe one document a line to stdin"))
        _read_lines(sys.stdin.read(), "stdin", documents, names, json_only=False)
    for file in files or []:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            _fail(ValueError(f"{file}: {error}"))
        if file.suffix == ".jsonl":
            _read_lines(text, str(file), documents, names, json_only=True)
        else:
            documents.append(text)
            names.append(file.name)
    return documents, names


def _read_lines(text: str, source: str, documents: list[Any], names: list[str], json_only: bool) -> None:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        value: Any = line
        if json_only or line.startswith(("{", '"')):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if json_only:
                    _fail(ValueError(f"{source}:{number}: not JSON: {error}"))
        if not isinstance(value, (str, dict)):
            _fail(ValueError(f"{source}:{number}: expected a string or an object with 'text', got {line[:60]!r}"))
        documents.append(value)
        names.append(f"{source}:{number}")


def _print_report(report: dict[str, Any]) -> None:
    for name, version in report["versions"].items():
        print(f"{name:14} {version}")
    print(f"{'device':14} {report['device']}")
    for name, reason in report["backends"].items():
        print(f"{'backend':14} {name}: {'available' if reason is None else reason}")
    check = report["self_check"]
    print(f"{'self-check':14} {'ok' if check['ok'] else 'FAILED'}: " + ", ".join(
        f"{name} differs by {difference:.1e} from the reference" for name, difference in check["difference"].items()
    ))  # fmt: skip
    if "verify" in report:
        result = report["verify"]
        print(f"{'verify':14} {'ok' if result['ok'] else 'FAILED'}: {result['message']}")


def _fail(error: Exception) -> Any:
    print(f"lastrerank: {error}", file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of `lastrerank`."""
    app()
