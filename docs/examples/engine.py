import asyncio

from lastrerank import Reranker, RerankRequest
from lastrerank.engine import Engine


async def main() -> None:
    with Engine(Reranker.from_pretrained()) as engine:  # packs what many callers want into passes
        requests = [RerankRequest(f"question {i}", ["one text", "another"]) for i in range(4)]
        answers = await asyncio.gather(*(engine.arerank(request) for request in requests))
        print([answer.results[0]["index"] for answer in answers])


asyncio.run(main())
