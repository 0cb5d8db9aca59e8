"""Reading and writing checkpoints in the published format: `config.json`, `tokenizer.json`, safetensors.

Nothing here executes code from a checkpoint. Every tensor is accounted for: missing, unknown, misshapen or
non-finite ones are errors that name them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lastrerank.config import ModelConfig
from lastrerank.model import LastLayerProjections, LayerWeights, ModelWeights
from lastrerank.ops import QuantisedWeight, Weight

BUNDLED_MODELS = Path(__file__).parent / "models"

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors", "model.safetensors.index.json")
# Not weights of this model: an output head that is never used, and a buffer some exporters write.
_IGNORED = re.compile(r"lm_head\.weight|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# `Operations.prepare`.
Prepare = Callable[[torch.Tensor, torch.Tensor | None], Weight]
# The largest magnitude of a quantised weight: 7 bits, as the native kernels want it (csrc/kernels.cpp).
_INT8_MAX = 64
# The projector's two matrices, by the names of the published package and of its ports.
_PROJECTOR = re.compile(r"(?:projector\.)?(0|2|linear1|linear2)\.weight")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its small files parsed. `weights` reads the large ones."""

    folder: Path
    raw_config: Mapping[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer

    def weights(
        self, device: torch.device, dtype: torch.dtype, prepare: Prepare | None = None
    ) -> ModelWeights:
        """All weights on `device` in `dtype`, q, k, v and gate, up packed; the embedding table as stored, on a CPU
        memory-mapped.

        prepare: `Operations.prepare`; gets each linear weight as stored, one at a time, and decides what is kept.

        Raises:
            ValueError: a file is damaged, or tensors are missing, unknown, misshapen or not finite.
        """
        with _Tensors(self.folder) as tensors:
            return _load(self.config, tensors, device, dtype, prepare)


def resolve(id_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a folder as it is, a bundled model's name, or a Hub id, downloaded once.

    Raises:
        ValueError: neither a folder nor something the Hub knows, or the Hub can't be reached.
    """
    path = Path(id_or_path)
    if path.is_dir():
        return path
    name = str(id_or_path)
    if (BUNDLED_MODELS / name / "config.json").is_file():
        return BUNDLED_MODELS / name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"id_or_path is {name!r}: no such folder, and no Hub id of the form 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"id_or_path is {name!r}: no such folder, and the Hub did not serve it: {error}") from error


def open_checkpoint(id_or_path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Resolve a checkpoint and read its configuration and tokenizer.

    Raises:
        ValueError: a file is missing or malformed, or the checkpoint is not of this family.
    """
    folder = resolve(id_or_path, revision)
    raw = _json(folder / "config.json")
    tokenizer_config = folder / "tokenizer_config.json"
    limit = _json(tokenizer_config).get("model_max_length") if tokenizer_config.is_file() else None
    architectures = raw.get("architectures") or []
    if any("Classification" in name for name in architectures):
        raise ValueError(
            f"{folder}: architectures is {architectures}, a classifier; expected a last-token reranker "
            "(JinaForRanking: a Qwen3 decoder with a projector)"
        )
    config = ModelConfig.from_dict(raw, limit)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: tokenizer.json is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{path}: {tokenizer.get_vocab_size()} tokens, but config.json has vocab_size {config.vocab_size}"
        )
    return Checkpoint(folder, raw, config, tokenizer)


def save(
    folder: str | os.PathLike[str],
    raw_config: Mapping[str, Any],
    tokenizer: Tokenizer,
    model_max_length: int,
    state: Mapping[str, torch.Tensor],
) -> None:
    """Write a checkpoint in the published format. The weights appear under their final name only when complete."""
    from safetensors.torch import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
    tokenizer.save(str(target / "tokenizer.json"))
    limits = {"model_max_length": model_max_length, "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(limits, indent=2) + "\n")
    partial = target / "model.safetensors.partial"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(partial), metadata={"format": "pt"})
    partial.replace(target / "model.safetensors")


def state_dict(config: ModelConfig, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Weights by their published names, unpacked (views); the inverse of loading. A quantised weight is what it has
    become, and its scales are beside it under `..._scale`.

    Raises:
        ValueError: a weight is quantised and can't be unpacked.
    """
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    state |= {"projector.0.weight": weights.w1, "projector.2.weight": weights.w2}
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def put(parts: dict[str, int], *stacked: Weight) -> None:
        """The parts of stacked weights, by name and number of outputs."""
        whole = torch.cat([weight if isinstance(weight, torch.Tensor) else weight.unpack() for weight in stacked])
        state.update(zip(parts, whole.split(list(parts.values())), strict=True))
        scales = [weight.scales for weight in stacked if isinstance(weight, QuantisedWeight)]
        if scales:
            names = (f"{name}_scale" for name in parts)
            state.update(zip(names, torch.cat(scales).split(list(parts.values())), strict=True))

    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        qkv = {f"{prefix}self_attn.{n}_proj.weight": s for n, s in (("q", q_size), ("k", kv_size), ("v", kv_size))}
        put(qkv, *((weights.last.q, weights.last.kv) if layer.qkv is None else (layer.qkv,)))
        if layer.qkv_bias is not None:
            for name, part in zip("qkv", layer.qkv_bias.split([q_size, kv_size, kv_size]), strict=True):
                state[f"{prefix}self_attn.{name}_proj.bias"] = part
        if layer.q_norm is not None and layer.k_norm is not None:
            state[f"{prefix}self_attn.q_norm.weight"] = layer.q_norm
            state[f"{prefix}self_attn.k_norm.weight"] = layer.k_norm
        put({f"{prefix}self_attn.o_proj.weight": config.hidden_size}, layer.o)
        put({f"{prefix}mlp.{name}_proj.weight": config.intermediate_size for name in ("gate", "up")}, layer.gate_up)
        put({f"{prefix}mlp.down_proj.weight": config.hidden_size}, layer.down)
        state[f"{prefix}input_layernorm.weight"] = layer.input_norm
        state[f"{prefix}post_attention_layernorm.weight"] = layer.post_norm
    return state


def quantised(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state in which weights have a `..._scale` fp32 `[out]`, those as int8 `[out, in]`.

    What their grids can't hold is kept apart: `..._outlier` fp32 `[E]` at `..._outlier_index` int32 `[E, 2]`.
    """
    found = dict(state)
    for name, tensor in state.items():
        if f"{name}_scale" in state:
            steps = (tensor / state[f"{name}_scale"][:, None]).round()
            large = steps.abs() > _INT8_MAX
            found[name] = steps.masked_fill(large, 0).to(torch.int8)
            if large.any():
                found[f"{name}_outlier"], found[f"{name}_outlier_index"] = tensor[large], large.nonzero().int()
    return found


class _Tensors:
    """All tensors of a folder's safetensors files by name, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._paths: dict[str, str] = {}  # by tensor
        self._files: dict[str, Any] = {}  # by path

    def __enter__(self) -> _Tensors:
        from safetensors import SafetensorError, safe_open

        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(_json(index)["weight_map"].values()))
        elif (self._folder / "model.safetensors").is_file():
            names = ["model.safetensors"]
        else:
            raise ValueError(f"{self._folder}: neither model.safetensors nor model.safetensors.index.json is there")
        for name in names:
            path = self._folder / name
            if Path(name).name != name or not path.is_file():
                raise ValueError(f"{self._folder}: {name}, listed in model.safetensors.index.json, is missing")
            try:
                opened = self._stack.enter_context(safe_open(str(path), framework="pt"))
                self._files[str(path)] = opened
                self._paths.update(dict.fromkeys(opened.keys(), str(path)))
            except SafetensorError as error:
                raise ValueError(f"{path}: damaged or incomplete: {error}") from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> Iterator[str]:
        return iter(self._paths)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._paths[name]].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._files[self._paths[name]].get_tensor(name)

    def read_apart(self, name: str) -> torch.Tensor:
        """In a mapping of its own, no page of it touched: to keep it keeps no other tensor's pages in memory."""
        from safetensors import safe_open

        with safe_open(self._paths[name], framework="pt") as opened:
            return opened.get_tensor(name)


def _load(
    config: ModelConfig,
    tensors: _Tensors,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Prepare | None,
) -> ModelWeights:
    stored = {_canonical(name): name for name in tensors.names() if not _IGNORED.fullmatch(name)}
    if not {"projector.0.weight", "projector.2.weight"} <= stored.keys():
        raise ValueError(
            "no projector: expected projector.0.weight and projector.2.weight (or linear1, linear2); "
            "a plain decoder without one is no last-token reranker"
        )
    hidden, p1, p = config.hidden_size, *(tensors.shape(stored[f"projector.{i}.weight"])[0] for i in (0, 2))
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "projector.0.weight": (p1, hidden),
        "projector.2.weight": (p, p1),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            expected[f"{prefix}self_attn.{name}_proj.weight"] = (size, hidden)
            if config.attention_bias:
                expected[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        if config.qk_norm:
            expected[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            expected[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
        expected[f"{prefix}self_attn.o_proj.weight"] = (hidden, q_size)
        for name in ("gate", "up"):
            expected[f"{prefix}mlp.{name}_proj.weight"] = (config.intermediate_size, hidden)
        expected[f"{prefix}mlp.down_proj.weight"] = (hidden, config.intermediate_size)
        expected[f"{prefix}input_layernorm.weight"] = (hidden,)
        expected[f"{prefix}post_attention_layernorm.weight"] = (hidden,)

    for name, shape in list(expected.items()):
        if f"{name}_scale" in stored:  # quantised
            expected[f"{name}_scale"] = shape[:1]
            if f"{name}_outlier" in stored:
                expected[f"{name}_outlier"] = tensors.shape(stored[f"{name}_outlier"])[:1]
                expected[f"{name}_outlier_index"] = (*expected[f"{name}_outlier"], 2)
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first: {', '.join(missing[:3])}")
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are unknown, the first: {', '.join(unknown[:3])}")
    for name, shape in expected.items():
        if tensors.shape(stored[name]) != shape:
            raise ValueError(f"{name} has shape {tensors.shape(stored[name])}, expected {shape} from config.json")

    def stored_tensor(*names: str) -> torch.Tensor:
        """One tensor, or several along the first dimension, as stored and checked to be finite."""
        parts = []
        for name in names:
            part = tensors.read(stored[name])
            if f"{name}_scale" in stored and part.dtype == torch.int8:
                part = part.float() * tensors.read(stored[f"{name}_scale"])[:, None]
                if f"{name}_outlier" in stored:
                    rows, columns = tensors.read(stored[f"{name}_outlier_index"]).long().T
                    if not ((rows >= 0) & (rows < len(part)) & (columns >= 0) & (columns < part.shape[1])).all():
                        raise ValueError(f"{name}_outlier_index points outside of {tuple(part.shape)}")
                    part[rows, columns] = tensors.read(stored[f"{name}_outlier"])
            if not part.is_floating_point():
                raise ValueError(f"{name} is stored as {part.dtype}, expected floating point")
            # The sum shows any NaN or infinity in one pass; only then is it worth a second look.
            if not torch.isfinite(part.sum(dtype=torch.float32)) and not torch.isfinite(part).all():
                raise ValueError(f"{name} holds NaN or infinity")
            parts.append(part.to(device))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read(*names: str) -> torch.Tensor:
        return stored_tensor(*names).to(dtype, copy=True)  # a view would keep the whole file mapped

    def embedding() -> torch.Tensor:
        name = "model.embed_tokens.weight"
        table = stored_tensor(name)
        if device.type != "cpu" or f"{name}_scale" in stored:
            return table
        return tensors.read_apart(stored[name])  # `table` is checked: all its pages, and its mapping, are in memory

    def linear(*names: str, outputs: slice = slice(None)) -> Weight:
        """Some outputs of a linear, or of several along the first dimension, as the backend wants them."""
        weight, scales = stored_tensor(*names)[outputs], None
        if all(f"{name}_scale" in stored for name in names):
            scales = torch.cat([tensors.read(stored[f"{name}_scale"]) for name in names])[outputs]
            if not (scales > 0).all():
                raise ValueError(f"{names[0]}_scale is not positive everywhere")
        kept = weight if prepare is None else prepare(weight, scales)
        return kept.to(dtype) if isinstance(kept, torch.Tensor) else kept

    def qkv(index: int) -> tuple[str, ...]:
        return tuple(f"model.layers.{index}.self_attn.{x}_proj.weight" for x in "qkv")

    last = config.num_layers - 1

    def layer_weights(index: int) -> LayerWeights:
        prefix, attn = f"model.layers.{index}.", f"model.layers.{index}.self_attn."
        return LayerWeights(
            input_norm=read(f"{prefix}input_layernorm.weight"),
            qkv=None if index == last else linear(*qkv(index)),
            qkv_bias=read(*(f"{attn}{x}_proj.bias" for x in "qkv")) if config.attention_bias else None,
            q_norm=read(f"{attn}q_norm.weight") if config.qk_norm else None,
            k_norm=read(f"{attn}k_norm.weight") if config.qk_norm else None,
            o=linear(f"{attn}o_proj.weight"),
            post_norm=read(f"{prefix}post_attention_layernorm.weight"),
            gate_up=linear(f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"),
            down=linear(f"{prefix}mlp.down_proj.weight"),
        )

    return ModelWeights(
        embedding=embedding(),
        layers=tuple(layer_weights(index) for index in range(config.num_layers)),
        last=LastLayerProjections(
            q=linear(*qkv(last), outputs=slice(q_size)), kv=linear(*qkv(last), outputs=slice(q_size, None))
        ),
        norm=read("model.norm.weight"),
        w1=read("projector.0.weight"),
        w2=read("projector.2.weight"),
    )


def _canonical(name: str) -> str:
    projector = _PROJECTOR.fullmatch(name)
    if projector:
        return f"projector.{ {'linear1': '0', 'linear2': '2'}.get(projector[1], projector[1]) }.weight"
    if re.match(r"(layers|embed_tokens|norm)\.", name):
        return f"model.{name}"
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent}: {path.name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
