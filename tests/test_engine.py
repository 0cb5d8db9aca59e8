"""The engine: answers are those of each request alone, however many there are and whatever fails beside them."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest
import torch

from lastrerank import Reranker, RerankRequest
from lastrerank.engine import (
    BadRequestError,
    ClosedError,
    DeadlineError,
    Engine,
    OverloadedError,
    TooLargeError,
    TooLongError,
)


def requests_of(documents, count, seed=0):
    rng = random.Random(seed)
    return [
        RerankRequest(f"query {i}", rng.sample(documents, rng.randint(1, 6)), block_size=rng.choice([2, 125]))
        for i in range(count)
    ]


def assert_same(results, expected, tolerance=1e-6):
    a, b = ({r["index"]: r["relevance_score"] for r in rows} for rows in (results, expected))
    assert a.keys() == b.keys() and all(abs(a[i] - b[i]) <= tolerance for i in a)


@pytest.fixture
def slow(small_reranker, monkeypatch):
    """Passes that wait for permission."""
    gate, real = threading.Event(), small_reranker.read_rows
    monkeypatch.setattr(small_reranker, "read_rows", lambda *a, **k: (gate.wait(30), real(*a, **k))[1])
    return small_reranker, gate


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def test_many_threads_get_what_each_would_get_alone(small_reranker, documents):
    requests = requests_of(documents, 40)
    with Engine(small_reranker, max_batch_tokens=2000) as engine:
        futures = [None] * len(requests)

        def ask(start):
            for i in range(start, len(requests), 4):
                futures[i] = engine.submit(requests[i])

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for request, future in zip(requests, futures, strict=True):
            expected = small_reranker.rerank_many([request])[0]
            answer = future.result(60)
            assert_same(answer.results, expected)
            assert [r["document"] for r in answer.results] == [request.documents[r["index"]] for r in answer.results]
            assert answer.tokenise_seconds > 0 and answer.inference_seconds > 0 and answer.queue_seconds >= 0
    assert engine.queued_tokens == engine.pending == 0
    assert engine.statistics.answered == 40 and engine.statistics.passes < engine.statistics.blocks


def test_deterministic_answers_are_bitwise(small, documents):
    reranker = Reranker.from_pretrained(small, deterministic=True)
    requests = requests_of(documents, 12)
    alone = reranker.rerank_many(requests)
    with Engine(reranker) as engine:
        futures = [engine.submit(request) for request in requests]
        assert [future.result(60).results for future in futures] == alone


def test_async(small_reranker, documents):
    request = RerankRequest("a query", documents[:3])

    async def main(engine):
        return await asyncio.gather(*(engine.arerank(request) for _ in range(5)))

    with Engine(small_reranker) as engine:
        answers = asyncio.run(main(engine))
    expected = small_reranker.rerank("a query", documents[:3])
    for answer in answers:
        assert_same(answer.results, expected)


def test_no_documents(small_reranker):
    with Engine(small_reranker) as engine:
        assert engine.rerank({"query": "q", "documents": []}).results == []


def test_a_large_request_does_not_starve_a_small_one(slow, documents):
    """Three hundred documents in blocks of 10 are queued first; five queued later are answered long before."""
    reranker, gate = slow
    order = []
    with Engine(reranker, max_batch_tokens=1000, max_queue_tokens=10**6) as engine:
        large = engine.submit(RerankRequest("large", (documents * 30)[:300], block_size=10))
        small = engine.submit(RerankRequest("small", documents[:1]))
        for name, future in (("large", large), ("small", small)):
            future.add_done_callback(lambda _, name=name: order.append((name, engine.statistics.passes)))
        wait_until(lambda: not engine._queue.encoding)
        gate.set()
        large.result(120)
    assert [name for name, _ in order] == ["small", "large"]
    assert order[0][1] <= 3 < 20 < order[1][1]


def test_the_queue_is_bounded(slow, documents):
    reranker, gate = slow
    with Engine(reranker, max_batch_tokens=500, max_queue_tokens=2000) as engine:
        accepted = [engine.submit({"query": "q", "documents": ["word " * 400] * 5})]  # an empty queue takes anything
        with pytest.raises(OverloadedError, match="at most 2000 may be") as refused:
            [accepted.append(engine.submit({"query": "q", "documents": documents[:2]})) for _ in range(20)]
        assert refused.value.retry_after >= 1
        gate.set()
        for future in accepted:
            assert future.result(60).results
        assert engine.rerank({"query": "q", "documents": documents[:2]}).results  # room again
    assert engine.statistics.refused == 1


def test_cancelled_and_late_requests_are_dropped(slow, documents):
    reranker, gate = slow
    with Engine(reranker, max_batch_tokens=300) as engine:
        first = engine.submit({"query": "first", "documents": documents[:1]})
        wait_until(lambda: not engine._queue.encoding)
        cancelled = engine.submit({"query": "cancelled", "documents": documents[:1]})
        late = engine.submit({"query": "late", "documents": documents[:1]}, timeout=0.01)
        wait_until(lambda: not engine._queue.encoding)
        assert cancelled.cancel()
        time.sleep(0.02)
        gate.set()
        with pytest.raises(CancelledError):
            cancelled.result(60)
        with pytest.raises(DeadlineError):
            late.result(60)
        assert first.result(60).results
    assert engine.statistics.dropped == 1 and engine.statistics.passes == 1 and engine.queued_tokens == 0


def test_who_fails_fails_alone(small_reranker, documents, monkeypatch):
    """A block that can't be scored; everyone packed with it is answered."""
    real = small_reranker.read_rows
    poisoned = small_reranker.encode(RerankRequest("poison", documents[:1])).blocks[0].ids

    def read_rows(blocks, **arguments):
        if any(block.ids is poisoned or list(block.ids) == list(poisoned) for block in blocks):
            raise RuntimeError("boom")
        return real(blocks, **arguments)

    monkeypatch.setattr(small_reranker, "read_rows", read_rows)
    requests = [*requests_of(documents, 7), RerankRequest("poison", documents[:1]), *requests_of(documents, 3, 1)]
    with Engine(small_reranker, max_batch_tokens=10**6, max_wait=0.2) as engine:
        futures = [engine.submit(request) for request in requests]
        for n, (request, future) in enumerate(zip(requests, futures, strict=True)):
            if n == 7:
                with pytest.raises(RuntimeError, match="boom"):
                    future.result(60)
            else:
                assert_same(future.result(60).results, small_reranker.rerank_many([request])[0])
        assert engine.statistics.failed == 1 and engine.statistics.splits >= 1 and engine.alive


