"""The whole of `rerank` against the plain implementation, alone and in company, and what it does with bad input."""

from __future__ import annotations

import asyncio
import random
import threading

import numpy as np
import pytest
import torch

import lastrerank.progress
from bench.baseline import TransformersReranker
from lastrerank import Reranker, RerankRequest
from lastrerank.checkpoint import BUNDLED
from lastrerank.reranker import default_dtype, resolve_device

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def baseline(tiny):
    return TransformersReranker(tiny)


@pytest.fixture(scope="module")
def windowed(tiny_windowed):
    return Reranker.from_pretrained(tiny_windowed, backend="reference"), TransformersReranker(tiny_windowed)


def scores(results) -> np.ndarray:
    by_index = {result["index"]: result["relevance_score"] for result in results}
    return np.array([by_index[i] for i in range(len(by_index))])


def assert_same(ours, theirs, check_vectors=True):
    assert sorted(r["index"] for r in ours) == sorted(r["index"] for r in theirs)
    np.testing.assert_allclose(scores(ours), scores(theirs), rtol=0, atol=TOLERANCE)
    if check_vectors:
        vectors = {r["index"]: r["embedding"] for r in theirs}
        for result in ours:
            np.testing.assert_allclose(result["embedding"], vectors[result["index"]], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_one_block(reranker, baseline, documents, count):
    arguments = ("Wie füge ich eine Tabelle ein?", documents[:count])
    assert_same(reranker.rerank(*arguments, return_embeddings=True), baseline.rerank(*arguments))


def test_scores_spread(reranker, documents):
    """The comparisons above would mean little if all scores were alike."""
    assert scores(reranker.rerank("table", documents[:40])).std() > 0.02


def test_three_hundred_documents_in_three_blocks(reranker, baseline, documents):
    arguments = dict(query="insert image", documents=documents[:300], max_doc_length=40)
    ours = reranker.rerank(**arguments, return_embeddings=True)
    assert_same(ours, baseline.rerank(**arguments))
    encoded = reranker.encode(RerankRequest(**arguments))
    assert [len(block.doc_rows) for block in encoded.blocks] == [125, 125, 50]


@pytest.mark.parametrize("instruction", [None, "prefer short ones " * 10])
def test_blocks_beyond_the_published_size_fit_the_context(tmp_path, tokenizer, instruction):
    """What stands around short documents is most of such a prompt; the published rule leaves that out."""
    from lastrerank.random_checkpoint import write_random_checkpoint

    overrides = {"max_position_embeddings": 2048, "lastrerank": {"max_query_length": 128, "max_doc_length": 512}}
    folder = write_random_checkpoint(tmp_path, "tiny", tokenizer=tokenizer, overrides=overrides)
    reranker = Reranker.from_pretrained(folder)
    documents = [f"page {i}" for i in range(300)]
    for size in (126, 300, 1000):
        request = RerankRequest("insert image", documents, block_size=size, instruction=instruction)
        blocks = reranker.encode(request).blocks
        assert sum(len(block.doc_rows) for block in blocks) == 300
        assert all(1024 < len(block.ids) <= 2048 for block in blocks[:-1]) and len(blocks[-1].ids) <= 2048


def test_blocks_closed_by_the_context(tmp_path, tokenizer, documents):
    from lastrerank.random_checkpoint import write_random_checkpoint

    overrides = {"max_position_embeddings": 2048, "lastrerank": {"max_query_length": 128, "max_doc_length": 512}}
    folder = write_random_checkpoint(tmp_path, "tiny", tokenizer=tokenizer, overrides=overrides)
    ours, theirs = Reranker.from_pretrained(folder, backend="reference"), TransformersReranker(folder)
    arguments = dict(query="insert image " * 20, documents=documents[:60], max_doc_length=512, max_query_length=128)
    assert_same(ours.rerank(**arguments, return_embeddings=True), theirs.rerank(**arguments))
    sizes = [len(block.doc_rows) for block in ours.encode(RerankRequest(**arguments)).blocks]
    assert len(sizes) > 3 and len(set(sizes)) > 1


def test_truncated_query_and_documents_and_instruction(reranker, baseline, documents):
    arguments = dict(
        query=documents[0] * 3, documents=[d * 4 for d in documents[:12]], max_doc_length=50, max_query_length=30,
        instruction="Prefer pages about {query} in Japanese.",
    )  # fmt: skip
    ours = reranker.rerank(**arguments, return_embeddings=True)
    assert_same(ours, baseline.rerank(**arguments))
    assert all(result["document"] is arguments["documents"][result["index"]] for result in ours)
    encoded = reranker.encode(RerankRequest(**arguments))
    assert encoded.query_cut and all(encoded.cut) and set(encoded.doc_tokens) == {50}


@pytest.mark.parametrize("block_size", [3, 5])
def test_windowed_layers_beyond_the_window(windowed, documents, block_size):
    ours, theirs = windowed
    long_documents = [" ".join(documents[i * 12 : i * 12 + 12]) for i in range(7)]
    arguments = dict(query="Seitenzahlen einfügen", documents=long_documents, block_size=block_size)
    encoded = ours.encode(RerankRequest(**arguments))
    assert max(len(block.ids) for block in encoded.blocks) > 3000
    assert_same(ours.rerank(**arguments, return_embeddings=True), theirs.rerank(**arguments))


def mixed_requests(documents, seed=0):
    rng = random.Random(seed)
    return [
        RerankRequest(rng.choice(documents)[:40], rng.sample(documents, size), block_size=rng.choice([3, 125]))
        for size in (1, 9, 0, 4, 2, 17, 1)
    ]


@pytest.mark.parametrize("max_batch_tokens", [1, 1500, 10**6])
def test_packed_scores_are_those_alone(reranker, documents, max_batch_tokens):
    requests = mixed_requests(documents)
    packed = reranker.rerank_many(requests, max_batch_tokens=max_batch_tokens)
    for request, results in zip(requests, packed, strict=True):
        alone = reranker.rerank_many([request])[0]
        assert [r["index"] for r in alone] == [r["index"] for r in results]
        np.testing.assert_allclose(scores(alone), scores(results), rtol=0, atol=1e-6)


def test_scores_are_read_when_the_next_pass_is_launched(tiny, documents, monkeypatch):
    """A GPU isn't left without work while the host looks at scores."""
    reranker, happened = Reranker.from_pretrained(tiny), []

    def noting(what):
        function = getattr(Reranker, what)

        def noted(*args, **kwargs):
            happened.append(what)
            return function(*args, **kwargs)

        monkeypatch.setattr(Reranker, what, noted)

    requests = [RerankRequest("a query", documents[i : i + 3]) for i in (0, 3, 6)]
    alone = [reranker.rerank_many([request])[0] for request in requests]
    noting("read_rows")
    noting("_read")
    together = reranker.rerank_many(requests, max_batch_tokens=1)
    assert happened == ["read_rows", "read_rows", "_read", "read_rows", "_read", "_read"]
    for ours, expected in zip(together, alone, strict=True):
        assert scores(ours).tolist() == scores(expected).tolist()


def test_deterministic_scores_are_bitwise_those_alone(tiny, documents):
    reranker = Reranker.from_pretrained(tiny, deterministic=True)
    requests = mixed_requests(documents)
    for request, results in zip(requests, reranker.rerank_many(requests), strict=True):
        assert scores(reranker.rerank_many([request])[0]).tolist() == scores(results).tolist()


def test_several_threads_share_a_reranker(reranker, documents):
    requests = mixed_requests(documents)
    expected, got = reranker.rerank_many(requests), {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: reranker.rerank_many([requests[i]])[0]}))
        for i in range(len(requests))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in enumerate(expected):
        np.testing.assert_allclose(scores(got[i]), scores(results), rtol=0, atol=1e-6)


