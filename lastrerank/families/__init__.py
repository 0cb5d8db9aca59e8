"""What differs between rerankers, as data, and how a checkpoint's family is found. A new one is an entry here.

A wrong prompt gives plausible numbers, so a family is never guessed: what says nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lastrerank.families.family import Cosine, Family, Logit, repository_name
from lastrerank.families.listwise import LISTWISE, LISTWISE_GGUF
from lastrerank.families.pointwise import CTXL_RERANK_V2, MXBAI_RERANK_V2, QWEN3_RERANKER, ZERANK
from lastrerank.pairs import PairPrompt
from lastrerank.stored import read_json, read_json_list

__all__ = [
    "ALIASES", "FAMILIES", "MODULES", "PROMPT_FILES", "SENTENCE_TRANSFORMERS", "Cosine", "Family", "Logit", "named",
    "recognise",
]  # fmt: skip

FAMILIES = {
    family.name: family
    for family in (LISTWISE, LISTWISE_GGUF, QWEN3_RERANKER, MXBAI_RERANK_V2, ZERANK, CTXL_RERANK_V2)
}
# Short names of public checkpoints: their own, without the owner.
ALIASES = {
    hub_id.split("/")[1].lower(): hub_id
    for hub_id in (
        "jinaai/jina-reranker-v3", "jinaai/jina-reranker-v3.5", "Qwen/Qwen3-Reranker-0.6B", "Qwen/Qwen3-Reranker-4B",
        "Qwen/Qwen3-Reranker-8B", "mixedbread-ai/mxbai-rerank-base-v2", "mixedbread-ai/mxbai-rerank-large-v2",
        "zeroentropy/zerank-1-small", "zeroentropy/zerank-1", "zeroentropy/zerank-2",
        "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b", "ContextualAI/ctxl-rerank-v2-instruct-multilingual-2b",
    )
}  # fmt: skip
# Prompts of the listwise family, as earlier checkpoints of this package name them in `lastrerank.template`.
_TEMPLATES = {"transformers": LISTWISE, "gguf": LISTWISE_GGUF}
# Which logits sentence-transformers reads.
SENTENCE_TRANSFORMERS = "1_LogitScore/config.json"
# What else stands in that file and changes nothing: the logits it reads are those of the language model's head.
_LOGITS_AS_ALWAYS = (("module_input_name", None), ("module_input_name", "causal_logits"))
# Where its prompts and templates are, and what is done beside reading logits.
_PROMPTS, MODULES = "config_sentence_transformers.json", "modules.json"
PROMPT_FILES = (_PROMPTS, "chat_template.jinja", "tokenizer_config.json")


def named(name: object, of: str = "family") -> Family:
    """The family called `name`, or the one that it is.

    Raises:
        ValueError: there is none; `of` is what has the name.
    """
    if isinstance(name, Family):
        return name
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{of} is {name!r:.80}, expected one of {list(FAMILIES)}")
    return FAMILIES[name]


def recognise(
    name: str,
    folder: Path,
    raw: Mapping[str, Any],
    has_projector: Callable[[], bool],
    tokenizer: Tokenizer,
) -> Family:
    """The family of a checkpoint, by the first of these that says one: the `lastrerank` object of its configuration; a
    projector, or the architecture that has one; the repository's name; sentence-transformers' file of the logits that
    are read, where a prompt is kept beside it that is the family's. What contradicts another is refused; where those
    files alone say it, so is what they have otherwise than the family.

    Args:
        name: a Hub id, or the folder's name.
        raw: the parsed `config.json`.
        has_projector: whether there is one among the tensors; looked at where nothing is said before.
        tokenizer: the checkpoint's.

    Raises:
        ValueError: none of them says one, or two say different ones.
    """
    own = raw.get("lastrerank")
    own = own if isinstance(own, Mapping) else {}
    found: dict[str, Family] = {}
    if own.get("family") is not None:
        found["lastrerank.family"] = named(own["family"], "config.json: lastrerank.family")
    template = own.get("template")
    if template is not None:
        if not isinstance(template, str) or template not in _TEMPLATES:
            expected = f"expected one of {list(_TEMPLATES)}"
            raise ValueError(f"config.json: lastrerank.template is {template!r:.80}, {expected}")
        found["lastrerank.template"] = _TEMPLATES[template]
    if found:
        return _only(name, found)
    if "JinaForRanking" in (raw.get("architectures") or ()) or has_projector():
        return LISTWISE
    for family in FAMILIES.values():
        if family.repositories and re.fullmatch(family.repositories, repository_name(name), re.IGNORECASE):
            found["its name"] = family
    if (folder / SENTENCE_TRANSFORMERS).exists():
        ids = _logits(folder)
        known = next((family for family in FAMILIES.values() if _reads(family, tokenizer) == ids), None)
        if known is not None and ("its name" in found or _has_prompt(folder, known)):
            if "its name" not in found:  # a public checkpoint's contract is known
                _check_sentence_transformers(folder, known)
            found[SENTENCE_TRANSFORMERS] = known
        elif known is None:
            raise ValueError(
                f"{folder / SENTENCE_TRANSFORMERS}: true_token_id and false_token_id are {ids}, in this tokenizer "
                f"those of no family that is known: expected one of {list(FAMILIES)}; name it by family="
            )
    if not found:
        raise ValueError(
            f"{name}: no family says how this decoder is a reranker, and a wrong prompt would give plausible numbers: "
            f"pass family= (one of {list(FAMILIES)}), or set it in config.json: "
            '"lastrerank": {"family": ...}'
        )
    return _only(name, found)


def _only(name: str, found: Mapping[str, Family]) -> Family:
    families = list(dict.fromkeys(found.values()))
    if len(families) > 1:
        said = ", ".join(f"{place} {family.name!r}" for place, family in found.items())
        raise ValueError(f"{name}: its family is contradictory ({said}): name it by family=")
    return families[0]


def _logits(folder: Path) -> tuple[int | None, int | None]:
    raw = read_json(folder / SENTENCE_TRANSFORMERS)
    ids = raw.get("true_token_id"), raw.get("false_token_id")
    if not all(value is None or type(value) is int for value in ids):
        raise ValueError(f"{folder / SENTENCE_TRANSFORMERS}: token ids are {ids}, expected integers or null")
    return ids


def _has_prompt(folder: Path, family: Family) -> bool:
    """Whether the files that hold prompts have the family's: the same logits are read by others, too."""
    texts = ""
    for name in PROMPT_FILES:
        with suppress(OSError, UnicodeDecodeError):
            texts += (folder / name).read_text(encoding="utf-8")
    return bool(family.signature) and all(part in texts for part in family.signature)


