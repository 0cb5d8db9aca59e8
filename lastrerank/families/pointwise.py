"""Rerankers that judge one document at a time: one logit, or the difference of two, of the prompt's last token.

Each is a prompt, byte for byte as its publisher's code makes it, and the words whose logits are read.
"""

from __future__ import annotations

from lastrerank.families.family import Family, Logit
from lastrerank.pairs import PairPrompt

# huggingface.co/Qwen/Qwen3-Reranker-0.6B, and 4B, 8B; github.com/QwenLM/Qwen3-Embedding. The text in the middle is
# encoded whole and cut on the right; frame and suffix stay.
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
QWEN3_RERANKER = Family(
    name="qwen3-reranker",
    prompt=PairPrompt(
        pieces=_QWEN3,
        instructed=_QWEN3,
        default_instruction="Given a web search query, retrieve relevant passages that answer the query",
    ),
    readout=Logit("yes", "no", activation="sigmoid"),
    repositories=r"Qwen3-Reranker-(0\.6B|4B|8B)",
    signature=(
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided.",
        "<Instruct>:", "<Query>:", "<Document>:",
    ),
)

# huggingface.co/mixedbread-ai/mxbai-rerank-base-v2 and large-v2, by the package mxbai-rerank 0.1.6: seven encodings.
_MXBAI_BEFORE = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
_MXBAI_AFTER = (
    "\n",
    "document: {document}",
    "\n",
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 "
    "for not relevant, 1 for relevant).\nRelevance:",
    "<|im_end|>\n<|im_start|>assistant\n",
)
MXBAI_RERANK_V2 = Family(
    name="mxbai-rerank-v2",
    prompt=PairPrompt(
        pieces=(_MXBAI_BEFORE, "query: {query}", *_MXBAI_AFTER),
        instructed=(_MXBAI_BEFORE, "instruction: {instruction}\nquery: {query}", *_MXBAI_AFTER),
        frame_counts=False,
        query_share=0.75,
    ),
    readout=Logit("1", "0"),
    repositories=r"mxbai-rerank-(base|large)-v2",
    signature=(
        "You are a search relevance expert who evaluates how well documents match search queries.",
        "query: ", "document: ",
    ),
)

# huggingface.co/zeroentropy/zerank-1, zerank-1-small and zerank-2 (also with "-reranker"). The probability is that of
# their first code, sigmoid(logit / 5); the instruction stands as in vLLM's template.
_ZERANK = ("{document}", "<|im_end|>\n<|im_start|>assistant\n")
ZERANK = Family(
    name="zerank",
    prompt=PairPrompt(
        pieces=("<|im_start|>system\n", "{query}", "<|im_end|>\n<|im_start|>user\n", *_ZERANK),
        instructed=(
            "<|im_start|>system\n", "<query>{query}</query>\n<instruction>{instruction}</instruction>",
            "<|im_end|>\n<|im_start|>user\n", *_ZERANK,
        ),
        strip=True,
    ),
    readout=Logit("Yes", None, scale=0.2, activation="sigmoid"),
    repositories=r"zerank-(1|1-small|2)(-reranker)?",
)  # fmt: skip

# huggingface.co/ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b and 2b. Encoded whole, the document first; the
# published code cuts the whole prompt and loses the query with it, here the document alone is cut.
_CTXL = "Check whether a given document contains information helpful to answer the query.\n<Document> {document}\n"
CTXL_RERANK_V2 = Family(
    name="ctxl-rerank-v2",
    prompt=PairPrompt(
        pieces=(_CTXL + "<Query> {query} ??",),
        instructed=(_CTXL + "<Query> {query} {instruction} ??",),
    ),
    readout=Logit("!", None),
    repositories=r"ctxl-rerank-v2-instruct-multilingual-[12]b",
    signature=(
        "Check whether a given document contains information helpful to answer the query.", "<Document> ", "<Query> ",
    ),
)
