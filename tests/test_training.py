"""The paper's losses against their formulas, and the loop: it learns, resumes exactly, and draws reproducibly."""

from __future__ import annotations

import gzip
import io
import json
import math
import multiprocessing
import random
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lastrerank import Reranker
from lastrerank.checkpoint import open_checkpoint
from lastrerank.cli import app
from lastrerank.kept import locked
from lastrerank.model import Model
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.packing import pack
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint
from lastrerank.training import operations, run
from lastrerank.training import trainer as trainer_module
from lastrerank.training.data import (
    ListRow,
    TrainingData,
    augmented,
    labelled,
    read_pairs,
    read_training_data,
)
from lastrerank.training.losses import disperse_loss, distill_loss, rank_loss, similar_loss
from lastrerank.training.mining import Pair, mine_lists
from lastrerank.training.queries import QueryMaker
from lastrerank.training.run import mine_folder
from lastrerank.training.run import train as run_training
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


def test_loss_grads():
    docs, copies, scores = (torch.randn(*s, requires_grad=True) for s in ((4, 6), (4, 6), (4,)))
    for loss, inputs in (
        (lambda s: rank_loss(s, 1, 0.5), (scores,)),
        (lambda d: disperse_loss(d, 0.5), (docs,)),
        (lambda d, c: similar_loss(d, c, 0.5), (docs, copies)),
        (lambda s: distill_loss(s, torch.tensor([1.0, 0.0, 2.0, -1.0]), 0.5), (scores,)),
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
    """From raw lists to a checkpoint that ranks: nDCG above 0.9, the same lists in other orders."""
    training, log = trainer(toy), io.StringIO()
    training.train(log)
    losses = [json.loads(line)["rank"] for line in log.getvalue().splitlines()]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5]), losses
    training.save_checkpoint(tmp_path / "trained")
    reranker = Reranker.from_pretrained(tmp_path / "trained")
    assert "random" not in reranker.checkpoint.raw_config["lastrerank"]
    gains = []
    for number in range(32):  # the same rows in other orders
        example = training.data.draw(9, number, hard=4, easy=0)
        found = reranker.rerank(example.query, example.documents, max_query_length=48, max_doc_length=96)
        gains.append(1 / math.log2(2 + [r["index"] for r in found].index(example.positive)))
    assert np.mean(gains) > 0.9, gains


def test_all_losses_train_together(toy):
    training, log = trainer(toy, steps=2, similar=0.85, dual=0.85, disperse=0.45, lists_per_step=8), io.StringIO()
    training.train(log)
    for line in log.getvalue().splitlines():
        record = json.loads(line)
        assert all(math.isfinite(record[name]) for name in ("rank", "disperse", "dual", "similar", "grad_norm"))


@pytest.mark.parametrize("more", [{}, {"average": 0.9, "doc_tokens": 24, "doc_tokens_least": 2, "hard_least": 1,
                                        "constant": True, "crowded": 0.3, "list_tokens": 9}])  # fmt: skip
