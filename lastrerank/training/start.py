"""Weights of a small checkpoint that reads a list, built by hand.

A small decoder does not find out from lists alone, in hours on a CPU, how a listwise prompt is read: which tokens are
the query, where a document begins, that the same word in both means something. What pretraining gives a large decoder
is written into this one's first three layers:

0. (window of 128) In every token: does it stand between `Rank` and the first `<passage`, so in the query? Did a
   `<passage` stand just before it, so is it in a document's header; or within fifty tokens, so near its beginning? Were
   the tokens before this digit digits, and which? Which signs had the token before? Products leave, in query tokens
   only, the word's lights, and everywhere the signs of the pair of words.
1. A head looks for the query's same word (its 32 signs agree) and fetches its lights; if there is none the token finds
   itself, where no lights are. A second does so with pairs. A third averages the digits of the nearest header: which
   document this is.
2. Every token averages its own document (equal numbers attract): meanings in four heads, the lights that were found in
   the fifth, those of pairs in the sixth, those found near the beginning in the seventh, headers (the shorter a
   document, the more of it they are) in the last. At a marker, that is the document's readout; at the last marker, the
   query's.
3. Nearly nothing: left for training.

A word that is found once in a page of a thousand tokens is a thousandth of its average. So the projector makes of every
light that is on at all one that is full, in documents; in the query each is as bright as the word is rare. Their
product is the share of the query that is found, by rarity; beside it stands the cosine of meanings.

Rotary embedding turns channel pairs i and i + d/2 of a head by theta^(-2i/d) a position. What must not depend on the
distance stands in pairs that turn by less than 1e-4 (theta is 1e12 for that), what must, in fast ones. A query `(1, 0)`
and a key `(a, b)` in such a pair give `a cos + b sin` of the angle between them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lastrerank import saving
from lastrerank.checkpoint import open_checkpoint
from lastrerank.families.listwise import PROMPT
from lastrerank.lists import EMBED_TOKEN, RERANK_TOKEN, ListEncoder
from lastrerank.packing import pack
from lastrerank.random_checkpoint import CONTROL_TOKENS, write_random_checkpoint
from lastrerank.reranker import Reranker
from lastrerank.training.data import TrainingData
from lastrerank.training.losses import rank_loss

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE = 576, 8, 64, 896
LAYERS, PROJECTED = 4, 512

# Channels of the residual stream.
MEANING = slice(0, 255)  # the teacher's embedding of the token; the rarer the token, the longer
CONSTANT = 255
IN_QUERY, RANK, PASSAGE, IN_HEADER, BEGINNING = range(256, 261)
DIGIT = slice(261, 271)  # which digit
CLOSING = 271  # the closing query is like one more document
HUNDRED = 272  # two tokens before is a digit, too
DIGIT_BEFORE = slice(273, 283)  # in a digit after a digit: which
NUMBER = slice(DIGIT.start, DIGIT_BEFORE.stop)  # all of these are the code of a document's number
SIGNS = slice(283, 315)  # of the word: +1 or -1 each, other words' agree by chance only
SIGNS_BEFORE = slice(315, 347)  # of the word before it
PAIR = slice(347, 379)  # their products, the signs of the two together
LIGHTS = slice(379, 443)  # four are on, as bright as the word is rare; at a marker: those found near the beginning
FOUND = slice(443, 507)  # lights of the query's same word; at a marker, the document's average
PAIRS_FOUND = slice(507, 571)  # the same for pairs of words
SHORT = 571  # at a marker: how much of the document is its header
FEATURES = (FOUND, PAIRS_FOUND, LIGHTS)
# These hold values up to `SCALE` and are scaled down by the norms; the others are about 1 in any channel.
SCALE = 16
LARGE = (CONSTANT, IN_QUERY, RANK, PASSAGE, IN_HEADER, BEGINNING, *range(NUMBER.start, NUMBER.stop))

ON = 4  # lights of a word
FULL_SHORT = (2.5, 13.0)  # factors of `SHORT` by which it is full below a hundred tokens, and below five hundred
GATE = -4.0  # closes a hidden unit of the projector at the query's readout
FIT_STEPS = 200

SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
    "max_position_embeddings": 32_768, "rope_theta": 1e12, "projector": (960, PROJECTED),
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
    folder: Path, tokenizer: Tokenizer, token_vectors: np.ndarray, data: TrainingData, fit_lists: int = 300
) -> Path:
    """Write the checkpoint this module describes.

    Args:
        folder: where it goes.
        tokenizer: control tokens last; ` Rank`, `<passage` and `<query` are one token each.
        token_vectors: the teacher's embedding of each token's text `[V, 512]`.
        data: lists.
        fit_lists: of them the weights of the features are fitted to; a tenth of it is looked at to centre the markers,
            eight times.
    """
    write_random_checkpoint(folder, SHAPE, tokenizer=tokenizer, dtype=torch.float32, seed=1)
    path = folder / "model.safetensors"
    state, generator = load_file(path), torch.Generator().manual_seed(0)

    def noise(std: float, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    table = _embeddings(state["model.embed_tokens.weight"], tokenizer, token_vectors, data)
    for name, tensor in state.items():
        if "norm" in name:
            tensor.fill_(1.0)
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            tensor[list(LARGE)] /= SCALE
    for index in range(LAYERS):
        layer = _Layer(state, index, noise)
        if index == 0:
            _find_query_and_headers(layer)
        elif index == 1:
            _match_and_number(layer)
        elif index == 2:
            _average_documents(layer)

    def save() -> None:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})

    # What all readouts share says nothing: the markers' own embeddings take it away.
    markers = [tokenizer.token_to_id(name) for name in (EMBED_TOKEN, RERANK_TOKEN)]
    for turn in range(8):
        save()
        for row, found in zip(markers, _readouts(folder, data, 1000 * turn, fit_lists // 10)[:2], strict=True):
            table[row, MEANING] -= 0.3 * found.mean(0)[MEANING]
    save()
    state["projector.0.weight"], state["projector.2.weight"] = _projector(folder, data, fit_lists)
    checkpoint = open_checkpoint(folder)
    raw = {**checkpoint.raw_config, "dtype": "bfloat16"}
    raw["lastrerank"] = {name: value for name, value in raw["lastrerank"].items() if name != "random"}
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    saving.save(folder, raw, tokenizer, checkpoint.tokenizer_config, halved)
    return folder


class _Layer:
    """One layer's weights as views to write into: random and small, reading and writing meanings alone."""

    def __init__(self, state: dict[str, torch.Tensor], index: int, noise: Noise) -> None:
        prefix = f"model.layers.{index}."
        heads = HEADS * HEAD_DIM
        self.q, self.k, self.v = noise(0.06, heads, HIDDEN), noise(0.06, heads, HIDDEN), noise(0.02, heads, HIDDEN)
        self.gate, self.up = noise(0.06, INTERMEDIATE, HIDDEN), noise(0.06, INTERMEDIATE, HIDDEN)
        for weight in (self.q, self.k, self.v, self.gate, self.up):
            weight[:, MEANING.stop :] = 0
        for weight in (self.q, self.k, self.up):
            weight[:, CONSTANT] = noise(0.3, len(weight))
        self.o, self.down = noise(0.003, HIDDEN, heads), noise(0.001, HIDDEN, INTERMEDIATE)
        for weight in (self.o, self.down):
            weight[MEANING.stop :] = 0
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
    table: torch.Tensor, tokenizer: Tokenizer, vectors: np.ndarray, data: TrainingData
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

    table.zero_()
    table[:count, MEANING] = torch.tensor(meaning, dtype=torch.float32)
    table[:, CONSTANT] = 1
    for number in range(len(vectors)):
        # The same word, in whatever case and with a space before it or not.
        text = tokenizer.decode([number])
        word = text.strip().lower() if text and "\ufffd" not in text else str(tokenizer.id_to_token(number))
        draw = np.random.default_rng(zlib.crc32(word.encode()))
        table[number, SIGNS] = torch.tensor(draw.choice([-0.25, 0.25], SIGNS.stop - SIGNS.start)).float()
        on = draw.choice(LIGHTS.stop - LIGHTS.start, ON, replace=False)
        if number < count:
            table[number, LIGHTS.start + torch.tensor(on)] = float(rarity[number, 0]) / 4
    table[one(" Rank", "Rank"), RANK] = 1
    table[one('\n<passage id="', "<passage"), PASSAGE] = 1
    for digit in range(10):
        table[one(f'id="{digit}">', str(digit)), DIGIT.start + digit] = 1
    query = one("\n<query>\n", "<query")
    table[query, CLOSING] = table[query, IN_HEADER] = 1
    return table.mul_(SCALE)


