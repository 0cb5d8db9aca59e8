"""What an evaluation ranks with: a `Reranker`, or a model that another library runs, on the same candidates."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch

from lastrerank.integrations import install_command
from lastrerank.request import RerankRequest
from lastrerank.reranker import Reranker, ranked


@dataclass(frozen=True)
class RankedList:
    """Places of a list's documents, best first, their scores in that order, and the tokens that were read."""

    order: list[int]
    scores: list[float]
    tokens: int


class Contender(Protocol):
    """Ranks lists. parameters: numbers in its weights. max_doc_length: its own cap in tokens, None where it has another
    kind of bound."""

    parameters: int
    max_doc_length: int | None

    def identity(self) -> dict[str, Any]:
        """What makes a score what it is: `model`, a digest of its weights, what runs it."""

    def rank(self, lists: Sequence[tuple[str, list[str]]], max_doc_length: int | None) -> list[RankedList]:
        """Rank each query's documents; a cap in tokens, None for the model's own."""


class Own:
    """A `Reranker`."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker
        self.parameters = reranker.checkpoint.parameters()
        self.max_doc_length: int | None = reranker.encoder.max_doc_length

    def identity(self) -> dict[str, Any]:
        """See `Contender`."""
        return self.reranker.identity()

    def rank(self, lists: Sequence[tuple[str, list[str]]], max_doc_length: int | None) -> list[RankedList]:
        """See `Contender`."""
        requests = [
            RerankRequest.of(RerankRequest(query, documents, max_doc_length=max_doc_length))
            for query, documents in lists
        ]
        encoded = [self.reranker.encode(request) for request in requests]
        scored = self.reranker.score_encoded(encoded, progress=False)
        found = []
        for request, prompt, scores in zip(requests, encoded, scored, strict=True):
            results = ranked(request, scores)
            # Before an activation, which makes ties of scores that aren't equal.
            values = [r.get("raw_score", r["relevance_score"]) for r in results]
            found.append(RankedList([r["index"] for r in results], values, prompt.num_tokens))
        return found


class CrossEncoderPeer:
    """A model that sentence-transformers' `CrossEncoder` runs: pairs in batches of 32, cut by its own tokenizer.

    Args:
        name: Hub id or folder.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: the library can't load it as a model of one score.
    """

    max_doc_length: int | None = None

    def __init__(self, name: str, device: str = "auto") -> None:
        from sentence_transformers import CrossEncoder

        try:
            self._model = CrossEncoder(name, device=None if device == "auto" else device)
        except Exception as error:  # whatever the library and those below it raise
            raise ValueError(f"cross-encoder:{name}: sentence-transformers can't load it: {error}") from error
        if getattr(self._model, "num_labels", 1) != 1:
            raise ValueError(f"cross-encoder:{name}: it has {self._model.num_labels} labels, expected one score")
        self._name = f"cross-encoder:{name}"
        # Before version 5 it is no module itself.
        module = self._model if isinstance(self._model, torch.nn.Module) else self._model.model
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        self._dtype = str(next(module.parameters()).dtype)
        settings = [str(getattr(self._model, n, None)) for n in ("max_length", "activation_fn", "prompts")]
        self._digest = _digest(module, _tokenizer(self._model), *settings)

    def identity(self) -> dict[str, Any]:
        """See `Contender`."""
        return {"model": self._name, "digest": self._digest, "dtype": self._dtype,
                "backend": f"sentence-transformers {version('sentence-transformers')}"}  # fmt: skip

    def rank(self, lists: Sequence[tuple[str, list[str]]], max_doc_length: int | None) -> list[RankedList]:
        """See `Contender`."""
        _refuse_cap(self._name, max_doc_length)
        pairs = [(query, document) for query, documents in lists for document in documents]
        if not pairs:
            return [RankedList([], [], 0) for _ in lists]
        scores = np.asarray(self._model.predict(pairs, batch_size=32, show_progress_bar=False), np.float32).reshape(-1)
        lengths = self._lengths(pairs)
        found, start = [], 0
        for _, documents in lists:
            own = slice(start, start + len(documents))
            found.append(_by_score(scores[own], sum(lengths[own])))
            start += len(documents)
        return found

    def _lengths(self, pairs: list[tuple[str, str]]) -> list[int]:
        encoded = self._model.tokenizer(
            [q for q, _ in pairs], [d for _, d in pairs], truncation=True,
            max_length=getattr(self._model, "max_length", None),
        )  # fmt: skip
        return [len(ids) for ids in encoded["input_ids"]]


class LateInteractionPeer:
    """A model that PyLate runs: a vector a token of query and document apart, the sum of the query's best matches.

    Args:
        name: Hub id or folder.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ImportError: pylate is not installed.
        ValueError: the library can't load it.
    """

    max_doc_length: int | None = None

    def __init__(self, name: str, device: str = "auto") -> None:
        from pylate import models

        try:
            self._model = models.ColBERT(model_name_or_path=name, device=None if device == "auto" else device)
        except Exception as error:  # whatever the library and those below it raise
            raise ValueError(f"late-interaction:{name}: PyLate can't load it: {error}") from error
        self._name = f"late-interaction:{name}"
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        names = ("query_length", "document_length", "query_prefix", "document_prefix", "do_query_expansion",
                 "attend_to_expansion_tokens", "skiplist_words", "prompts")  # fmt: skip
        settings = [str(getattr(self._model, n, None)) for n in names]
        self._digest = _digest(self._model, _tokenizer(self._model), *settings)

    def identity(self) -> dict[str, Any]:
        """See `Contender`."""
        return {"model": self._name, "digest": self._digest, "dtype": str(next(self._model.parameters()).dtype),
                "backend": f"pylate {version('pylate')}"}  # fmt: skip

    def rank(self, lists: Sequence[tuple[str, list[str]]], max_doc_length: int | None) -> list[RankedList]:
        """See `Contender`."""
        _refuse_cap(self._name, max_doc_length)
        found = []
        for query, documents in lists:
            own = np.asarray(self._model.encode([query], is_query=True, show_progress_bar=False)[0])
            vectors = self._model.encode(documents, is_query=False, show_progress_bar=False) if documents else []
            scores = [float((own @ np.asarray(document).T).max(axis=1).sum()) for document in vectors]
            tokens = len(own) + sum(len(document) for document in vectors)
            found.append(_by_score(np.array(scores, np.float32), tokens))
        return found


# Models that other libraries run, by the word before the colon.
PEERS: Mapping[str, Callable[[str, str], Contender]] = {
    "cross-encoder": CrossEncoderPeer,
    "late-interaction": LateInteractionPeer,
}


_LIBRARIES = {
    "cross-encoder": ("sentence_transformers", install_command("compare")),
    "late-interaction": ("pylate", "pip install pylate"),
}


def peer(name: str, device: str = "auto") -> Contender:
    """A peer by its kind and name, as `cross-encoder:BAAI/bge-reranker-v2-m3`.

    Raises:
        ValueError: no such kind, or it can't be loaded.
        ImportError: its library is not installed.
    """
    kind, model = check_peer(name)
    return PEERS[kind](model, device)


def check_peer(name: str) -> tuple[str, str]:
    """A peer's kind and its model.

    Raises:
        ValueError: no such kind.
        ImportError: its library is not installed.
    """
    kind, _, model = name.partition(":")
    if kind not in PEERS or not model:
        raise ValueError(f"peer is {name!r:.80}, expected one of {[f'{kind}:ID' for kind in PEERS]}")
    library, install = _LIBRARIES[kind]
    if library not in sys.modules and find_spec(library) is None:
        raise ImportError(f"{name}: {library} is not installed: {install}")
    return kind, model


def _by_score(scores: np.ndarray, tokens: int) -> RankedList:
    if not np.isfinite(scores).all():
        raise RuntimeError(f"scores are not finite: {scores.tolist()!s:.80}")
    order = np.argsort(-scores, kind="stable")
    return RankedList(order.tolist(), scores[order].tolist(), tokens)


def _tokenizer(model: Any) -> str:
    """A model's tokenizer, serialised."""
    own = getattr(model, "tokenizer", None)
    fast = getattr(own, "backend_tokenizer", None)
    return repr(own) if fast is None else fast.to_str()


def _refuse_cap(name: str, max_doc_length: int | None) -> None:
    if max_doc_length is not None:
        raise ValueError(f"max_doc_length is {max_doc_length}: {name} cuts by its own tokenizer, not by a cap in ours")


def _digest(module: torch.nn.Module, *settings: str) -> str:
    """SHA-256 of a model's tensors and configurations, and of what else makes its scores what they are."""
    configurations: list[Any] = [getattr(part, "config", None) for part in module.modules()]
    settings += tuple(one.to_json_string() for one in configurations if hasattr(one, "to_json_string"))
    total = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(raw.numpy().data)
    return total.hexdigest()
