from lastrerank import Reranker

model = Reranker.from_pretrained()  # in place of CrossEncoder(...)
scores = model.predict([("page numbers", "Insert a page number."), ("page numbers", "Check the spelling.")])
ranking = model.rank("page numbers", ["Check the spelling.", "Insert a page number."], return_documents=True)
print(scores, ranking[0]["text"])