def _find_query_and_headers(layer: _Layer) -> None:
    layer.sharpen([30, 31, 62, 63], 41.0)
    layer.sharpen([*NEAR, *(channel + 32 for channel in NEAR)], 45.0)
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
    layer.q[near, CONSTANT], layer.k[near, PASSAGE] = 1.0, 2.0
    layer.q[head + 30, CONSTANT], layer.k[head + 30, CONSTANT] = 1.08, 0.2
    layer.v[head, PASSAGE] = 4.0
    layer.o[IN_HEADER, head] = 5.0
    # `<passage` within about fifty.
    head = layer.clear(5)
    layer.q[[head + 4, head + 5], CONSTANT] = 1.0
    layer.k[[head + 4, head + 5], PASSAGE] = 2.0
    layer.q[head + 30, CONSTANT], layer.k[head + 30, CONSTANT] = 0.49, 0.2
    layer.v[head, PASSAGE] = 4.0
    layer.o[BEGINNING, head] = 5.0
    # Digits look one token back, where other tokens look at themselves; every token looks one back, and two.
    layer.sharpen([0, 32], 80.0)
    for number, back, everyone in ((2, 1, False), (1, 1, True), (0, 2, True)):
        head = layer.clear(number)
        for pair, amplitude in ((0, 1.0), (1, 0.5), (2, 0.5), (3, 0.5)):
            turn = back * SHAPE["rope_theta"] ** (-2 * pair / HEAD_DIM)
            key = torch.tensor([math.cos(turn), math.sin(turn)]) * amplitude
            rows = [head + pair, head + pair + 32]
            layer.k[rows, CONSTANT] = key
            if everyone:
                layer.q[rows[0], CONSTANT] = amplitude
            else:
                layer.q[rows, CONSTANT] = 0.5 * key
                layer.q[rows[0], DIGIT] = SCALE * amplitude
    digits, signs = DIGIT.stop - DIGIT.start, SIGNS.stop - SIGNS.start
    of_digit, of_signs, of_hundred = (head * HEAD_DIM for head in (2, 1, 0))
    layer.v[of_digit : of_digit + digits, DIGIT] = SCALE * torch.eye(digits)
    layer.o[DIGIT_BEFORE, of_digit : of_digit + digits] = 1.6 * torch.eye(digits)
    layer.v[of_signs : of_signs + signs, SIGNS] = torch.eye(signs)
    layer.o[SIGNS_BEFORE, of_signs : of_signs + signs] = torch.eye(signs)
    layer.v[of_hundred, DIGIT] = SCALE
    layer.o[HUNDRED, of_hundred] = 2.0
    # SwiGLU is nearly a product when the gate is large: (in the query) times (lights), (sign) times (sign before).
    lights = LIGHTS.stop - LIGHTS.start
    used = lights + 2 * signs
    for weight in (layer.gate, layer.up):
        weight[:used] = 0
    layer.down[:, :used] = 0
    layer.gate[:lights, IN_QUERY] = 4.0
    layer.up[:lights, LIGHTS] = 4.0 * torch.eye(lights)
    layer.down[FOUND, :lights] = 0.25 * torch.eye(lights)
    for first, sign in ((lights, 1.0), (lights + signs, -1.0)):
        layer.gate[first : first + signs, SIGNS] = sign * 4 * torch.eye(signs)
        layer.up[first : first + signs, SIGNS_BEFORE] = sign * torch.eye(signs)
        layer.down[PAIR, first : first + signs] = 0.25 * torch.eye(signs)


