"""`Reranker`: the public API. Text in, ranked documents out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lastrerank import ops, saving
from lastrerank.checkpoint import BUNDLED, Checkpoint, open_checkpoint
from lastrerank.crossencoder import CrossEncoderFace, ModelCard
from lastrerank.families import FAMILIES, Cosine, Family, named
from lastrerank.graphs import GraphedModel
from lastrerank.isolation import isolated
from lastrerank.kept import FileState, digest
from lastrerank.model import Model
from lastrerank.packing import pack
from lastrerank.progress import Progress
from lastrerank.prompt import EncodedBlock, EncodedRequest, PassRows, RequestEncoder
from lastrerank.request import BLOCK_SIZE, Document, RerankRequest, RerankResult
from lastrerank.texts import Steps, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
          "float8": torch.float8_e4m3fn}  # fmt: skip
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "float8"]
Backend = Literal["auto", "native", "triton", "triton-portable", "flash-attn", "reference"]

# Backends whose passes read nothing back from the device, so that a CUDA graph can hold them.
CAPTURABLE = ("triton", "triton-portable")

# Tokens of one pass when the caller doesn't say: enough to fill the device, small enough to share it.
_BATCH_TOKENS = {"cpu": 16_384, "cuda": 131_072}


@dataclass(frozen=True)
class Scored:
    """Scores of one request as published, fp32 `[N]` in the caller's order, and document vectors `[N, P]`
    (un-normalised). raw: what documents are ranked by where that is another number: an activation makes ties."""

    scores: np.ndarray
    vectors: np.ndarray
    raw: np.ndarray | None = None


@dataclass(frozen=True)
class _Reading:
    """Readouts of complete requests, launched: fp32 on the host once `copied` has happened (None: they are there)."""

    requests: Sequence[EncodedRequest]
    scores: torch.Tensor
    vectors: torch.Tensor | None
    copied: torch.cuda.Event | None


class Reranker(CrossEncoderFace):
    """A reranker of any family. Made by `from_pretrained`; may be used from several threads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Model,
        encoder: RequestEncoder,
        *,
        device: torch.device,
        backend: str,
        dtype: str,
        deterministic: bool,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.checkpoint, self.config, self.family = checkpoint, checkpoint.config, checkpoint.family
        self.model, self.encoder = model, encoder
        self.device, self.backend, self.dtype, self.deterministic = device, backend, dtype, deterministic
        self._made_by = made_by
        self.model_card_data = ModelCard()
        self._digest: str | None = None
        # On a CPU the table is the memory of its file, which may be written to: what it was is known by a checksum.
        self._checksum = checkpoint.embedding_checksum() if device.type == "cpu" else 0
        self._seen: FileState | None = None
        capturable = backend in CAPTURABLE and device.type == "cuda"
        self._graphs = GraphedModel(model, device) if capturable else None

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: Dtype | torch.dtype = "auto",
        backend: Backend = "auto",
        family: str | Family = "auto",
        deterministic: bool = False,
        revision: str | None = None,
    ) -> Reranker:
        """Load a checkpoint from a folder, from those in the package, or from the Hub (no remote code is run).

        Args:
            id_or_path: folder, bundled name or Hub id; None: the small checkpoint in the package.
            device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
            dtype: "auto" (see `default_dtype`), "float32", "bfloat16", "float16", or quantised linears,
                whose scores differ: "int8" (native backend), "float8" (Triton backend, Ada or newer).
            backend: "auto" or one of `lastrerank.ops.BACKENDS`. "auto" takes the Triton kernels on a GPU if they pass
                a check of this model's shape (see `lastrerank.selfcheck`), made once.
            family: "auto" (what the checkpoint says), a name in `lastrerank.families.FAMILIES`, or a family.
            deterministic: every block is its own pass, so that scores are bitwise the same alone and in company.
            revision: of a Hub id; nothing else has one.

        Raises:
            ValueError: an argument, or the checkpoint, is not usable; the message names what and why.
            RuntimeError: a backend asked for by name can't serve here.
        """
        id_or_path = BUNDLED if id_or_path is None else id_or_path
        made_by = {"id_or_path": id_or_path, "device": device, "dtype": dtype, "backend": backend,
                   "family": family, "deterministic": deterministic, "revision": revision}  # fmt: skip
        target = resolve_device(str(device))
        kind = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        if not isinstance(kind, str) or kind not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}, expected 'auto', {', '.join(map(repr, DTYPES))}")
        if not isinstance(backend, str) or (backend != "auto" and backend not in ops.BACKENDS):
            raise ValueError(f"backend is {backend!r}, expected 'auto' or one of {list(ops.BACKENDS)}")
        known = None if isinstance(family, str) and family == "auto" else named(family)
        if kind == "auto":
            kind = default_dtype(target)
        source = open_checkpoint(id_or_path, revision, known)
        if Path(id_or_path).is_dir():  # another process may stand in another folder
            made_by["id_or_path"] = str(Path(id_or_path).resolve())
        encoder = source.family.prompt.encoder(source.tokenizer, source.config)
        name, operations = ops.select(backend, target, DTYPES[kind], source.config)
        compute_dtype = ops.residual_dtype(name, DTYPES[kind])
        weights = source.weights(target, compute_dtype, operations.prepare)
        return cls(
            source, Model(source.config, weights, operations), encoder,
            device=target, backend=name, dtype=kind, deterministic=deterministic, made_by=made_by,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"Reranker({self.checkpoint.name!r}, device={str(self.device)!r}, dtype={self.dtype!r}, "
            f"backend={self.backend!r})"
        )

    def __reduce__(self) -> Any:
        """Another process loads the same checkpoint, and refuses one that has changed."""
        if self._made_by is None:
            raise TypeError("this Reranker was not made by from_pretrained, so another process couldn't load it")
        return _load_again, (dict(self._made_by), self.identity()["digest"])

    def __deepcopy__(self, memo: Any) -> Reranker:
        """Nothing in it is ever changed by who holds it."""
        return self

    @property
    def max_batch_tokens(self) -> int:
        """Rows of a pass when the caller doesn't say."""
        return _BATCH_TOKENS[self.device.type]

    def identity(self) -> dict[str, Any]:
        """What makes a score with these weights what it is, for whoever keeps results: the model's name, a SHA-256 of
        configuration, tokenizer, weights and prompt, dtype and backend; and how numbers are rounded where that is not
        the same on every processor. Reads the files once more.

        Raises:
            ValueError: a file has changed since it was loaded.
        """
        if self._digest is None:
            parts = [dict(vars(self.family.prompt))]
            if not isinstance(self.family.readout, Cosine):
                parts.append(dict(vars(self.family.readout)))
            self._digest = digest(self.checkpoint.digest(), *parts)
        rounding = self.model.ops.rounding
        if rounding is None and self.dtype != "float32":
            gpu = self.device.type == "cuda"
            rounding = torch.cuda.get_device_name(self.device) if gpu else torch.backends.cpu.get_cpu_capability()
        how = {} if rounding is None else {"rounding": rounding}
        return {
            "model": self.checkpoint.name, "digest": self._digest, "dtype": self.dtype, "backend": self.backend, **how
        }  # fmt: skip

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
        score_threshold: float | None = None,
        progress: bool | None = None,
    ) -> list[RerankResult]:
        """Rank documents by relevance to a query. Same arguments, keys and order as the published `rerank`.

        Arguments are those of `RerankRequest`. progress: True or False, None shows a bar on a terminal when it takes
        long.

        Returns:
            Dicts, best first, ties in input order (see `RerankResult`). `[]` for no documents.

        Raises:
            TypeError, ValueError: an argument is bad; the message names it, its position and its value.
        """
        request = RerankRequest(
            query, documents, top_n, return_embeddings, max_doc_length, max_query_length, instruction, block_size,
            orders, score_threshold,
        )  # fmt: skip
        return self.rerank_many([request], progress=progress)[0]

    async def arerank(self, query: str, documents: Sequence[Document], **options: Any) -> list[RerankResult]:
        """`rerank` on a thread, for whoever must not wait; many at once are better served by an `Engine`."""
        return await asyncio.to_thread(partial(self.rerank, query, documents, **options))

    def rerank_many(
        self,
        requests: Sequence[RerankRequest | Mapping[str, Any]],
        *,
        max_batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> list[list[RerankResult]]:
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
            self.encoder.check(request, "" if single else f"requests[{i}].")
        scored = self.score_encoded(
            (self.encode(request) for request in checked), max_batch_tokens=max_batch_tokens, progress=progress,
            documents=sum(len(request.documents) * request.orders for request in checked),
        )  # fmt: skip
        return [ranked(request, result) for request, result in zip(checked, scored, strict=True)]

    def device_answers(self) -> bool:
        """Whether the device computes: after an illegal access or a memory fault, a GPU never does again in this
        process."""
        if self.device.type == "cpu":
            return True
        try:
            torch.ones(1, device=self.device).add_(1)
            torch.cuda.current_stream(self.device).synchronize()  # the device's would end a capture beside it
        except torch.cuda.OutOfMemoryError:  # it answered
            return True
        except RuntimeError:
            return False
        return True

    def warmup(self) -> None:
        """Do now what the first requests would wait for; call it once, before serving.

        A short list is scored, which pages the weights in, starts threads and compiles kernels. With the Triton
        kernels the CUDA graphs of all passes of up to 4,096 tokens are captured, which otherwise happens when the first
        pass of a size comes; they keep about 150 MiB at 0.6B (see `lastrerank.graphs`).
        """
        self.rerank("warm up", ["a short document", "another one"], progress=False)
        if self._graphs is not None:
            with isolated(self.device):
                self._graphs.capture()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write this model in the published format, weights in its dtype (what is float32 and isn't rounded in a pass
        stays that: embedding, norms, biases, a projector), in place of the checkpoint that `folder` holds, in one step
        (see `lastrerank.saving`); Python files that the checkpoint names are copied, not run.

        int8: the linears rotated (see `lastrerank.rotation`), as int8 with a scale for each output
        (`..._proj.weight_scale`), half the size of 16 bit. Other programs refuse it by its `quantization_config`.
        Loaded with dtype "int8" it gives the same scores; with another, those of the quantised weights.

        A family that scores by logits is saved as a classifier of one output (`score.weight`, in fp32 whatever the
        dtype is), which Transformers reads as such, in the dtype that it is told.

        Raises:
            ValueError: the weights are quantised in a way that isn't saved (float8), or too large for the dtype, or the
                family is one's own.
            OSError: it can't be written; the folder is as it was.
        """
        self._check_table()
        source = self.checkpoint
        dtype = "float32" if self.dtype == "int8" else self.dtype
        raw = {**source.raw_config, "dtype": dtype, "torch_dtype": dtype, "quantization_config": None}
        state = saving.state_dict(self.config, self.model.weights)
        if self.dtype == "int8":
            raw, state = saving.quantised(raw, state)
        else:
            # A classifier is fp32, whatever the dtype is; so is what is computed with in fp32 and isn't this dtype's.
            for name, tensor in state.items():
                small = tensor.to(DTYPES[self.dtype])
                if name != "score.weight" and (tensor.dtype != torch.float32 or torch.equal(small.float(), tensor)):
                    if not torch.isfinite(small).all():
                        raise ValueError(f"{name} has numbers that are too large for {self.dtype}")
                    state[name] = small
        raw = self._with_family(raw)
        limits = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.config.max_context}
        saving.save(
            folder, {name: value for name, value in raw.items() if name != "quantization_config" or value},
            source.tokenizer, limits | dict(source.tokenizer_config), state, python_files=source.folder,
            hub_id=source.base if "/" in source.base else None,
        )  # fmt: skip

    def _with_family(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of a save, which says what it is whatever its folder is called. A family that reads logits
        is saved as a classifier of one output: what its row was made from isn't kept."""
        if FAMILIES.get(self.family.name) != self.family:
            raise ValueError(f"family {self.family.name!r} is none of {list(FAMILIES)}: whoever loads it couldn't tell")
        own = {n: v for n, v in (raw.get("lastrerank") or {}).items() if n not in ("family", "template")}
        if self.family != FAMILIES["listwise"]:  # which is known by its projector
            own["family"] = self.family.name
        raw = {n: v for n, v in raw.items() if n != "lastrerank"} | ({"lastrerank": own} if own else {})
        if isinstance(self.family.readout, Cosine):
            return raw
        padding = self.checkpoint.tokenizer.token_to_id("<|endoftext|>")
        return {n: v for n, v in raw.items() if n not in ("auto_map", "num_labels")} | {
            "architectures": [f"{raw['model_type'].capitalize()}ForSequenceClassification"],
            "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
            "pad_token_id": padding if raw.get("pad_token_id") is None else raw["pad_token_id"],
        }  # fmt: skip

    # What an engine calls

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Tokenise a checked request to prompts. Thread-safe, touches no device."""
        return run(self.encode_by_slices(request))

    def encode_by_slices(self, request: RerankRequest) -> Steps[EncodedRequest]:
        """The same as a generator that yields after each slice of the work."""
        encoded = yield from self.encoder.encode_by_slices(request)
        if self.deterministic:  # every block is a pass of its own
            encoded = replace(encoded, blocks=tuple(block.alone() for block in encoded.blocks))
        return encoded

    def score_encoded(
        self,
        requests: Iterable[EncodedRequest],
        *,
        max_batch_tokens: int | None = None,
        progress: bool | None = None,
        documents: int = 0,
    ) -> list[Scored]:
        """Score encoded requests in packed passes. Requests are drawn as passes need them, results kept in order. A GPU
        has the next pass before the scores of the last one are waited for, and computes it while others are tokenised.

        documents: of all requests, for progress.

        Raises:
            RuntimeError: a score is not finite (the dtype overflowed); nothing is returned then.
        """
        budget = self.max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(f"max_batch_tokens is {budget!r}, expected an integer of at least 1")
        results: dict[int, Scored] = {}
        unfinished: dict[int, EncodedRequest] = {}
        with Progress("reranking", "documents", progress, documents) as bar:
            passes = self._launched(requests, unfinished, budget, bar)
            for readings, _ in pairwise(chain(passes, [[]])):  # the next is launched before this one is read
                for numbers, reading in readings:
                    results.update(zip(numbers, self._read(reading), strict=True))
        for number in unfinished:  # requests without documents
            results[number] = Scored(np.zeros(0, np.float32), np.zeros((0, 0), np.float32))
        return [results[number] for number in sorted(results)]

    def _launched(
        self, requests: Iterable[EncodedRequest], unfinished: dict[int, EncodedRequest], budget: int, bar: Progress
    ) -> Iterator[list[tuple[list[int], _Reading]]]:
        """Pass by pass, the numbers of the requests that it completes, and their readouts. unfinished: is filled with
        requests as they are drawn; those without documents stay in it."""
        hidden: dict[int, list[torch.Tensor]] = {}  # read rows, a block each, of unfinished requests
        for group in _passes(_blocks_of(requests, unfinished), 1 if self.deterministic else budget):
            layer_share = sum(len(block.doc_rows) for _, block in group) / self.config.num_layers
            parts = self.read_rows([block for _, block in group], on_layer=partial(_advance, bar, layer_share))
            for (number, _), part in zip(group, parts, strict=True):
                hidden.setdefault(number, []).append(part)
            done = [n for n, r in unfinished.items() if r.blocks and len(hidden.get(n, ())) == len(r.blocks)]
            readings = []
            for together in [[n] for n in done] if self.deterministic else filter(None, [done]):
                own = [part for n in together for part in hidden.pop(n)]
                readings.append((together, self._launch_readout([unfinished.pop(n) for n in together], own)))
            yield readings

    def read_rows(
        self, blocks: Sequence[EncodedBlock], on_layer: Callable[[int], None] | None = None
    ) -> list[torch.Tensor]:
        """One packed pass: of each block the residual stream `[R, D]` at its documents' rows and its query's, if one is
        read.

        on_layer: as `Model.hidden_states`, for progress, and to stop by an exception. A captured CUDA graph is replayed
        where one holds the pass.

        Raises:
            RuntimeError: the weights' file was written to while it is in use.
        """
        self._check_table()
        with isolated(self.device):
            batch = pack(blocks, self.device)
            rows = None if self._graphs is None else self._graphs.hidden_states(batch)
            if rows is None:
                rows = self.model.hidden_states(batch, on_layer=on_layer)
            elif on_layer is not None:
                for _ in range(self.config.num_layers):
                    on_layer(batch.num_tokens)
            return list(rows.split([len(block.read_rows) for block in blocks]))

    def score_read_rows(self, requests: Sequence[EncodedRequest], hidden: Sequence[torch.Tensor]) -> list[Scored]:
        """Readout of complete requests from the read rows of all their blocks, in order; one copy to the host.

        Raises:
            RuntimeError: a score is not finite (the dtype overflowed).
        """
        return self._read(self._launch_readout(requests, hidden)) if requests else []

    def _launch_readout(self, requests: Sequence[EncodedRequest], hidden: Sequence[torch.Tensor]) -> _Reading:
        """Doesn't wait for the device."""
        counts = [len(block.doc_rows) for request in requests for block in request.blocks]
        # Every order of a request is fused apart, as if it were a request of its own.
        owners = [(n, order) for n, request in enumerate(requests) for order in request.block_orders]
        with isolated(self.device):
            weights = self.model.weights
            assert weights.readout is not None
            vectors, scores = weights.readout(
                self.model.ops, torch.cat(list(hidden)), weights.norm, self.config.rms_norm_eps, counts, owners
            )
            host_scores = scores.float().to("cpu", non_blocking=True)
            wants_vectors = any(request.request.return_embeddings for request in requests)
            host_vectors = vectors.float().to("cpu", non_blocking=True) if wants_vectors else None
            copied = torch.cuda.Event() if self.device.type == "cuda" else None
            if copied is not None:
                copied.record(torch.cuda.current_stream(self.device))
        return _Reading(requests, host_scores, host_vectors, copied)

    def _read(self, reading: _Reading) -> list[Scored]:
        """Raises RuntimeError where a score is not finite."""
        if reading.copied is not None:
            reading.copied.synchronize()
        requests, host_scores = reading.requests, reading.scores.numpy()
        if reading.vectors is None:
            host_vectors = np.zeros((len(host_scores), 0), np.float32)
        else:
            host_vectors = reading.vectors.numpy()
        if not np.isfinite(host_scores).all():
            raise RuntimeError(f"scores are not finite: {self.dtype} overflowed in this model; use another dtype")

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
            found = (total / request.request.orders).astype(np.float32)
            logit = self.family.readout
            results.append(
                Scored(found, own) if isinstance(logit, Cosine) else Scored(logit.published(found), own, found)
            )
        return results

    def _check_table(self) -> None:
        """Raises RuntimeError where the weights' file was overwritten in place; new attributes and links are no
        matter."""
        if self.device.type == "cpu" and (touched := self.checkpoint.touched()) is not None and touched != self._seen:
            try:
                same = self.checkpoint.embedding_checksum() == self._checksum
            except ValueError:  # cut off
                same = False
            if not same:
                raise RuntimeError(f"{touched.path} was overwritten while its weights are in use: load the model again")
            self._seen = touched


def _advance(bar: Progress, documents: float, tokens: int) -> None:
    """A layer is done."""
    bar.advance(documents)


def ranked(request: RerankRequest, scored: Scored) -> list[RerankResult]:
    """The results of a request, best first, ties in input order, at most `top_n`, none below `score_threshold`."""
    raw = scored.scores if scored.raw is None else scored.raw
    order = np.argsort(-raw, kind="stable")
    if request.score_threshold is not None:
        order = order[scored.scores[order].astype(np.float64) >= request.score_threshold]
    results: list[RerankResult] = []
    for i in order[: request.top_n]:
        result: RerankResult = {
            "document": request.documents[i],
            "relevance_score": float(scored.scores[i]),
            "index": int(i),
            "embedding": scored.vectors[i].copy() if request.return_embeddings else None,
        }
        if scored.raw is not None:
            result["raw_score"] = float(raw[i])
        results.append(result)
    return results


def _load_again(made_by: dict[str, Any], wanted: str) -> Reranker:
    """A pickled Reranker in another process."""
    loaded = Reranker.from_pretrained(**made_by)
    if loaded.identity()["digest"] != wanted:
        raise ValueError(f"{loaded.checkpoint.folder}: not the checkpoint that the pickled Reranker had loaded")
    return loaded


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "cuda" is the caller's current one, by its number.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    if device.type == "cuda" and device.index is None:  # the current one is each thread's own
        return torch.device("cuda", torch.cuda.current_device())
    return device


def default_dtype(device: torch.device) -> str:
    """What "auto" is: bfloat16, in which checkpoints are published, on a GPU that has units for it; else float32."""
    if device.type == "cpu" or (torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)):
        return "float32"
    return "bfloat16"


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
    """Blocks in order, grouped so that each group is a pass of at most `budget` rows where it can be."""
    group: list[tuple[int, EncodedBlock]] = []
    rows = PassRows()
    for number, block in blocks:
        if not rows.fits(block, budget):
            yield group
            group, rows = [], PassRows()
        group.append((number, block))
        rows.add(block)
    if group:
        yield group