def test_resume_is_exact(toy, tmp_path, more):
    whole, first, second = (trainer(toy, steps=6, **more) for _ in range(3))
    whole.train(io.StringIO())
    first.train(io.StringIO(), until=3)
    first.save_state(tmp_path / "state.pt")
    second.load_state(tmp_path / "state.pt")
    second.train(io.StringIO())
    assert second.step == 6
    for averaged in (False, True):
        own, resumed = whole.merged(averaged), second.merged(averaged)
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in own.items())
        if averaged and more:
            assert not torch.equal(own["model.norm.weight"], whole.parameters["model.norm.weight"])
    with pytest.raises(ValueError, match="was trained with steps = 6"):
        trainer(toy, steps=7, **more).load_state(tmp_path / "state.pt")
    old = torch.load(tmp_path / "state.pt", weights_only=True)
    del old["identity"]["way of drawing lists"], old["checksum"]
    torch.save(old | {"checksum": trainer_module._checksum(old)}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="of a training with another way of drawing lists"):
        trainer(toy, steps=6, **more).load_state(tmp_path / "old.pt")
    for bad in ({"average": 1.0}, {"doc_tokens_least": 25, "doc_tokens": 24}, {"hard_least": 5, "hard": 4},
                {"crowded": 0.1}, {"rank": 0.0, "distill": 1.0}, {"rank": 0.0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            trainer(toy, **bad)


def test_lists_are_as_long_as_drawn(toy):
    training = trainer(toy, hard=4, hard_least=1, lists_per_step=8, easy_start=0.0)
    sizes = {len(drawn.block.doc_rows) - drawn.dual for step in range(8) for drawn in training.drawer[step]}
    assert sizes == {2, 3, 4, 5}
    assert repr(training.drawer[3]) == repr(training.drawer[3])


def test_documents_are_cut_at_a_drawn_number_in_half_of_the_lists(toy):
    folder, _, _ = toy
    documents = ["expert " * 60, "expert " * 61]
    rows = [ListRow("expert", 0, (1,), None, "all")]
    drawer = trainer((folder, documents, rows), doc_tokens=50, doc_tokens_least=5, lists_per_step=200).drawer
    lengths = Counter(len(drawn.block) for drawn in drawer[0])
    [(longest, whole)] = lengths.most_common(1)
    assert longest == max(lengths) and 70 < whole < 130
    assert len(lengths) > 20 and longest - min(lengths) > 80  # two documents, 5 to 50 tokens
    assert sum(count for length, count in lengths.items() if longest - length > 60) > 30  # short ones as often


def test_a_label_has_its_share_whatever_the_list(toy):
    logits = [1.0, 3.0, 2.0, -1.0]
    shares = np.exp(labelled(logits, 0.65, 2))
    plain = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(shares, 0.35 * plain + [0, 0, 0.65, 0], rtol=1e-12)
    assert labelled(logits, 0.0, 2) == logits
    documents = [f"text {i}" for i in range(40)]
    rows = [ListRow(f"q{i}", i, tuple(j for j in range(20) if j != i), (0.0,) * 20, "p", label=0.4) for i in range(20)]
    for most in (0, 40):
        sizes = set()
        for hard in (1, 5, 19):
            settings = dict(hard=hard, easy=0, easy_start=0.0, list_tokens=most, distill=1.0)
            for drawn in trainer((toy[0], documents, rows), **settings).drawer[3]:
                shares = np.exp(drawn.teacher)
                sizes.add(len(shares))
                assert shares[drawn.positive] == pytest.approx(0.4 + 0.6 / len(shares))
                assert shares.sum() == pytest.approx(1)
        assert (sizes == {2, 6, 20}) if not most else (1 < max(sizes) < 20), sizes


def test_lists_are_as_short_as_asked_for(toy):
    """Negatives are left out until the documents fit, never the positive; what is left keeps its label and logit."""
    folder, documents, rows = toy
    documents = [f"{text} " * (1 + i % 5) for i, text in enumerate(documents)]
    logits = {i: float(i) for i in range(len(documents))}
    rows = [replace(row, teacher=tuple(logits[i] for i in (row.positive, *row.negatives))) for row in rows]
    whole, short = (
        trainer((folder, documents, rows), hard=4, lists_per_step=8, list_tokens=most, distill=1.0).drawer
        for most in (0, 40)
    )
    lengths = {text: cut.length for text, cut in zip(documents, whole.encoder.cut(documents, 96), strict=True)}
    fewer = 0
    for number in range(24):
        example = whole.data.draw(0, number, 4, 0)
        found = short._shorter(example, 96)
        total = sum(lengths[text] for text in found.documents)
        assert total <= 40 or len(found.documents) == 1
        assert found.documents[found.positive] == example.documents[example.positive]
        assert found.teacher == tuple(logits[documents.index(text)] for text in found.documents)
        fewer += len(found.documents) < len(example.documents)
    assert fewer > 0
    assert [drawn.positive for drawn in short[0]] != [drawn.positive for drawn in whole[0]]


def test_crowded_lists(toy):
    folder, _, _ = toy
    documents = [f"{number} {'expert ' * 20}" for number in range(200)]
    rows = [ListRow(f"expert {i}", i, (), None, "all") for i in range(200)]
    drawer = trainer((folder, documents, rows), hard=2, easy=1, crowded=0.5, doc_tokens_least=3,
                     lists_per_step=16, easy_start=0.0).drawer  # fmt: skip
    counts = {len(drawn.block.doc_rows): len(drawn.block) for drawn in drawer[0] + drawer[1]}
    crowds = [count for count in counts if count > 2]
    assert crowds and min(crowds) > 31 and max(crowds) <= 102 and 2 in counts
    assert len(drawer.encoder.cut([documents[0]], 96)[0].ids) > 20
    assert all(counts[count] < 30 * count for count in crowds)  # cut at three tokens, beside the markers


def test_renamed_lists_keep_the_template_and_what_matches(toy):
    """A token gives way to the same one everywhere, none to one of the template's, in another list to another."""
    folder, _, _ = toy
    words = ("éclair", "ß", "ÿþ", "ñandú", "ЖЩ", "字典", "ðæ", "çå")  # of bytes that the template lacks
    documents = [f"{word} {other}" for word in words for other in words]
    drawers = []
    for renamed in (False, True):
        rows = [ListRow(words[i // 8], i, tuple({8, 17, 26, 35, 44} - {i}), None, "all", renamed) for i in range(64)]
        drawers.append(trainer((folder, documents, rows), lists_per_step=40).drawer)
    fixed, changed, seen = set(drawers[0]._fixed.tolist()), 0, set()
    tokenizer = open_checkpoint(folder / "start").tokenizer
    assert {tokenizer.token_to_id(token) for token in ("<|embed_token|>", "<|im_end|>", "0", "9")} <= fixed
    for plain, renamed in zip(*(drawer[0] for drawer in drawers), strict=True):
        before, after = plain.block.ids.tolist(), renamed.block.ids.tolist()
        assert len(before) == len(after) and plain.block.query_row == renamed.block.query_row
        names = dict(zip(before, after, strict=True))
        assert [names[i] for i in before] == after and len(set(names.values())) == len(names)
        assert all(names[i] == i for i in names if i in fixed)
        assert not {names[i] for i in names if i not in fixed} & fixed
        changed += sum(names[i] != i for i in names)
        seen.add(tuple(sorted(names.items())))
    assert changed > 40 and len(seen) > 20


def test_processes_that_draw_ahead_change_nothing(toy):
    def trained(workers: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        folder, documents, rows = toy
        lists = folder, documents, [replace(row, renamed=bool(i % 2)) for i, row in enumerate(rows)]
        training, log = trainer(
            lists, steps=5, dual=0.5, similar=0.5, lists_per_step=8, crowded=0.2, doc_tokens_least=2, list_tokens=9,
        ), io.StringIO()  # fmt: skip
        training.workers = workers
        state = torch.random.get_rng_state()
        training.train(log, until=3)
        training.train(log)
        assert torch.equal(state, torch.random.get_rng_state())
        return [{**json.loads(line), "tokens_per_s": 0} for line in log.getvalue().splitlines()], training.merged()

    (log, own), (other_log, other) = trained(0), trained(2)
    assert len(log) == 5 and log == other_log
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    bad = trainer((toy[0], ["a", "b"], [ListRow("a", 0, (7,), None, "all")]), steps=2, easy=1)
    bad.workers = 1
    with pytest.raises(IndexError):
        bad.train(io.StringIO())


def test_queries_made_from_a_document():
    text = "The printer prints pages in colour. Choose a driver, then choose the paper format! Nothing else is needed."
    maker = QueryMaker([text, "the pages of a book", "the paper is here"])
    rng = random.Random(0)
    drawn = [maker.make(text, rng) for _ in range(2000)]
    made = set(drawn)
    plain = re.sub(r"[.,!]", "", text)
    assert len(made) > 100
    assert all(set(re.sub(r"[.,!]", "", query).split()) <= set(plain.split()) for query in made)
    keywords = Counter(word for query in drawn if len(query.split()) < 4 for word in query.split())
    assert keywords["driver"] > 1.2 * keywords["pages"]  # in one text of the three and in two
    japanese = "印刷の設定を変更します。用紙の形式を選びます。"
    made = {maker.make(japanese, rng) for _ in range(100)}
    assert len(made) > 20 and all(part in japanese for query in made for part in query.split())
    assert maker.make("two words", rng) == maker.make("", rng) == ""
    assert QueryMaker([text]).make(text, random.Random(1)) == QueryMaker([text]).make(text, random.Random(1))


@pytest.mark.parametrize("head_norms", [True, False])
def test_operations_for_a_gpu_give_the_gradients_of_the_reference(toy, monkeypatch, head_norms):
    """On a CPU: row operations uncompiled, attention of packed sequences by the reference. The rule of errors: at most
    twice what the reference's own is under autocast."""

    def packed(q, k, v, starts, _, longest, __, scale, window_size):
        lengths = tuple(starts.diff().tolist())
        assert max(lengths) == longest and window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        return ReferenceOperations().attention(q, k, v, starts, lengths, window, scale)

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(operations, "varlen_attn", packed)
    training = trainer(toy, lists_per_step=3)
    config, weights = training.checkpoint.config, training.weights()
    assert config.qk_norm and config.num_layers > 1
    windows = (9, *config.layer_windows[1:])
    config = replace(config, layer_windows=windows, qk_norm=head_norms)
    if not head_norms:
        weights = replace(weights, layers=tuple(replace(x, q_norm=None, k_norm=None) for x in weights.layers))
    batch = pack([drawn.block for drawn in training.drawer[0]], training.device)
    found = {}
    for own in (ReferenceOperations(), operations.TrainingOperations()):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = Model(config, weights, own).hidden_states(batch)
            loss = (out.float() * torch.linspace(-1, 1, out.shape[1])).square().sum()
            gradients = torch.autograd.grad(loss, training._trained, retain_graph=True, allow_unused=True)
            found[type(own).__name__, autocast] = [out, *gradients]
    exact = found["ReferenceOperations", False]
    used = [number for number, gradient in enumerate(exact) if gradient is not None]
    assert len(used) > 10
    for number in used:
        assert torch.equal(exact[number], found["TrainingOperations", False][number])  # it leaves them to the reference
        plain, own = (found[name, True][number] for name in ("ReferenceOperations", "TrainingOperations"))
        assert 0 < (own - exact[number]).norm() <= 2 * (plain - exact[number]).norm()


def test_low_rank_updates(toy, tmp_path):
    """Nothing moves at first; then only the updates and the projector; the saved checkpoint has them merged."""
    training = trainer(toy, steps=3, lora_rank=4)
    before = {name: tensor.clone() for name, tensor in training.parameters.items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in training.merged().items())
    training.train(io.StringIO())
    for name, tensor in training.parameters.items():
        assert torch.equal(tensor, before[name]) != name.startswith("projector."), name
    merged = training.merged()
    for name in before:
        assert torch.equal(merged[name], before[name]) != (name.endswith("_proj.weight") or "projector" in name), name
    training.save_checkpoint(tmp_path / "merged", torch.float32)
    saved = open_checkpoint(tmp_path / "merged").weights(torch.device("cpu"), torch.float32)
    o = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(saved.layers[0].o, merged[o])
    training.save_state(tmp_path / "state.pt")
    again = trainer(toy, steps=3, lora_rank=4)
    again.load_state(tmp_path / "state.pt")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in again.merged().items())


@pytest.fixture
def pairs(toy, tmp_path):
    """Raw pairs as the command takes them, and a dev set."""
    _, documents, rows = toy
    folder = tmp_path / "pairs"
    folder.mkdir()
    with gzip.open(folder / "documents.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"id": f"d{i}", "text": d}) + "\n" for i, d in enumerate(documents))
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"query": d.split()[0], "positive": f"d{i}"}) + "\n" for i, d in enumerate(documents))
    )
    dev = tmp_path / "dev-set"
    (dev / "qrels").mkdir(parents=True)
    (dev / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": d}) + "\n" for i, d in enumerate(documents))
    )
    (dev / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": r.query}) + "\n" for i, r in enumerate(rows))
    )
    (dev / "qrels" / "dev.tsv").write_text("".join(f"q{i}\td{r.positive}\t1\n" for i, r in enumerate(rows)))
    return folder, dev


def test_the_command_from_raw_pairs_to_a_checkpoint(toy, pairs, tmp_path):
    folder, dev = pairs
    recipe = {"steps": 4, "lists_per_step": 2, "hard": 2, "easy": 1, "temperature": [0.2, 0.1]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    output = tmp_path / "out"
    arguments = ["train", str(folder), "--start", str(toy[0] / "start"), "--output", str(output), "--recipe",
                 str(tmp_path / "recipe.json"), "--dev", str(dev), "--every", "2", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["step"] == 4 and result["dev"].keys() == {"dev-set"} and 0 < result["best_dev_ndcg"] <= 1
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2, 2, 3, 4, 4]
    assert (output / "progress.png").stat().st_size > 1000 and (output / "best" / "model.safetensors").is_file()
    Reranker.from_pretrained(output / "last").rerank("expert", ["a", "b"], max_query_length=9, max_doc_length=9)
    # Again: nothing is left to do. With another recipe: refused.
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"seed": 1}))
    assert CliRunner().invoke(app, arguments).exit_code == 2
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"stepps": 1}))
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_training_stops_early_and_goes_on_after_an_interruption(toy, pairs, tmp_path, monkeypatch):
    folder, dev = pairs
    config = TrainingConfig(steps=12, lists_per_step=1, hard=2, easy=1)
    arguments = (toy[0] / "start", mine_folder(folder, tmp_path / "lists", limit=20))
    monkeypatch.setattr(run._DevSet, "ndcg", lambda self, checkpoint, device: 0.5)
    stopped = run.train(*arguments, tmp_path / "early", config, dev=[dev], every=2, patience=2)
    assert stopped["step"] == 4 and stopped["best_dev_ndcg"] == 0.5  # the start, and two looks no better

    whole = run.train(*arguments, tmp_path / "whole", config, every=4)
    assert whole["step"] == 12
    real = Trainer.save_state

    def killed(self, path):
        real(self, path)
        if self.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train(*arguments, tmp_path / "cut", config, every=4)
    run.train(*arguments, tmp_path / "cut", config, every=4)
    read = lambda name: open_checkpoint(tmp_path / name / "last").weights(torch.device("cpu"), torch.float32)  # noqa: E731
    assert torch.equal(read("cut").layers[0].down, read("whole").layers[0].down)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_the_models_own_negatives(toy, pairs, tmp_path):
    folder, _ = pairs
    model = Reranker.from_pretrained(toy[0] / "start")
    own = mine_folder(folder, tmp_path / "own", depth=3, model=model)
    wide = mine_folder(folder, tmp_path / "wide", depth=6)
    documents = [json.loads(line)["text"] for line in (own / "documents.jsonl").read_text().splitlines()]
    for a, b in zip(*((path / "lists.jsonl").read_text().splitlines() for path in (own, wide)), strict=True):
        a, b = json.loads(a), json.loads(b)
        ranked = model.rerank(a["query"], [documents[i] for i in b["negatives"]]) if b["negatives"] else []
        assert a["negatives"] == [b["negatives"][r["index"]] for r in ranked[:3]]


