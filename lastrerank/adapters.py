"""LoRA adapters as PEFT writes them: read over a base checkpoint and merged into it while it loads, and written.

What PEFT would compute is computed, `W + scale * B A` in fp32, or refused by name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lastrerank.saving import replace_folder
from lastrerank.stored import EMBEDDING, canonical, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Fields that change what is computed, and the one value under which it is what stands above.
_FIXED: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False,
    "use_qalora": False, "use_bdlora": None, "alora_invocation_tokens": None, "arrow_config": None,
    "layer_replication": None, "megatron_config": None, "trainable_token_indices": None, "target_parameters": None,
    "velora_config": None, "monteclora_config": None,
    "kasa_config": None,
}  # fmt: skip
# Fields that are read, or say only how an adapter came about or where it goes, which its tensors say.
_KNOWN = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type",
    "inference_mode", "lora_dropout", "auto_mapping", "peft_version", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
})  # fmt: skip
# Beginnings that leave the base's weights as they are; others take something out of them first.
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """updates: by canonical name of a linear's weight, `(scale, B [out, r], A [r, in])`. replaced: tensors that stand
    in place of the base's. base: folder or Hub id, and revision, that it was made for."""

    folder: Path
    base: str
    revision: str | None
    updates: Mapping[str, tuple[float, torch.Tensor, torch.Tensor]]
    replaced: Mapping[str, torch.Tensor]

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the base with what the adapter does to it, fp32 where it does something."""
        if name in self.replaced:
            return self.replaced[name].float()
        if name not in self.updates:
            return weight
        scale, b, a = self.updates[name]
        return weight.float() + scale * (b.float() @ a.float())

    def check(self, shapes: Mapping[str, tuple[int, ...]], linears: Collection[str]) -> None:
        """Raises ValueError where it doesn't fit a base with tensors of these shapes; the message names the tensor."""
        for name, (_, b, a) in self.updates.items():
            found = (b.shape[0], a.shape[1])
            if name not in linears:
                raise ValueError(f"{self.folder}: updates {name}, which is no linear of {self.base}")
            if found != shapes[name]:
                raise ValueError(f"{self.folder}: updates {name} as {found}, {self.base} has it as {shapes[name]}")
        for name, tensor in self.replaced.items():
            if name in (EMBEDDING, "lm_head.weight", "score.weight"):
                raise ValueError(f"{self.folder}: replaces {name}, which isn't supported")
            if name not in shapes or tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"{self.folder}: replaces {name} {tuple(tensor.shape)}, {self.base} has {shapes.get(name)}"
                )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no checkpoint."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def read_adapter(folder: Path) -> Adapter:
    """An adapter's two files.

    Raises:
        ValueError: one is missing or damaged, or asks for something that isn't computed here; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    raw = read_json(folder / CONFIG)
    _check_fields(folder / CONFIG, raw)
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / CONFIG}: base_model_name_or_path is {base!r:.80}, expected a folder or a Hub id")
    rank, alpha = _number(folder, raw, "r", 1), _number(folder, raw, "lora_alpha", 0)
    patterns = {name: _patterns(folder, raw, name) for name in ("rank_pattern", "alpha_pattern")}
    revision = raw.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"{folder / CONFIG}: revision is {revision!r:.80}, expected a string")
    try:
        if not stat.S_ISREG(os.stat(folder / WEIGHTS).st_mode):  # a pipe would be waited for
            raise ValueError(f"{folder / WEIGHTS}: no regular file")
        tensors = load_file(str(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS}: missing, damaged or incomplete: {error}") from error
    parts: dict[str, dict[str, torch.Tensor]] = {}
    replaced: dict[str, torch.Tensor] = {}
    for stored, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{folder / WEIGHTS}: {stored} is {tensor.dtype}, expected numbers")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder / WEIGHTS}: {stored} holds NaN or infinity")
        name = stored.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])(\.default)?\.weight", name)
        if found:
            own = parts.setdefault(canonical(f"{found[1]}.weight"), {})
            if found[2] in own:
                raise ValueError(f"{folder / WEIGHTS}: an update of {found[1]} is there twice")
            own[found[2]] = tensor
        elif "lora_" in name or "modules_to_save" in name:
            raise ValueError(f"{folder / WEIGHTS}: {stored} is no update that is known here")
        elif canonical(name) in replaced:
            raise ValueError(f"{folder / WEIGHTS}: {canonical(name)} is there twice")
        else:
            replaced[canonical(name)] = tensor
    updates = {}
    for weight, pair in parts.items():
        module = weight.removesuffix(".weight")
        _check_targeted(folder, raw, module)
        if weight in replaced:
            raise ValueError(f"{folder / WEIGHTS}: {weight} is replaced and updated")
        if pair.keys() != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].shape[1:] != pair["A"].shape[:1]:
            shapes = {n: tuple(t.shape) for n, t in pair.items()}
            raise ValueError(f"{folder / WEIGHTS}: {module} has {shapes}, expected A [r, in] and B [out, r]")
        own_rank = _pattern(patterns["rank_pattern"], module, rank)
        own_alpha = _pattern(patterns["alpha_pattern"], module, alpha)
        if len(pair["A"]) != own_rank:
            raise ValueError(f"{folder / WEIGHTS}: {module} has rank {len(pair['A'])}, {CONFIG} says {own_rank:g}")
        scale = own_alpha / (own_rank**0.5 if raw.get("use_rslora") else own_rank)
        updates[weight] = (scale, pair["B"], pair["A"])
    if not updates and not replaced:
        raise ValueError(f"{folder / WEIGHTS}: holds nothing")
    return Adapter(folder, base, revision, updates, replaced)


def write_adapter(
    folder: str | os.PathLike[str],
    base: str,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    replaced: Mapping[str, torch.Tensor],
    rank: int,
    alpha: float,
    revision: str | None = None,
) -> None:
    """Write an adapter that PEFT reads, in one step (see `lastrerank.saving`).

    Args:
        base: folder or Hub id, of which `revision` is meant.
        updates: by canonical name of a linear's weight, `(B [out, r], A [r, in])`.
        replaced: whole tensors by canonical name, those of the projector.
    """
    from safetensors.torch import save_file

    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in updates})
    saved = sorted({name.split(".")[0] for name in replaced})
    raw = {
        "peft_type": "LORA", "base_model_name_or_path": base, "revision": revision, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "target_modules": modules,
        "modules_to_save": saved or None, "task_type": None, "inference_mode": True,
    }  # fmt: skip
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in replaced.items()}
    for name, (b, a) in updates.items():
        module = f"{_PREFIX}{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}

    def write(target: Path) -> None:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, str(target / WEIGHTS))
        (target / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")

    replace_folder(Path(os.path.realpath(folder)), write)


def _check_fields(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises ValueError where a field asks for something that isn't computed here."""
    for name, value in raw.items():
        if name in _FIXED:
            if value is not None and value != _FIXED[name]:
                raise ValueError(f"{path}: {name} is {value!r:.80}, expected {_FIXED[name]!r}")
        elif name == "init_lora_weights":
            if value not in _INITIAL:
                raise ValueError(f"{path}: {name} is {value!r:.80}, which changes the base's weights first")
        elif name == "use_rslora":
            if not isinstance(value, bool):
                raise ValueError(f"{path}: {name} is {value!r:.80}, expected true or false")
        elif name not in _KNOWN and value is not None:
            raise ValueError(f"{path}: {name} is {value!r:.80}, a field that isn't known here")


