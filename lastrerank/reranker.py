"""`Reranker`: the public API. Text in, ranked documents out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lastrerank import checkpoint as checkpoints
from lastrerank import ops
from lastrerank.checkpoint import Checkpoint
from lastrerank.graphs import GraphedModel
from lastrerank.model import Model
from lastrerank.packing import pack, readout
from lastrerank.progress import Progress
from lastrerank.prompt import TEMPLATES, CutText, EncodedBlock, PromptEncoder, PromptTemplate
from lastrerank.request import BLOCK_SIZE, Document, RerankRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
          "float8": torch.float8_e4m3fn}  # fmt: skip
# int8 and float8 name the linears' weights; everything else is in this then.
_ACTIVATIONS = {"int8": torch.float32, "float8": torch.bfloat16}

# Backends whose passes read nothing back from the device, so that a CUDA graph can hold them.
CAPTURABLE = ("triton",)

# Tokens of one pass when the caller doesn't say: enough to fill the device, small enough to share it.
_BATCH_TOKENS = {"cpu": 16_384, "cuda": 131_072}


@dataclass(frozen=True)
class EncodedRequest:
    """A request as prompts, ready to be packed with others.

    blocks: one prompt each. block_documents: for each block the indices of its documents in the request.
    block_orders: for each block the order it belongs to, 0 being the caller's. doc_tokens: bare tokens of each
    document after cutting. cut: whether each document was cut; query_cut: whether the query was.
    """

    request: RerankRequest
    blocks: tuple[EncodedBlock, ...]
    block_documents: tuple[np.ndarray, ...]
    block_orders: tuple[int, ...]
    doc_tokens: tuple[int, ...]
    cut: tuple[bool, ...]
    query_cut: bool

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all blocks."""
        return sum(len(block.ids) for block in self.blocks)


@dataclass(frozen=True)
class Scored:
    """Scores of one request: fp32 `[N]` in the caller's order, and document vectors `[N, P]` (un-normalised)."""

    scores: np.ndarray
    vectors: np.ndarray