def test_bad_pairs_are_named(tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"id": 1, "text": "x"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"query": "q", "positive": 1}\n{"query": "q", "positive": 2}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: positive: 2 is no known document's id"):
        mine_folder(tmp_path, tmp_path / "out")


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


def test_a_querys_other_answers_are_no_negatives():
    documents = [f"{number}" for number in range(6)]
    rows = [ListRow("q", 1, (), None, "all"), ListRow("q", 2, (), None, "all"),
            *(ListRow(f"r{i}", i, (), None, "all") for i in (0, 3, 4, 5))]  # fmt: skip
    data = TrainingData(documents, rows)
    drawn = [data.draw(0, n, hard=0, easy=3) for n in range(200)]
    own = [example for example in drawn if example.query == "q"]
    assert len(own) > 20 and all(len({"1", "2"} & set(example.documents)) == 1 for example in own)
    assert any({"1", "2"} <= set(example.documents) for example in drawn if example.query != "q")


def test_what_has_an_answers_text_is_no_negative():
    documents = ["same", "other", "same", "more", "last"]
    rows = [ListRow("q", 0, (2, 3), (2.0, 1.0, 0.0), "p"), ListRow("q", 3, (1, 0), None, "p"),
            ListRow("r", 4, (0, 2), None, "p"), ListRow("s", 2, (), None, "p")]  # fmt: skip
    data = TrainingData(documents, rows)
    for number in range(200):
        drawn = data.draw(0, number, 2, 3)
        if drawn.query == "q":
            assert not {"same", "more"} & set(drawn.documents) - {drawn.documents[drawn.positive]}
        assert len(set(drawn.documents)) == len(drawn.documents)


