"""A model's operations against the reference, on the machine they are to run on; shapes, dtype and windows are its own.

What `lastrerank.selfcheck` does in a process of its own before `auto` takes compiled kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from lastrerank.config import ModelConfig
from lastrerank.graphs import GraphedModel, empty_bucket, fill
from lastrerank.isolation import isolated
from lastrerank.model import LastLayerProjections, LayerWeights, Model, ModelWeights
from lastrerank.ops import Operations, Prefixes
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.packing import PackedBatch

# Lengths of the checks' sequences: one token, around a tile's edge, several tiles and a rest, neighbours on both sides.
LENGTHS = (1, 63, 64, 1025, 65, 129)
_TOKENS, _REPETITIONS, _TIMED_TOKENS, _BUCKET = 512, 50, 16_384, 512  # tokens: of the vocabulary
# Beside twice the plain implementation's own error: so many roundings of the largest value. In fp32 that one is the
# truth here, and another order of summation is no error.
_ROUNDINGS = {torch.float32: 64}


class FailedError(Exception):
    """A check found something else than it should have."""


class SlowError(Exception):
    """The kernels are slower than what they stand for; or something else was running."""


def check(
    operations: Operations,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    begin: Callable[[str], None],
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Every operation of this model's shape against the reference, two layers end to end; on a GPU also repetitions
    beside a busy stream, a graph's replay, and the time.

    Args:
        dtype: as in `ops.select`.
        begin: called with what comes next.
        lengths: of the sequences that attention and the two layers are tried with.

    Raises:
        FailedError: something is wrong; the message says what, and by how much.
        SlowError: it takes longer than the reference.
    """
    kind = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    context = _Context(operations, config, device, kind, torch.Generator(device).manual_seed(0))
    with isolated(device):
        begin("norms and the gate ran")
        _check_rows(context, quantised=dtype != kind)
        begin("rotary embeddings ran")
        _check_rotary(context)
        for window in dict.fromkeys(config.layer_windows):
            begin(f"attention ran, window {window}")
            _check_attention(context, window, lengths)
        begin("the readouts ran")
        _check_readouts(context)
        begin("two layers ran")
        models = _check_model(context, lengths, quantised=dtype != kind)
        if device.type == "cuda":
            begin("attention was repeated beside another stream")
            _check_repetitions(context, lengths)
            begin("a graph was replayed")
            _check_graph(context, models[0])
            begin("time was taken")
            _check_time(context, *models)


_REFERENCE = ReferenceOperations()


@dataclass(frozen=True)
class _Context:
    operations: Operations
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator
    reference: Operations = _REFERENCE

    def randn(self, *size: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        drawn = torch.randn(size, generator=self.generator, device=self.device)
        return (drawn * scale + offset).to(self.dtype)

    def compare(self, what: str, found: torch.Tensor, call: Callable[..., torch.Tensor], *tensors: Any) -> None:
        """The error rule: at most twice what the reference's own is in this dtype, and a few roundings."""
        exact = call(*(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors))
        plain = call(*tensors)
        allowed = 2 * _distance(plain, exact)
        allowed += _ROUNDINGS.get(self.dtype, 4) * torch.finfo(self.dtype).eps * float(exact.abs().max())
        self.expect(what, _distance(found, exact), allowed)

    def expect(self, what: str, error: float, allowed: float) -> None:
        if not error <= allowed:  # a NaN is none either
            raise FailedError(f"{what} is off by {error:.1e}, allowed {allowed:.1e}")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _check_rows(context: _Context, quantised: bool) -> None:
    config, own, reference, eps = context.config, context.operations, context.reference, context.config.rms_norm_eps
    for rows in (1, 63, 257):
        x, y = (context.randn(rows, config.hidden_size, scale=3) for _ in range(2))
        weight = context.randn(config.hidden_size, scale=0.1, offset=1)
        wide = context.randn(rows, 2 * config.intermediate_size, scale=2)
        if quantised:
            _check_quantised(context, x, y, weight, wide)
            continue
        norm = partial(reference.rms_norm, eps=eps)
        context.compare("rms_norm", own.rms_norm(x, weight, eps), norm, x, weight)
        total, normed = own.add_rms_norm(x.clone(), y, weight, eps)
        if not torch.equal(total, x + y):
            raise FailedError("add_rms_norm's sum isn't the sum")
        context.compare("add_rms_norm", normed, norm, x + y, weight)
        context.compare("swiglu", own.swiglu(wide), reference.swiglu, wide)


def _check_quantised(
    context: _Context, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, wide: torch.Tensor
) -> None:
    """Rows that only `linear` understands: the product of both, whose error e4m3's three bits of fraction bound."""
    config, own, reference, eps = context.config, context.operations, context.reference, context.config.rms_norm_eps
    total, normed = own.add_rms_norm(x.clone(), y, weight, eps)
    if not torch.equal(total, x + y):
        raise FailedError("add_rms_norm's sum isn't the sum")
    for what, rows, exact in (
        ("the quantised sum and norm", normed, reference.rms_norm(x + y, weight, eps)),
        ("the quantised norm", own.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps)),
        ("the quantised gate", own.swiglu(wide), reference.swiglu(wide)),
    ):
        matrix = context.randn(config.hidden_size, exact.shape[1], scale=exact.shape[1] ** -0.5)
        product = exact.float() @ matrix.float().t()
        found = own.linear(rows, own.prepare(matrix))
        context.expect(what, _distance(found, product), 0.05 * float(product.abs().max()))


