"""The paper's losses against their formulas, and the loop: it learns, resumes exactly, and draws reproducibly."""

from __future__ import annotations

import io
import json
import math
import random

import numpy as np
import pytest
import torch

from lastrerank import Reranker
from lastrerank.checkpoint import open_checkpoint
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint
from lastrerank.training.data import ListRow, TrainingData, augmented, read_training_data
from lastrerank.training.losses import disperse_loss, distill_loss, embedding_loss, rank_loss, similar_loss
from lastrerank.training.mining import Pair, mine_lists
from lastrerank.training.trainer import Trainer, TrainingConfig


def cos(a, b):
    return float((a @ b) / (a.norm() * b.norm()))


def test_losses_are_the_papers_formulas():
    torch.manual_seed(0)
    t, docs, copies = 0.25, torch.randn(5, 8).double(), torch.randn(5, 8).double()
    scores = torch.rand(5).double()
    expected = -math.log(math.exp(scores[2] / t) / sum(math.exp(s / t) for s in scores))
    assert float(rank_loss(scores, 2, t)) == pytest.approx(expected, abs=1e-6)

    # d+ is document 0, the four others are negatives: every pair once, over K = 4.
    total = sum(math.exp(cos(docs[i], docs[j]) / t) for i in range(5) for j in range(i + 1, 5))
    assert float(disperse_loss(docs, t)) == pytest.approx(math.log(total / 4), abs=1e-5)

    each = []
    for i in range(5):
        own = math.exp(cos(docs[i], copies[i]) / t)
        each.append(-math.log(own / (own + sum(math.exp(cos(docs[i], docs[j]) / t) for j in range(5) if j != i))))
    assert float(similar_loss(docs, copies, t)) == pytest.approx(sum(each) / 5, abs=1e-5)

    teacher = torch.randn(5).double()
    p, q = torch.softmax(teacher, 0), torch.softmax(scores / t, 0)
    assert float(distill_loss(scores, teacher, t)) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    mean = sum(1 - cos(a, b) for a, b in zip(docs, copies, strict=True)) / 5
    assert float(embedding_loss(docs, copies)) == pytest.approx(mean, abs=1e-6)


