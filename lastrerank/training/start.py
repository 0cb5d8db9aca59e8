"""Where training of a small checkpoint begins: weights that already read a list, built by hand.

A small decoder does not find out from lists alone, in hours on a CPU, how a listwise prompt is read: which tokens are
the query, where a document begins, that the same word in both means something. What pretraining gives a large decoder
is written into this one's first three layers, as soft as training needs it:

0. (window of 128) In every token: does it stand between `Rank` and the first `<passage`, so in the query? Did a
   `<passage` stand just before it, so is it in a document's header? Was the token before this digit a digit, and which?
   A product with the first answer leaves, in query tokens only, a code of the word and its rarity.
1. Two heads look for the query's word that is most like this token, in two random projections of the teacher's token
   embeddings, and fetch its code: synonyms and other languages match as far as the teacher puts them together. If
   none is alike the token finds itself, where no code is. A third head averages the digits of the nearest header: which
   document this is.
2. Every token averages its own document (equal numbers attract): meanings in four heads, in the fifth the matched
   codes, which attract a little too. At a marker, that is the document's readout; at the last marker, the query's.
3. Nearly nothing, to be learnt.

The projector starts linear: averaged meanings to the teacher's embedding as well as ridge regression can, matched
codes to channels of their own. So before any training a score is the teacher's cosine, roughly, plus the share of the
query that is found in the document.

Rotary embedding turns channel pairs i and i + d/2 of a head by theta^(-2i/d) a position. What must not depend on the
distance stands in pairs that turn by less than 1e-4 (theta is 1e12 for that), what must, in fast ones. A query `(1, 0)`
and a key `(a, b)` in such a pair give `a cos + b sin` of the angle between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lastrerank.families.listwise import PROMPT
from lastrerank.lists import EMBED_TOKEN, RERANK_TOKEN, ListEncoder
from lastrerank.packing import pack
from lastrerank.random_checkpoint import CONTROL_TOKENS, write_random_checkpoint
from lastrerank.reranker import Reranker
from lastrerank.training.data import TrainingData

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE = 320, 5, 64, 896
TEACHER, LAYERS = 512, 4

# Channels of the residual stream.
MEANING = slice(0, 255)  # the teacher's embedding of the token; the rarer the token, the longer
CONSTANT = 255
IN_QUERY, RANK, PASSAGE, RARITY, QUERY_RARITY, IN_HEADER = 256, 257, 258, 259, 260, 261
MATCH = slice(264, 296)  # codes of the query's words
DIGIT = slice(296, 306)  # which digit
CLOSING = 306  # the closing query is like one more document
DIGIT_BEFORE = slice(307, 317)  # in a digit after a digit: which
NUMBER = slice(DIGIT.start, DIGIT_BEFORE.stop)  # all of these are the code of a document's number
MATCHED = 317  # rarity of the query's word that was matched
# These hold values up to `SCALE` and are scaled down by the norms; the others are about 1 in any channel.
SCALE = 16
LARGE = (CONSTANT, IN_QUERY, RANK, PASSAGE, RARITY, QUERY_RARITY, IN_HEADER, *range(NUMBER.start, NUMBER.stop))

SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
    "max_position_embeddings": 32_768, "rope_theta": 1e12,
    "projector": (2 * HIDDEN, TEACHER + MATCH.stop - MATCH.start + 32),  # 32 empty ones to be learnt
    "sliding_window": 128, "layer_types": ["sliding_attention"] + ["full_attention"] * 3,
    "lastrerank": {"max_query_length": 512, "max_doc_length": 2048},
}  # fmt: skip

# Channels of a head, by how fast their pairs turn: within a header, from header to header, hardly at all. The last few
# (30, 31, 62, 63), slowest of all, hold constants and flags.
NEAR = [1, 2, 3, 4, 5]
SLOW = [*range(12, 30), *range(44, 62)]
# By pair: a query's weight, a key's weights of cosine and sine. The sum is smaller at any distance up to 32,768 than
# nearer by, so the nearest header wins; `test_the_nearest_header_wins` holds them to it for documents of up to 2,100
# tokens. Found by a linear programme over the fall at each distance, then rounded. Pair 31 does not turn; it keeps the
# sum above zero, so that what is no header never wins. Keys have four bits and are multiplied by numbers of four: bf16
# holds them exactly, and every digit's key has one direction.
NEAREST = {
    7: (0.288, 0.0, -0.28125), 8: (0.4757, 0.46875, -0.0625), 9: (0.3296, 0.3125, -0.1875), 10: (0.486, 0.5, 0.0),
    11: (0.4843, 0.46875, 0.0), 31: (0.914, 0.875, 0.0),
}  # fmt: skip
NEAREST_LOGIT = 700.0
COUNTING_HEAD = 2  # of layer 1: looks for the nearest header

Noise = Callable[..., torch.Tensor]


def initial_checkpoint(
    folder: Path, tokenizer: Tokenizer, token_vectors: np.ndarray, data: TrainingData, fit_lists: int = 600
) -> Path:
    """Write the checkpoint this module describes.

    Args:
        folder: where it goes.
        tokenizer: control tokens last; ` Rank`, `<passage` and `<query` are one token each.
        token_vectors: the teacher's embedding of each token's text `[V, 512]`.
        data: lists with the teacher's embeddings.
        fit_lists: of them the projector is fitted to; a tenth of it is looked at to centre the markers, eight times.
    """
    write_random_checkpoint(folder, SHAPE, tokenizer=tokenizer, dtype=torch.float32, seed=1)
    path = folder / "model.safetensors"
    state, generator = load_file(path), torch.Generator().manual_seed(0)

    def noise(std: float, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    table = _embeddings(state["model.embed_tokens.weight"], tokenizer, token_vectors, data, noise)
    for name, tensor in state.items():
        if "norm" in name:
            tensor.fill_(1.0)
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            tensor[list(LARGE)] /= SCALE
    width = MEANING.stop
    likeness = noise(len(SLOW) ** -0.5 / SCALE, len(SLOW), width)
    code = noise((MATCH.stop - MATCH.start) ** -0.5, MATCH.stop - MATCH.start, width)
    for index in range(LAYERS):
        layer = _Layer(state, index, noise)
        if index == 0:
            _find_query_and_headers(layer, code)
        elif index == 1:
            _match_and_number(layer, likeness, noise)
        elif index == 2:
            _average_documents(layer, noise)
    # relu(x) - relu(-x) = x
    identity = torch.eye(HIDDEN)
    identity[CONSTANT, CONSTANT] = 0
    state["projector.0.weight"] = torch.cat([identity, -identity]) + noise(0.002, 2 * HIDDEN, HIDDEN)

    def save() -> None:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})

    # What all readouts share says nothing: the markers' own embeddings take it away.
    markers = [tokenizer.token_to_id(name) for name in (EMBED_TOKEN, RERANK_TOKEN)]
    for turn in range(8):
        save()
        for row, found in zip(markers, _readouts(folder, data, 1000 * turn, fit_lists // 10)[:2], strict=True):
            table[row, MEANING] -= 0.3 * found.mean(0)[MEANING]
    save()
    linear = _fitted_projection(*_readouts(folder, data, 10_000, fit_lists))
    state["projector.2.weight"] = torch.cat([linear, -linear], 1)
    save()
    return folder


class _Layer:
    """One layer's weights, random and small, as views to write into."""

    def __init__(self, state: dict[str, torch.Tensor], index: int, noise: Noise) -> None:
        prefix = f"model.layers.{index}."
        self.q, self.k = noise(0.06, HEADS * HEAD_DIM, HIDDEN), noise(0.06, HEADS * HEAD_DIM, HIDDEN)
        self.v = noise(0.02, HEADS * HEAD_DIM, HIDDEN)
        for weight in (self.q, self.k):
            weight[:, CONSTANT] *= SCALE
            weight[:, IN_QUERY : MATCHED + 1] = 0
        self.v[:, CONSTANT] = 0
        self.o = noise(0.003, HIDDEN, HEADS * HEAD_DIM)
        self.gate, self.up = noise(0.06, INTERMEDIATE, HIDDEN), noise(0.06, INTERMEDIATE, HIDDEN)
        self.down = noise(0.001, HIDDEN, INTERMEDIATE)
        for weight in (self.gate, self.up):
            weight[:, CONSTANT:] = 0
        self.up[:, CONSTANT] = noise(0.3, INTERMEDIATE)
        self.q_norm = state[f"{prefix}self_attn.q_norm.weight"]
        self.k_norm = state[f"{prefix}self_attn.k_norm.weight"]
        for name in "qkvo":
            state[f"{prefix}self_attn.{name}_proj.weight"] = getattr(self, name)
        for name in ("gate", "up", "down"):
            state[f"{prefix}mlp.{name}_proj.weight"] = getattr(self, name)

    def clear(self, head: int) -> int:
        """Empty a head; returns its first row."""
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        for weight in (self.q, self.k, self.v):
            weight[rows] = 0
        self.o[:, rows] = 0
        return rows.start

    def sharpen(self, channels: Any, logit: float) -> None:
        """Scale of the logits that equal directions in these channels of a head reach."""
        self.q_norm[channels] = self.k_norm[channels] = (logit / HEAD_DIM**0.5) ** 0.5