def test_negatives_come_from_the_pool_or_from_every_document(caplog):
    documents = ["answer one", "answer two", "nobody's answer", "another answer"]
    for pool, expected in (("all", {0, 1, 2, 3}), ("named", {0, 1})):
        data = TrainingData(documents, [ListRow("q", 0, (), None, pool), ListRow("r", 1, (), None, pool)])
        drawn = {text for n in range(50) for text in data.draw(0, n, 0, 3).documents}
        assert drawn == {documents[i] for i in expected}
        mined = mine_lists(documents, [Pair("answer", 0, pool), Pair("one", 1, pool)], depth=5)
        assert set(mined[0]["negatives"]) == expected - {0}
    answers = [Pair("apple", i, "all") for i in range(60)]
    mined = mine_lists(["apple " * 5] * 60 + [f"apple number {i}" for i in range(10)], answers, depth=5)
    assert all(len(row["negatives"]) == 5 for row in mined)
    alone = ListRow("q", 0, (), None, "p")
    with pytest.raises(ValueError, match="1 of 1 lists can have no negative, the first of query 'q' in pool 'p'"):
        TrainingData(documents, [alone])
    assert TrainingData(documents, [alone, ListRow("r", 1, (), None, "all")]).rows == [ListRow("r", 1, (), None, "all")]
    assert "1 of 2 lists can have no negative" in caplog.text and "they are left out" in caplog.text
    rows = [ListRow("q", 0, (1,), None, "en"), ListRow("r", 1, (0,), None, "de")]
    for weights, message in (({"german": 1.0}, "'german', expected of"), ({"en": -1.0}, "'en' has -1.0"),
                             ({"en": 0.0}, "no pool that has lists would be drawn")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TrainingData(documents, rows, weights)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"query": 5}, "query is 5"), ({"positive": True}, "positive: True"), ({"positive": [1]}, r"positive: \[1\]"),
        ({"negatives": "2"}, "negatives is '2'"), ({"negatives": [3]}, "negatives: 3 is no known"),
        ({"teacher": ["a", 1]}, r"teacher is \['a', 1\]"), ({"teacher": [float("nan"), 1]}, "teacher is .nan"),
        ({"teacher": [10**400, 1]}, "teacher is .1000"),
        ({"teacher": [1.0]}, "teacher has 1 logits for 2"), ({"pool": ["x"]}, r"pool is \['x'\]"),
        ({"renamed": "false"}, "renamed is 'false'"), ({"label": "0.5"}, "label is 0.5"),
    ],
)  # fmt: skip
def test_bad_lists_are_named(tmp_path, lists, message):
    row = {"query": "q", "positive": 1, "negatives": [2], "teacher": [1.0, 0.0], "label": 0.5} | lists
    (tmp_path / "documents.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    (tmp_path / "lists.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"lists\.jsonl:1: {message}"):
        read_training_data(tmp_path)


