"""What differs between rerankers, as data, and how a checkpoint's family is found. A new one is an entry here.

A wrong prompt gives plausible numbers, so a family is never guessed: what says nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lastrerank.families.family import Cosine, Family, Logit
from lastrerank.families.listwise import LISTWISE, LISTWISE_GGUF
from lastrerank.families.pointwise import CTXL_RERANK_V2, MXBAI_RERANK_V2, QWEN3_RERANKER, ZERANK

__all__ = ["FAMILIES", "SENTENCE_TRANSFORMERS", "Cosine", "Family", "Logit", "named", "recognise"]

FAMILIES = {
    family.name: family
    for family in (LISTWISE, LISTWISE_GGUF, QWEN3_RERANKER, MXBAI_RERANK_V2, ZERANK, CTXL_RERANK_V2)
}
# Prompts of the listwise family, as earlier checkpoints of this package name them in `lastrerank.template`.
_TEMPLATES = {"transformers": LISTWISE, "gguf": LISTWISE_GGUF}
# Which logits sentence-transformers reads.
SENTENCE_TRANSFORMERS = "1_LogitScore/config.json"


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
    logits: Mapping[str, Any] | None,
) -> Family:
    """The family of a checkpoint, by the first of these that says one: the `lastrerank` object of its configuration; a
    projector, or the architecture that has one; sentence-transformers' file and the repository's name, which must not
    contradict each other.

    Args:
        name: a Hub id, or the folder's name.
        raw: the parsed `config.json`.
        has_projector: whether there is one among the tensors; looked at where nothing is said before.
        logits: the parsed `1_LogitScore/config.json`, if there is one.

    Raises:
        ValueError: none of them says one, or two say different ones.
    """
    own = raw.get("lastrerank")
    own = own if isinstance(own, Mapping) else {}
    if own.get("family") is not None:
        return named(own["family"], "config.json: lastrerank.family")
    template = own.get("template")
    if template is not None:
        if not isinstance(template, str) or template not in _TEMPLATES:
            expected = f"expected one of {list(_TEMPLATES)}"
            raise ValueError(f"config.json: lastrerank.template is {template!r:.80}, {expected}")
        return _TEMPLATES[template]
    if "JinaForRanking" in (raw.get("architectures") or ()) or has_projector():
        return LISTWISE
    found: dict[str, Family] = {}
    if logits is not None:
        ids = logits.get("true_token_id"), logits.get("false_token_id")
        known = next((family for family in FAMILIES.values() if family.token_ids == ids), None)
        if known is None:
            raise ValueError(
                f"{folder / SENTENCE_TRANSFORMERS}: true_token_id and false_token_id are {ids}, those of no family "
                f"that is known: expected one of {list(FAMILIES)}; name it by family="
            )
        found[SENTENCE_TRANSFORMERS] = known
    last = re.sub(r"-seq(-cls)?$", "", name.rpartition("/")[2])
    for family in FAMILIES.values():
        if family.repositories and re.fullmatch(family.repositories, last, re.IGNORECASE):
            found["its name"] = family
    families = list(dict.fromkeys(found.values()))
    if len(families) > 1:
        said = ", ".join(f"{place} {family.name!r}" for place, family in found.items())
        raise ValueError(f"{name}: its family is contradictory ({said}): name it by family=")
    if not families:
        raise ValueError(
            f"{name}: no family says how this decoder is a reranker, and a wrong prompt would give plausible numbers: "
            f"pass family= (one of {list(FAMILIES)}), or set it in config.json: "
            '"lastrerank": {"family": ...}'
        )
    return families[0]
