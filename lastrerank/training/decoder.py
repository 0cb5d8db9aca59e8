"""Where training begins: a plain pretrained decoder (Qwen3, Qwen2, Llama) becomes a listwise reranker.

The paper starts from a pretrained decoder (arXiv 2509.25085, section 3). Its first layers are kept, the prompt's
control tokens added, and a projector put on top that makes of the readouts something that a cosine can tell apart: as
they are, they all point one way.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from tokenizers import AddedToken

from lastrerank import saving
from lastrerank.adapters import is_adapter
from lastrerank.checkpoint import open_checkpoint, open_decoder, resolve
from lastrerank.config import ModelConfig
from lastrerank.families import FAMILIES, SENTENCE_TRANSFORMERS
from lastrerank.families.family import repository_name
from lastrerank.kept import digest
from lastrerank.lists import EMBED_TOKEN, RERANK_TOKEN, V3_CAPS
from lastrerank.stored import PROJECTOR, Tensors, read_json, small_files, weight_files
from lastrerank.training.data import TrainingData
from lastrerank.training.trainer import Trainer, TrainingConfig

# Channels of the projector that a start gets: linear at first, its hidden halves are each other's negatives.
PROJECTED = 256
CAPS = ("max_query_length", "max_doc_length")
# Tokens of a list of a few short documents.
LEAST_CONTEXT = 1024
# What decoders of these families end a turn or a text with.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>")
# Lists whose readouts are looked at.
LISTS = 60


def is_decoder(id_or_path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is a decoder and nothing more: no projector, no head of a classifier, no family's name.

    Raises:
        ValueError: it can't be read.
    """
    name, folder = resolve(id_or_path)
    if is_adapter(folder):
        return False
    raw = read_json(folder / "config.json")
    ModelConfig.from_dict(raw)
    architectures = raw.get("architectures") or ()
    known = any(f.repositories and re.fullmatch(f.repositories, repository_name(name), re.IGNORECASE)
                for f in FAMILIES.values())  # fmt: skip
    named = {"family", "template"} & (raw.get("lastrerank") or {}).keys()
    if known or named or (folder / SENTENCE_TRANSFORMERS).exists():
        return False
    if not all(architecture.endswith(("ForCausalLM", "Model")) for architecture in architectures):
        return False
    with Tensors(folder) as tensors:
        return not any(PROJECTOR.fullmatch(name) for name in tensors.names())


def check_layers(folder: str | os.PathLike[str], layers: int | None) -> None:
    """Raises ValueError where the decoder in a folder hasn't as many layers."""
    count = read_json(Path(folder) / "config.json")["num_hidden_layers"]
    if layers is not None and not 0 < layers <= count:
        raise ValueError(f"layers is {layers}, expected 1 to {count}: {folder} has as many")


def decoder_digest(folder: str | os.PathLike[str], layers: int | None) -> str:
    """SHA-256 of everything that decides what `listwise_start` makes of the decoder in a folder."""
    files = [*small_files(Path(folder)), *weight_files(Path(folder))[0]]
    return digest(layers, *(part for path in files for part in (path.name, path)))