def test_orders_is_the_mean_over_seeded_orders(reranker, documents):
    query, docs = "formula", documents[:9]
    generator = np.random.default_rng(0)
    orders = [np.arange(9)] + [generator.permutation(9) for _ in range(3)]
    total = np.zeros(9)
    for order in orders:
        total[order] += scores(reranker.rerank(query, [docs[i] for i in order]))
    averaged = reranker.rerank(query, docs, orders=4, return_embeddings=True)
    np.testing.assert_allclose(scores(averaged), total / 4, rtol=0, atol=1e-6)
    plain = {r["index"]: r["embedding"] for r in reranker.rerank(query, docs, return_embeddings=True)}
    for result in averaged:
        np.testing.assert_allclose(result["embedding"], plain[result["index"]], rtol=1e-4, atol=1e-5)


def test_rank_and_predict(reranker, documents):
    query, docs = "chart", documents[:6]
    expected = reranker.rerank(query, docs)
    ranked = reranker.rank(query, docs, top_k=3, return_documents=True)
    assert [r["corpus_id"] for r in ranked] == [r["index"] for r in expected[:3]]
    assert [r["text"] for r in ranked] == [r["document"] for r in expected[:3]]
    assert "text" not in reranker.rank(query, docs)[0]
    pairs = [("chart", docs[0]), ("print", docs[1]), ("chart", docs[2]), ("print", docs[0]), ("chart", docs[3])]
    predicted = reranker.predict(pairs)
    assert predicted.dtype == np.float32
    chart, printed = (scores(reranker.rerank(q, d)) for q, d in
                      (("chart", [docs[0], docs[2], docs[3]]), ("print", [docs[1], docs[0]])))  # fmt: skip
    np.testing.assert_allclose(predicted, [chart[0], printed[0], chart[1], printed[1], chart[2]], atol=1e-6, rtol=0)
    assert reranker.predict([]).shape == (0,)