def test_a_lost_device_ends_the_engine(small_reranker, documents, monkeypatch):
    """After an illegal access a GPU never computes again: no pass is tried any more, and health says so."""
    calls = []

    def read_rows(blocks, **arguments):
        calls.append(len(blocks))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(small_reranker, "read_rows", read_rows)
    monkeypatch.setattr(small_reranker, "device_answers", lambda: False)
    with Engine(small_reranker, max_batch_tokens=10**6, max_wait=0.2) as engine:
        futures = [engine.submit(request) for request in requests_of(documents, 5)]
        for future in futures:
            with pytest.raises(ClosedError, match=r"cpu doesn't compute any more after CUDA error: an illegal"):
                future.result(60)
        assert not engine.alive and len(calls) == 1
        with pytest.raises(ClosedError):
            engine.submit(requests_of(documents, 1)[0])


def test_a_pass_out_of_memory_is_split(small_reranker, documents, monkeypatch):
    """Also within one request: two blocks at once are too many."""
    real, sizes = small_reranker.read_rows, []

    def read_rows(blocks, **arguments):
        sizes.append(len(blocks))
        if len(blocks) > 1:
            raise MemoryError("out of memory")
        return real(blocks, **arguments)

    request = RerankRequest("q", documents[:7], block_size=2)
    expected = small_reranker.rerank_many([request])[0]
    monkeypatch.setattr(small_reranker, "read_rows", read_rows)
    with Engine(small_reranker, max_batch_tokens=10**6) as engine:
        assert_same(engine.rerank(request).results, expected)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_closing(slow, documents):
    reranker, gate = slow
    engine = Engine(reranker)
    drained = [engine.submit({"query": f"q{i}", "documents": documents[:2]}) for i in range(3)]
    threading.Timer(0.1, gate.set).start()
    engine.close()
    assert all(future.result(0).results for future in drained)
    with pytest.raises(ClosedError):
        engine.submit({"query": "q", "documents": []})
    assert not engine.alive

    gate.clear()
    engine = Engine(reranker)
    abandoned = [engine.submit({"query": f"q{i}", "documents": documents[:2]}) for i in range(3)]
    threading.Timer(0.1, gate.set).start()
    engine.close(drain=False)
    for future in abandoned:
        with pytest.raises(ClosedError):
            future.result(0)
    assert engine.queued_tokens == 0