def _embeddings(
    table: torch.Tensor, tokenizer: Tokenizer, vectors: np.ndarray, data: TrainingData, noise: Noise
) -> torch.Tensor:
    """Fill the embedding table `[V, D]`: principal directions of the teacher's, words of the prompt, digits."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def one(text: str, name: str) -> int:
        found = [i for i in ids(text) if (tokenizer.id_to_token(i) or "").lstrip("Ġ") == name]
        if len(found) != 1:
            raise ValueError(f"tokenizer: {name!r} is not one token in {text!r}")
        return found[0]

    count = len(vectors) - len(CONTROL_TOKENS)
    frequency = np.ones(len(vectors))
    sample = data.documents[::5]
    for text in sample:
        frequency[list(set(ids(text[:1000])))] += 1
    # Words of the prompt are in every list.
    around = ' Rank the passages based on their relevance to query: \n<passage id="1">\n</passage>\n\n<query>\n'
    frequency[ids(around)] = len(sample) + 1
    rarity = np.log((len(sample) + 1) / frequency)
    rarity = (rarity / rarity.max())[:count, None] ** 1.5
    centred = vectors[:count].astype(np.float64)
    centred -= (centred * frequency[:count, None]).sum(0) / frequency[:count].sum()
    _, directions = np.linalg.eigh((centred * rarity).T @ (centred * rarity))
    meaning = centred @ directions[:, ::-1][:, MEANING]
    meaning *= rarity / (np.linalg.norm(meaning, axis=1, keepdims=True) + 1e-9)

    table.copy_(noise(0.003, *table.shape))
    table[:count, MEANING] += torch.tensor(meaning, dtype=torch.float32)
    table[:, CONSTANT] = 1
    table[:, IN_QUERY:] = 0
    table[:count, RARITY] = torch.tensor(rarity[:, 0], dtype=torch.float32)
    table[one(" Rank", "Rank"), RANK] = 1
    table[one('\n<passage id="', "<passage"), PASSAGE] = 1
    for digit in range(10):
        table[one(f'id="{digit}">', str(digit)), DIGIT.start + digit] = 1
    query = one("\n<query>\n", "<query")
    table[query, CLOSING] = table[query, IN_HEADER] = 1
    return table.mul_(SCALE)


def _find_query_and_headers(layer: _Layer, code: torch.Tensor) -> None:
    layer.sharpen([*NEAR, *(channel + 32 for channel in NEAR), 30, 31, 62, 63], 20.5)
    # `<passage` beats `Rank`, both beat the 126 others.
    head = layer.clear(4)
    layer.q[head + 63, CONSTANT], layer.q[head + 31, CONSTANT] = 0.8, 0.6
    layer.k[head + 30, CONSTANT] = 0.3
    layer.k[head + 63, RANK], layer.k[head + 62, RANK] = 2.0, 1.2
    layer.k[head + 63, PASSAGE], layer.k[head + 31, PASSAGE] = 4.0, 3.0
    layer.v[head, RANK] = 4.0
    layer.o[IN_QUERY, head] = 5.0
    # `<passage` within about five tokens; the others win against anything further away.
    head = layer.clear(3)
    near = [head + channel for channel in NEAR]
    layer.q[[*near, head + 30], CONSTANT] = 1.0
    layer.k[near, PASSAGE] = 2.0
    layer.k[head + 30, CONSTANT] = 0.2
    layer.v[head, PASSAGE] = 4.0
    layer.o[IN_HEADER, head] = 5.0
    # Digits look one token back, where other tokens look at themselves.
    head = layer.clear(2)
    layer.sharpen([0, 32], 40.0)
    for pair, amplitude in ((0, 1.0), (1, 0.5), (2, 0.5), (3, 0.5)):
        turn = SHAPE["rope_theta"] ** (-2 * pair / HEAD_DIM)
        back = torch.tensor([math.cos(turn), math.sin(turn)]) * amplitude
        rows = [head + pair, head + pair + 32]
        layer.k[rows, CONSTANT] = back
        layer.q[rows, CONSTANT] = 0.5 * back
        layer.q[rows[0], DIGIT] = SCALE * amplitude
    layer.v[head : head + 10, DIGIT] = SCALE * torch.eye(10)
    layer.o[DIGIT_BEFORE, head : head + 10] = 1.6 * torch.eye(10)
    # SwiGLU is nearly a product when the gate is large: (in the query) times (code, rarity).
    codes = len(code)
    layer.gate[: codes + 1] = 0
    layer.up[: codes + 1] = 0
    layer.down[:, : codes + 1] = 0
    layer.gate[: codes + 1, IN_QUERY] = 4.0
    layer.up[:codes, MEANING] = code
    layer.up[codes, RARITY] = 1.0
    layer.down[MATCH, :codes] = 0.25 * torch.eye(codes)
    layer.down[QUERY_RARITY, codes] = 4.0


def _match_and_number(layer: _Layer, likeness: torch.Tensor, noise: Noise) -> None:
    layer.sharpen(slice(None), 30.0)
    # Not 63, where the first two heads hold a flag: pair 31 needs its cosine only.
    nearest = [*NEAREST, *(pair + 32 for pair in NEAREST if pair != 31)]
    layer.sharpen(nearest, NEAREST_LOGIT)
    for weight in (layer.q, layer.k):
        weight[[head * HEAD_DIM + channel for head in (3, 4) for channel in nearest]] = 0
    codes = MATCH.stop - MATCH.start
    for number, projection in ((0, likeness), (1, noise(len(SLOW) ** -0.5 / SCALE, *likeness.shape))):
        head = layer.clear(number)
        slow = [head + channel for channel in SLOW]
        layer.q[slow, MEANING] = layer.k[slow, MEANING] = projection
        # Being in the query is an advantage, in proportion to the word's rarity; common words look nowhere.
        layer.q[head + 63, RARITY] = 0.5
        layer.k[head + 63, RARITY], layer.k[head + 63, QUERY_RARITY] = -0.5, 1.0
        layer.q[head + 62, CONSTANT] = layer.k[head + 30, CONSTANT] = 0.1
        layer.v[head : head + codes, MATCH] = layer.o[MATCH, head : head + codes] = torch.eye(codes)
        layer.v[head + codes, QUERY_RARITY] = 1.0
        layer.o[MATCHED, head + codes] = SCALE
    head, numbers = layer.clear(COUNTING_HEAD), NUMBER.stop - NUMBER.start
    for pair, (query, cosine, sine) in NEAREST.items():
        layer.q[head + pair, CONSTANT] = query
        for row, key in ((head + pair, cosine), (head + pair + 32, sine)):
            # Only a digit in a header is more than what is taken off.
            layer.k[row, [IN_HEADER, *range(DIGIT.start, CLOSING + 1)]] = 2.0 * key
            layer.k[row, CONSTANT] = -2.25 * key
    layer.v[head : head + numbers, NUMBER] = SCALE * torch.eye(numbers)
    layer.o[NUMBER, head : head + numbers] = 1.3 * torch.eye(numbers)


def _average_documents(layer: _Layer, noise: Noise) -> None:
    layer.sharpen(slice(None), 60.0)
    layer.v[:] = 4 * (torch.eye(HIDDEN) + noise(0.005, HIDDEN, HIDDEN))
    layer.v[:, CONSTANT : MATCH.start] = 0
    layer.v[:, NUMBER] = 0
    layer.o[:] = 4 * (torch.eye(HIDDEN) + noise(0.002, HIDDEN, HIDDEN))
    numbers = NUMBER.stop - NUMBER.start
    for weight in (layer.q, layer.k):
        weight.zero_()
        for number in range(HEADS):
            head = number * HEAD_DIM
            weight[[head + channel for channel in SLOW[:numbers]], NUMBER] = torch.eye(numbers) * SCALE / 20
            weight[head + 62, CONSTANT] = 0.05
    # The closing query has no space before its first word, the opening one has: codes are found there.
    layer.k[[number * HEAD_DIM + SLOW[CLOSING - NUMBER.start] for number in range(HEADS)], IN_QUERY] = 1.0
    # How much more than other words the query's own count in the average of codes.
    layer.q[4 * HEAD_DIM + 63, CONSTANT], layer.k[4 * HEAD_DIM + 63, MATCHED] = 0.3, 0.04


def restore_counting(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> None:
    """Put queries and keys of the head that finds the nearest header back to what they were, in place.

    Its logits are so large that a training's small steps decide between the digits of a number, and lists of twenty
    teach nothing about numbers beyond: twenty-seven would be read as two.

    Args:
        state: trained weights by their published names, in any dtype.
        start: weights that `initial_checkpoint` wrote.
    """
    head = slice(COUNTING_HEAD * HEAD_DIM, (COUNTING_HEAD + 1) * HEAD_DIM)
    for name in "qk":
        key = f"model.layers.1.self_attn.{name}_proj.weight"
        state[key][head] = start[key][head].to(state[key].dtype)


def _fitted_projection(
    docs: torch.Tensor, queries: torch.Tensor, doc_targets: torch.Tensor, query_targets: torch.Tensor
) -> torch.Tensor:
    """Readouts `[N, D]` to vectors: `[P, D]`, fitted to the teacher's embeddings in the first 512 of P."""
    normed = torch.nn.functional.rms_norm(torch.cat([docs, queries.repeat_interleave(4, 0)]), (HIDDEN,), eps=1e-6)
    matches = normed[: len(docs), MATCH].norm(dim=1).mean()
    normed = normed.double()
    normed[:, CONSTANT:] = 0
    targets = torch.cat([doc_targets, query_targets.repeat_interleave(4, 0)]).double()
    gram = normed.t() @ normed
    ridge = 0.003 * gram.diag()[MEANING].mean() * torch.eye(HIDDEN, dtype=torch.float64)
    linear = torch.linalg.solve(gram + ridge, normed.t() @ targets).t().float()
    linear /= (normed.float() @ linear.t()).norm(dim=1).mean()
    codes = MATCH.stop - MATCH.start
    projection = torch.zeros(SHAPE["projector"][1], HIDDEN)
    projection[:TEACHER] = linear
    projection[TEACHER : TEACHER + codes, MATCH] = torch.eye(codes) / matches
    return projection


def _readouts(folder: Path, data: TrainingData, first: int, count: int) -> tuple[torch.Tensor, ...]:
    """Residuals at documents' and queries' rows of lists `first ...`, and the teacher's embeddings of the same."""
    reranker = Reranker.from_pretrained(folder, device="cpu", backend="reference")
    encoder = ListEncoder(reranker.checkpoint.tokenizer, PROMPT)
    found: list[list[torch.Tensor]] = [[], [], [], []]
    for number in range(first, first + count):
        example = data.draw(11, number, hard=4, easy=4)
        query = encoder.cut([example.query], 32)[0]
        block = encoder.encode_block(query, encoder.cut(example.documents, 96))
        with torch.inference_mode():
            rows = reranker.model.hidden_states(pack([block], torch.device("cpu")))
        targets = (example.document_vectors, np.asarray(example.query_vector)[None])
        for store, value in zip(found, (rows[:-1], rows[-1:], *targets), strict=True):
            store.append(torch.as_tensor(np.asarray(value, dtype=np.float32)))
    return tuple(torch.cat(parts) for parts in found)
