"""The face of sentence-transformers' `CrossEncoder`: `rank`, `predict`, and what its evaluators ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from lastrerank.families import Cosine, Family
from lastrerank.families.family import sigmoid
from lastrerank.request import Document, RerankRequest, RerankResult


class ModelCard:
    """Where sentence-transformers' evaluators leave their last results."""

    metrics: Mapping[str, float] = MappingProxyType({})

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, float], epoch: int = 0, step: int = 0
    ) -> None:
        """As those of its own models."""
        self.metrics = dict(metrics)


class CrossEncoderFace:
    """What a `Reranker` has of it."""

    num_labels = 1
    family: Family
    rerank: Callable[..., list[RerankResult]]
    rerank_many: Callable[..., list[list[RerankResult]]]

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """As sentence-transformers' `CrossEncoder.rank`: `[{corpus_id, score, text?}]`, best first.

        batch_size has no effect: passes are packed by tokens. Scores of a family that has logits are those, as there,
        or their sigmoid where activation_fn is one. Of its other options those are refused that would change a score.
        """
        score = _score_wanted(options, self.family)
        results = self.rerank(query, documents, top_n=top_k, progress=show_progress_bar)
        return [
            {"corpus_id": result["index"], "score": score(result)}
            | ({"text": _text(result["document"])} if return_documents else {})
            for result in results
        ]

    def predict(
        self,
        inputs: Sequence[Sequence[str]] | None = None,
        *,
        sentences: Sequence[Sequence[str]] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **options: Any,
    ) -> Any:
        """As `CrossEncoder.predict`: fp32 score of each (query, document) pair, in the caller's order: an array, with
        convert_to_tensor a tensor, with neither a list of tensors, for a single pair one number. Its releases before
        6 call `inputs` `sentences`.

        Pairs of one query are scored as one list, in their order: a listwise score depends on its company, and what
        judges one document at a time shares its prompt.
        batch_size has no effect: passes are packed by tokens. Scores of a family that has logits are those, as there,
        or their sigmoid where activation_fn is one. Of its other options those are refused that would change a score.
        """
        score = _score_wanted(options, self.family)
        if (inputs is None) == (sentences is None):
            raise TypeError("expected one of inputs and sentences: a list of (query, document) pairs")
        pairs: Any = sentences if inputs is None else inputs
        if hasattr(pairs, "tolist"):
            pairs = pairs.tolist()
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            raise TypeError(f"inputs is a {type(pairs).__name__}, expected a list of (query, document) pairs")
        single = len(pairs) == 2 and all(isinstance(text, str) for text in pairs)
        pairs = [pairs] if single else pairs
        groups: dict[str, list[int]] = {}
        for position, pair in enumerate(pairs):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"inputs[{position}] is {pair!r:.80}, expected (query, document)")
            if not isinstance(pair[0], str):
                raise TypeError(f"inputs[{position}][0] is a {type(pair[0]).__name__}, expected a string")
            groups.setdefault(pair[0], []).append(position)
        requests = [RerankRequest(query, [pairs[i][1] for i in members]) for query, members in groups.items()]
        scores = np.empty(len(pairs), np.float32)
        for members, results in zip(
            groups.values(), self.rerank_many(requests, progress=show_progress_bar), strict=True
        ):
            for result in results:
                scores[members[result["index"]]] = score(result)
        if convert_to_tensor or not convert_to_numpy:
            tensor = torch.from_numpy(scores)
            return tensor[0] if single else tensor if convert_to_tensor else list(tensor)
        return scores[0] if single else scores


# Options of sentence-transformers' CrossEncoder: those that change no score here, and those that would.
_HARMLESS_OPTIONS = ("num_workers", "convert_to_numpy", "convert_to_tensor", "chunk_size")
_ACTIVATIONS_OF = ("activation_fn", "activation_fct")
_REFUSED_OPTIONS = ("prompt_name", "prompt", "apply_softmax", "device", "pool")


def _score_wanted(options: Mapping[str, Any], family: Family) -> Callable[[Mapping[str, Any]], float]:
    """Of a result, the score that a CrossEncoder with these options gives: a cosine, or a logit, or its sigmoid."""
    activation = "Identity"
    for name, value in options.items():
        if name not in (*_HARMLESS_OPTIONS, *_ACTIVATIONS_OF, *_REFUSED_OPTIONS):
            raise TypeError(f"{name} is {value!r:.80}: no option of CrossEncoder that is known here")
        kind = "Identity" if value is None or value is False else type(value).__name__
        known = ("Identity",) if isinstance(family.readout, Cosine) else ("Identity", "Sigmoid")
        if name in _ACTIVATIONS_OF and kind in known:
            activation = kind if kind != "Identity" else activation
        elif name not in _HARMLESS_OPTIONS and kind != "Identity":
            raise ValueError(f"{name} is {value!r:.80}, which would change the scores: not supported")
    if activation == "Sigmoid":
        return lambda result: float(sigmoid(np.float32(result["raw_score"])))
    return lambda result: result.get("raw_score", result["relevance_score"])


def _text(document: Document) -> str:
    return document if isinstance(document, str) else document["text"]