def test_a_fault_of_the_engine_leaves_nobody_waiting(small_reranker, documents, monkeypatch):
    with Engine(small_reranker) as engine:
        monkeypatch.setattr(engine, "_next_pass", lambda: 1 / 0)
        with pytest.raises(ClosedError, match="ZeroDivisionError"):
            engine.rerank({"query": "q", "documents": documents[:2]})
        assert not engine.alive


def test_all_of_several_requests_or_none(slow, documents):
    reranker, gate = slow
    with Engine(reranker, max_queue_tokens=3000) as engine:
        many = [{"query": f"q{i}", "documents": documents[:2]} for i in range(40)]
        first = engine.submit_many(many)
        wait_until(lambda: not engine._queue.encoding)
        queued = engine.queued_tokens
        with pytest.raises(OverloadedError):  # together they are a large request, as the first are
            engine.submit_many(many)
        one = engine.submit(many[0])  # which leaves the door open for small ones
        wait_until(lambda: not engine._queue.encoding)
        assert engine.pending == 41 and queued < engine.queued_tokens < queued + 1000
        with pytest.raises(ValueError, match="query is empty"):
            engine.submit_many([many[0], {"query": "", "documents": []}])
        with pytest.raises(TooLargeError):
            engine.submit_many(many * 20)
        assert engine.pending == 41
        gate.set()
        assert all(future.result(60).results for future in (*first, one))


def test_what_only_tokenising_shows(small_reranker, documents, monkeypatch):
    """Too long an instruction, a text that was not to be cut, a panic in the tokenizers: failed, and nothing else."""
    with Engine(small_reranker) as engine:
        with pytest.raises(BadRequestError, match="instruction has more than 64 tokens"):
            engine.rerank({"query": "q", "documents": ["x"], "instruction": "words " * 100_000})
        long = {"query": "q", "documents": ["x", "words " * 1000]}
        with pytest.raises(TooLongError, match=r"documents\[1\] is longer than its cap"):
            engine.submit(long, refuse_cut=True).result(60)
        assert len(engine.rerank(long).results) == 2

        class PanicError(BaseException):
            pass

        def panic(request):
            raise PanicError("index out of bounds")

        with monkeypatch.context() as broken:
            broken.setattr(small_reranker, "encode_by_slices", panic)
            with pytest.raises(RuntimeError, match="PanicError: index out of bounds"):
                engine.rerank({"query": "q", "documents": ["x"]})
        assert engine.rerank({"query": "q", "documents": ["x"]}).results and engine.queued_tokens == 0


def test_long_texts_are_estimated_at_their_caps(slow):
    """A megabyte that will be cut to 256 tokens does not fill the queue."""
    reranker, gate = slow
    with Engine(reranker, max_queue_tokens=2000) as engine:
        first = engine.submit({"query": "q", "documents": ["x"]})
        second = engine.submit({"query": "q", "documents": ["word " * 200_000]})
        gate.set()
        assert first.result(60).results and second.result(60).results


def test_a_list_that_changes_after_it_was_submitted(slow):
    reranker, gate = slow
    documents = ["one", "two", "three"]
    with Engine(reranker) as engine:
        future = engine.submit({"query": "q", "documents": documents})
        documents.clear()
        gate.set()
        assert sorted(r["document"] for r in future.result(60).results) == ["one", "three", "two"]
        assert engine.alive


def test_a_failed_pass_is_not_kept_in_memory(small_reranker, documents, monkeypatch):
    """While its halves are tried, nothing holds the tensors of the pass that did not fit."""
    real, alive = small_reranker.read_rows, []

    def read_rows(blocks, **arguments):
        assert not [reference for reference in alive if reference() is not None]
        activations = torch.zeros(1000)
        alive.append(weakref.ref(activations))
        if len(blocks) > 1:
            raise MemoryError("out of memory")
        return real(blocks, **arguments)

    monkeypatch.setattr(small_reranker, "read_rows", read_rows)
    with Engine(small_reranker, max_batch_tokens=10**6) as engine:
        answer = engine.rerank(RerankRequest("q", documents[:6], block_size=2))
    assert len(answer.results) == 6 and len(alive) == 5


def test_bad_requests_are_refused_before_they_are_queued(small_reranker):
    with Engine(small_reranker) as engine:
        with pytest.raises(TypeError, match=r"documents\[0\] is a int"):
            engine.submit({"query": "q", "documents": [1]})
        with pytest.raises(ValueError, match="don't fit the context"):
            engine.submit({"query": "q", "documents": ["x"], "max_doc_length": 4096})
        assert engine.pending == 0
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        Engine(small_reranker, max_batch_tokens=0)