def test_loss_grads():
    docs, copies, scores = (torch.randn(*s, requires_grad=True) for s in ((4, 6), (4, 6), (4,)))
    for loss, inputs in (
        (lambda s: rank_loss(s, 1, 0.5), (scores,)),
        (lambda d: disperse_loss(d, 0.5), (docs,)),
        (lambda d, c: similar_loss(d, c, 0.5), (docs, copies)),
        (lambda s: distill_loss(s, torch.tensor([1.0, 0.0, 2.0, -1.0]), 0.5), (scores,)),
        (lambda d: embedding_loss(d, torch.ones(4, 6)), (docs,)),
    ):
        assert torch.autograd.gradcheck(loss, inputs, eps=1e-2, atol=2e-2, rtol=2e-2)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A checkpoint and lists whose answer a reader can tell: the document that repeats the query's word."""
    folder = tmp_path_factory.mktemp("toy")
    overrides = {"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256}}
    write_random_checkpoint(
        folder / "start", "tiny", tokenizer=small_tokenizer(), dtype=torch.float32, overrides=overrides
    )
    rng = random.Random(0)
    words = ["expert", "passage", "relevance", "numerical", "identifier", "intent", "ranking", "question"]
    documents = [f"{w} {rng.choice(words[1::2])}" for w in words for _ in range(4)]
    rows = [
        ListRow(words[i // 4], i, tuple(j for j in range(32) if j // 4 != i // 4 and rng.random() < 0.3), None, "all")
        for i in range(0, 32, 8)
    ]
    return folder, documents, rows


def trainer(toy, **changes) -> Trainer:
    folder, documents, rows = toy
    config = TrainingConfig(
        **{"steps": 320, "lists_per_step": 2, "hard": 4, "easy": 0, "learning_rate": 1e-3, "temperature": (0.1, 0.1),
           "similar": 0.0, "dual": 0.0, "disperse": 0.1} | changes
    )  # fmt: skip
    return Trainer(open_checkpoint(folder / "start"), TrainingData(documents, rows), config)


def test_overfits_toy_lists_to_a_good_ranking(toy, tmp_path):
    """From raw lists to a checkpoint that ranks: mean reciprocal rank of the positive above 0.9."""
    training, log = trainer(toy), io.StringIO()
    training.train(log)
    losses = [json.loads(line)["rank"] for line in log.getvalue().splitlines()]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5]), losses
    training.save_checkpoint(tmp_path / "trained")
    _, documents, rows = toy
    reranker = Reranker.from_pretrained(tmp_path / "trained")
    assert "random" not in reranker.checkpoint.raw_config["lastrerank"]
    ranks = []
    for row in rows:
        listed = [documents[i] for i in (*row.negatives[:4], row.positive)]
        order = [r["index"] for r in reranker.rerank(row.query, listed, max_query_length=48, max_doc_length=96)]
        ranks.append(1 / (1 + order.index(len(listed) - 1)))
    assert np.mean(ranks) > 0.9


def test_all_losses_train_together(toy):
    training, log = trainer(toy, steps=2, similar=0.85, dual=0.85, disperse=0.45, lists_per_step=8), io.StringIO()
    training.train(log)
    for line in log.getvalue().splitlines():
        record = json.loads(line)
        assert all(math.isfinite(record[name]) for name in ("rank", "disperse", "dual", "similar", "grad_norm"))


def test_resume_is_exact(toy, tmp_path):
    whole, first, second = trainer(toy, steps=6), trainer(toy, steps=6), trainer(toy, steps=6)
    whole.train(io.StringIO())
    first.train(io.StringIO(), until=3)
    first.save_state(tmp_path / "state.pt")
    second.load_state(tmp_path / "state.pt")
    second.train(io.StringIO())
    assert second.step == 6
    for name, tensor in whole.parameters.items():
        assert torch.equal(tensor, second.parameters[name]), name
    with pytest.raises(ValueError, match="was trained with steps = 6"):
        trainer(toy, steps=7).load_state(tmp_path / "state.pt")


def test_lists_are_drawn_reproducibly_and_in_random_order(toy):
    _, documents, rows = toy
    data = TrainingData(documents, rows)
    lists = [data.draw(0, n, hard=3, easy=2) for n in range(50)]
    assert lists == [data.draw(0, n, hard=3, easy=2) for n in range(50)]
    assert len({example.positive for example in lists}) > 3
    for example in lists:
        assert example.documents[example.positive].startswith(example.query)
    doubled = data.draw(0, 3, hard=3, easy=0, augment=True)
    originals = [i for i, copy in enumerate(doubled.copy_of) if copy >= 0]
    assert len(originals) * 2 == len(doubled.documents) and doubled.positive in originals
    assert sorted(originals + [doubled.copy_of[i] for i in originals]) == list(range(len(doubled.documents)))


def test_augmenting_keeps_some_of_the_text():
    rng = random.Random(0)
    copies = {augmented("One here. Two there. Three.", rng) for _ in range(20)}
    assert len(copies) > 3 and all(copies)
    assert augmented("", rng) == ""


def test_mining_and_reading_back(tmp_path):
    documents = ["red apple pie", "green apple cake", "blue sky today", "red sky at night", "apple apple apple"]
    pairs = [Pair("apple", 0, "p"), Pair("apple", 1, "p"), Pair("sky", 2, "p"), Pair("red sky", 3, "p"),
             Pair("apple tart", 4, "p")]  # fmt: skip
    rows = mine_lists(documents, pairs, depth=2, teacher=lambda pair, ids, share: share)
    assert rows[0]["negatives"] == [4]  # document 1 answers the same query, so it is no negative
    assert rows[3]["negatives"] and 3 not in rows[3]["negatives"]
    assert all(len(row["teacher"]) == len(row["negatives"]) + 1 for row in rows)
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents))
    )
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_training_data(tmp_path)
    assert [row.query for row in data.rows] == [pair.query for pair in pairs]
    (tmp_path / "lists.jsonl").write_text('{"query": "q", "positive": 99, "negatives": []}\n')
    with pytest.raises(ValueError, match=r"lists\.jsonl:1: expected query"):
        read_training_data(tmp_path)