def _match_and_number(layer: _Layer) -> None:
    layer.sharpen(slice(None), 160.0)
    # Not 63, where the first two heads hold a flag: pair 31 needs its cosine only.
    nearest = [*NEAREST, *(pair + 32 for pair in NEAREST if pair != 31)]
    layer.sharpen(nearest, NEAREST_LOGIT)
    for weight in (layer.q, layer.k):
        weight[[head * HEAD_DIM + channel for head in range(3, HEADS) for channel in nearest]] = 0
    signs, lights = SIGNS.stop - SIGNS.start, LIGHTS.stop - LIGHTS.start
    for number, same, found, flag in ((0, SIGNS, FOUND, 4.0), (1, PAIR, PAIRS_FOUND, 2.5)):
        head = layer.clear(number)
        rows = [head + channel for channel in SLOW[:signs]]
        layer.q[rows, same] = layer.k[rows, same] = torch.eye(signs) / 4
        # Being in the query is an advantage: less than being the same word, more than being the same word elsewhere.
        layer.q[head + 63, CONSTANT] = layer.k[head + 63, IN_QUERY] = flag
        layer.v[head : head + lights, FOUND] = torch.eye(lights)
        layer.o[found, head : head + lights] = torch.eye(lights)
    head, numbers = layer.clear(COUNTING_HEAD), NUMBER.stop - NUMBER.start
    for pair, (query, cosine, sine) in NEAREST.items():
        layer.q[head + pair, CONSTANT] = query
        for row, key in ((head + pair, cosine), (head + pair + 32, sine)):
            # Only a digit in a header is more than what is taken off.
            layer.k[row, [IN_HEADER, *range(DIGIT.start, CLOSING + 1)]] = 2.0 * key
            layer.k[row, CONSTANT] = -2.25 * key
    layer.v[head : head + numbers, NUMBER] = SCALE * torch.eye(numbers)
    layer.o[NUMBER, head : head + numbers] = 1.3 * torch.eye(numbers)


