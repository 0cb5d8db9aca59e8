"""Writing checkpoints in the published format. A save is one step for whoever reads the folder, or loses power."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lastrerank.config import QUANTIZATION, ModelConfig
from lastrerank.kept import partial_name
from lastrerank.model import ModelWeights
from lastrerank.ops import QuantisedWeight, Weight
from lastrerank.readouts import Head, Projector
from lastrerank.rotation import rotated

# What makes up a checkpoint, in this format or an earlier save's: it goes when another takes its place, everything else
# in the folder stays. Beside these go the weights that an index names and the Python files that `auto_map` names.
_CHECKPOINT_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.json|merges\.txt|tokenizer\.model|chat_template\.\w+|modules\.json|"
    r"config_sentence_transformers\.json|sentence_bert_config\.json|"
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.(index\.json|partial)|"
    r"pytorch_model.*\.bin|pytorch_model\.bin\.index\.json|adapter_config\.json|adapter_model\.\w+"
)


def save(
    folder: str | os.PathLike[str],
    raw_config: Mapping[str, Any],
    tokenizer: Tokenizer,
    tokenizer_config: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    *,
    python_files: Path | None = None,
    hub_id: str | None = None,
) -> None:
    """Write a checkpoint in the published format in place of what `folder` holds; whenever it is interrupted, the
    folder holds the old one or the new one, whole.

    Where the file system can't exchange two folders, or the folder is a mount, files are exchanged one by one: an
    interruption then may leave a folder without `config.json`, which doesn't load, but never a mixture.

    Args:
        folder: made if it isn't there. Files that belong to no checkpoint stay.
        raw_config: `config.json`.
        tokenizer: `tokenizer.json`.
        tokenizer_config: `tokenizer_config.json`; `model_max_length` among it.
        state: tensors by published name.
        python_files: folder with the files that `auto_map` names; they are copied, never run.
        hub_id: where else they are; without either, `auto_map` is left out, since Transformers refuses one without.

    Raises:
        OSError: it can't be written; the folder is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    raw = dict(raw_config)
    copied: list[Path] = []
    if raw.get("auto_map") is not None:
        raw["auto_map"], copied = _auto_map(raw["auto_map"], python_files, hub_id)
        if not raw["auto_map"]:
            del raw["auto_map"]

    def write(target: Path) -> None:
        (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(str(target / "tokenizer.json"))
        text = json.dumps(dict(tokenizer_config), indent=2) + "\n"
        (target / "tokenizer_config.json").write_text(text, encoding="utf-8")
        for path in copied:
            shutil.copyfile(path, target / path.name)
        weights = target / "model.safetensors"
        try:
            save_file({n: t.contiguous() for n, t in state.items()}, str(weights), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{Path(folder) / weights.name} can't be written: {error}") from error
        # The library makes a file that its owner alone can read.
        os.chmod(weights, (target / "config.json").stat().st_mode & 0o777)

    replace_folder(Path(os.path.realpath(folder)), write)


def state_dict(config: ModelConfig, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Weights by their published names, unpacked (views); the inverse of loading. A quantised weight is what it has
    become, and its scales are beside it under `..._scale`.

    Raises:
        ValueError: a weight is quantised and can't be unpacked.
    """
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if isinstance(weights.readout, Projector):
        state |= {"projector.0.weight": weights.readout.w1, "projector.2.weight": weights.readout.w2}
    elif isinstance(weights.readout, Head):
        state["score.weight"] = weights.readout.vector[None]
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
        if layer.o_bias is not None:
            state[f"{prefix}self_attn.o_proj.bias"] = layer.o_bias
        put({f"{prefix}mlp.{name}_proj.weight": config.intermediate_size for name in ("gate", "up")}, layer.gate_up)
        put({f"{prefix}mlp.down_proj.weight": config.hidden_size}, layer.down)
        state[f"{prefix}input_layernorm.weight"] = layer.input_norm
        state[f"{prefix}post_attention_layernorm.weight"] = layer.post_norm
    return state


def quantised(
    raw_config: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and state in which weights that have a `..._scale` fp32 `[out]` are int8 `[out, in]`: numbers of
    steps, rotated (see `lastrerank.rotation`)."""
    found = dict(state)
    for name, tensor in state.items():
        if f"{name}_scale" in state:
            found[name] = (rotated(tensor.double()) / state[f"{name}_scale"][:, None]).round().to(torch.int8)
    return {**raw_config, "quantization_config": QUANTIZATION}, found


def _auto_map(names: Any, folder: Path | None, hub_id: str | None) -> tuple[dict[str, Any], list[Path]]:
    """`auto_map` as it holds in another folder, and the files to copy there."""
    if not isinstance(names, dict):
        return {}, []
    kept: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for key, value in names.items():
        # A tokenizer has two classes, of which one may be null. With "--" it is of another repository: true everywhere.
        listed = value if isinstance(value, list) else [value]
        own = [name for name in listed if isinstance(name, str) and "--" not in name]
        needed = [None if folder is None else _modules(folder, name.split(".")[0]) for name in own]
        if all(needed):
            kept[key] = value
            files |= {name: path for found in needed for name, path in (found or {}).items()}
        elif hub_id is not None:
            named = [f"{hub_id}--{name}" if name in own else name for name in listed]
            kept[key] = named if isinstance(value, list) else named[0]
    return kept, list(files.values())


def _modules(folder: Path, name: str) -> dict[str, Path] | None:
    """A module's file and those it imports relatively, or None if one isn't there."""
    found: dict[str, Path] = {}
    wanted = [name]
    while wanted:
        path = folder / f"{wanted.pop()}.py"
        if path.name in found:
            continue
        if not path.is_file():
            return None
        found[path.name] = path
        text = path.read_text(encoding="utf-8", errors="replace")
        wanted += re.findall(r"^\s*from\s+\.(\w+)\s+import", text, re.MULTILINE)
    return found


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that then takes the place of `target`; files of no checkpoint come along."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = partial_name(target)
    try:
        new.mkdir()
        beside = True
    except OSError:  # a mount whose parent isn't ours
        if not target.is_dir():
            raise
        new, beside = partial_name(target / "checkpoint"), False
        new.mkdir()
    try:
        write(new)
        for path in new.iterdir():
            _sync(path)
        _sync(new)
        with _alone(target.parent if beside else target):
            _sweep(target)
            if beside and not target.exists():
                new.rename(target)
            elif beside and _exchange(new, target):
                _remove(new)
                new = target  # what is left of the old one is someone's
            else:
                _exchange_files(new, target)
        _sync(target.parent)
    finally:
        if new != target:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process or thread at a time takes a folder's place."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Finish what saves that were killed have left beside the folder: what is someone's goes back, after an hour the
    rest goes."""
    own = re.compile(rf"\.{re.escape(target.name)}\.[0-9]+-[0-9a-f]+\.partial")  # as `partial_name` makes them
    for left in filter(lambda path: own.fullmatch(path.name), target.parent.iterdir()):
        try:
            if left.is_dir() and target.is_dir():
                _give_back(left, target, _checkpoint_files(left))
                if time.time() - left.stat().st_mtime > 3600:
                    _remove(left)
        except OSError:
            continue


def _give_back(old: Path, target: Path, leaving: set[str]) -> None:
    """Move what doesn't belong to the old checkpoint to the folder that took its place, unless it is there."""
    for entry in old.iterdir():
        if entry.name not in leaving and not (target / entry.name).exists() and not (target / entry.name).is_symlink():
            entry.rename(target / entry.name)


def _remove(folder: Path) -> None:
    """A folder of a checkpoint, but for what else has come into it."""
    try:
        for name in _checkpoint_files(folder):
            (folder / name).unlink()
        folder.rmdir()
    except OSError:
        return


def _exchange(new: Path, target: Path) -> bool:
    """Swap two folders in one step; False, and nothing has happened, where that can't be done."""
    leaving = _checkpoint_files(target)
    os.chmod(new, target.stat().st_mode & 0o7777)
    linked = []
    for entry in target.iterdir():
        taken = entry.name in leaving or (new / entry.name).exists()
        if taken or (entry.is_dir() and not entry.is_symlink()):
            continue
        try:
            os.link(entry, new / entry.name, follow_symlinks=False)
        except OSError:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)
        linked.append(entry.name)
    stands_there = os.path.samefile(target, ".") if os.path.exists(".") else False
    library = ctypes.CDLL(None, use_errno=True)
    here, there = os.fsencode(new), os.fsencode(target)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(here, there, 2)  # RENAME_SWAP
        else:
            failed = library.renameat2(-100, here, -100, there, 2)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        failed = -1
    if failed:
        for name in linked:
            (new / name).unlink()
        return False
    # `new` is now the old one. What can't be moved out of it stays in it, for the next save to try.
    with suppress(OSError):
        if stands_there:
            os.chdir(target)
        for name in linked:
            (new / name).unlink(missing_ok=True)
        _give_back(new, target, leaving)
    return True


def _exchange_files(new: Path, target: Path) -> None:
    """Without `config.json` nothing loads: it goes first and comes last."""
    leaving = _checkpoint_files(target)
    for name in sorted(leaving, key=lambda name: name != "config.json"):
        (target / name).unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(target / path.name)
    _sync(target)


def _checkpoint_files(folder: Path) -> set[str]:
    """Names of the files of the checkpoint that a folder holds, or of several."""
    found = {entry.name for entry in folder.iterdir() if _CHECKPOINT_FILES.fullmatch(entry.name)}
    for name, key in (("model.safetensors.index.json", "weight_map"), ("config.json", "auto_map")):
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))[key].values()
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            continue
        for value in values:
            named = value if name != "config.json" else f"{str(value).split('.')[0]}.py"
            if isinstance(named, str) and Path(named).name == named and (folder / named).is_file():
                found.add(named)
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
