"""The recipe of a checkpoint to bundle, at toy size and with a toy teacher."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch

from lastrerank.random_checkpoint import small_tokenizer
from lastrerank.training.bundled import _readouts, bundled_tokenizer, initial_checkpoint, pool_weights, taught_lists
from lastrerank.training.data import read_training_data


def teacher(texts):
    """A bag of hashed words: texts that share words are near each other."""
    vectors = np.zeros((len(texts), 512), np.float32)
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(512).astype(np.float32)
    return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
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
    return taught_lists(data, data / "lists", teacher), documents, pairs


def test_lists_know_the_teacher(taught):
    folder, documents, _ = taught
    data = read_training_data(folder)
    assert set(data.pools) == {"debian/en", "debian/de", "lo-index/en", "lo-index/de"}
    example = data.draw(0, 0, hard=3, easy=1)
    assert example.document_vectors.shape == (len(example.documents), 512) and len(example.teacher) >= 2
    centred = teacher(documents) - teacher(documents).mean(0)
    own = centred[documents.index(example.documents[0])]
    assert example.document_vectors[0] @ own / np.linalg.norm(own) == pytest.approx(1, abs=1e-2)
    weights = pool_weights(data)
    assert weights["lo-index/en"] == weights["lo-index/de"] == 0.045 and weights["debian/en"] == 0.22
    assert weights["debian/de"] == pytest.approx(0.1)


def test_the_start_knows_what_words_mean(taught, tmp_path):
    """Untrained, the readouts are nearer to the teacher's embeddings of their own texts than chance."""
    folder, _, _ = taught
    data, tokenizer = read_training_data(folder), small_tokenizer()
    texts = [tokenizer.decode([i]).strip() or " " for i in range(tokenizer.get_vocab_size())]
    start = initial_checkpoint(tmp_path / "start", tokenizer, teacher(texts), data, fit_lists=60)
    docs, _, targets, _ = _readouts(start, data, 50_000, 20)
    from lastrerank import Reranker

    model = Reranker.from_pretrained(start, backend="reference").model
    normed = model.ops.rms_norm(docs, model.weights.norm, 1e-6)
    vectors = torch.relu(normed @ model.weights.w1.t()) @ model.weights.w2.t()
    own = torch.cosine_similarity(vectors, targets)
    others = torch.cosine_similarity(vectors, targets.roll(1, 0))
    assert own.mean() > 0.4 and own.mean() > others.mean() + 0.3, (own.mean(), others.mean())


def test_tokenizer(taught):
    """Everything comes back as it was, and the prompt is cheap."""
    _, documents, pairs = taught
    tokenizer = bundled_tokenizer(documents, pairs)
    for text in (*documents[:3], "grüße 日本語\n\t 123", "<|embed_token|"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode('</passage>\n<passage id="').ids) < 12