def test_results_are_sorted_and_ties_keep_input_order(small_reranker):
    from lastrerank.reranker import Scored, ranked

    request = RerankRequest("q", ["a", "b", "c", "d"], top_n=3)
    tied = Scored(np.array([0.5, 0.7, 0.7, 0.5], np.float32), np.zeros((4, 0), np.float32))
    assert [r["index"] for r in ranked(request, tied)] == [1, 2, 0]
    results = small_reranker.rerank("q", [f"document {i}" for i in range(9)])
    values = [r["relevance_score"] for r in results]
    assert values == sorted(values, reverse=True) and all(-1 <= v <= 1 for v in values)
    assert set(results[0]) == {"document", "relevance_score", "index", "embedding"} and results[0]["embedding"] is None


def test_unusual_input_is_served(small_reranker):
    assert small_reranker.rerank("q", []) == []
    assert small_reranker.rerank_many([]) == []
    assert small_reranker.rerank("q", ["a", "b"], top_n=0) == []
    assert len(small_reranker.rerank("q", ["a", "b"], top_n=99)) == 2
    mapping = {"text": "mapped", "id": 7}
    results = small_reranker.rerank("q", ["", "\0 nul \0", mapping, "\n\n", "word " * 2_000_000, "x" * 100_000])
    assert sorted(r["index"] for r in results) == [0, 1, 2, 3, 4, 5]
    assert next(r for r in results if r["index"] == 2)["document"] is mapping
    assert all(np.isfinite(r["relevance_score"]) for r in results)