class Reranker:
    """A last-token listwise reranker. Made by `from_pretrained`; may be used from several threads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Model,
        encoder: PromptEncoder,
        *,
        device: torch.device,
        backend: str,
        dtype: str,
        deterministic: bool,
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.model, self.encoder = model, encoder
        self.device, self.backend, self.dtype, self.deterministic = device, backend, dtype, deterministic
        self._graphs: GraphedModel | None = None

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        template: str | PromptTemplate = "auto",
        deterministic: bool = False,
        revision: str | None = None,
    ) -> Reranker:
        """Load a checkpoint from a folder, from those in the package, or from the Hub (no remote code is run).

        Args:
            id_or_path: folder, bundled name or Hub id.
            device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
            dtype: "auto" (float32 on a CPU, bfloat16 on a GPU), "float32", "bfloat16", "float16", or quantised linears,
                whose scores differ: "int8" (native backend), "float8" (Triton backend, Ada or newer).
            backend: "auto" or one of `lastrerank.ops.BACKENDS`.
            template: "auto" (what the checkpoint says), a name in `lastrerank.prompt.TEMPLATES`, or a template.
            deterministic: every block is its own pass, so that scores are bitwise the same alone and in company.
            revision: of a Hub id.

        Raises:
            ValueError: an argument, or the checkpoint, is not usable; the message names what and why.
            RuntimeError: a backend asked for by name can't serve here.
        """
        target = resolve_device(device)
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}, expected 'auto', {', '.join(map(repr, DTYPES))}")
        if backend != "auto" and backend not in ops.BACKENDS:
            raise ValueError(f"backend is {backend!r}, expected 'auto' or one of {list(ops.BACKENDS)}")
        if isinstance(template, str) and template != "auto" and template not in TEMPLATES:
            raise ValueError(f"template is {template!r}, expected 'auto', one of {list(TEMPLATES)} or a PromptTemplate")
        if dtype == "auto":
            dtype = "float32" if target.type == "cpu" else "bfloat16"
        source = checkpoints.open_checkpoint(id_or_path, revision)
        if template == "auto":
            template = source.config.template
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise ValueError(f"config.json: lastrerank.template is {template!r}, expected one of {list(TEMPLATES)}")
            template = TEMPLATES[template]
        encoder = PromptEncoder(source.tokenizer, template)
        name, operations = ops.select(backend, target, DTYPES[dtype])
        compute_dtype = _ACTIVATIONS.get(dtype, DTYPES[dtype])
        weights = source.weights(target, compute_dtype, operations.prepare)
        return cls(
            source, Model(source.config, weights, operations), encoder,
            device=target, backend=name, dtype=dtype, deterministic=deterministic,
        )  # fmt: skip

    # What people call

    def rerank(
        self,
        query: str,
        documents: Sequence[Document],
        top_n: int | None = None,
        return_embeddings: bool = False,
        max_doc_length: int | None = None,
        max_query_length: int | None = None,
        *,
        instruction: str | None = None,
        block_size: int = BLOCK_SIZE,
        orders: int = 1,
        progress: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Rank documents by relevance to a query. Same arguments, keys and order as the published `rerank`.

        Arguments are those of `RerankRequest`. progress: True or False, None shows a bar on a terminal when it takes
        long.

        Returns:
            Dicts, best first, ties in input order: `document` (the caller's own object), `relevance_score` (cosine in
            [-1, 1]), `index`, `embedding` (fp32 `[P]`, not normalised, or None). `[]` for no documents.

        Raises:
            TypeError, ValueError: an argument is bad; the message names it, its position and its value.
        """
        request = RerankRequest(
            query, documents, top_n, return_embeddings, max_doc_length, max_query_length, instruction, block_size,
            orders,
        )  # fmt: skip
        return self.rerank_many([request], progress=progress)[0]

    def rerank_many(
        self,
        requests: Sequence[RerankRequest | Mapping[str, Any]],
        *,
        max_batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Rank several lists in packed passes of at most `max_batch_tokens` tokens (a longer block goes alone).

        Scores are those of each request alone. Requests are `RerankRequest`s or mappings of their fields. Results in
        the order of the requests, each as `rerank` returns it.
        """
        if isinstance(requests, (str, Mapping)) or not isinstance(requests, Sequence):
            raise TypeError(f"requests is a {type(requests).__name__}, expected a list of requests")
        single = len(requests) == 1
        checked = [
            RerankRequest.of(request, "request" if single else f"requests[{i}]") for i, request in enumerate(requests)
        ]
        for i, request in enumerate(checked):
            self.check_caps(request, "" if single else f"requests[{i}].")
        scored = self.score_encoded(
            (self.encode(request) for request in checked), max_batch_tokens=max_batch_tokens, progress=progress
        )
        return [ranked(request, result) for request, result in zip(checked, scored, strict=True)]

    def rank(
        self, query: str, documents: Sequence[str], top_k: int | None = None, return_documents: bool = False
    ) -> list[dict[str, Any]]:
        """As sentence-transformers' `CrossEncoder.rank`: `[{corpus_id, score, text?}]`, best first."""
        results = self.rerank(query, documents, top_n=top_k)
        return [
            {"corpus_id": result["index"], "score": result["relevance_score"]}
            | ({"text": _text(result["document"])} if return_documents else {})
            for result in results
        ]

    def predict(self, pairs: Sequence[Sequence[str]]) -> np.ndarray:
        """As `CrossEncoder.predict`: fp32 score of each (query, document) pair, in the caller's order.

        Pairs of one query are scored as one list, in their order: a listwise score depends on its company.
        """
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            raise TypeError(f"pairs is a {type(pairs).__name__}, expected a list of (query, document) pairs")
        groups: dict[str, list[int]] = {}
        for position, pair in enumerate(pairs):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"pairs[{position}] is {pair!r:.80}, expected (query, document)")
            if not isinstance(pair[0], str):
                raise TypeError(f"pairs[{position}][0] is a {type(pair[0]).__name__}, expected a string")
            groups.setdefault(pair[0], []).append(position)
        requests = [RerankRequest(query, [pairs[i][1] for i in members]) for query, members in groups.items()]
        scores = np.empty(len(pairs), np.float32)
        for members, results in zip(groups.values(), self.rerank_many(requests), strict=True):
            for result in results:
                scores[members[result["index"]]] = result["relevance_score"]
        return scores

    def warmup(self) -> None:
        """Do now what the first requests would wait for; call it once, before serving.

        A short list is scored, which pages the weights in, starts threads and compiles kernels. With the Triton
        kernels, passes of up to 4,096 tokens are also captured as CUDA graphs, and replayed from then on; that keeps
        about 150 MiB at 0.6B (see `lastrerank.graphs`).
        """
        self.rerank("warm up", ["a short document", "another one"], progress=False)
        if self.backend in CAPTURABLE and self._graphs is None:
            with current_device(self.device):
                self._graphs = GraphedModel(self.model, self.device)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write this model in the published format, weights in its dtype.

        int8: the linears as int8 with a scale for each output (`..._proj.weight_scale`), half the size of 16 bit, and
        the outliers of each (`..._proj.weight_outlier`, `..._outlier_index`).
        Loaded with dtype "int8" it gives the same scores; with another, those of the quantised weights.

        Raises:
            ValueError: the weights are quantised in a way that isn't saved (float8).
        """
        raw = {**self.checkpoint.raw_config, "dtype": self.dtype, "torch_dtype": self.dtype}
        state = checkpoints.state_dict(self.config, self.model.weights)
        if self.dtype == "int8":
            raw |= {"dtype": "float32", "torch_dtype": "float32"}
            raw["lastrerank"] = {**(raw.get("lastrerank") or {}), "quantization": "int8"}
            state = checkpoints.quantised(state)
        else:
            state = {name: tensor.to(DTYPES[self.dtype]) for name, tensor in state.items()}
        checkpoints.save(folder, raw, self.checkpoint.tokenizer, self.config.max_context, state)

    # What an engine calls

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Tokenise a checked request and lay its documents out in blocks. Thread-safe, touches no device."""
        query_cap, doc_cap = self.check_caps(request)
        query = self.encoder.cut([request.query], query_cap)[0]
        most = self.config.max_query_length
        if request.instruction is not None and self.encoder.cut([request.instruction], most)[0].cut:
            raise ValueError(f"instruction has more than {most} tokens, what this checkpoint's queries may have")
        documents = self.encoder.cut(request.texts, doc_cap)
        capacity = self.config.max_context - 2 * query.length
        blocks: list[EncodedBlock] = []
        block_documents: list[np.ndarray] = []
        block_orders: list[int] = []
        for order, permutation in enumerate(_orders(len(documents), request.orders)):
            for members in _blocks([documents[i] for i in permutation], capacity, doc_cap, request.block_size):
                indices = permutation[members]
                blocks.append(
                    self.encoder.encode_block(query, [documents[i] for i in indices], request.instruction)
                )
                block_documents.append(indices)
                block_orders.append(order)
        return EncodedRequest(
            request, tuple(blocks), tuple(block_documents), tuple(block_orders),
            tuple(document.length for document in documents), tuple(document.cut for document in documents), query.cut,
        )  # fmt: skip

    @torch.inference_mode()
    def score_encoded(
        self,
        requests: Iterable[EncodedRequest],
        *,
        max_batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> list[Scored]:
        """Score encoded requests in packed passes. Requests are drawn as passes need them, results kept in order.

        Raises:
            RuntimeError: a score is not finite (the dtype overflowed); nothing is returned then.
        """
        budget = _BATCH_TOKENS[self.device.type] if max_batch_tokens is None else max_batch_tokens
        if budget < 1:
            raise ValueError(f"max_batch_tokens is {budget}, expected at least 1")
        results: dict[int, Scored] = {}
        unfinished: dict[int, EncodedRequest] = {}
        hidden: dict[int, list[torch.Tensor]] = {}  # read rows, a block each, of unfinished requests

        with Progress("reranking", "token layers", progress) as bar:
            for group in _passes(_blocks_of(requests, unfinished), 1 if self.deterministic else budget):
                bar.add_total(sum(len(block.ids) for _, block in group) * self.config.num_layers)
                parts = self.read_rows([block for _, block in group], on_layer=bar.advance)
                for (number, _), part in zip(group, parts, strict=True):
                    hidden.setdefault(number, []).append(part)
                done = [n for n, r in unfinished.items() if r.blocks and len(hidden.get(n, ())) == len(r.blocks)]
                for together in ([n] for n in done) if self.deterministic else [done]:
                    scored = self.score_read_rows(
                        [unfinished.pop(n) for n in together], [part for n in together for part in hidden.pop(n)]
                    )
                    results.update(zip(together, scored, strict=True))
        for number in unfinished:  # requests without documents
            results[number] = Scored(np.zeros(0, np.float32), np.zeros((0, 0), np.float32))
        return [results[number] for number in sorted(results)]

    @torch.inference_mode()
    def read_rows(
        self, blocks: Sequence[EncodedBlock], on_layer: Callable[[int], None] | None = None
    ) -> list[torch.Tensor]:
        """One packed pass: of each block the residual stream `[N + 1, D]` at its N documents' rows and its query's.

        on_layer: as `Model.hidden_states`, for progress. A captured CUDA graph is replayed where one holds the pass.
        """
        with current_device(self.device):
            batch = pack(blocks, self.device)
            rows = None if self._graphs is None else self._graphs.hidden_states(batch)
            if rows is None:
                rows = self.model.hidden_states(batch, on_layer=on_layer)
            elif on_layer is not None:
                on_layer(batch.num_tokens * self.config.num_layers)
        return list(rows.split([len(block.doc_rows) + 1 for block in blocks]))

    @torch.inference_mode()
    def score_read_rows(self, requests: Sequence[EncodedRequest], hidden: Sequence[torch.Tensor]) -> list[Scored]:
        """Readout of complete requests from the read rows of all their blocks, in order; one copy to the host.

        Raises:
            RuntimeError: a score is not finite (the dtype overflowed).
        """
        if not requests:
            return []
        counts = [len(block.doc_rows) for request in requests for block in request.blocks]
        # Every order of a request is fused apart, as if it were a request of its own.
        keys = [(n, order) for n, request in enumerate(requests) for order in request.block_orders]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        with current_device(self.device):
            where = readout(counts, [numbers[key] for key in keys], self.device)
            vectors, _, scores = self.model.score(torch.cat(list(hidden)), where)
        host_scores = scores.float().cpu().numpy()
        if not np.isfinite(host_scores).all():
            raise RuntimeError(f"scores are not finite: {self.dtype} overflowed in this model; use another dtype")
        wants_vectors = any(request.request.return_embeddings for request in requests)
        host_vectors = vectors.float().cpu().numpy() if wants_vectors else np.zeros((len(host_scores), 0), np.float32)

        results, row = [], 0
        for request in requests:
            n = len(request.doc_tokens)
            total = np.zeros(n, np.float64)
            own = np.zeros((n, host_vectors.shape[1]), np.float32)
            for order, members in zip(request.block_orders, request.block_documents, strict=True):
                total[members] += host_scores[row : row + len(members)]
                if order == 0:
                    own[members] = host_vectors[row : row + len(members)]
                row += len(members)
            results.append(Scored((total / request.request.orders).astype(np.float32), own))
        return results

    def check_caps(self, request: RerankRequest, prefix: str = "") -> tuple[int, int]:
        query_cap = request.max_query_length or self.config.max_query_length
        doc_cap = request.max_doc_length or self.config.max_doc_length
        if 2 * query_cap + doc_cap > self.config.max_context:
            raise ValueError(
                f"{prefix}max_query_length {query_cap} and {prefix}max_doc_length {doc_cap}: the query, twice, and one "
                f"document don't fit the context of {self.config.max_context} tokens"
            )
        return query_cap, doc_cap


def ranked(request: RerankRequest, scored: Scored) -> list[dict[str, Any]]:
    """The results of a request, best first, ties in input order, at most `top_n`."""
    order = np.argsort(-scored.scores, kind="stable")[: request.top_n]
    return [
        {
            "document": request.documents[i],
            "relevance_score": float(scored.scores[i]),
            "index": int(i),
            "embedding": scored.vectors[i].copy() if request.return_embeddings else None,
        }
        for i in order
    ]


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device this thread's current one: Triton launches there, whatever its tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def resolve_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this PyTorch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def _orders(count: int, orders: int) -> Iterator[np.ndarray]:
    """Permutations of the list: the caller's order, then seeded random ones."""
    yield np.arange(count)
    generator = np.random.default_rng(0)
    for _ in range(orders - 1):
        yield generator.permutation(count)


def _blocks(documents: Sequence[CutText], capacity: int, doc_cap: int, block_size: int) -> Iterator[list[int]]:
    """The published block rule: close a block when it is full or has no room for a longest document."""
    members: list[int] = []
    left = capacity
    for index, document in enumerate(documents):
        members.append(index)
        left -= document.length
        if len(members) >= block_size or left <= doc_cap:
            yield members
            members, left = [], capacity
    if members:
        yield members


def _blocks_of(
    requests: Iterable[EncodedRequest], unfinished: dict[int, EncodedRequest]
) -> Iterator[tuple[int, EncodedBlock]]:
    """Every block with its request's number; a request is noted as unfinished when it is drawn."""
    for number, request in enumerate(requests):
        unfinished[number] = request
        for block in request.blocks:
            yield number, block


def _passes(
    blocks: Iterator[tuple[int, EncodedBlock]], budget: int
) -> Iterator[list[tuple[int, EncodedBlock]]]:
    """Blocks in order, grouped so that a group has at most `budget` tokens or a single block."""
    group: list[tuple[int, EncodedBlock]] = []
    tokens = 0
    for number, block in blocks:
        if group and tokens + len(block.ids) > budget:
            yield group
            group, tokens = [], 0
        group.append((number, block))
        tokens += len(block.ids)
    if group:
        yield group


def _text(document: Document) -> str:
    return document if isinstance(document, str) else document["text"]