def _average_documents(layer: _Layer) -> None:
    layer.sharpen(slice(None), 60.0)
    layer.sharpen([*SLOW, 63], 200.0)
    numbers = NUMBER.stop - NUMBER.start
    meanings = [slice(first, min(first + HEAD_DIM, MEANING.stop)) for first in range(0, MEANING.stop, HEAD_DIM)]
    # What each head averages, where to, and by what it is enlarged: what is found is rare.
    averages = [(part, part, 4.0) for part in meanings]
    averages += [(FOUND, FOUND, 16.0), (PAIRS_FOUND, PAIRS_FOUND, 16.0), (FOUND, LIGHTS, 16.0)]
    averages += [(slice(IN_HEADER, IN_HEADER + 1), slice(SHORT, SHORT + 1), 4.0)]
    for number, (source, target, gain) in enumerate(averages):
        head = layer.clear(number)
        for weight in (layer.q, layer.k):
            weight[[head + channel for channel in SLOW[:numbers]], NUMBER] = torch.eye(numbers) * SCALE / 20
            weight[head + 62, CONSTANT] = 0.05
        # What stands in the opening query belongs to the closing one, too: a word may be spelt otherwise there.
        layer.k[head + SLOW[CLOSING - NUMBER.start], IN_QUERY] = 1.0
        width = source.stop - source.start
        layer.v[head : head + width, source] = gain * torch.eye(width)
        layer.o[target, head : head + width] = 4 * torch.eye(width)
    # The seventh: tokens near the beginning win.
    layer.q[6 * HEAD_DIM + 63, CONSTANT] = layer.k[6 * HEAD_DIM + 63, BEGINNING] = 0.5


