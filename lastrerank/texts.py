"""Texts to ids, cut to a cap, at a cost that the cap bounds however long the text is.

Of a long text only a leading piece is encoded, and only those of its ids are taken that the whole text has, too:

- ids of complete pre-tokens (words), the last two of the piece excepted: what follows can change no others. That holds
  for the patterns in `_PATTERNS`, which look one character beyond a match, or through one run of white space.
- inside an unbroken run (Chinese without punctuation, base64, spaces), ids up to a place where the run is certain to be
  divided. Byte-level BPE merges in order of rank, so the tokens before a boundary are those of the text before it, and
  tokens stand beside each other in a long text exactly if they do so in a text of two (a merge across them would have
  happened there, too). Let no token be longer than L. Whatever follows, one token of the run's encoding holds the
  piece's last character, and it begins at one of its last L places; if the run up to each of these, encoded from a
  boundary b on, begins with the token that stands after b, then b is a boundary in all of them, and so in the whole
  text.
- The rule where neither decides (a run that divides itself anew wherever it ends; a thousand combining marks on one
  character; a tokenizer of another kind): a text is read as if it ended after as many characters as the cap's tokens
  can have, 2**21 at most.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE, Model

# Texts of one slice of work: what a thread does before another request may have its turn.
_SLICE_TEXTS, _SLICE_CHARS = 64, 1 << 18
# No text is read further than this; the tokenizers library fails on runs of some millions of spaces.
_MOST_CHARS = 1 << 21
# Patterns of a `Split` whose matches are decided as described above: Qwen's, GPT-4's and GPT-2's.
_PATTERNS = frozenset({
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
})  # fmt: skip

T = TypeVar("T")
# Work that yields when others may have their turn, and returns its result at the end.
Steps = Generator[None, None, T]


@dataclass(frozen=True)
class CutText:
    """A query or document as it goes into the prompt.

    text: the caller's, or the decoded first `cap` tokens of it. ids: int32 `[n]`, its own ids. length: tokens of the
    bare text, at most the cap: what the block rule counts. cut: whether tokens were left out.
    """

    text: str
    ids: np.ndarray
    length: int
    cut: bool


class TextEncoder:
    """Encodes and cuts texts with one tokenizer, which is not changed. Safe to use from several threads.

    Args:
        tokenizer: adds no token of its own, neither cuts nor pads.
        control_tokens: texts that it encodes as one token wherever they stand.
        cache_bytes: bound on what is remembered of texts seen before (ids and text together).
    """

    def __init__(self, tokenizer: Tokenizer, control_tokens: Iterable[str] = (), cache_bytes: int = 64 << 20) -> None:
        self.tokenizer = tokenizer
        self._longest_control = max(map(len, control_tokens), default=0)
        self._looks_ahead_little = _is_byte_level(tokenizer)
        self._divides_runs = self._looks_ahead_little and not self._longest_control
        self._cache: OrderedDict[tuple[str, int, bool], CutText] = OrderedDict()
        self._cache_bytes, self._cache_limit = 0, cache_bytes
        self._lock = Lock()
        _encoders.add(self)

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token; only long texts ask for it, and a large vocabulary takes a while."""
        return max(map(len, self.tokenizer.get_vocab(with_added_tokens=False)), default=1)

    def cut(self, texts: Sequence[str], cap: int) -> list[CutText]:
        """Tokenise texts and cut each to its first `cap` tokens, in parallel batches, cached.

        A text of more than `cap` tokens becomes the decoded text of its first `cap`, as the published code does.
        """
        return run(self.cut_by_slices(texts, cap))

    def cut_by_slices(self, texts: Sequence[str], cap: int, at_ids: bool = False) -> Steps[list[CutText]]:
        """The same as a generator: yields after each slice of the work, and returns the result.

        at_ids: a text of more than `cap` tokens becomes its first `cap` ids, and its `text` stays whole: decoding and
        encoding again, as `cut` does it, may give others.
        """
        found: dict[str, CutText] = {}
        with self._lock:
            for text in texts:
                entry = self._cache.get((text, cap, at_ids))
                if entry is not None:
                    self._cache.move_to_end((text, cap, at_ids))
                    found[text] = entry
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for number, group in enumerate(_slices(missing, 16 * cap + 64)):
            if number:
                yield
            # A token is at least one byte but may be long: only texts far beyond the cap are worth a careful short cut.
            long = {text: self._leading(text, cap) for text in group if len(text) > 16 * cap + 64}
            ids = {text: found_ids for text, (found_ids, _) in long.items()}
            ids.update(self.encode(text for text in group if text not in ids))
            kept = {text: self.tokenizer.decode(ids[text][:cap], skip_special_tokens=False) for text in group
                    if len(ids[text]) > cap and not at_ids}
            kept_ids = self.encode(dict.fromkeys(kept.values()))
            for text in group:
                if text in kept:
                    entry = CutText(kept[text], np.asarray(kept_ids[kept[text]], np.int32), cap, True)
                elif len(ids[text]) > cap:
                    entry = CutText(text, np.asarray(ids[text][:cap], np.int32), cap, True)
                else:
                    read = long[text][1] if text in long else text
                    entry = CutText(read, np.asarray(ids[text], np.int32), len(ids[text]), read is not text)
                found[text] = entry
                self._remember((text, cap, at_ids), entry)
        return [found[text] for text in texts]

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of whole texts, one parallel batch."""
        ordered = list(texts)
        if not ordered:
            return {}
        encodings = _guarded(self.tokenizer.encode_batch_fast, ordered, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(ordered, encodings, strict=True)}

    def _leading(self, text: str, cap: int) -> tuple[list[int], str]:
        """At least `cap + 1` leading ids of a long text, or all of them, and the text: where the rule of the module's
        description applies, the piece of it that was read."""
        most = min(_MOST_CHARS, (cap + 1) * self._longest_token + 4096)
        chars = 16 * cap + 64
        while self._looks_ahead_little and chars < min(most, len(text)):
            ids = self._certain_ids(text, chars, cap)
            if len(ids) > cap:
                return ids, text
            chars *= 4
        if len(text) <= most:
            return self.encode([text])[text], text
        # As long a piece as may be read: what is certain of it, or the rule.
        ids = self._certain_ids(text, most, cap) if self._looks_ahead_little else []
        piece = text[:most]
        return (ids, text) if len(ids) > cap else (self.encode([piece])[piece], piece)

    def _certain_ids(self, text: str, chars: int, cap: int) -> list[int]:
        """Ids of a leading piece of about `chars` characters that the whole text has, too."""
        end = _apart(text, chars)
        # As a batch of one: `encode` would hold the interpreter's lock all the while.
        encoding = _guarded(self.tokenizer.encode_batch, [text[: end or chars]], add_special_tokens=False)[0]
        words = encoding.word_ids
        if not words or words[-1] is None:
            return []
        sure = sum(word is not None and word < words[-1] - 1 for word in words)
        while self._longest_control and sure and encoding.offsets[sure - 1][1] > chars - self._longest_control:
            sure -= 1  # a control token may be cut in two there
        if sure > cap or not self._divides_runs or end is None:
            return encoding.ids[:sure]
        run_start = words.index(words[-1])
        run_text = text[encoding.offsets[run_start][0] : end]
        if run_start and run_text.isspace() and text[encoding.offsets[run_start - 1][1] - 1].isspace():
            return encoding.ids[:sure]  # white space is divided by what comes at its end
        boundary = self._boundary(encoding.tokens[run_start:], cap + 1 - run_start)
        return encoding.ids[: run_start + boundary] if boundary is not None else encoding.ids[:sure]

    def _boundary(self, tokens: list[str], least: int) -> int | None:
        """A number of leading tokens of an unbroken run, `least` or more, after which every longer run is divided."""
        longest, model = self._longest_token, self.tokenizer.model
        run_text = "".join(tokens)[:-4]  # its last character (four bytes at most) may belong to the next pre-token
        least = max(least, 1)
        for count in range(least, min(least + 64, len(tokens) - 1), 8):
            start = sum(map(len, tokens[:count]))
            stop = start + 4 * longest
            if stop > len(run_text):
                return None
            ends = range(stop - longest + 1, stop + 1)
            if all(model.tokenize(run_text[start:end])[0].value == tokens[count] for end in ends):
                return count
        return None

    def _remember(self, key: tuple[str, int, bool], entry: CutText) -> None:
        def size(item: tuple[str, int, bool], value: CutText) -> int:
            return 4 * len(item[0]) + value.ids.nbytes + 256

        with self._lock:
            if key in self._cache or size(key, entry) > self._cache_limit // 4:
                return
            self._cache[key] = entry
            self._cache_bytes += size(key, entry)
            while self._cache_bytes > self._cache_limit:
                self._cache_bytes -= size(*self._cache.popitem(last=False))


_encoders: WeakSet[TextEncoder] = WeakSet()


def _release_locks() -> None:
    """In a forked child: a lock that another thread of the parent held is held for ever, and so waits the library for
    its threads, unless it is told that they are gone (it knows by itself only where nobody has set this variable)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for encoder in list(_encoders):
        encoder._lock = Lock()


