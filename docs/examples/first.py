from lastrerank import Reranker

reranker = Reranker.from_pretrained()  # the small checkpoint in the package; or "jinaai/jina-reranker-v3"
documents = [
    "Choose Insert - Page Number to add the number of the current page.",
    "The spelling checker marks unknown words with a wavy line.",
    "To print several pages on one sheet, open the Print dialog.",
]
for result in reranker.rerank("insert page numbers", documents):
    print(f"{result['relevance_score']:.3f}  {result['document']}")