@pytest.mark.parametrize(
    ("documents", "lists", "message"),
    [
        ([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], [], r"documents\.jsonl:2: id 1 is there twice"),
        ([{"id": True, "text": "a"}], [], r"documents\.jsonl:1: expected 'id'"),
        ([{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], [{"query": "q", "positive": 1, "negatives": [2, 1]}],
         r"lists\.jsonl:1: the positive 1 is among the negatives"),
    ],
)  # fmt: skip
def test_contradictory_training_data_is_refused(tmp_path, documents, lists, message):
    for name, rows in (("documents", documents), ("lists", lists), ("pairs", [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_training_data(tmp_path)
    if not lists:
        with pytest.raises(ValueError, match=message):
            read_pairs(tmp_path)


def test_augmenting_keeps_some_of_the_text():
    rng = random.Random(0)
    copies = {augmented("One here. Two there. Three.", rng) for _ in range(20)}
    assert len(copies) > 3 and all(copies)
    assert augmented("", rng) == ""
    whole = "Version 3.14 of www.example.com is out. Get it now."
    assert all("3.14" in copy and "www.example.com" in copy for copy in (augmented(whole, rng) for _ in range(9))
               if "Version" in copy)  # fmt: skip
    assert {augmented("没有空格的一句话没有标点", rng) for _ in range(9)} != {"没有空格的一句话没有标点"}
    assert " " not in augmented("第一句话。第二句话！第三句话？", rng)


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
    with pytest.raises(ValueError, match=r"lists\.jsonl:1: positive: 99 is no known document's id"):
        read_training_data(tmp_path)


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut off":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    else:  # one bit of a tensor
        data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["cut off", "empty", "one bit"])
def test_a_damaged_state_is_refused(toy, tmp_path, how):
    training = trainer(toy, steps=2)
    training.train(io.StringIO(), until=1)
    training.save_state(tmp_path / "state.pt")
    damaged(tmp_path / "state.pt", how)
    with pytest.raises(ValueError, match=r"state\.pt is damaged .*: remove it to start anew"):
        trainer(toy, steps=2).load_state(tmp_path / "state.pt")


def test_a_training_goes_on_from_nothing_else(toy, pairs, tmp_path, caplog):
    """Another start, other data, another weighing of them: refused by name, and the output is as it was."""
    folder, _ = pairs
    config = TrainingConfig(steps=2, lists_per_step=1, hard=1, easy=1)
    output = tmp_path / "out"
    run_training(toy[0] / "start", folder, output, config, every=1, progress=False)
    before = (output / "last" / "model.safetensors").read_bytes()

    other = tmp_path / "other"
    shutil.copytree(toy[0] / "start", other)
    raw = (other / "config.json").read_text()
    (other / "config.json").write_text(raw.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(ValueError, match="training with another start"):
        run_training(other, folder, output, config, every=1, progress=False)
    with pytest.raises(ValueError, match="training with another weights"):
        run_training(toy[0] / "start", folder, output, config, weights={"all": 2.0}, every=1, progress=False)
    with (folder / "pairs.jsonl").open("a") as lines:
        lines.write((folder / "pairs.jsonl").read_text().split("\n")[0] + "\n")
    with pytest.raises(ValueError, match="training with another data"):
        run_training(toy[0] / "start", folder, output, config, every=1, progress=False)
    assert (output / "last" / "model.safetensors").read_bytes() == before


def test_arguments_of_a_training_are_checked_at_once(toy, pairs, tmp_path):
    folder, dev = pairs
    shutil.copytree(dev, tmp_path / "b" / "dev-set")
    for options, message in (
        ({"every": 0}, "every is 0"), ({"dev_queries": 0}, "dev_queries is 0"),
        ({"patience": 0, "dev": [dev]}, "patience is 0"), ({"patience": 2}, "there is no dev set to look at"),
        ({"dev": [dev, tmp_path / "b" / "dev-set"]}, "dev is .* two of one name"),
    ):
        with pytest.raises(ValueError, match=message):
            run.train(toy[0] / "start", folder, tmp_path / "out", TrainingConfig(steps=1), **options)
    for bad in ({"lists_per_step": 0}, {"doc_tokens": 0}, {"warmup": 5.0}, {"temperature": (0.2, 0.0)},
                {"hard": 0, "easy": 0}, {"easy_start": 2.0}):  # fmt: skip
        with pytest.raises(ValueError, match=r" is | are 0"):
            trainer(toy, **bad)


def test_lists_that_are_mined_otherwise_are_other_data(toy, pairs, tmp_path, monkeypatch):
    folder, _ = pairs
    config = TrainingConfig(steps=2, lists_per_step=1, hard=1, easy=1)
    run.train(toy[0] / "start", folder, tmp_path / "out", config)
    mine = run.mine_lists
    monkeypatch.setattr(run, "mine_lists", lambda *a, **k: [row | {"negatives": []} for row in mine(*a, **k)])
    with pytest.raises(ValueError, match="another mined"):
        run.train(toy[0] / "start", folder, tmp_path / "out", config)


def test_a_log_that_lost_the_best_is_refused(toy, pairs, tmp_path):
    folder, dev = pairs
    lists, config = mine_folder(folder, tmp_path / "lists"), TrainingConfig(steps=4, lists_per_step=1, hard=1, easy=1)
    run.train(toy[0] / "start", lists, tmp_path / "out", config, dev=[dev], every=2)
    log = tmp_path / "out" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[-1:]))
    with pytest.raises(ValueError, match=r"log\.jsonl has 0 of the 4 steps"):
        run.train(toy[0] / "start", lists, tmp_path / "out", config, dev=[dev], every=2)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_process_has_set_changes_no_training(toy, rank):
    def weights():
        training = trainer(toy, steps=2, lora_rank=rank)
        training.train(io.StringIO())
        return training.merged()

    expected = weights()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights().items())
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights().items())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_resumed_training_says_so(toy, pairs, tmp_path, caplog):
    config = TrainingConfig(steps=2, lists_per_step=1, hard=1, easy=1)
    for _ in range(2):
        run_training(toy[0] / "start", pairs[0], tmp_path / "out", config, every=1, progress=False)
    assert "going on from step 2 of 2" in caplog.text