os.register_at_fork(after_in_child=_release_locks)


def run(steps: Steps[Any]) -> Any:
    """The result of a generator, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _slices(texts: Sequence[str], most: int) -> Iterator[list[str]]:
    """Texts in order, some at a time; of each `most` characters count, since no more are looked at as a rule."""
    group: list[str] = []
    chars = 0
    for text in texts:
        if group and (len(group) >= _SLICE_TEXTS or chars + min(len(text), most) > _SLICE_CHARS):
            yield group
            group, chars = [], 0
        group.append(text)
        chars += min(len(text), most)
    if group:
        yield group


def _guarded(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """The tokenizers library's panics are no `Exception`, so that nothing here would handle them."""
    try:
        return function(*arguments, **keywords)
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizers library failed: {error}") from error


def _apart(text: str, chars: int) -> int | None:
    """A place at or before `chars` at which the text may be normalised (NFC) in two; None if there is none near."""
    for end in range(chars, max(chars - 1024, 0), -1):
        if end >= len(text) or not _may_join(text[end]):
            return end
    return None


def _may_join(character: str) -> bool:
    """Whether NFC may make one of a character and the one before it: marks, parts of a Hangul syllable, two of Kirat
    Rai's vowel signs (letters), and any that this Python's tables don't have and newer ones may."""
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cn":
        return True
    return "\u1160" <= character <= "\u11ff" or "\U00016d67" <= character <= "\U00016d68"


def bare_tokenizer(tokenizer: Tokenizer, model: Model) -> Tokenizer:
    """A tokenizer that normalises, divides and decodes as `tokenizer` does, but adds no token, neither cuts nor pads.

    Args:
        tokenizer: its parts are shared, not copied; added tokens, cutting, padding and post-processing stay behind.
        model: the vocabulary, shared as well.
    """
    bare = Tokenizer(model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(tokenizer, part) is not None:
            setattr(bare, part, getattr(tokenizer, part))
    return bare


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether this is a byte-level BPE, divided into words by a pattern we know, after NFC at most."""
    model = tokenizer.model
    if not isinstance(model, BPE) or model.dropout or model.byte_fallback:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    raw = json.loads(bare_tokenizer(tokenizer, BPE()).to_str())  # without the vocabulary: it may be large
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    outer = raw.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", []) if outer.get("type") == "Sequence" else [outer]
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return False
    patterns = int(bool(parts[-1].get("use_regex", True)))
    for part in parts[:-1]:
        known = part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert")
        patterns += known and part["pattern"].get("Regex") in _PATTERNS
        if not (known and part["pattern"].get("Regex") in _PATTERNS) and part.get("type") != "Digits":
            return False
    return patterns == 1
