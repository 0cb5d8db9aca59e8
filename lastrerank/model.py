"""The forward of a reranker's Qwen3 or Qwen2 decoder, by hand.

One layer is finished for all tokens before the next starts, so one layer's keys and values exist at a time. Between
two attentions everything is row by row, so it runs over chunks of rows: output projection, residual, norm, MLP,
residual, next norm, next projection. What must exist for all T tokens is the residual `[T, D]` and one packed
projection `[T, (Hq + 2 Hkv) d]`, whose query part the attention output overwrites. The last layer computes what is
read: keys and values for all tokens, everything else for the read rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lastrerank.config import ModelConfig
from lastrerank.ops import Operations, Weight
from lastrerank.packing import PackedBatch
from lastrerank.readouts import Readout

# Rows of one chunk between attentions. Bounds the MLP's buffers: rows * 3 * intermediate_size elements.
ROW_CHUNK = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. qkv `[(Hq + 2 Hkv) d, D]` and gate_up `[2F, D]` are packed; qkv is None in the last layer."""

    input_norm: torch.Tensor
    qkv: Weight | None
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Weight
    down: Weight


@dataclass(frozen=True)
class LastLayerProjections:
    """The last layer's qkv projection in two parts: queries are computed for read rows only."""

    q: Weight
    kv: Weight


