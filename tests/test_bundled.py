"""The recipe of a checkpoint to bundle, at toy size and with a toy teacher."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lastrerank import Reranker
from lastrerank.cli import default_model
from lastrerank.packing import pack
from lastrerank.training.bundled import bundled_tokenizer, pool_weights, sampled_lists
from lastrerank.training.data import read_training_data
from lastrerank.training.start import (
    BEGINNING,
    FOUND,
    IN_HEADER,
    IN_QUERY,
    LIGHTS,
    NEAREST,
    NEAREST_LOGIT,
    NUMBER,
    PAIRS_FOUND,
    SCALE,
    SHORT,
    initial_checkpoint,
)  # fmt: skip


def teacher(texts):
    """A bag of hashed words: texts that share words are near each other."""
    vectors = np.zeros((len(texts), 512), np.float32)
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(512).astype(np.float32)
    return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9)


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = "query passage relevance expert search ranking intent question instruction".split()  # noqa: SIM905
    documents = [" ".join(rng.choice(words, 4)) for _ in range(60)]
    data = tmp_path_factory.mktemp("data")
    (data / "documents.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(documents))
    )
    pairs = [{"query": t.split()[0], "positive": i, "lang": "en" if i % 2 else "de",
              "source": "debian" if i < 30 else "lo-index"} for i, t in enumerate(documents)]  # fmt: skip
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return sampled_lists(data, data / "lists"), documents, pairs


def test_lists(mined):
    """Every pool has its share, and a list's negatives are of its pool and no answer."""
    folder, documents, _ = mined
    data = read_training_data(folder)
    assert set(data.pools) == {"debian/en", "debian/de", "lo-index/en", "lo-index/de"}
    weights = pool_weights(data)
    assert weights["lo-index/en"] == weights["lo-index/de"] == 0.045 and weights["debian/en"] == 0.22
    assert weights["debian/de"] == pytest.approx(0.1)
    assert data.documents == documents
    for row in data.rows:
        assert all((number < 30) == row.pool.startswith("debian") for number in row.negatives)
        assert row.positive not in row.negatives


@pytest.fixture(scope="module")
def start(mined, tmp_path_factory):
    data, tokenizer = read_training_data(mined[0]), Tokenizer.from_file(str(default_model() / "tokenizer.json"))
    texts = [tokenizer.decode([i]).strip() or " " for i in range(tokenizer.get_vocab_size())]
    folder = tmp_path_factory.mktemp("start")
    return initial_checkpoint(folder, tokenizer, teacher(texts), data, fit_lists=20)


def traced(start, documents, query, monkeypatch):
    """Tokens, the block, residuals after the first two layers, and at the readouts."""
    reranker = Reranker.from_pretrained(start, backend="reference")
    block = reranker.encoder.encode_block(reranker.encoder.cut([query], 32)[0], reranker.encoder.cut(documents, 2048))
    outputs, mlp = {}, reranker.model._mlp

    def recorded(layer, *rest):
        residual, added = mlp(layer, *rest)
        outputs.setdefault(id(layer), []).append(residual + added)  # by chunks of rows
        return residual, added

    monkeypatch.setattr(reranker.model, "_mlp", recorded)
    with torch.inference_mode():
        read = reranker.model.hidden_states(pack([block], torch.device("cpu")))
    first, second = (torch.cat(outputs[id(layer)]) for layer in reranker.model.weights.layers[:2])
    tokens = [reranker.checkpoint.tokenizer.id_to_token(int(i)) for i in block.ids]
    return tokens, block, first, second, read