def test_a_large_request_waits_without_filling_the_door(slow, documents):
    """It counts as a quarter of the bound; small ones are let in beside it, another large one is not."""
    reranker, gate = slow
    with Engine(reranker, max_batch_tokens=1000, max_queue_tokens=8000, max_request_tokens=10**6) as engine:
        large = engine.submit(RerankRequest("large", documents[:20] * 10, block_size=10))
        wait_until(lambda: not engine._queue.encoding)
        assert engine.queued_tokens > 8000
        small = [engine.submit(RerankRequest(f"small {i}", ["a short text"])) for i in range(20)]
        with pytest.raises(OverloadedError):
            engine.submit(RerankRequest("another large one", documents[:20] * 10, block_size=10))
        with pytest.raises(OverloadedError):
            [engine.submit(RerankRequest(f"more {i}", ["a short text"])) for i in range(100)]
        gate.set()
        assert all(future.result(60).results for future in small)
        assert len(large.result(120).results) == 200


def test_a_request_has_a_bound_of_its_own(small_reranker):
    with Engine(small_reranker, max_queue_tokens=500, max_request_tokens=2000) as engine:
        with pytest.raises(TooLargeError, match="at most 2000 may be in one"):
            engine.submit({"query": "q", "documents": ["word " * 300] * 20})
        short = {"query": "q", "documents": ["!?" * 60] * 22}  # more tokens than its characters make one think
        with pytest.raises(TooLargeError):
            engine.rerank(short)
        assert engine.pending == 0 and engine.rerank({"query": "q", "documents": ["x"]}).results


@pytest.mark.parametrize("why", ["cancelled", "late", "abandoned"])
def test_a_pass_that_nobody_waits_for_stops_at_its_next_layer(small_reranker, documents, monkeypatch, why):
    layers, begun = [], threading.Event()
    real = small_reranker.read_rows

    def read_rows(blocks, on_layer=None):
        def slowly(tokens):
            layers.append(tokens)
            begun.set()
            time.sleep(0.3)
            on_layer(tokens)

        return real(blocks, on_layer=slowly)

    monkeypatch.setattr(small_reranker, "read_rows", read_rows)
    with Engine(small_reranker) as engine:
        future = engine.submit({"query": "q", "documents": documents[:3]}, 0.2 if why == "late" else None)
        assert begun.wait(20)
        if why == "cancelled":
            assert future.cancel()
        elif why == "abandoned":
            engine.abandon()
        if why != "cancelled":
            with pytest.raises(ClosedError if why == "abandoned" else DeadlineError):
                future.result(20)
        if why != "abandoned":
            monkeypatch.setattr(small_reranker, "read_rows", real)
            assert engine.rerank({"query": "next", "documents": documents[:1]}).results
    assert len(layers) == 1 < small_reranker.config.num_layers
    assert engine.queued_tokens == 0 and engine.statistics.answered == (why != "abandoned")


def test_draining_takes_no_longer_than_it_may(small_reranker, documents, monkeypatch):
    real = small_reranker.read_rows

    def read_rows(blocks, on_layer=None):
        return real(blocks, on_layer=lambda tokens: (time.sleep(0.2), on_layer(tokens)))

    monkeypatch.setattr(small_reranker, "read_rows", read_rows)
    engine = Engine(small_reranker, max_batch_tokens=100, max_queue_tokens=10**6)
    futures = [engine.submit({"query": f"q{i}", "documents": documents[:3]}) for i in range(30)]
    started = time.perf_counter()
    engine.close(timeout=1.0)
    assert time.perf_counter() - started < 3
    outcomes = [type(future.exception(0)).__name__ for future in futures]
    assert set(outcomes) <= {"NoneType", "ClosedError"} and outcomes.count("ClosedError") >= 20


def test_tokenising_is_shared_by_slices(small_reranker, monkeypatch):
    """With one thread: a list of thousands of long texts doesn't keep a short one waiting until all are tokenised."""
    order = []
    real = small_reranker.encode_by_slices

    def watched(request):
        def steps():
            result = yield from real(request)
            order.append(request.query)
            return result

        return steps()

    monkeypatch.setattr(small_reranker, "encode_by_slices", watched)
    with Engine(small_reranker, tokenizer_threads=1, max_request_tokens=10**9) as engine:
        large = engine.submit({"query": "large", "documents": [f"{i} words and words " * 60 for i in range(600)]})
        small = engine.submit({"query": "small", "documents": ["x"]})
        assert small.result(60).results
        large.cancel()
    assert order[0] == "small"


