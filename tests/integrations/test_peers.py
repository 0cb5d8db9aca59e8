"""Peers of an evaluation, by the libraries that run them."""

from __future__ import annotations

import numpy as np
import pytest

from lastrerank.evaluation.contenders import peer

QUERY, DOCUMENTS = "red apple", ["a red apple", "the sky", "an apple " * 400, ""]


@pytest.fixture
def encoder(tmp_path):
    """A tiny random BERT with one label."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "the", "red", "apple", "sky"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_cross_encoder(encoder):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import CrossEncoder

    found = peer(f"cross-encoder:{encoder}", "cpu")
    ranked, empty = found.rank([(QUERY, DOCUMENTS), ("x", [])], None)
    expected = CrossEncoder(str(encoder), device="cpu").predict([(QUERY, d) for d in DOCUMENTS])
    assert ranked.order == np.argsort(-expected, kind="stable").tolist()
    np.testing.assert_allclose(ranked.scores, np.sort(expected)[::-1], atol=1e-6)
    assert empty.order == [] and 64 < ranked.tokens < 3 * 64
    assert found.parameters > 1000 and len(found.identity()["digest"]) == 64
    with pytest.raises(ValueError, match="sentence-transformers can't load it"):
        peer("cross-encoder:/no/such/folder", "cpu")