BAD = [
    (dict(query=""), ValueError, "query is empty"),
    (dict(query=None), TypeError, r"query is a NoneType"),
    (dict(query="a\ud800"), ValueError, r"query has a lone surrogate .* at character 1"),
    (dict(documents="a string"), TypeError, "documents is a str"),
    (dict(documents={"text": "a"}), TypeError, "documents is a dict"),
    (dict(documents=["a", 3]), TypeError, r"documents\[1\] is a int \(3\)"),
    (dict(documents=["a", b"bytes"]), TypeError, r"documents\[1\] is a bytes"),
    (dict(documents=["a", {"title": "t"}]), ValueError, r"documents\[1\] has keys \['title'\], expected 'text'"),
    (dict(documents=[{"text": None}]), TypeError, r"documents\[0\]\['text'\] is a NoneType"),
    (dict(documents=["ok", "\udfff"]), ValueError, r"documents\[1\] has a lone surrogate"),
    (dict(top_n=-1), ValueError, "top_n is -1"),
    (dict(top_n=1.5), TypeError, "top_n is 1.5"),
    (dict(max_doc_length=0), ValueError, "max_doc_length is 0"),
    (dict(max_query_length=-3), ValueError, "max_query_length is -3"),
    (dict(max_doc_length=4096), ValueError, "max_doc_length 4096.*don't fit the context of 4096"),
    (dict(max_query_length=2048), ValueError, "max_query_length 2048"),
    (dict(block_size=0), ValueError, "block_size is 0"),
    (dict(orders=0), ValueError, "orders is 0"),
    (dict(instruction=5), TypeError, "instruction is a int"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:30] for _, _, m in BAD])
def test_bad_input_is_named_before_any_work(small_reranker, monkeypatch, change, error, message):
    monkeypatch.setattr(small_reranker.model, "hidden_states", lambda *a, **k: pytest.fail("the model ran"))
    arguments = {"query": "q", "documents": ["a", "b"], **change}
    with pytest.raises(error, match=message):
        small_reranker.rerank(**arguments)
    with pytest.raises(error, match=r"requests\[1\]\."):
        small_reranker.rerank_many([{"query": "fine", "documents": ["a"]}, arguments])


def test_bad_requests_and_pairs(small_reranker):
    with pytest.raises(ValueError, match=r"requests\[1\] has fields"):
        small_reranker.rerank_many([{"query": "q", "documents": []}, {"query": "q", "docs": []}])
    with pytest.raises(TypeError, match=r"requests is a dict"):
        small_reranker.rerank_many({"query": "q", "documents": []})
    with pytest.raises(ValueError, match=r"inputs\[0\] is 'ab'"):
        small_reranker.predict(["ab"])
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        small_reranker.rerank_many([{"query": "q", "documents": ["a"]}], max_batch_tokens=0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (dict(device="tpu"), "device is 'tpu'"),
        (dict(device="mps"), "device is 'mps'"),
        (dict(dtype="float7"), "dtype is 'float7'"),
        (dict(backend="fast"), "backend is 'fast'"),
        (dict(family="chat"), "family is 'chat'"),
    ],
)
def test_unknown_choices_are_named(small, argument, message):
    with pytest.raises(ValueError, match=message):
        Reranker.from_pretrained(small, **argument)