def test_a_late_request_is_not_tokenised_to_the_end(small_reranker):
    with Engine(small_reranker, max_request_tokens=10**9) as engine:
        documents = [f"{i} words and words " * 400 for i in range(3000)]
        with pytest.raises(DeadlineError):
            engine.submit({"query": "q", "documents": documents}, timeout=0.05).result(60)
        assert not engine._queue.encoding


def test_called_as_a_reranker_is(small_reranker, documents):
    with Engine(small_reranker) as engine:
        answer = engine.rerank("a query", documents[:3], top_n=2)
        assert [r["index"] for r in answer.results] == [
            r["index"] for r in small_reranker.rerank("a query", documents[:3], top_n=2)
        ]
        with pytest.raises(TypeError, match="documents is missing"):
            engine.rerank("a query")
        with pytest.raises(TypeError, match="beside a request"):
            engine.rerank({"query": "q", "documents": []}, documents)
        for timeout in (-1, float("nan"), "soon"):
            with pytest.raises(ValueError, match="timeout is"):
                engine.rerank("a query", documents[:1], timeout=timeout)
    for wrong in ({"max_wait": float("nan")}, {"max_wait": -1}, {"tokenizer_threads": 0}, {"max_queue_tokens": True},
                  {"max_request_tokens": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Engine(small_reranker, **wrong)


def test_a_deadline_is_kept_while_a_long_pass_runs(slow, documents):
    """It is not found out after the pass."""
    reranker, gate = slow
    with Engine(reranker) as engine:
        first = engine.submit({"query": "first", "documents": documents[:2]})
        wait_until(lambda: not engine._queue.encoding)
        started = time.perf_counter()
        for query in ("queued", "first too"):
            with pytest.raises(DeadlineError):
                engine.submit({"query": query, "documents": documents[:1]}, timeout=0.2).result(10)
        assert time.perf_counter() - started < 8
        gate.set()
        assert first.result(60).results
        assert engine.queued_tokens == 0


@pytest.mark.parametrize("long", [float("inf"), 1e10])
def test_centuries_of_time_do_not_stop_others_deadlines(slow, documents, long):
    reranker, gate = slow
    with Engine(reranker) as engine:
        first = engine.submit({"query": "first", "documents": documents[:2]}, timeout=long)
        wait_until(lambda: not engine._queue.encoding)
        queued = engine.submit({"query": "queued", "documents": documents[:1]}, timeout=long)
        time.sleep(0.1)
        with pytest.raises(DeadlineError):
            engine.submit({"query": "late", "documents": documents[:1]}, timeout=0.2).result(10)
        gate.set()
        assert first.result(60).results and queued.result(60).results


def test_the_bad_one_of_many_requests_is_named(small_reranker, documents):
    good = {"query": "q", "documents": documents[:1]}
    with Engine(small_reranker) as engine, pytest.raises(TypeError, match=r"requests\[1\]\.documents\[0\]"):
        engine.submit_many([good, good | {"documents": [5]}])


def test_between_the_layers_of_a_long_block_others_are_served(small_reranker, documents, monkeypatch):
    """A block longer than a pass can't be divided; who waits beside it is answered before it is done, rightly."""
    real, begun, order = small_reranker.read_rows, threading.Event(), []

    def read_rows(blocks, on_layer=None):
        def slowly(tokens):
            begun.set()
            time.sleep(0.2)
            on_layer(tokens)

        return real(blocks, on_layer=slowly)

    large = RerankRequest("large", documents[:20])
    expected = {"large": small_reranker.rerank_many([large])[0]}
    small = [RerankRequest(f"small {i}", documents[i : i + 2]) for i in range(3)]
    expected |= {request.query: small_reranker.rerank_many([request])[0] for request in small}
    monkeypatch.setattr(small_reranker, "read_rows", read_rows)
    with Engine(small_reranker, max_batch_tokens=1500, max_queue_tokens=10**5) as engine:
        futures = {"large": engine.submit(large)}
        assert begun.wait(20)
        futures |= {request.query: engine.submit(request) for request in small}
        for name, future in futures.items():
            future.add_done_callback(lambda _, name=name: order.append(name))
        for name, future in futures.items():
            assert_same(future.result(60).results, expected[name])
    assert order[-1] == "large" and engine.statistics.answered == 4
