"""The recipe of a checkpoint to bundle, at toy size and with a toy teacher."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lastrerank import Reranker
from lastrerank.cli import default_model
from lastrerank.packing import pack
from lastrerank.training.bundled import bundled_tokenizer, pool_weights, taught_lists
from lastrerank.training.data import read_training_data
from lastrerank.training.start import (
    IN_HEADER,
    IN_QUERY,
    MATCHED,
    NEAREST,
    NEAREST_LOGIT,
    NUMBER,
    SCALE,
    _readouts,
    initial_checkpoint,
    restore_counting,
)  # fmt: skip


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


@pytest.fixture(scope="module")
def start(taught, tmp_path_factory):
    data, tokenizer = read_training_data(taught[0]), Tokenizer.from_file(str(default_model() / "tokenizer.json"))
    texts = [tokenizer.decode([i]).strip() or " " for i in range(tokenizer.get_vocab_size())]
    folder = tmp_path_factory.mktemp("start")
    return initial_checkpoint(folder, tokenizer, teacher(texts), data, fit_lists=20)


def test_the_start_knows_what_words_mean(taught, start):
    """Untrained, the readouts are nearer to the teacher's embeddings of their own texts than chance."""
    docs, _, targets, _ = _readouts(start, read_training_data(taught[0]), 50_000, 20)
    model = Reranker.from_pretrained(start, backend="reference").model
    normed = model.ops.rms_norm(docs, model.weights.norm, 1e-6)
    projector = model.weights.readout
    vectors = (torch.relu(normed @ projector.w1.t()) @ projector.w2.t())[:, :512]
    own = torch.cosine_similarity(vectors, targets)
    others = torch.cosine_similarity(vectors, targets.roll(1, 0))
    assert own.mean() > 0.4 and own.mean() > others.mean() + 0.3, (own.mean(), others.mean())


def test_the_start_reads_the_prompt(start, monkeypatch):
    """Untrained: which tokens are the query, which document a token is of, and where the query's words are."""
    reranker = Reranker.from_pretrained(start, backend="reference")
    words = "numerical identifier indicated assess analyze determine depends provide".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 300, 22)  # numbers of two digits, documents short and long
    documents = [" " + " ".join(rng.choice(words, length)) for length in lengths]
    for place in (1, 14):
        documents[place] = " assess analyze satisfies determine"
    query = reranker.encoder.cut(["satisfies"], 32)[0]
    block = reranker.encoder.encode_block(query, reranker.encoder.cut(documents, 2048))
    outputs, mlp = {}, reranker.model._mlp

    def recorded(layer, *rest):
        residual, added = mlp(layer, *rest)
        outputs.setdefault(id(layer), []).append(residual + added)  # by chunks of rows
        return residual, added

    monkeypatch.setattr(reranker.model, "_mlp", recorded)
    with torch.inference_mode():
        reranker.model.hidden_states(pack([block], torch.device("cpu")))
    first, second = (torch.cat(outputs[id(layer)]) for layer in reranker.model.weights.layers[:2])
    tokens = [reranker.checkpoint.tokenizer.id_to_token(int(i)) for i in block.ids]

    begin, headers = tokens.index("ĠRank"), [i for i, token in enumerate(tokens) if token == "<passage"]
    found = (first[:, IN_QUERY] > SCALE / 3).nonzero()[:, 0].tolist()
    assert found == list(range(begin, headers[0]))
    in_header = first[:, IN_HEADER] > SCALE / 3
    assert all(in_header[i : i + 4].all() and not in_header[i + 10 : i + 12].any() for i in headers)

    numbers = torch.nn.functional.normalize(second[:, NUMBER], dim=1)
    for place, (header, marker) in enumerate(zip(headers, block.doc_rows.tolist(), strict=True)):
        same = numbers[header + 8 : marker] @ numbers[marker]
        others = numbers[[row for row in block.doc_rows.tolist() if row != marker]] @ numbers[marker]
        assert same.min() > 0.9 and others.max() < 0.9, (place, same, others)

    # Not in the first document: words that are everywhere look about evenly at all before them, there at the query.
    inside = [row for h, m in zip(headers[1:], block.doc_rows.tolist()[1:], strict=True) for row in range(h + 8, m)]
    own = [row for row in inside if tokens[row] == "Ġsatisfies"]
    others = [row for row in inside if row not in own]
    assert len(own) == 2 and second[own, MATCHED].min() > 5 * second[others, MATCHED].mean()


def test_counting_is_restored_and_nothing_else(start):
    first, state = (load_file(start / "model.safetensors") for _ in range(2))
    for tensor in state.values():
        tensor += 1
    restore_counting(state, first)
    for name, tensor in state.items():
        same = tensor == first[name]
        if name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            assert same[128:192].all()
            same = torch.cat([same[:128], same[192:]])
        assert not same.any(), name


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


def test_tokenizer(taught):
    """Everything comes back as it was, and the prompt is cheap."""
    _, documents, pairs = taught
    tokenizer = bundled_tokenizer(documents, pairs)
    for text in (*documents[:3], "grüße 日本語\n\t 123", "<|embed_token|"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode('</passage>\n<passage id="').ids) < 12