def listwise_start(
    decoder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    data: TrainingData,
    config: TrainingConfig,
    *,
    layers: int | None = None,
) -> Path:
    """Write a listwise checkpoint that computes what the first layers of a decoder compute.

    Args:
        decoder: folder of a decoder without a projector, safetensors, `tokenizer.json` beside it.
        output: folder of the checkpoint.
        data: the lists of which `LISTS` are looked at, as `config` draws them.
        layers: as many are kept; None keeps all.

    Raises:
        ValueError: it is no such decoder, or has fewer layers.
    """
    check_layers(decoder, layers)
    found = open_decoder(decoder)
    raw, tokenizer = dict(found.raw_config), found.tokenizer
    kept = raw["num_hidden_layers"] if layers is None else layers
    state = {
        name: tensor for name, tensor in found.state.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < kept
    }  # fmt: skip
    raw |= {"architectures": ["JinaForRanking"], "num_hidden_layers": kept, "tie_word_embeddings": True}
    if raw.get("layer_types") is not None:
        raw["layer_types"] = raw["layer_types"][:kept]

    missing = [token for token in (EMBED_TOKEN, RERANK_TOKEN) if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in missing])
    rows = -(-max(tokenizer.get_vocab_size(), raw["vocab_size"]) // 64) * 64
    table = state["model.embed_tokens.weight"].float()
    generator = torch.Generator().manual_seed(config.seed)
    spread = table.std(0) * torch.randn(rows, table.shape[1], generator=generator)
    larger = table.mean(0) + spread
    larger[: len(table)] = table
    # A marker begins much like the decoder's own end of a text, which has learnt to look back, or like nothing else.
    last = next((end for name in _ENDS if (end := tokenizer.token_to_id(name)) is not None), None)
    for marker in map(tokenizer.token_to_id, missing):
        larger[marker] = table.mean(0) + spread[marker] if last is None else table[last] + 0.3 * spread[marker]
    state["model.embed_tokens.weight"] = larger
    raw["vocab_size"] = rows

    context = ModelConfig.from_dict(raw, found.tokenizer_config.get("model_max_length")).max_context
    if context < LEAST_CONTEXT:
        raise ValueError(f"{decoder} has a context of {context} tokens, a list needs {LEAST_CONTEXT} at least")
    caps = {name: min(cap, context // 4) for name, cap in zip(CAPS, V3_CAPS, strict=True)}
    if caps["max_doc_length"] < V3_CAPS[1]:
        raw["lastrerank"] = {**(raw.get("lastrerank") or {}), **caps}
    hidden = raw["hidden_size"]
    state["projector.0.weight"], state["projector.2.weight"] = linear_projector(torch.eye(hidden)[:PROJECTED])
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(found.tokenizer_config)
    saving.save(output, raw, tokenizer, tokenizer_config, state)
    readouts = _readouts(Trainer(open_checkpoint(output), data, config))
    state["projector.0.weight"], state["projector.2.weight"] = linear_projector(whitening(*readouts, PROJECTED))
    saving.save(output, raw, tokenizer, tokenizer_config, state)
    return Path(output)


def linear_projector(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A projector that multiplies by `matrix` `[P, D]`: `relu(x) - relu(-x) = x`."""
    identity = torch.eye(len(matrix))
    return torch.cat([matrix, -matrix]), torch.cat([identity, -identity], dim=1)


def whitening(documents: torch.Tensor, queries: torch.Tensor, width: int) -> torch.Tensor:
    """`[width, D]`: the directions in which readouts of documents `[N, D]` and queries `[M, D]` differ most among
    themselves, each scaled to a variance of one; the means of both are projected out."""
    if len(documents) < 8:
        raise ValueError(f"{len(documents)} documents were read: too few to see how readouts differ")
    means, _ = torch.linalg.qr(torch.stack([documents.mean(0), queries.mean(0)]).T)
    centred = torch.cat([documents - documents.mean(0), queries - queries.mean(0)])
    centred = centred - centred @ means @ means.T
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    deviation = sizes[:width] / len(centred) ** 0.5
    # Directions that few readouts show are noise: they are not blown up.
    matrix = directions[:width] / (deviation + 0.1 * deviation[0])[:, None]
    padding = width - len(matrix)
    return torch.cat([matrix, matrix.new_zeros(padding, matrix.shape[1])]) - torch.cat(
        [matrix @ means @ means.T, matrix.new_zeros(padding, matrix.shape[1])]
    )


@torch.no_grad()
def _readouts(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed states at the markers of documents and of queries."""
    documents, queries = [], []
    steps = -(-LISTS // trainer.config.lists_per_step)
    for drawn in [drawn for step in range(steps) for drawn in trainer.drawer[step]][:LISTS]:
        normed, _ = trainer.readouts([drawn.block])
        documents.append(normed[int(drawn.dual) : -1])
        queries.append(normed[-1:])
    return torch.cat(documents), torch.cat(queries)