def test_a_gpu_is_known_by_its_number(monkeypatch):
    """The current device is each thread's own: an engine's would be another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0) and resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")])
def test_the_default_dtype_is_one_that_the_gpu_has_units_for(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype(torch.device("cuda", 0)) == dtype and default_dtype(torch.device("cpu")) == "float32"


@pytest.mark.parametrize("size", [3e38, 1e37])
def test_scores_that_overflow_are_an_error(small, tmp_path, size):
    """Vectors that overflow, and finite ones whose norm does."""
    from safetensors.torch import load_file, save_file

    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(small / "model.safetensors")
    state["projector.2.weight"] = state["projector.2.weight"].sign() * size
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="scores are not finite"):
        Reranker.from_pretrained(tmp_path).rerank("q", ["a", "b"])


def test_progress_shows_on_long_work(small_reranker, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws as on a terminal
    small_reranker.rerank("q", ["a"] * 30, block_size=2, progress=True)
    assert "reranking" in capsys.readouterr().err
    small_reranker.rerank("q", ["a"] * 30)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(lastrerank.progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(lastrerank.progress, "PATIENCE", 0.0)
    small_reranker.rerank("q", ["a"] * 30, block_size=2)
    assert "reranking" in capsys.readouterr().err


def test_save_pretrained_round_trip(reranker, tmp_path, documents):
    reranker.save_pretrained(tmp_path)
    again = Reranker.from_pretrained(tmp_path, backend="reference")
    assert scores(again.rerank("q", documents[:5])).tolist() == scores(reranker.rerank("q", documents[:5])).tolist()


class Markup(str):
    """A kind of str that is something else by + (as markupsafe's) and equal to a plain one."""

    def __radd__(self, other):
        return Markup(str(other).replace("<", "&lt;") + str(self))

    def __add__(self, other):
        return Markup(str(self) + str(other).replace("<", "&lt;"))


def test_kinds_of_str_are_what_they_say(small):
    texts = ["\nrivers of france", " <b> two", "three"]
    get = lambda reranker, query, documents: [  # noqa: E731
        (r["index"], r["relevance_score"]) for r in reranker.rerank(query, documents, instruction=type(query)("<i>"))
    ]
    expected = get(Reranker.from_pretrained(small), "a <query>", texts)
    fresh = Reranker.from_pretrained(small)
    assert get(fresh, Markup("a <query>"), [Markup(text) for text in texts]) == expected
    assert get(fresh, Markup("a <query>"), [{"text": Markup(text)} for text in texts]) == expected
    assert get(fresh, "a <query>", texts) == expected
    given = Markup("its own object")
    assert fresh.rerank("q", [given])[0]["document"] is given


def test_arrays_and_columns_are_lists(small_reranker):
    texts = ["one", "two", "three"]
    expected = [(r["index"], r["relevance_score"]) for r in small_reranker.rerank("q", texts)]

    class Column:
        """As pandas has it: indexed by labels."""

        def tolist(self):
            return list(texts)

        def __getitem__(self, label):
            raise KeyError(label)

    for documents in (np.array(texts), np.array(texts, object), Column(), tuple(texts)):
        assert [(r["index"], r["relevance_score"]) for r in small_reranker.rerank("q", documents)] == expected
    for documents in (np.float64(1), {"a", "b"}, iter(texts), b"bytes", 5):
        with pytest.raises(TypeError, match="documents is a"):
            small_reranker.rerank("q", documents)


def test_an_empty_instruction_is_none(small_reranker):
    plain = small_reranker.encode(RerankRequest("q", ["a"]))
    for instruction in (None, ""):
        encoded = small_reranker.encode(RerankRequest("q", ["a"], instruction=instruction))
        assert encoded.num_tokens == plain.num_tokens
    assert small_reranker.encode(RerankRequest("q", ["a"], instruction=" ")).num_tokens > plain.num_tokens


def test_as_a_cross_encoder(small_reranker):
    pairs = [("q", "one"), ("q", "two")]
    scores = small_reranker.predict(pairs)
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float32
    options = {"batch_size": 8, "show_progress_bar": False, "prompt_name": None, "num_workers": 0}
    assert small_reranker.predict(pairs, convert_to_numpy=True, **options).tolist() == scores.tolist()
    assert small_reranker.predict(pairs, convert_to_tensor=True).tolist() == scores.tolist()
    assert [float(x) for x in small_reranker.predict(pairs, convert_to_numpy=False)] == scores.tolist()
    assert float(small_reranker.predict(pairs[0])) == pytest.approx(float(small_reranker.predict(pairs[:1])[0]))
    assert small_reranker.predict(np.array(pairs)).tolist() == scores.tolist()
    for name in ("inputs", "sentences"):  # as sentence-transformers calls them, today and before 6
        assert small_reranker.predict(**{name: pairs}).tolist() == scores.tolist()
    with pytest.raises(TypeError, match="one of inputs and sentences"):
        small_reranker.predict()
    with pytest.raises(TypeError, match="positional"):  # its own come in another order
        small_reranker.rank("q", ["one"], None, False, "web")
    assert len(small_reranker.rank("q", ["one", "two"], top_k=1, batch_size=8)) == 1
    for option in ({"prompt_name": "web"}, {"apply_softmax": True}, {"activation_fn": torch.nn.Sigmoid()}):
        with pytest.raises(ValueError, match="would change the scores"):
            small_reranker.predict(pairs, **option)
    with pytest.raises(TypeError, match="surprise is 1"):
        small_reranker.rank("q", ["one"], surprise=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"family": None}, "family is None"), ({"family": {}}, "family is"),
     ({"backend": ["native"]}, "backend is"),
     ({"dtype": 5}, "dtype is 5"), ({"id_or_path": "a" * 5000}, "id_or_path is")],
)  # fmt: skip
def test_arguments_of_other_kinds_are_named(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        Reranker.from_pretrained(**{"id_or_path": small, **arguments})


def test_more_bad_requests_are_named(small_reranker):
    for budget in ("10", float("nan"), 0, True):
        with pytest.raises(ValueError, match="max_batch_tokens is"):
            small_reranker.rerank_many([{"query": "q", "documents": ["a"]}], max_batch_tokens=budget)
    with pytest.raises(ValueError, match="request has fields"):
        small_reranker.rerank_many([{"query": "q", "documents": [], 5: 1}])
    assert repr(small_reranker).startswith("Reranker('small") and "0x" not in repr(small_reranker)
    assert Reranker.from_pretrained(dtype=torch.float32).checkpoint.name == "lastrerank-43m"


def test_a_former_bundled_name_is_the_new_one_with_a_warning(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lastrerank-13m", "lastrerank-26m"):
        caplog.clear()
        assert Reranker.from_pretrained(name).checkpoint.name == "lastrerank-43m"
        assert f"{name} is not in this version" in caplog.text
    (tmp_path / "lastrerank-13m").mkdir()  # a folder of that name is what it is
    with pytest.raises(ValueError, match=r"config\.json"):
        Reranker.from_pretrained("lastrerank-13m")


def test_numbers_of_other_kinds_are_numbers(small_reranker):
    found = small_reranker.rerank("q", ["a", "b", "c"], np.int64(2), score_threshold=np.float32(-1), orders=np.int32(1))
    assert found == small_reranker.rerank("q", ["a", "b", "c"], 2, score_threshold=-1.0)
    for bad in (np.float64(2.0), np.bool_(True), True, "2"):
        with pytest.raises(TypeError, match="top_n is"):
            small_reranker.rerank("q", ["a"], bad)


def test_no_name_is_the_bundled_checkpoint():
    assert Reranker.from_pretrained(None).checkpoint.name == BUNDLED


def test_a_threshold_leaves_out_what_scores_lower(small_reranker):
    documents = ["a passage", "another one", "relevance", ""]
    found = small_reranker.rerank("expert", documents)
    for number, result in enumerate(found):
        kept = small_reranker.rerank("expert", documents, score_threshold=result["relevance_score"])
        assert kept == found[: number + 1]  # equal ones stay
    assert small_reranker.rerank("expert", documents, score_threshold=1.1) == []
    for bad, said in ((float("nan"), "finite"), ("x", "expected a number"), (True, "expected a number")):
        with pytest.raises((TypeError, ValueError), match=f"score_threshold is .*{said}"):
            small_reranker.rerank("expert", documents, score_threshold=bad)


def test_async_rerank_is_rerank(small_reranker):
    documents = ["a passage", "another one"]
    found = asyncio.run(small_reranker.arerank("expert", documents, top_n=1))
    assert found == small_reranker.rerank("expert", documents, 1)
