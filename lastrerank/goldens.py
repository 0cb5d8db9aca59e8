"""Published scores of published checkpoints, for `lastrerank doctor --verify`.

Each says where it is from and in which dtype it was computed, which bounds how near one can come: a logit in bf16 has
eight bits of mantissa, so that references differ by up to one at the irrelevant end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lastrerank.families.family import repository_name

_FRANCE = (
    "What is the capital city of France?",
    ("Paris is the capital and most populous city of France.", "The Rhine is a river in Central and Western Europe.",
     "Photosynthesis converts light energy into chemical energy."),
)  # fmt: skip
_TEA = (
    "What are the health benefits of green tea?",
    ("Green tea contains antioxidants called catechins that may help reduce inflammation and protect cells from "
     "damage.",
     "El precio del café ha aumentado un 20% este año debido a problemas en la cadena de suministro.",
     "Studies show that drinking green tea regularly can improve brain function and boost metabolism.",
     "Basketball is one of the most popular sports in the United States.",
     "绿茶富含儿茶素等抗氧化剂，可以降低心脏病风险，还有助于控制体重。",
     "Le thé vert est riche en antioxydants et peut améliorer la fonction cérébrale."),
)  # fmt: skip
_CHINA = (
    "What is the capital of China?",
    ("The capital of China is Beijing.",
     "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
     "responsible for the movement of planets around the sun."),
)  # fmt: skip
_MOCKINGBIRD = (
    "Who wrote 'To Kill a Mockingbird'?",
    ("'To Kill a Mockingbird' is a novel by Harper Lee published in 1960.",
     "The novel 'Moby-Dick' was written by Herman Melville.",
     "Harper Lee was born in 1926 in Monroeville, Alabama."),
)  # fmt: skip
_SUM = ("What is 2+2?", ("4", "The answer is definitely 1 million"))


@dataclass(frozen=True)
class Golden:
    """Scores of one list. checkpoints: pattern of the last part of its Hub ids. scores: before an activation, in the
    documents' order. tolerance: absolute. vector: first components of the first document's, of one that has them."""

    checkpoints: str
    query: str
    documents: Sequence[str]
    scores: tuple[float, ...]
    tolerance: float
    source: str
    vector: tuple[float, ...] = ()


GOLDENS = (
    Golden(r"jina-reranker-v3\.5", *_FRANCE, (0.521538, -0.138701, -0.118413), 1e-3, "its Transformers package, fp32",
           (2.566754, -1.079753, 1.213184)),
    Golden(r"jina-reranker-v3", *_TEA,
           (0.294921875, -0.16015625, 0.189453125, -0.1708984375, 0.2255859375, 0.1640625), 2e-2,
           "vLLM's tests, bf16"),
    Golden(r"Qwen3-Reranker-0\.6B", *_CHINA, (7.596951, -12.192464), 2e-2, "one reproduction in Transformers, fp32"),
    Golden(r"Qwen3-Reranker-4B", *_CHINA, (6.4375, -14.375), 1.0, "the model card, bf16"),
    Golden(r"Qwen3-Reranker-8B", *_CHINA, (5.0625, -14.25), 1.0, "the model card, bf16"),
    Golden(r"mxbai-rerank-base-v2", *_MOCKINGBIRD, (9.1875, 0.5625, 4.0), 0.5,
           "mxbai-rerank issue 8, bf16, normalised scores undone"),
    Golden(r"mxbai-rerank-large-v2", *_MOCKINGBIRD, (12.125, -1.375, 9.6875), 0.5,
           "mxbai-rerank issue 8, bf16, normalised scores undone"),
    Golden(r"zerank-2(-reranker)?", *_SUM, (5.4062, -4.5), 0.5, "the model card, bf16"),
)  # fmt: skip


def golden_of(name: str) -> Golden | None:
    """What is published of the checkpoint with this Hub id or folder name; conversions to classifiers included."""
    last = repository_name(name)
    return next((golden for golden in GOLDENS if re.fullmatch(golden.checkpoints, last, re.IGNORECASE)), None)
