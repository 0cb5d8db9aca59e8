"""jina-reranker-v3 and v3.5: a list in one context, cosine of projected states (arXiv 2509.25085)."""

from __future__ import annotations

from dataclasses import replace

from lastrerank.families.family import Cosine, Family
from lastrerank.lists import EMBED_TOKEN, RERANK_TOKEN, ListPrompt

_SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. If "
    "not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking."
)
_ASK = (
    "I will provide you with {count} passages, each indicated by a numerical identifier. "
    "Rank the passages based on their relevance to query: {query}"
)

PROMPT = ListPrompt(
    opening=f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{_ASK}\n",
    instruction="<instruct>\n{instruction}\n</instruct>\n",
    passage='<passage id="{index}">\n{document}' + EMBED_TOKEN + "\n</passage>",
    separator="\n",
    closing="\n<query>\n{query}" + RERANK_TOKEN,
)
# The GGUF and MLX packages of v3.5 put a second marker after the first query; the late one is read here too.
GGUF_PROMPT = replace(
    PROMPT, opening=f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{_ASK}{RERANK_TOKEN}\n"
)

LISTWISE = Family("listwise", PROMPT, Cosine())
LISTWISE_GGUF = Family("listwise-gguf", GGUF_PROMPT, Cosine())
