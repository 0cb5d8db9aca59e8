"""What stands in a checkpoint's folder: small JSON files, and tensors by the names of the published packages.

Nothing here executes code from a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lastrerank.config import ModelConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# No weights: a buffer some exporters write.
IGNORED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# The projector's two matrices, by the names of the published package and of its ports.
PROJECTOR = re.compile(r"(?:projector\.)?(0|2|linear1|linear2)\.weight")
EMBEDDING = "model.embed_tokens.weight"
# Names of safetensors' types that hold plain numbers.
NUMBERS = ("F64", "F32", "F16", "BF16")
# A configuration is under a megabyte.
_MOST_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that holds an object.

    Raises:
        ValueError: it is missing, no regular file, too large, or no JSON object; the message names it.
    """
    value = _json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json_list(path: Path) -> list[Any]:
    """The same of one that holds a list."""
    value = _json(path)
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected a JSON list, got {type(value).__name__}")
    return value


def _json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path, _MOST_JSON).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: not JSON: {error}") from error


def read_bytes(path: Path, most: int) -> bytes:
    """A regular file of at most `most` bytes.

    Raises:
        ValueError: it is missing, no regular file, too large, or can't be read; the message names it.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise ValueError(f"{path}: no regular file")
        if found.st_size > most:
            raise ValueError(f"{path}: {found.st_size} bytes, expected at most {most}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error


def small_files(folder: Path) -> list[Path]:
    """Those of a folder that decide what its checkpoint computes, but for the weights."""
    paths = (folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json"))
    return [path for path in paths if path.exists()]


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and for several the file of each tensor; `model.safetensors` goes before an
    index, as in Transformers."""
    index, whole = folder / INDEX, folder / WEIGHTS
    where = None
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{index}: weight_map is {where!r:.80}, expected an object of files by tensor")
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{index}: weight_map[{name!r:.80}] is {file!r:.80}, expected a safetensors file's name"
                )
    if whole.exists():
        return [whole], None
    if where is None:
        raise ValueError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")
    paths = [folder / name for name in sorted(set(where.values()))]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{folder}: {path.name}, listed in {INDEX}, is missing")
    return paths, where


class Tensors:
    """All tensors of a folder's safetensors files by name, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._paths: dict[str, str] = {}  # by tensor
        self._files: dict[str, Any] = {}  # by path

    def __enter__(self) -> Tensors:
        from safetensors import SafetensorError, safe_open

        paths, where = weight_files(self._folder)
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path}: no regular file")
            try:
                opened = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: damaged or incomplete: {error}") from error
            self._files[str(path)] = opened
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if name in self._paths:
                    raise ValueError(f"{name} is in {Path(self._paths[name]).name} and in {path.name}")
                if where is not None and where.get(name) != path.name:
                    raise ValueError(f"{path}: holds {name}, which {INDEX} has in {where.get(name)}")
                self._paths[name] = str(path)
        absent = sorted((where or {}).keys() - self._paths.keys())
        if absent:
            raise ValueError(f"{self._folder}: {absent[0]} is listed in {INDEX}, but {where[absent[0]]} lacks it")  # type: ignore[index]
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> Iterator[str]:
        return iter(self._paths)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The stored type, as safetensors calls it."""
        return str(self._slice(name).get_dtype())

    def rows(self, name: str, start: int) -> torch.Tensor:
        """One row of a matrix."""
        with torch.device("cpu"):  # slices follow the default device, whole tensors don't
            return self._slice(name)[start : start + 1][0]

    def read(self, name: str) -> torch.Tensor:
        return self._files[self._paths[name]].get_tensor(name)

    def read_apart(self, name: str) -> torch.Tensor:
        """In a mapping of its own, no page of it touched: to keep it keeps no other tensor's pages in memory."""
        from safetensors import safe_open

        with safe_open(self._paths[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._files[self._paths[name]].get_slice(name)


def expected_tensors(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The decoder's shapes by canonical name, and which of them are its linears: what may be stored quantised."""
    hidden = config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    linears: set[str] = set()
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        attn = f"{prefix}self_attn."
        own = {f"{attn}{x}_proj": (size, hidden) for x, size in (("q", q_size), ("k", kv_size), ("v", kv_size))}
        if config.attention_bias:
            shapes |= {f"{name}.bias": size[:1] for name, size in own.items()}
        if config.output_bias:
            shapes[f"{attn}o_proj.bias"] = (hidden,)
        own[f"{attn}o_proj"] = (hidden, q_size)
        own |= {f"{prefix}mlp.{x}_proj": (config.intermediate_size, hidden) for x in ("gate", "up")}
        own[f"{prefix}mlp.down_proj"] = (hidden, config.intermediate_size)
        linears |= {f"{name}.weight" for name in own}
        shapes |= {f"{name}.weight": size for name, size in own.items()}
        if config.qk_norm:
            shapes |= {f"{attn}{x}_norm.weight": (config.head_dim,) for x in "qk"}
        shapes |= {f"{prefix}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    return shapes, linears


def canonical(name: str) -> str:
    """A tensor's name as the published package has it: of ports, of a bare decoder, or that name itself."""
    projector = PROJECTOR.fullmatch(name)
    if projector:
        return f"projector.{ {'linear1': '0', 'linear2': '2'}.get(projector[1], projector[1]) }.weight"
    if re.match(r"(layers|embed_tokens|norm)\.", name):
        return f"model.{name}"
    return name