def _reads(family: Family, tokenizer: Tokenizer) -> tuple[int, int | None] | None:
    """The ids of the words that a family reads; None if it reads none, or they are no tokens."""
    with suppress(ValueError):
        return family.readout.token_ids(tokenizer) if isinstance(family.readout, Logit) else None
    return None


def _check_sentence_transformers(folder: Path, family: Family) -> None:
    """Raises ValueError where its files make another score than the family."""
    assert isinstance(family.prompt, PairPrompt)
    for field, value in read_json(folder / SENTENCE_TRANSFORMERS).items():
        if field not in ("true_token_id", "false_token_id") and (field, value) not in _LOGITS_AS_ALWAYS:
            raise ValueError(
                f"{folder / SENTENCE_TRANSFORMERS}: {field} is {value!r:.80}, a field that lastrerank doesn't know: it "
                "may change the score; name the family by family= if it doesn't"
            )
    if (folder / _PROMPTS).exists():
        raw = read_json(folder / _PROMPTS)
        prompts, name = raw.get("prompts"), raw.get("default_prompt_name")
        prompt = prompts.get(name) if isinstance(prompts, Mapping) and isinstance(name, str) else None
        if name is not None and not (isinstance(prompt, str) and prompt.strip() in _own_texts(family.prompt)):
            raise ValueError(
                f"{folder / _PROMPTS}: the prompt {name!r:.80} that is its default is {prompt!r:.160}, which is not "
                f"{family.name!r}'s: name the family by family= and give it as an instruction"
            )
    if (folder / MODULES).exists():
        modules = read_json_list(folder / MODULES)
        for kind in (module.get("type") if isinstance(module, Mapping) else module for module in modules):
            if not isinstance(kind, str) or kind.rpartition(".")[2] not in ("Transformer", "LogitScore"):
                raise ValueError(f"{folder / MODULES}: {kind!r:.80} is a module that lastrerank doesn't have")


def _own_texts(prompt: PairPrompt) -> set[str]:
    """What a default prompt may be: the instruction, or a part of the frame, with or without the role's line."""
    parts = [part.strip() for text in prompt.texts() for part in re.split(r"<\|[^|]*\|>", text)]
    return {prompt.default_instruction or "", *parts, *(part.partition("\n")[2].strip() for part in parts)} - {""}