def _projector(folder: Path, data: TrainingData, lists: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[H, D]` and `[P, H]`: meanings as they are; of a document every light that is on at all, of the query
    each as bright as it is; and a constant in documents alone, so that what is found hardly makes them longer.

    How much each counts is fitted to the lists' labels.
    """
    docs, queries, shapes = _readouts(folder, data, 10_000, lists)
    state = load_file(folder / "model.safetensors")
    rows = torch.cat([docs, queries])
    normed = torch.nn.functional.rms_norm(rows, (HIDDEN,), state["model.norm.weight"], eps=1e-6)
    # Logarithms: of how little is full, and of its shares in a document and in the query, for each of `FEATURES`; of
    # meaning's and the constant's share, and the temperature's inverse. How much being short counts has a sign.
    full, shown, asked = torch.full((3,), 4.0), torch.zeros(3), torch.zeros(3)
    rest, short = torch.tensor([0.5, 1.5, 2.0]), torch.zeros(len(FULL_SHORT))
    parameters = [full, shown, asked, rest, short]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    counts = [count for _, count in shapes]
    for _ in range(FIT_STEPS):
        meaning, constant, scale = rest.exp()
        w1, w2 = _weighed(full.exp(), shown.exp(), asked.exp(), meaning, constant, short)
        vectors = torch.nn.functional.normalize(torch.relu(normed @ w1.t()) @ w2.t(), dim=1)
        total = torch.zeros(())
        for own, query, (positive, _) in zip(
            vectors[: len(docs)].split(counts), vectors[len(docs) :].unbind(), shapes, strict=True
        ):
            total = total + rank_loss(scale * (own @ query), positive, 1.0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return w1.detach(), w2.detach()


def _weighed(
    full: torch.Tensor,
    shown: torch.Tensor,
    asked: torch.Tensor,
    meaning: torch.Tensor,
    constant: torch.Tensor,
    short: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A projector; differentiable. The first three `[3]`, a number for each of `FEATURES`; short `[2]`."""
    lights, width = LIGHTS.stop - LIGHTS.start, MEANING.stop
    w1, w2 = torch.zeros(SHAPE["projector"][0], HIDDEN), torch.zeros(PROJECTED, SHAPE["projector"][0])
    eye, constants = torch.eye(lights), width + len(FEATURES) * lights
    ones = 0  # a hidden unit that is one in documents
    w1[ones, CONSTANT], w1[ones, CLOSING] = 1.0, GATE
    w2[constants, ones] = constant

    def full_at(rows: slice, feature: Any, brightness: torch.Tensor | float) -> None:
        """1 - min(brightness * feature, 1), in documents."""
        w1[rows, CONSTANT], w1[rows, CLOSING] = 1.0, GATE
        w1[rows, feature] = -brightness * torch.eye(rows.stop - rows.start)

    first = 1
    for number, feature in enumerate(FEATURES):
        dark, linear = slice(first, first + lights), slice(first + lights, first + 2 * lights)
        rows = slice(width + lights * number, width + lights * (number + 1))
        full_at(dark, feature, full[number])
        w2[rows, ones], w2[rows, dark] = shown[number], -eye * shown[number]
        w1[linear, feature], w2[rows, linear] = eye, eye * asked[number]
        first = linear.stop
    w1[first : first + 2 * width, MEANING] = torch.cat([torch.eye(width), -torch.eye(width)])
    w2[:width, first : first + 2 * width] = torch.cat([torch.eye(width), -torch.eye(width)], 1) * meaning
    first += 2 * width
    w1[first, CLOSING] = w2[constants + 1, first] = 1.0  # in the query: for what is true of a document anyway
    for number, brightness in enumerate(FULL_SHORT):
        first += 1
        full_at(slice(first, first + 1), slice(SHORT, SHORT + 1), brightness)
        w2[constants + 1, first] = -short[number]
    w2[constants + 1, ones] = short.sum()
    return w1, w2


def _readouts(
    folder: Path, data: TrainingData, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Residuals at documents' and queries' rows of lists `first ...`; each list's positive and number of documents."""
    reranker = Reranker.from_pretrained(folder, device="cpu")
    encoder = ListEncoder(reranker.checkpoint.tokenizer, PROMPT)
    docs, queries, shapes = [], [], []
    for number in range(first, first + count):
        example = data.draw(11, number, hard=12, easy=0)
        query = encoder.cut([example.query], 32)[0]
        block = encoder.encode_block(query, encoder.cut(example.documents, 512))
        with torch.inference_mode():
            rows = reranker.model.hidden_states(pack([block], torch.device("cpu")))
        docs.append(rows[:-1].float())
        queries.append(rows[-1:].float())
        shapes.append((example.positive, len(example.documents)))
    return torch.cat(docs), torch.cat(queries), shapes
