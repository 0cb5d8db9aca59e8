"""What is compared: each provider makes, from a checkpoint folder, a function that scores encoded requests.

A provider that can't run here says why and is left out; nothing is compared that isn't the same computation, so
callers check scores before they time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

Request = tuple[str, list[str]]
# Scores of several requests, each in its documents' order.
Scorer = Callable[[list[Request]], list[np.ndarray]]


class UnavailableError(Exception):
    """This provider can't run here; the message says what is missing."""


def ours(backend: str, dtype: str, share: bool = True) -> Callable[[Path], Scorer]:
    """share: whether prompts of one request compute once what they have in common."""

    def make(folder: Path) -> Scorer:
        from lastrerank import Reranker, RerankRequest

        try:
            reranker = Reranker.from_pretrained(folder, backend=backend, dtype=dtype)
        except (ValueError, RuntimeError) as error:
            raise UnavailableError(str(error)) from error

        def score(requests: list[Request]) -> list[np.ndarray]:
            encoded = [reranker.encode(RerankRequest(query, documents)) for query, documents in requests]
            if not share:
                encoded = [replace(e, blocks=tuple(b.alone() for b in e.blocks)) for e in encoded]
            return [found.scores if found.raw is None else found.raw for found in reranker.score_encoded(encoded)]

        return score

    return make


def transformers(
    attention: str, dtype: torch.dtype, change: Callable[[torch.nn.Module], Any] | None = None
) -> Callable[[Path], Scorer]:
    """change: what the decoder is replaced by."""

    def make(folder: Path) -> Scorer:
        from bench.baseline import TransformersReranker
        from bench.pairs import FAMILIES, TransformersPairs

        device = "cuda" if torch.cuda.is_available() else "cpu"
        family = declared_family(folder)
        try:
            if family in FAMILIES:
                pairs = TransformersPairs(folder, family, dtype, device)
                if change is not None:
                    pairs.model.model = change(pairs.model.model)
                return lambda requests: [pairs.scores(query, documents) for query, documents in requests]
            reranker = TransformersReranker(folder, dtype, attention, device)
            if change is not None:
                reranker.model = change(reranker.model)
        except ImportError as error:
            raise UnavailableError(str(error)) from error

        def score(requests: list[Request]) -> list[np.ndarray]:
            return [reranker.block(query, documents)[2] for query, documents in requests]

        return score

    return make


def torchao_int8(decoder: torch.nn.Module) -> Any:
    """Linear layers in 8 bits, their inputs quantised on the way; compiled, without which it is half as fast."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(decoder, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(decoder)


def cross_encoder(folder: Path) -> Scorer:
    """sentence-transformers' `CrossEncoder` over the conversion to a classifier that people use there."""
    from bench.pairs import QWEN3_INSTRUCTION
    from lastrerank import Reranker

    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    loaded = Reranker.from_pretrained(folder, backend="reference", dtype="float32")
    if loaded.family.name != "qwen3-reranker":
        raise UnavailableError(f"the prompt of {loaded.family.name} isn't two texts end to end")
    converted = folder / "classifier"
    loaded.save_pretrained(converted)
    model = CrossEncoder(str(converted), model_kwargs={"dtype": torch.float32})
    model.tokenizer.pad_token = "<|endoftext|>"
    model.model.config.pad_token_id = model.tokenizer.pad_token_id
    before, _, after = loaded.family.prompt.pieces

    def score(requests: list[Request]) -> list[np.ndarray]:
        return [
            model.predict(
                [(f"{before}<Instruct>: {QWEN3_INSTRUCTION}\n<Query>: {query}\n<Document>:", f" {document}{after}")
                 for document in documents], activation_fn=torch.nn.Identity(), show_progress_bar=False,
            ) for query, documents in requests
        ]  # fmt: skip

    return score


def peer(name: str) -> Callable[[Path], Scorer]:
    """A class of `bench.peers`."""

    def make(folder: Path) -> Scorer:
        from bench import peers
        from bench.baseline import PlainReranker
        from bench.pairs import FAMILIES, PlainPairs

        family = declared_family(folder)
        try:
            decoder = getattr(peers, name)(folder)
            if family in FAMILIES:
                pairs = PlainPairs(folder, family, decoder.hidden)
                return lambda requests: [pairs.scores(query, documents) for query, documents in requests]
        except (ImportError, NotImplementedError) as error:
            raise UnavailableError(str(error)) from error
        reranker = PlainReranker(folder, decoder.hidden)

        def score(requests: list[Request]) -> list[np.ndarray]:
            return [reranker.block(query, documents)[2] for query, documents in requests]

        return score

    return make


def declared_family(folder: Path) -> str | None:
    """What the configuration of a checkpoint written here says that it is."""
    declared = json.loads((folder / "config.json").read_text()).get("lastrerank") or {}
    return declared.get("family")


# Their first pass of a workload compiles, which takes longer than most passes.
COMPILING = ("torch.compile-float32", "torch.compile-bfloat16", "torchao-int8")

PROVIDERS: dict[str, Callable[[Path], Scorer]] = {
    "transformers-sdpa-float32": transformers("sdpa", torch.float32),
    "transformers-eager-float32": transformers("eager", torch.float32),
    "transformers-sdpa-bfloat16": transformers("sdpa", torch.bfloat16),
    "torch.compile-float32": transformers("sdpa", torch.float32, torch.compile),
    "torch.compile-bfloat16": transformers("sdpa", torch.bfloat16, torch.compile),
    "torchao-int8": transformers("sdpa", torch.float32, torchao_int8),
    "sentence-transformers-float32": cross_encoder,
    "openvino-float32": peer("OpenVino"),
    "openvino-bfloat16": peer("OpenVinoBfloat16"),
    "openvino-int8": peer("OpenVinoInt8"),
    "onnxruntime-float32": peer("OnnxRuntime"),
    "onnxruntime-int8": peer("OnnxRuntimeInt8"),
    "llama.cpp-f16": peer("LlamaCppF16"),
    "llama.cpp-bf16": peer("LlamaCppBF16"),
    "llama.cpp-q8_0": peer("LlamaCpp"),
    "llama.cpp-q4_0": peer("LlamaCppQ4"),
    "lastrerank-reference-float32": ours("reference", "float32"),
    "lastrerank-native-float32": ours("native", "float32"),
    "lastrerank-native-unshared-float32": ours("native", "float32", share=False),
    "lastrerank-native-bfloat16": ours("native", "bfloat16"),
    "lastrerank-native-int8": ours("native", "int8"),
}