def _check_rotary(context: _Context) -> None:
    config, eps = context.config, context.config.rms_norm_eps
    rows, half = 63, config.head_dim // 2
    positions = torch.arange(rows, device=context.device) * 7
    table = torch.rand(int(positions.max()) + 1, half, generator=context.generator, device=context.device)
    weight = context.randn(config.head_dim, scale=0.1, offset=1) if config.qk_norm else None
    for heads, kv_heads in (
        (config.num_heads, config.num_kv_heads), (config.num_heads, 0), (0, config.num_kv_heads)
    ):  # fmt: skip
        qkv = context.randn(rows, (heads + 2 * kv_heads) * config.head_dim, scale=2)

        def rotate(
            operations: Operations, x: torch.Tensor, w: torch.Tensor | None, heads: int = heads, kv: int = kv_heads
        ) -> torch.Tensor:
            return operations.qk_norm_rope(x.clone(), w, w, table, table, positions, heads, kv, eps)

        found = rotate(context.operations, qkv, weight)
        context.compare("qk_norm_rope", found, partial(rotate, context.reference), qkv, weight)


def _packed(context: _Context, lengths: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v in one projection with NaN behind the last row and beside every row; starts."""
    config = context.config
    rows = sum(lengths)
    wide = torch.full((rows + 64, config.qkv_size + 64), float("nan"), dtype=context.dtype, device=context.device)
    wide[:rows, : config.qkv_size] = context.randn(rows, config.qkv_size)
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q, k, v, _ = wide.split([q_size, kv_size, kv_size, 64], 1)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=context.device)
    return [x.unflatten(1, (-1, config.head_dim)) for x in (q, k, v)], starts


def _check_attention(context: _Context, window: int | None, lengths: Sequence[int]) -> None:
    config, reference, own = context.config, context.reference, context.operations
    (q, k, v), cu = _packed(context, lengths)
    rows, scale, sizes = sum(lengths), config.head_dim**-0.5, tuple(lengths)
    what = f"attention (window {window})"

    def exact(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Any = None, prefixes: Any = None
    ) -> torch.Tensor:
        return reference.attention(q, k, v, cu, sizes, window, scale, rows, prefixes=prefixes)

    found = own.attention(q, k, v, cu, sizes, window, scale)[:rows]
    inner = [x[:rows] for x in (q, k, v)]
    context.compare(what, found, exact, *inner)

    read = torch.tensor(sorted({*(int(x) - 1 for x in cu[1:]), rows // 2}), device=context.device)
    some = own.attention(q[read].contiguous(), k, v, cu, sizes, window, scale, rows=read)
    context.compare(f"{what} of read rows", some, partial(exact, rows=read), q[read].contiguous(), k, v)

    # All others continue the longest.
    longest = max(range(len(lengths)), key=lambda n: lengths[n])
    before = (sum(lengths[:longest]), lengths[longest])
    host = tuple((0, 0) if n == longest else before for n in range(len(lengths)))
    prefixes = Prefixes(torch.tensor(host, dtype=torch.int32, device=context.device), host)
    continued = own.attention(q, k, v, cu, sizes, window, scale, prefixes=prefixes)[:rows]
    context.compare(f"{what} of what continues", continued, partial(exact, prefixes=prefixes), *inner)

    # Neighbours of the longest sequence are NaN: nothing of it changes. Then over the queries themselves.
    alone = slice(before[0], before[0] + before[1])
    expected = found[alone].clone()
    for x in (q, k, v):
        x[: alone.start], x[alone.stop : rows] = float("nan"), float("nan")
    for target in (None, q):
        again = own.attention(q, k, v, cu, sizes, window, scale, out=target)[alone]
        if not torch.equal(again, expected):
            where = "beside NaN" if target is None else "in place"
            raise FailedError(f"{what} {where} is not what it was before")


def _check_readouts(context: _Context) -> None:
    config, reference, own, eps = context.config, context.reference, context.operations, context.config.rms_norm_eps
    width = config.hidden_size
    hidden, norm = context.randn(9, width, scale=2), context.randn(width, scale=0.1, offset=1)
    w1, w2 = context.randn(128, width, scale=width**-0.5), context.randn(64, 128, scale=128**-0.5)
    docs, queries, of_docs, of_sequences = (
        torch.tensor(x, device=context.device)
        for x in ([0, 1, 3, 4, 6, 7], [2, 5, 8], [0, 0, 1, 1, 2, 2], [0, 0, 1])
    )

    def score(operations: Operations) -> tuple[torch.Tensor, ...]:
        return operations.score(hidden, docs, queries, of_docs, of_sequences, norm, w1, w2, eps)

    # In fp32 whatever the dtype of states and weights is: what sums of so many terms in another order may differ by.
    order = width * torch.finfo(torch.float32).eps
    names = ("document vectors", "query vectors", "the score of documents")
    for name, found_part, exact in zip(names, score(own), score(reference), strict=True):
        context.expect(name, _distance(found_part, exact), order * float(exact.abs().max()))
    vector = torch.randn(width, generator=context.generator, device=context.device) * width**-0.5
    exact = reference.logit(hidden, norm, vector, eps)
    context.expect("logit", _distance(own.logit(hidden, norm, vector, eps), exact), order * float(exact.abs().max()))


def _two_layers(context: _Context, operations: Operations, tensors: Mapping[str, torch.Tensor]) -> Model:
    config = replace(context.config, num_layers=2, layer_windows=_two_windows(context.config))
    q_size = config.num_heads * config.head_dim

    def layer(index: int, qkv: torch.Tensor | None) -> LayerWeights:
        bias = tensors[f"{index} bias"] if config.attention_bias else None
        head = tensors[f"{index} head"] if config.qk_norm else None
        return LayerWeights(
            input_norm=tensors[f"{index} norm"], qkv=None if qkv is None else operations.prepare(qkv), qkv_bias=bias,
            q_norm=head, k_norm=head, o=operations.prepare(tensors[f"{index} o"]),
            o_bias=tensors[f"{index} o bias"] if config.output_bias else None,
            post_norm=tensors[f"{index} post"], gate_up=operations.prepare(tensors[f"{index} gate_up"]),
            down=operations.prepare(tensors[f"{index} down"]),
        )  # fmt: skip

    last = tensors["1 qkv"]
    projections = LastLayerProjections(operations.prepare(last[:q_size]), operations.prepare(last[q_size:]))
    layers = (layer(0, tensors["0 qkv"]), layer(1, None))
    return Model(config, ModelWeights(tensors["embedding"], layers, projections, tensors["final"]), operations)


def _two_windows(config: ModelConfig) -> tuple[int | None, ...]:
    kinds = tuple(dict.fromkeys(config.layer_windows))
    return (kinds * 2)[:2]


def _check_model(context: _Context, lengths: Sequence[int], quantised: bool) -> tuple[Model, Model]:
    """The model by these operations and by the reference, in this dtype."""
    config, width = context.config, context.config.hidden_size
    tensors = {"embedding": context.randn(_TOKENS, width), "final": context.randn(width, scale=0.1, offset=1)}
    attended = config.num_heads * config.head_dim
    for index in range(2):
        for name, out, inner in (
            ("qkv", config.qkv_size, width), ("o", width, attended), ("gate_up", 2 * config.intermediate_size, width),
            ("down", width, config.intermediate_size),
        ):  # fmt: skip
            tensors[f"{index} {name}"] = context.randn(out, inner, scale=inner**-0.5)
        tensors[f"{index} bias"] = context.randn(config.qkv_size, scale=0.1)
        tensors[f"{index} o bias"] = context.randn(width, scale=0.1)
        tensors[f"{index} head"] = context.randn(config.head_dim, scale=0.1, offset=1)
        for name in ("norm", "post"):
            tensors[f"{index} {name}"] = context.randn(width, scale=0.1, offset=1)
    own = _two_layers(context, context.operations, tensors)
    plain = _two_layers(context, context.reference, tensors)
    exact = _two_layers(context, context.reference, {name: x.float() for name, x in tensors.items()})
    batch = _batch_of(context, lengths)
    truth = exact.hidden_states(batch)
    error, allowed = _distance(own.hidden_states(batch), truth), 2 * _distance(plain.hidden_states(batch), truth)
    largest = float(truth.abs().max())
    allowed += (0.1 if quantised else _ROUNDINGS.get(context.dtype, 4) * torch.finfo(context.dtype).eps) * largest
    context.expect("the state after two layers", error, allowed)
    return own, plain


def _check_repetitions(context: _Context, lengths: Sequence[int]) -> None:
    (q, k, v), cu = _packed(context, lengths)
    config, rows, sizes = context.config, sum(lengths), tuple(lengths)
    q, k, v = q[:rows], k[:rows], v[:rows]
    tiles = context.operations.attention_tiles(config, context.dtype, cu, sizes, None)
    busy, noise = torch.cuda.Stream(context.device), context.randn(2048, 2048)
    busy.wait_stream(torch.cuda.current_stream(context.device))
    for window in dict.fromkeys(config.layer_windows):

        def attend(window: int | None = window) -> torch.Tensor:
            return context.operations.attention(
                q, k, v, cu, sizes, window, config.head_dim**-0.5, tiles=tiles
            ).clone()

        first = attend()
        for number in range(_REPETITIONS):
            with torch.cuda.stream(busy):
                for _ in range(20):
                    torch.mm(noise, noise)
            if not torch.equal(attend(), first):
                raise FailedError(f"attention gives other bits at repetition {number + 1}")
    torch.cuda.synchronize(context.device)


def _batch_of(context: _Context, lengths: Sequence[int]) -> PackedBatch:
    """A pass of random tokens, whose sequences' last rows are read."""
    starts = torch.tensor([0, *accumulate(lengths)], device=context.device)
    return PackedBatch(
        ids=torch.randint(_TOKENS, (sum(lengths),), generator=context.generator, device=context.device),
        positions=torch.cat([torch.arange(n, device=context.device) for n in lengths]), cu_seqlens=starts.int(),
        seqlens=tuple(lengths), read_rows=starts[1:] - 1, max_positions=max(lengths),
    )  # fmt: skip


def _check_graph(context: _Context, own: Model) -> None:
    batch, bucket = _batch_of(context, (_BUCKET - 100,)), empty_bucket(_BUCKET, context.device)
    fill(bucket, batch)
    eager = own.hidden_states(bucket)[: len(batch.read_rows)]
    graphs = GraphedModel(own, context.device, (_BUCKET,))
    graphs.capture()
    for error in graphs.failed.values():
        raise error
    replayed = graphs.hidden_states(batch)
    if replayed is None or not torch.equal(replayed, eager):
        raise FailedError("a graph's replay is not what its passes compute")


def _check_time(context: _Context, own: Model, plain: Model) -> None:
    """Where the device is the limit: two layers of a short pass are a matter of launching them, which a graph does away
    with."""
    batch = _batch_of(context, (_TIMED_TOKENS,))

    def seconds(model: Model) -> float:
        times = []
        for _ in range(4):  # the first compiles and fills caches
            torch.cuda.synchronize(context.device)
            started = time.perf_counter()
            model.hidden_states(batch)
            torch.cuda.synchronize(context.device)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    ours, theirs = seconds(own), seconds(plain)
    if ours > 1.2 * theirs:  # two layers are short: a list of tiles that a whole pass makes once
        raise SlowError(f"it takes {ours * 1e3:.2f} ms where the reference takes {theirs * 1e3:.2f} ms")