def test_a_lock_is_not_a_childs(tmp_path):
    """A process that draws lists may live a little longer than the training that was killed."""
    forking = multiprocessing.get_context("fork")
    begun, end = forking.Event(), forking.Event()
    child = forking.Process(target=lambda: (begun.set(), end.wait()))
    with locked(tmp_path / "x", "this"):
        child.start()
    try:
        assert begun.wait(60)
        with locked(tmp_path / "x", "this"):
            assert child.is_alive()
    finally:
        end.set()
        child.join()


def test_two_trainings_do_not_share_a_folder(toy, pairs, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / "train", "a test"), pytest.raises(ValueError, match="in use by another process"):
        run_training(toy[0] / "start", pairs[0], tmp_path / "out", TrainingConfig(steps=1), progress=False)


def test_a_full_disk_is_one_line_and_loses_nothing(toy, tmp_path, monkeypatch):
    training = trainer(toy, steps=2)
    training.save_state(tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()

    def full(*arguments, **keywords):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"state\.pt can't be written"):
        training.save_state(tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == before and len(list(tmp_path.glob("*"))) == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("[1]", "expected a JSON object"), ("{", "not JSON"), ('{"stepps": 1}', "the recipe has 'stepps'"),
     ('{"steps": "3"}', "the recipe's steps is '3'"), ('{"steps": 1.5}', "the recipe's steps"),
     ('{"steps": true}', "the recipe's steps"), ('{"temperature": 0.1}', "the recipe's temperature"),
     ('{"temperature": [0.1, NaN]}', "the recipe's temperature"),
     ('{"learning_rate": -1}', "the recipe's learning_rate")],
)  # fmt: skip
def test_recipes_that_are_none(tmp_path, recipe, message):
    (tmp_path / "recipe.json").write_text(recipe)
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_file(tmp_path / "recipe.json")