def _number(folder: Path, raw: Mapping[str, Any], name: str, least: float) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ValueError(f"{folder / CONFIG}: {name} is {value!r:.80}, expected a number of at least {least:g}")
    return float(value)


def _patterns(folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, float]:
    """Numbers by a pattern of module names; patterns that could take for ever are refused."""
    given = raw.get(name)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{folder / CONFIG}: {name} is {given!r:.80}, expected an object")
    for key in given:
        if not re.fullmatch(r"[\w.^$|-]+", key):
            raise ValueError(f"{folder / CONFIG}: {name} has {key!r:.80}, expected a module's name")
        _number(folder, given, key, 0)
    return {key: float(value) for key, value in given.items()}


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's: the first key that the module's name ends with, as a regular expression."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_targeted(folder: Path, raw: Mapping[str, Any], module: str) -> None:
    """PEFT reads no update of a module that the configuration doesn't name."""
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    if isinstance(targets, list) and not any(module == t or module.endswith(f".{t}") for t in map(str, targets)):
        raise ValueError(f"{folder / WEIGHTS}: updates {module}, which is none of target_modules {targets}")
    number = re.search(r"layers\.(\d+)\.", module)
    if layers is not None and number and int(number[1]) not in (layers if isinstance(layers, list) else [layers]):
        raise ValueError(f"{folder / WEIGHTS}: updates {module}, which is in none of layers_to_transform {layers}")