@dataclass(frozen=True)
class ModelWeights:
    """embedding `[V, D]` in any dtype, layers, the last layer's split projection, final norm `[D]` (in the dtype of the
    residual), and what reads scores from the last states (a bare decoder has none)."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    last: LastLayerProjections
    norm: torch.Tensor
    readout: Readout | None = None


class Model:
    """A decoder bound to one set of operations. Holds no state between passes."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Operations) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self._scale = config.head_dim**-0.5
        # On the CPU, as Transformers does it: a GPU's power function rounds differently.
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
        self.frequencies = (1.0 / config.rope_theta**exponent).to(weights.norm.device)
        # MKL chooses a function's kernel at its first call. Where several threads make it, one may get a coarse kernel:
        # then the angles of a first pass are off by 1e-4 (pytorch/pytorch, issue 188792).
        for function in (torch.cos, torch.sin):
            function(torch.zeros(1, device="cpu"))

    def hidden_states(self, batch: PackedBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Residual stream `[R, D]` after the last layer at `batch.read_rows`, before the final norm.

        on_layer: called with the number of tokens whenever a layer is done, for progress.
        """
        config, ops, layers = self.config, self.ops, self.weights.layers
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        cos, sin = self._rope_table(batch.max_positions, batch.ids.device)

        tiles = ops.attention_tiles(
            config, self.weights.norm.dtype, batch.cu_seqlens, batch.seqlens, batch.prefixes
        )
        residual = ops.embed(batch.ids, self.weights.embedding).to(self.weights.norm.dtype)
        qkv = self._by_rows(self._first_projection, residual)
        for index in range(len(layers) - 1):
            layer = layers[index]
            qkv = ops.qk_norm_rope(
                qkv, layer.q_norm, layer.k_norm, cos, sin, batch.positions,
                config.num_heads, config.num_kv_heads, config.rms_norm_eps,
            )  # fmt: skip
            q, k, v = (
                x.unflatten(1, (-1, config.head_dim)) for x in qkv.split([q_size, kv_size, kv_size], dim=1)
            )
            out = None if torch.is_grad_enabled() else q
            attended = ops.attention(
                q, k, v, batch.cu_seqlens, batch.seqlens, config.layer_windows[index], self._scale, out=out,
                prefixes=batch.prefixes, tiles=tiles,
            ).flatten(1)  # fmt: skip
            residual, qkv = self._between(index, attended, residual, qkv)
            if on_layer is not None:
                on_layer(batch.num_tokens)

        # The last layer. `qkv` holds its keys and values only.
        layer, rows = layers[-1], batch.read_rows
        residual = residual[rows]
        normed = ops.rms_norm(residual, layer.input_norm, config.rms_norm_eps)
        q_bias = None if layer.qkv_bias is None else layer.qkv_bias[:q_size]
        q = ops.linear(normed, self.weights.last.q, q_bias)
        q = ops.qk_norm_rope(
            q, layer.q_norm, None, cos, sin, batch.positions[rows], config.num_heads, 0, config.rms_norm_eps
        )
        kv = ops.qk_norm_rope(
            qkv, None, layer.k_norm, cos, sin, batch.positions, 0, config.num_kv_heads, config.rms_norm_eps
        )
        k, v = (x.unflatten(1, (-1, config.head_dim)) for x in kv.split([kv_size, kv_size], dim=1))
        attended = ops.attention(
            q.unflatten(1, (-1, config.head_dim)), k, v, batch.cu_seqlens, batch.seqlens,
            config.layer_windows[-1], self._scale, rows=rows, prefixes=batch.prefixes,
        )  # fmt: skip
        residual, down = self._mlp(layer, attended.flatten(1), residual)
        if on_layer is not None:
            on_layer(batch.num_tokens)
        return residual + down

    # Row-wise parts: each takes and returns rows, so that it can run on any chunk of them.

    def _first_projection(self, residual: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        normed = self.ops.rms_norm(residual, self.weights.layers[0].input_norm, self.config.rms_norm_eps)
        return self._project(0, normed, out)

    def _between(
        self, index: int, attended: torch.Tensor, residual: torch.Tensor, qkv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From layer `index`'s attention output to the next layer's projection, and the residual on the way."""
        layer, following = self.weights.layers[index], self.weights.layers[index + 1]

        def rows(attended: torch.Tensor, residual: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            residual, down = self._mlp(layer, attended, residual)
            residual, normed = self.ops.add_rms_norm(
                residual, down, following.input_norm, self.config.rms_norm_eps
            )
            return residual, self._project(index + 1, normed, out)

        if torch.is_grad_enabled():
            residual, qkv = rows(attended, residual, None)
            return residual, qkv
        # In place: a chunk's attention output has been read when its next projection is written over it. The last
        # layer's keys and values go where keys and values always stand.
        target = qkv if index + 2 < len(self.weights.layers) else qkv[:, -self._kv_size :]
        for chunk in _chunks(residual):
            rows(attended[chunk], residual[chunk], target[chunk])
        return residual, target

    def _mlp(
        self, layer: LayerWeights, attended: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projection, residual, norm, MLP. Returns (residual, what the MLP adds to it)."""
        ops = self.ops
        projected = ops.linear(attended, layer.o, layer.o_bias)
        residual, normed = ops.add_rms_norm(residual, projected, layer.post_norm, self.config.rms_norm_eps)
        del projected  # its memory is the next product's
        return residual, ops.linear(ops.linear_swiglu(normed, layer.gate_up), layer.down)

    def _project(self, index: int, normed: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        layer = self.weights.layers[index]
        if layer.qkv is not None:
            return self.ops.linear(normed, layer.qkv, layer.qkv_bias, out)
        q_size = self.config.num_heads * self.config.head_dim
        bias = None if layer.qkv_bias is None else layer.qkv_bias[q_size:]
        return self.ops.linear(normed, self.weights.last.kv, bias, out)

    @property
    def _kv_size(self) -> int:
        return 2 * self.config.num_kv_heads * self.config.head_dim

    def _by_rows(
        self, part: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor], residual: torch.Tensor
    ) -> torch.Tensor:
        if torch.is_grad_enabled():
            return part(residual, None)
        width = self.config.qkv_size if len(self.weights.layers) > 1 else self._kv_size
        target = residual.new_empty(len(residual), width)
        for chunk in _chunks(residual):
            part(residual[chunk], target[chunk])
        return target

    def _rope_table(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, fp32 `[length, d/2]`."""
        angle = torch.arange(length, device=device).float()[:, None] * self.frequencies
        return angle.cos(), angle.sin()


def _chunks(rows: torch.Tensor) -> Iterator[slice]:
    step = ROW_CHUNK[rows.device.type]
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
