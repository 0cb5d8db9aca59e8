"""The baseline and the independent check: last-token reranking in Hugging Face Transformers.

Written from the published description alone, the way the remote code works: the whole prompt is tokenised as one
string, markers are searched in the ids, the decoder keeps all hidden states, one block is one pass. Shares no code with
`lastrerank`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. "
    "If not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking."
)


def whole_prompt(query: str, documents: list[str], instruction: str | None = None) -> str:
    """The prompt as one string, to its very end."""
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
        f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. "
        f"Rank the passages based on their relevance to query: {query}\n"
    )
    if instruction:
        prompt += f"<instruct>\n{instruction}\n</instruct>\n"
    prompt += "\n".join(
        f'<passage id="{i}">\n{document}<|embed_token|>\n</passage>' for i, document in enumerate(documents)
    )
    prompt += f"\n<query>\n{query}<|rerank_token|>\n</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return prompt


class PlainReranker:
    """All of it but the decoder: the prompt, the readouts, the projector, the scores and the blocks.

    Args:
        folder: single-file safetensors checkpoint in the published format.
        hidden: the decoder: hidden states `[T, C]` after the last norm, of ids `[T]` on the CPU.
    """

    def __init__(self, folder: str | Path, hidden: Callable[[torch.Tensor], torch.Tensor]) -> None:
        folder, self.hidden = Path(folder), hidden
        limits = json.loads((folder / "tokenizer_config.json").read_text())
        self.context = limits["model_max_length"]
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.embed_id = self.tokenizer.convert_tokens_to_ids("<|embed_token|>")
        self.rerank_id = self.tokenizer.convert_tokens_to_ids("<|rerank_token|>")
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            self.w1 = file.get_tensor("projector.0.weight").float()
            self.w2 = file.get_tensor("projector.2.weight").float()

    @torch.inference_mode()
    def block(
        self, query: str, documents: list[str], instruction: str | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query vector `[P]`, document vectors `[N, P]` and scores `[N]` of one block, fp32."""
        ids = self.tokenizer(whole_prompt(query, documents, instruction), return_tensors="pt")["input_ids"][0]
        hidden = self.hidden(ids)
        rows = hidden[ids == self.embed_id]
        query_row = hidden[torch.where(ids == self.rerank_id)[0][-1]]
        vectors = torch.relu(torch.cat([query_row[None], rows]) @ self.w1.T) @ self.w2.T
        vectors = vectors.float()
        scores = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
        vectors = vectors.cpu().numpy()
        return vectors[0], vectors[1:], scores.cpu().numpy()

    def rerank(
        self,
        query: str,
        documents: list[str],
        top_n: int | None = None,
        max_doc_length: int = 2048,
        max_query_length: int = 512,
        instruction: str | None = None,
        block_size: int = 125,
    ) -> list[dict]:
        """The published `rerank`, plus `instruction` and `block_size`."""

        def cut(text: str, cap: int) -> tuple[str, int]:
            ids = self.tokenizer(text, truncation=True, max_length=cap)["input_ids"]
            return (self.tokenizer.decode(ids) if len(ids) >= cap else text), len(ids)

        query, query_length = cut(query, max_query_length)
        texts, lengths = zip(*(cut(document, max_doc_length) for document in documents), strict=True)
        blocks: list[list[str]] = [[]]
        room = self.context - 2 * query_length
        for text, length in zip(texts, lengths, strict=True):
            blocks[-1].append(text)
            room -= length
            if len(blocks[-1]) >= block_size or room <= max_doc_length:
                blocks.append([])
                room = self.context - 2 * query_length
        queries, vectors, weights = [], [], []
        for block in filter(None, blocks):
            query_vector, block_vectors, scores = self.block(query, block, instruction)
            queries.append(query_vector)
            vectors.extend(block_vectors)
            weights.append(((1.0 + scores) / 2.0).max())
        fused = np.average(np.stack(queries), axis=0, weights=weights)
        stacked = np.stack(vectors)
        scores = stacked @ fused / (np.linalg.norm(stacked, axis=1) * np.linalg.norm(fused))
        order = np.argsort(-scores, kind="stable")[:top_n]
        return [
            {"document": documents[i], "relevance_score": float(scores[i]), "index": int(i), "embedding": stacked[i]}
            for i in order
        ]


class TransformersReranker(PlainReranker):
    """A checkpoint folder run through Transformers' own Qwen3.

    Args:
        folder: single-file safetensors checkpoint in the published format.
        dtype: weights and activations.
        attention: "sdpa", "eager" or "flash_attention_2".
        device: torch device string.
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu"
    ) -> None:
        super().__init__(folder, self._all_layers)
        raw = json.loads((Path(folder) / "config.json").read_text())
        raw = {key: value for key, value in raw.items() if key not in ("lastrerank", "architectures")}
        config = Qwen3Config(**raw)
        config._attn_implementation = attention
        state = load_file(str(Path(folder) / "model.safetensors"))
        with torch.device("meta"):
            self.model = Qwen3Model(config)
        self.model = self.model.to_empty(device=device).to(dtype)
        self.model.rotary_emb = type(self.model.rotary_emb)(config=config).to(device)
        decoder = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        self.model.load_state_dict(decoder, strict=True)
        self.model.eval()
        self.w1, self.w2 = self.w1.to(device, dtype), self.w2.to(device, dtype)
        self.device = device

    def _all_layers(self, ids: torch.Tensor) -> torch.Tensor:
        """As the remote code: every layer's hidden states are kept, the last one is used."""
        output = self.model(input_ids=ids[None].to(self.device), output_hidden_states=True, use_cache=False)
        return output.hidden_states[-1][0]
