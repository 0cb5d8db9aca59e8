import json
import tempfile
from pathlib import Path

from lastrerank import Reranker
from lastrerank.batch import read_requests, rerank_file

folder = Path(tempfile.mkdtemp())
rows = [{"id": f"q{i}", "query": f"page {i}", "documents": [{"id": "a", "text": "page 1"}, {"id": "b", "text": "x"}]}
        for i in range(3)]  # fmt: skip
(folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
requests = read_requests(folder / "in.jsonl", {"top_n": 1})
print(rerank_file(Reranker.from_pretrained(), requests, folder / "out.jsonl", trec=folder / "out.run"))
print((folder / "out.run").read_text())
