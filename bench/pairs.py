"""The baseline and the independent check of rerankers that judge one document at a time, in Hugging Face Transformers.

Written from the model cards and packages alone, one prompt a pair, in batches padded on the left; shares no code with
`lastrerank`. What users' texts contain is encoded with control tokens live, as the cards do it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
QWEN3_LIMIT = MXBAI_LIMIT = 8192


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def qwen3(tokenizer: Tokenizer, query: str, document: str, instruction: str | None = None) -> list[int]:
    """Three encodings; the one in the middle is cut."""
    prefix = _ids(tokenizer, (
        '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct '
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    ))  # fmt: skip
    suffix = _ids(tokenizer, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    pair = f"<Instruct>: {instruction or QWEN3_INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    return prefix + _ids(tokenizer, pair)[: QWEN3_LIMIT - len(prefix) - len(suffix)] + suffix


def mxbai(tokenizer: Tokenizer, query: str, document: str, instruction: str | None = None) -> list[int]:
    """Seven encodings laid end to end; the query's share is bounded, the document has the rest."""
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    start = _ids(tokenizer, f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    end, line = _ids(tokenizer, "<|im_end|>\n<|im_start|>assistant\n"), _ids(tokenizer, "\n")
    query = f"query: {query}" if instruction is None else f"instruction: {instruction}\nquery: {query}"
    query_ids = _ids(tokenizer, query)[: MXBAI_LIMIT * 3 // 4]
    document_ids = _ids(tokenizer, f"document: {document}")[: MXBAI_LIMIT - len(query_ids) - len(line)]
    return start + query_ids + line + document_ids + line + _ids(tokenizer, task) + end


def zerank(tokenizer: Tokenizer, query: str, document: str, instruction: str | None = None) -> list[int]:
    """A chat of the query as the system and the document as the user."""
    text = query.strip()
    if instruction is not None:
        text = f"<query>{text}</query>\n<instruction>{instruction}</instruction>"
    return _ids(
        tokenizer,
        f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\n{document.strip()}<|im_end|>\n"
        "<|im_start|>assistant\n",
    )


def ctxl(tokenizer: Tokenizer, query: str, document: str, instruction: str | None = None) -> list[int]:
    """One string without a frame."""
    suffix = "" if instruction is None else f" {instruction}"
    return _ids(
        tokenizer,
        "Check whether a given document contains information helpful to answer the query.\n"
        f"<Document> {document}\n<Query> {query}{suffix} ??",
    )


# Prompt, the words whose logits are read, and what the publisher makes of their difference.
FAMILIES: dict[str, tuple[Callable[..., list[int]], tuple[str, str | None], Callable[[float], float]]] = {
    "qwen3-reranker": (qwen3, ("yes", "no"), lambda x: 1 / (1 + np.exp(-x))),
    "mxbai-rerank-v2": (mxbai, ("1", "0"), lambda x: x),
    "zerank": (zerank, ("Yes", None), lambda x: 1 / (1 + np.exp(-x / 5))),
    "ctxl-rerank-v2": (ctxl, ("!", None), lambda x: x),
}


class PlainPairs:
    """All of it but the decoder: a prompt a document, each by itself, and the words' logits at its last token.

    Args:
        folder: single-file safetensors checkpoint whose output head is its embedding.
        family: a name in `FAMILIES`.
        hidden: the decoder: hidden states `[T, C]` after the last norm, of ids `[T]`.

    Raises:
        NotImplementedError: the output head is another.
    """

    def __init__(self, folder: Path, family: str, hidden: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.prompt, words, _ = FAMILIES[family]
        self.tokenizer, self.hidden = Tokenizer.from_file(str(folder / "tokenizer.json")), hidden
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            if "lm_head.weight" in file.keys():  # noqa: SIM118 (no mapping)
                raise NotImplementedError("the output head is not the embedding")
            table = file.get_tensor("model.embed_tokens.weight")
        true, *false = [table[_ids(self.tokenizer, word)[0]].float() for word in words if word is not None]
        self.weight = true - sum(false)

    def scores(self, query: str, documents: list[str], instruction: str | None = None) -> np.ndarray:
        """Raw scores fp32 `[N]`."""
        prompts = [self.prompt(self.tokenizer, query, document, instruction) for document in documents]
        return np.array([float(self.hidden(torch.tensor(ids))[-1] @ self.weight) for ids in prompts], np.float32)


class TransformersPairs:
    """A checkpoint folder run as its card does it, by Transformers' own causal model or classifier.

    Args:
        folder: single-file safetensors checkpoint.
        family: a name in `FAMILIES`.
        dtype: weights and activations.
        device: torch device string.
    """

    def __init__(
        self, folder: str | Path, family: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self.prompt, words, self.published = FAMILIES[family]
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.words = [None if word is None else _ids(self.tokenizer, word)[0] for word in words]
        raw = json.loads((Path(folder) / "config.json").read_text())
        self.classifier = "Classification" in raw["architectures"][0]
        kind: Any = AutoModelForSequenceClassification if self.classifier else AutoModelForCausalLM
        self.model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self.device = device

    @torch.inference_mode()
    def scores(
        self, query: str, documents: list[str], instruction: str | None = None, batch_size: int = 32
    ) -> np.ndarray:
        """Raw scores fp32 `[N]`: batches padded on the left, the logits of the last row."""
        prompts = [self.prompt(self.tokenizer, query, document, instruction) for document in documents]
        found = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=self.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=self.device)
            if self.classifier:
                hidden = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, -1]
                logits = self.model.score(hidden).float()
                found.append(logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0))
                continue
            # The last row's logits alone: those of all rows would be gigabytes.
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
            true, false = self.words
            found.append(logits[:, true].float() - (0 if false is None else logits[:, false].float()))
        return torch.cat(found).cpu().numpy()
