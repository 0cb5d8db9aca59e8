"""Reading checkpoints in the published format: `config.json`, `tokenizer.json`, safetensors.

Nothing here executes code from a checkpoint. What a folder says is what is loaded: every tensor is accounted for, and
what is missing, unknown, misshapen, not finite, quantised in an unknown way, or named twice is an error that names it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from lastrerank import adapters
from lastrerank.adapters import Adapter
from lastrerank.config import INT8_MAX, ModelConfig
from lastrerank.families import ALIASES, MODULES, PROMPT_FILES, SENTENCE_TRANSFORMERS, Cosine, Family, recognise
from lastrerank.isolation import isolated
from lastrerank.kept import FileState, digest
from lastrerank.model import LastLayerProjections, LayerWeights, ModelWeights
from lastrerank.ops import Weight
from lastrerank.readouts import Head, Projector, Readout
from lastrerank.rotation import rotated
from lastrerank.stored import (
    EMBEDDING,
    IGNORED,
    INDEX,
    NUMBERS,
    PROJECTOR,
    Tensors,
    canonical,
    expected_tensors,
    read_bytes,
    read_json,
    small_files,
    weight_files,
)
from lastrerank.texts import bare_tokenizer

logger = logging.getLogger("lastrerank")

BUNDLED_MODELS = Path(__file__).parent / "models"
# The checkpoint in the package, and those that former versions had in its place.
BUNDLED, FORMER = "lastrerank-43m", ("lastrerank-13m", "lastrerank-26m")

_FILES = (
    "config.json", "tokenizer.json", "*.safetensors", INDEX, adapters.CONFIG, SENTENCE_TRANSFORMERS,
    *PROMPT_FILES, MODULES,
)  # fmt: skip
# The output head, which is read by families that score by logits, and the head of a classifier.
_LM_HEAD, _CLASSIFIER = "lm_head.weight", "score.weight"
# Labels of a classifier's two outputs, the second of which is the relevant one.
_LABELS = (("no", "yes"), ("0", "1"))
# `Operations.prepare`.
Prepare = Callable[[torch.Tensor, torch.Tensor | None], Weight]
# In which an added token may be found other than by itself.
_WAYS = ("lstrip", "rstrip", "single_word")
# A tokenizer of a million tokens is under 100 MB.
_MOST_TOKENIZER = 512 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its small files parsed. `weights` reads the large ones.

    name: a Hub id, a bundled name, or the folder's. family: what it is. files: all that was and will be read, as they
    were when it was opened. adapter: what is merged into the weights while they are read; `folder` is its base's, and
    `base` the base's name (without an adapter, the checkpoint's own).
    """

    name: str
    folder: Path
    raw_config: Mapping[str, Any]
    config: ModelConfig
    family: Family
    tokenizer: Tokenizer
    tokenizer_config: Mapping[str, Any]
    files: tuple[FileState, ...]
    adapter: Adapter | None
    base: str

    def weights(
        self, device: torch.device, dtype: torch.dtype, prepare: Prepare | None = None
    ) -> ModelWeights:
        """All weights on `device` in `dtype`, q, k, v and gate, up packed; the embedding table as stored, on a CPU
        memory-mapped (`touched` says whether its file has been written to).

        prepare: `Operations.prepare`; gets each linear weight as stored, one at a time, and decides what is kept.

        Raises:
            ValueError: a file is damaged or has changed since, or tensors are missing, unknown, misshapen, twice there
                or not finite.
        """
        # Products of adapters and rotations are fp32 ones, whatever the process computes by.
        cpu = isolated(torch.device("cpu"), inference=False)
        with Tensors(self.folder) as tensors, cpu, isolated(device, inference=False):
            loaded = _load(self, tensors, device, dtype, prepare)
        self._check_current("while it was read")
        return loaded

    def digest(self) -> str:
        """SHA-256 of everything that decides a score: configuration, tokenizer, weights. Reads all of it.

        Raises:
            ValueError: a file has changed since it was opened.
        """
        found = digest(*(part for state in self.files for part in (state.path.name, state.path)))
        self._check_current("since it was loaded")
        return found

    def parameters(self) -> int:
        """Numbers in the tensors that are stored; of the files' headers."""
        with Tensors(self.folder) as tensors:
            return sum(math.prod(tensors.shape(name)) for name in tensors.names() if not name.endswith("_scale"))

    def embedding_checksum(self) -> int:
        """Of the table's bytes, at the speed of memory; read apart from the mapping that `weights` gives, whose pages
        stay on disk until they are used.

        Raises:
            ValueError: the files can't be read any more.
        """
        with Tensors(self.folder) as tensors:
            name = next((name for name in tensors.names() if canonical(name) == EMBEDDING), None)
            if name is None:
                raise ValueError(f"{self.folder}: {EMBEDDING} is missing")
            raw = tensors.read(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            rows = raw[: len(raw) // 32768 * 32768].view(np.uint64).reshape(-1, 4096)
            # Sums modulo 2^64 of the words, weighed by row and by column.
            sums = (rows.sum(axis, dtype=np.uint64) for axis in (0, 1))
            weighed = [int((x * np.arange(1, len(x) + 1, dtype=np.uint64)).sum(dtype=np.uint64)) for x in sums]
            return zlib.crc32(raw[rows.nbytes :].tobytes()) + (weighed[0] << 32) + (weighed[1] << 96)

    def touched(self) -> FileState | None:
        """A weights file that was written to in place, or whose attributes were changed, since it was opened."""
        found = (state.now() for state in self.files if state.path.suffix == ".safetensors")
        return next((state for state in found if state is not None), None)

    def _check_current(self, when: str) -> None:
        for state in self.files:
            if not state.is_current():
                raise ValueError(f"{state.path} has changed {when}: load the checkpoint again")


def resolve(id_or_path: str | os.PathLike[str], revision: str | None = None) -> tuple[str, Path]:
    """Name and local folder of a checkpoint: a folder as it is, a bundled model's name, or a Hub id or the short name
    of one (`lastrerank.families.ALIASES`), downloaded once. A former bundled model's name is its successor's, with a
    warning.

    Raises:
        ValueError: neither a folder nor something the Hub knows, or the Hub can't be reached; or what is here has no
            revisions.
    """
    path, name = Path(id_or_path), str(id_or_path)
    if not name:  # as a path it would be the current folder
        raise ValueError("id_or_path is '', expected a folder, a name or a Hub id")
    try:
        if path.is_dir():
            _refuse_revision(revision, f"{name} is a folder")
            return _folder_name(path.resolve()), path
    except OSError as error:
        raise ValueError(f"id_or_path is {name!r:.80}: {error.strerror}") from error
    if name in FORMER:
        logger.warning("%s is not in this version: %s takes its place, whose scores are others", name, BUNDLED)
        name = BUNDLED
    if re.fullmatch(r"[\w.-]+", name) and (BUNDLED_MODELS / name / "config.json").is_file():
        _refuse_revision(revision, f"{name} is in the package")
        return name, BUNDLED_MODELS / name
    name = ALIASES.get(name.lower(), name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"id_or_path is {name!r}: no such folder, and no Hub id of the form 'owner/name', nor one of the short "
            f"names {', '.join([BUNDLED, *ALIASES])}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return name, Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"id_or_path is {name!r}: no such folder, and the Hub did not serve it: {error}") from error


def resolve_base(adapter: adapters.Adapter) -> tuple[str, Path]:
    """As `resolve`, of what an adapter was made for."""
    # What PEFT noted of the Hub says nothing of a folder that has been put in its place.
    return resolve(adapter.base, None if os.path.isdir(adapter.base) else adapter.revision)


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ValueError(f"revision is {revision!r:.80}: {what}, only what is on the Hub has revisions")


def _folder_name(folder: Path) -> str:
    """The folder's own; of a snapshot in the Hub's cache, which is called by its commit, the repository's."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def open_checkpoint(
    id_or_path: str | os.PathLike[str], revision: str | None = None, family: Family | None = None
) -> Checkpoint:
    """Resolve a checkpoint, read its configuration and tokenizer, and find its family, if it isn't given.

    Raises:
        ValueError: a file is missing or malformed, or the checkpoint's family is not known.
    """
    name, folder = resolve(id_or_path, revision)
    base, adapter = name, None
    before: list[FileState] = []
    if adapters.is_adapter(folder):
        before = [FileState.of(folder / n) for n in (adapters.CONFIG, adapters.WEIGHTS) if (folder / n).exists()]
        adapter = adapters.read_adapter(folder)
        base, folder = resolve_base(adapter)
    # As they are before they are read: one that is replaced meanwhile is found out when the weights are.
    small = [FileState.of(path) for path in small_files(folder)]
    raw, config, tokenizer, tokenizer_config = _read_small_files(folder)
    if family is None:

        def has_projector() -> bool:
            with Tensors(folder) as tensors:
                return any(PROJECTOR.fullmatch(tensor) for tensor in tensors.names())

        family = recognise(base, folder, raw, has_projector, tokenizer)
    files = (*small, *(FileState.of(path) for path in weight_files(folder)[0]), *before)
    return Checkpoint(name, folder, raw, config, family, tokenizer, tokenizer_config, files, adapter, base)


def _read_small_files(folder: Path) -> tuple[dict[str, Any], ModelConfig, Tokenizer, dict[str, Any]]:
    """`config.json` as it is and read, the tokenizer, and `tokenizer_config.json`, of a folder with a checkpoint."""
    if (folder / adapters.CONFIG).exists():
        raise ValueError(
            f"{folder}: {adapters.CONFIG} is there beside a checkpoint: whether it is merged already isn't said; keep "
            "adapter and base apart"
        )
    raw = read_json(folder / "config.json")
    path = folder / "tokenizer_config.json"
    tokenizer_config = read_json(path) if path.exists() else {}
    config = ModelConfig.from_dict(raw, tokenizer_config.get("model_max_length"))
    return raw, config, _tokenizer(folder / "tokenizer.json", config.vocab_size, tokenizer_config), tokenizer_config


@dataclass(frozen=True)
class Decoder:
    """A decoder as it is stored, whatever is on top of it: tensors by canonical name, in memory of the files."""

    raw_config: Mapping[str, Any]
    tokenizer: Tokenizer
    tokenizer_config: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]


def open_decoder(id_or_path: str | os.PathLike[str], revision: str | None = None) -> Decoder:
    """Read a decoder of a known architecture.

    Raises:
        ValueError: a file is missing or malformed, or a tensor is missing, unknown or misshapen.
    """
    _, folder = resolve(id_or_path, revision)
    raw, config, tokenizer, tokenizer_config = _read_small_files(folder)
    if config.quantised:
        raise ValueError(f"{folder}: its weights are int8: training starts from what they were quantised from")
    with Tensors(folder) as tensors:
        stored = _stored_names(tensors)
        stored.pop(_LM_HEAD, None)  # never used
        expected, _ = expected_tensors(config)
        _check_stored(tensors, stored, expected, dict.fromkeys(expected, NUMBERS))
        state = {name: tensors.read(stored[name]) for name in expected}
    for name, tensor in state.items():
        _check_finite(name, tensor)
    return Decoder(raw, tokenizer, tokenizer_config, state)


def _tokenizer(path: Path, vocab_size: int, tokenizer_config: Mapping[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(path, _MOST_TOKENIZER))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are not even that
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{path}: token {tokenizer.id_to_token(largest)!r:.80} has id {largest}, but config.json has vocab_size "
            f"{vocab_size}"
        )
    if getattr(tokenizer.model, "dropout", None):
        raise ValueError(f"{path}: dropout is {tokenizer.model.dropout}: the same text would have other ids every time")
    if tokenizer.num_special_tokens_to_add(False):
        raise ValueError(f"{path}: post_processor adds tokens around every text, which no prompt here has")
    for token in tokenizer.get_added_tokens_decoder().values():
        _check_added(path, {way: getattr(token, way) for way in ("content", *_WAYS)})
    where = path.with_name("tokenizer_config.json")
    added = tokenizer_config.get("added_tokens_decoder")
    for number, token in (added.items() if isinstance(added, dict) else ()):
        content = token.get("content") if isinstance(token, dict) else None
        if isinstance(token, dict):
            _check_added(where, token)
        if not isinstance(content, str) or str(tokenizer.token_to_id(content)) != str(number):
            own = tokenizer.token_to_id(content) if isinstance(content, str) else None
            raise ValueError(
                f"{where}: added_tokens_decoder has {content!r:.80} as {number!s:.20}, tokenizer.json as {own}"
            )
    if tokenizer_config.get("split_special_tokens"):
        raise ValueError(f"{where}: split_special_tokens is true: control tokens of a prompt would be text")
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = tokenizer_config.get(name)
        for token in (listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ()):
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str) or tokenizer.token_to_id(content) is None:
                raise ValueError(f"{where}: {name} has {content!r:.80}, which tokenizer.json does not")
    if tokenizer_config.get("add_prefix_space") is True and not _prefixes(tokenizer):
        raise ValueError(f"{where}: add_prefix_space is true, but tokenizer.json puts no space before a text")
    return tokenizer


def _check_added(where: Path, token: Mapping[str, Any]) -> None:
    for way in _WAYS:
        if token.get(way):
            raise ValueError(f"{where}: {way} of {token.get('content')!r:.80} is true: it eats what stands beside it")


def _prefixes(tokenizer: Tokenizer) -> bool:
    """Whether a text that begins with a letter is encoded as one that a space stands before."""
    raw = json.loads(bare_tokenizer(tokenizer, BPE()).to_str())  # without the vocabulary: it may be large
    said = json.dumps([raw["normalizer"], raw["pre_tokenizer"]])
    return re.search('"add_prefix_space": true|"prepend_scheme": "(always|first)"|"prepend": "', said) is not None


def _load(
    checkpoint: Checkpoint,
    tensors: Tensors,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Prepare | None,
) -> ModelWeights:
    config = checkpoint.config
    stored, adapter = _account(checkpoint, tensors), checkpoint.adapter
    if adapter is not None:
        if config.quantised:
            raise ValueError(f"{checkpoint.folder}: its weights are int8: an adapter is for those they were made from")
        adapter.check({name: tensors.shape(own) for name, own in stored.items()}, expected_tensors(config)[1])
    q_size = config.num_heads * config.head_dim

    def plain(name: str) -> torch.Tensor:
        """As stored, or what an int8 tensor stands for; checked to be finite."""
        part = tensors.read(stored[name])
        if part.dtype == torch.int8:
            if int(part.max()) > INT8_MAX or int(part.min()) < -INT8_MAX:
                raise ValueError(f"{name} has integers beyond {INT8_MAX}")
            part = rotated(part.float()) * tensors.read(stored[f"{name}_scale"])[:, None]
        if part.dtype == torch.float64:
            part = part.float()  # nothing here computes in it
        if adapter is not None:
            part = adapter.apply(name, part)
        _check_finite(name, part)
        return part

    def stacked(*names: str) -> torch.Tensor:
        """One tensor, or several along the first dimension, in memory of its own: the file may be written to."""
        parts = [plain(name).to(device) for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def converted(names: tuple[str, ...], tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.to(dtype, copy=True)
        if dtype == torch.float16:
            _check_finite(names[0], result, "in float16; use another dtype")
        return result

    def read(*names: str) -> torch.Tensor:
        return converted(names, stacked(*names))

    def embedding() -> torch.Tensor:
        table = plain(EMBEDDING)
        if device.type != "cpu" or tensors.kind(stored[EMBEDDING]) == "F64":
            return table.to(device)
        return tensors.read_apart(stored[EMBEDDING])  # `table` is checked: all its pages are in memory

    def linear(*names: str, outputs: slice = slice(None)) -> Weight:
        """Some outputs of a linear, or of several along the first dimension, as the backend wants them."""
        weight, scales = stacked(*names)[outputs], None
        if config.quantised:
            scales = torch.cat([tensors.read(stored[f"{name}_scale"]) for name in names])[outputs]
        kept = weight if prepare is None else prepare(weight, scales)
        return converted(names, kept) if isinstance(kept, torch.Tensor) else kept

    def qkv(index: int) -> tuple[str, ...]:
        return tuple(f"model.layers.{index}.self_attn.{x}_proj.weight" for x in "qkv")

    def readout() -> Readout:
        logit = checkpoint.family.readout
        if isinstance(logit, Cosine):
            return Projector(read("projector.0.weight"), read("projector.2.weight"))
        rows: list[tuple[str, int | None]]
        if _CLASSIFIER in stored:
            rows = [(_CLASSIFIER, 0), (_CLASSIFIER, None)]
            if tensors.shape(stored[_CLASSIFIER])[0] == 2:  # the relevant label's row less the other's
                rows = [(_CLASSIFIER, 1), (_CLASSIFIER, 0)]
        else:
            matrix = _LM_HEAD if _LM_HEAD in stored else EMBEDDING
            rows = [(matrix, number) for number in logit.token_ids(checkpoint.tokenizer)]
        vector = torch.zeros(config.hidden_size, dtype=torch.float32, device="cpu")
        for (name, number), sign in zip(rows, (1, -1), strict=True):
            if number is not None:
                row = tensors.rows(stored[name], number).float()
                _check_finite(f"{name}[{number}]", row)
                vector += sign * row
        return Head(vector.to(device))

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
            o_bias=read(f"{attn}o_proj.bias") if config.output_bias else None,
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
        readout=readout(),
    )


def _account(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, str]:
    """Stored names by canonical name, after every tensor's name, shape and type has been found to be what is expected.

    Raises:
        ValueError: one isn't; the message names it.
    """
    config, stored = checkpoint.config, _stored_names(tensors)
    expected, linears = expected_tensors(config)
    if isinstance(checkpoint.family.readout, Cosine):
        stored.pop(_LM_HEAD, None)  # never used
        expected |= _projector_shapes(checkpoint, tensors, stored)
    else:
        expected |= _head_shape(checkpoint, tensors, stored)
    kinds = {name: ("I8",) if config.quantised and name in linears else NUMBERS for name in expected}
    if config.quantised:
        for name in linears & stored.keys():
            expected[f"{name}_scale"], kinds[f"{name}_scale"] = expected[name][:1], ("F32",)
    _check_stored(tensors, stored, expected, kinds)
    for name in linears if config.quantised else ():
        scales = tensors.read(stored[f"{name}_scale"])
        if not ((scales > 0) & scales.isfinite()).all():
            raise ValueError(f"{name}_scale is not positive and finite everywhere")
    return stored


def _stored_names(tensors: Tensors) -> dict[str, str]:
    """Stored names by canonical name.

    Raises:
        ValueError: one is there twice.
    """
    stored: dict[str, str] = {}
    for name in tensors.names():
        if not IGNORED.fullmatch(name):
            if canonical(name) in stored:
                raise ValueError(f"{canonical(name)} is there twice, as {stored[canonical(name)]} and as {name}")
            stored[canonical(name)] = name
    return stored


def _check_stored(
    tensors: Tensors,
    stored: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, tuple[str, ...]],
) -> None:
    """Raises ValueError where a tensor is missing, unknown, or of another shape or kind than expected."""
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first: {', '.join(missing[:3])}")
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are unknown, the first: {', '.join(unknown[:3])}")
    for name, shape in expected.items():
        if tensors.shape(stored[name]) != shape:
            raise ValueError(f"{name} has shape {tensors.shape(stored[name])}, expected {shape} from config.json")
        if tensors.kind(stored[name]) not in kinds[name]:
            hint = ": quantised weights need a quantization_config that is known" if kinds[name] == NUMBERS else ""
            raise ValueError(
                f"{name} is stored as {tensors.kind(stored[name])}, expected {' or '.join(kinds[name])}{hint}"
            )


def _projector_shapes(
    checkpoint: Checkpoint, tensors: Tensors, stored: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Of a listwise checkpoint's projector."""
    names = [f"projector.{i}.weight" for i in (0, 2)]
    if checkpoint.config.classifier:
        raise ValueError(
            f"config.json: architectures is {checkpoint.raw_config['architectures']}, a classifier; expected a "
            "last-token reranker (JinaForRanking: a Qwen3 decoder with a projector)"
        )
    if not set(names) <= stored.keys():
        raise ValueError(
            "no projector: expected projector.0.weight and projector.2.weight (or linear1, linear2); "
            "a plain decoder without one is no listwise reranker"
        )
    shapes = [tensors.shape(stored[name]) for name in names]
    for name, shape in zip(names, shapes, strict=True):
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"{name} has shape {shape}, expected a matrix [out, in]")
    p1, p = (shape[0] for shape in shapes)
    return {names[0]: (p1, checkpoint.config.hidden_size), names[1]: (p, p1)}


def _head_shape(
    checkpoint: Checkpoint, tensors: Tensors, stored: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Of what a score's logit is read by: a classifier's head, a stored output head, or the embedding."""
    config, family = checkpoint.config, checkpoint.family
    assert not isinstance(family.readout, Cosine)
    if not config.classifier:
        for number in family.readout.token_ids(checkpoint.tokenizer):
            if number is not None and number >= config.vocab_size:
                raise ValueError(f"tokenizer.json: the word that is read is {number}, vocab_size {config.vocab_size}")
        if _LM_HEAD in stored:  # used whatever the flag says: it may differ
            return {_LM_HEAD: (config.vocab_size, config.hidden_size)}
        if not config.tied:
            raise ValueError(
                f"{_LM_HEAD} is missing, and config.json's tie_word_embeddings is "
                f"{checkpoint.raw_config.get('tie_word_embeddings')!r:.80}: a family {family.name!r} scores by it"
            )
        return {}
    if _CLASSIFIER not in stored:
        raise ValueError(f"{_CLASSIFIER} is missing: architectures is {checkpoint.raw_config['architectures']}")
    outputs = tensors.shape(stored[_CLASSIFIER])[:1]
    if outputs == (2,) and tuple(label.lower() for label in config.labels) in _LABELS:
        return {_CLASSIFIER: (2, config.hidden_size)}
    if outputs != (1,):
        raise ValueError(
            f"{_CLASSIFIER} has {outputs} outputs, labelled {config.labels!s:.80}: expected one, or two that "
            f"config.json's id2label names {' or '.join(map(str, _LABELS))}"
        )
    return {_CLASSIFIER: (1, config.hidden_size)}


def _check_finite(name: str, tensor: torch.Tensor, where: str = "") -> None:
    # The sum shows any NaN or infinity in one pass; only then is it worth a second look.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity {where}".rstrip())