def test_the_start_reads_the_prompt(start, monkeypatch):
    """Untrained: which tokens are the query, which document a token is of, and whether it is near the beginning."""
    words = "numerical identifier indicated assess analyze determine depends provide".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 120, 114)  # numbers of three digits, documents short and long
    documents = [" " + " ".join(rng.choice(words, length)) for length in lengths]
    tokens, block, first, second, _ = traced(start, documents, "satisfies", monkeypatch)

    begin, headers = tokens.index("ĠRank"), [i for i, token in enumerate(tokens) if token == "<passage"]
    found = (first[:, IN_QUERY] > SCALE / 3).nonzero()[:, 0].tolist()
    assert found == list(range(begin, headers[0]))
    in_header = first[:, IN_HEADER] > SCALE / 3
    assert all(in_header[i : i + 6].all() and not in_header[i + 9 : i + 12].any() for i in headers)
    near = first[:, BEGINNING] > SCALE / 3
    apart = [(h, m) for h, m in zip(headers, block.doc_rows.tolist(), strict=True) if m - h > 64]
    assert apart and all(near[h : h + 40].all() and not near[h + 60 : m].any() for h, m in apart)

    numbers = torch.nn.functional.normalize(second[:, NUMBER], dim=1)
    markers = numbers[block.doc_rows]
    others = markers @ markers.T - 2 * torch.eye(len(markers))
    # Numbers of three digits differ in one of three: logits of the average, 200 times this, are six apart at least.
    assert others[:100, :100].max() < 0.9 and others.max() < 0.97, (others[:100, :100].max(), others.max())
    for place, (header, marker) in enumerate(zip(headers, block.doc_rows.tolist(), strict=True)):
        assert (numbers[header + 9 : marker] @ numbers[marker]).min() > 0.97, place


def test_the_start_finds_words_and_pairs(start, monkeypatch):
    """Untrained, at a document's marker: lights of the query's words that stand there, however long it is, and of no
    others; of pairs that stand side by side; those near the beginning apart; and a long document is no short one."""
    words = "numerical identifier indicated assess analyze determine depends provide".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    documents = [" " + " ".join(rng.choice(words, length)) for length in (900, 40, 900, 40, 40, 300)]
    documents[2] += " satisfies"  # at the end of a long one
    documents[3] += " satisfies, as the intent"
    documents[4] += " satisfies intent"
    documents[5] = " satisfies" + documents[5]
    tokens, block, _, second, read = traced(start, documents, "satisfies intent", monkeypatch)
    lit = read[: len(documents), FOUND].max(1).values
    assert lit[[2, 3, 4, 5]].min() > 20 * lit[[0, 1]].max(), lit
    pairs = read[: len(documents), PAIRS_FOUND].max(1).values
    assert pairs[4] > 20 * pairs[[0, 1, 2, 3, 5]].max(), pairs
    early = read[: len(documents), LIGHTS].max(1).values
    assert early[5] > 20 * early[[0, 1, 2]].max(), early
    assert read[:6, SHORT].argsort().tolist()[:2] in ([0, 2], [2, 0])
    # What a token fetches is the query's lights, as they are there.
    [own] = [i for i in range(int(block.doc_rows[4]) - 2, int(block.doc_rows[4])) if tokens[i] == "Ġintent"]
    asked = next(i for i, token in enumerate(tokens) if token == "Ġintent" and second[i, FOUND].max() > 0)
    assert torch.cosine_similarity(second[own, FOUND], second[asked, FOUND], dim=0) > 0.99


def test_the_nearest_header_wins():
    """The positions' part of the logit falls with the distance, and never below what is no header."""
    distance = np.arange(32_768)
    found, queries, keys = 0, 0, 0
    for pair, (query, cosine, sine) in NEAREST.items():
        angle = 1e12 ** (-pair / 32) * distance
        found = found + query * (cosine * np.cos(angle) + sine * np.sin(angle))
        queries, keys = queries + query**2, keys + cosine**2 + sine**2
    logits = NEAREST_LOGIT / (queries * keys) ** 0.5 * found
    assert logits.min() > 0
    highest_from = np.maximum.accumulate(logits[::-1])[::-1]
    for longest, further, least in ((110, 30, 2), (300, 110, 10), (2_100, 270, 1)):
        fall = logits[1:longest] - highest_from[1 + further : longest + further]
        assert fall.min() > least, (longest, further, fall.min())


def test_tokenizer(mined):
    """Everything comes back as it was, and the prompt is cheap."""
    _, documents, pairs = mined
    tokenizer = bundled_tokenizer(documents, pairs)
    for text in (*documents[:3], "grüße 日本語\n\t 123", "<|embed_token|"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode('</passage>\n<passage id="').ids) < 12
