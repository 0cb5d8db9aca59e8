"""What clients can send that they shouldn't, over real sockets: it costs little, is told in the usual shape, and
`/health` answers meanwhile. Times are bounds against hanging, far above what is seen."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from bench.serving import serving
from lastrerank.server import listen

QUERY = "how do I print"


class Server:
    def __init__(self, address, process):
        self.port, self.process = int(address.rsplit(":", 1)[1]), process

    def ask(self, method, path, body=None, headers=None, timeout=60):
        """Status, headers, and parsed body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            content = json.dumps(body) if body is not None and not isinstance(body, bytes) else body
            connection.request(method, path, content, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read()
            with contextlib.suppress(ValueError):
                text = json.loads(text)
            return response.status, {k.lower(): v for k, v in response.getheaders()}, text
        finally:
            connection.close()

    def raw(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def memory(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024

    @contextlib.contextmanager
    def health_within(self, seconds):
        """`/health` is asked all the while."""
        worst, stop = [0.0], threading.Event()

        def watch():
            while not stop.is_set():
                started = time.perf_counter()
                assert self.ask("GET", "/health")[0] == 200
                worst[0] = max(worst[0], time.perf_counter() - started)
                time.sleep(0.03)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert worst[0] < seconds, f"/health took {worst[0]:.1f} s"


@pytest.fixture(scope="module")
def server(small):
    with serving("--model", str(small), "--max-body", str(8 << 20), "--max-total-body", str(20 << 20),
                 "--max-connections", "40", key="secret") as (address, process):  # fmt: skip
        yield Server(address, process)


KEY = {"authorization": "Bearer secret"}


@pytest.mark.parametrize("scheme", ["Bearer secret", "bearer secret", "BEARER secret", "Bearer  secret"])
def test_the_scheme_has_no_case(server, scheme):
    assert server.ask("POST", "/v1/rerank", {"query": QUERY, "documents": ["x"]}, {"authorization": scheme})[0] == 200


def test_without_a_key_a_body_is_not_read(server):
    before = server.memory()
    with server.health_within(2):
        for _ in range(4):
            with contextlib.suppress(OSError):  # closed before all was sent
                status, headers, answer = server.ask("POST", "/v1/rerank", b"[" + b"[]," * (2 << 20))
                assert status == 401 and headers["www-authenticate"] == "Bearer" and answer["error"]["message"]
        with server.raw(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n") as connection:
            assert b" 401 " in connection.recv(1000)  # told before any of it was sent
    assert server.memory() - before < 40
    for path in ("/info", "/v1/models", "/score", "/nothing"):
        assert server.ask("GET", path)[0] == 401, path
    for path in ("/health", "/ready", "/metrics", "/", "/docs", "/openapi.json"):
        assert server.ask("GET", path)[0] == 200, path


@pytest.mark.parametrize("kind", ["lists", "strings", "objects", "numbers", "unknown field", "keys"])
def test_bodies_of_millions_of_things(server, kind):
    size = 7 << 20
    things = {
        "lists": b"[]", "strings": b'""', "objects": b'{"text":""}', "numbers": b"1", "unknown field": b"[]",
        "keys": b'""',
    }[kind]  # fmt: skip
    listed = b"[" + b",".join([things] * (size // (len(things) + 1))) + b"]"
    body = b'{"query":"q","documents":' + listed + b"}"
    if kind == "unknown field":
        body = b'{"query":"q","documents":["x"],"z":' + listed + b"}"
    elif kind == "keys":
        many = b",".join(b'"k%d":0' % i for i in range(400_000))
        body = b'{"query":"q","documents":[{"text":"x",' + many + b"}]}"
    before = server.memory()
    with server.health_within(3):
        status, _, answer = server.ask("POST", "/v1/rerank", body, KEY)
    assert status in ((200,) if kind == "keys" else (413, 422)), answer
    assert server.memory() - before < 200


def test_a_packed_body_is_bounded_unpacked(server):
    right = gzip.compress(json.dumps({"query": QUERY, "documents": ["x", "y"]}).encode())
    packed = {**KEY, "content-encoding": "gzip"}
    assert server.ask("POST", "/v1/rerank", right, packed)[0] == 200
    before = server.memory()
    assert server.ask("POST", "/v1/rerank", gzip.compress(b" " * (500 << 20), 1), packed)[0] == 413
    assert server.memory() - before < 60
    for broken in (right[:-9], b"no gzip", b""):
        assert server.ask("POST", "/v1/rerank", broken, packed)[0] == 400
    assert server.ask("POST", "/v1/rerank", right, {**KEY, "content-encoding": "br"})[0] == 415


def test_packed_bodies_together_are_bounded(server):
    bomb = gzip.compress(b'{"query":"q","documents":["' + b"a" * (7 << 20) + b'"]}', 1)
    before, statuses = server.memory(), []
    packed = {**KEY, "content-encoding": "gzip"}
    threads = [
        threading.Thread(target=lambda: statuses.append(server.ask("POST", "/v1/rerank", bomb, packed)[0]))
        for _ in range(20)
    ]
    with server.health_within(3):
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert set(statuses) <= {200, 429} and 200 in statuses
    assert server.memory() - before < 400


@pytest.mark.parametrize(("headers", "size", "status"), [(KEY, 30 << 20, 413), ({}, 6 << 20, 401)])
def test_who_sends_too_much_is_told(server, headers, size, status):
    """Not cut off while sending, without a word."""
    answer = server.ask("POST", "/v1/rerank", b" " * size, headers)
    assert answer[0] == status and answer[2]["error"]["message"]


def test_bodies_are_read_where_one_is_wanted(server):
    """Not on open paths, where a client without a key could hold connections and memory with them."""
    head = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\nxx"
    held = [server.raw(head) for _ in range(60)]
    try:
        with server.health_within(3):
            assert b" 405 " in held[-1].recv(1000)
            assert server.ask("POST", "/v1/rerank", {"query": QUERY, "documents": ["x"]}, KEY)[0] == 200
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b'{"query":"q","documents":[{"a":"x"}],"rank_fields":["a","a"]}', 422, "rank_fields"),
        (b'{"query":"q","documents":[{"a":"x","n":1e999}],"rank_fields":["a"]}', 422, "documents[0]"),
        (b'{"query":"q","documents":[{"a":1}],"rank_fields":["a"]}', 422, "documents[0]"),
        (b'{"query":"q","documents":[{"a":"x","b":"y","text":5}],"rank_fields":["b","a"]}', 422, "documents[0]"),
        (b'{"query":"q","documents":[{"text":"x","n":"\xff"}]}', 400, None),
        (b'{"query":"q","documents":["x"],"use_activation":null,"mm_processor_kwargs":null}', 200, None),
        (b'{"query":"q","documents":["x"],"surprise":0,"other":null}', 422, "surprise"),
        (b'{"query":"q","documents":["x"],"truncate_prompt_tokens":-1}', 200, None),
    ],
)
def test_odd_bodies(server, body, status, param):
    got, _, answer = server.ask("POST", "/v1/rerank", body, KEY)
    assert got == status, answer
    if status != 200:
        assert answer["error"]["param"] == param
    long = b'{"query":"q","documents":["x"],"' + b"k" * (1 << 20) + b'":1}'
    assert len(json.dumps(server.ask("POST", "/v1/rerank", long, KEY)[2])) < 3000


def test_rank_fields_are_joined_in_their_order(server, small_reranker):
    body = {"query": QUERY, "documents": [{"a": "one", "b": "two"}, "three"], "rank_fields": ["b", "a"]}
    found = server.ask("POST", "/v1/rerank", body, KEY)[2]["results"]
    expected = small_reranker.rerank(QUERY, ["two\none", "three"])
    assert [(r["index"], round(r["relevance_score"], 5)) for r in found] == [
        (r["index"], round(r["relevance_score"], 5)) for r in expected
    ]
    assert {"a": "one", "b": "two"} in [r["document"] for r in found]


def test_all_bodies_together_are_bounded(server):
    """Half-sent bodies hold memory up to a bound; who comes then is told to come again, and the rest goes on."""
    head = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 8000000\r\n\r\n"
    held = [server.raw(head + b" " * 7_900_000) for _ in range(2)]
    time.sleep(1)
    try:
        with server.raw(head) as connection:
            answer = connection.recv(1000)
            assert b" 429 " in answer and b"retry-after" in answer.lower()
        assert server.ask("POST", "/v1/rerank", {"query": QUERY, "documents": ["x"]}, KEY)[0] == 200
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 20
    while server.ask("POST", "/v1/rerank", b'{"query":"q","documents":["' + b"a" * 7_900_000 + b'"]}', KEY)[0] != 200:
        assert time.monotonic() < deadline  # what was held has been given back


def test_silent_connections_make_way(server):
    """More of them than may be open: the server answers others, and they are closed."""
    held = [server.raw(b"GET /health HT" if i % 2 else b"") for i in range(100)]
    try:
        with server.health_within(3):
            time.sleep(1)
        assert server.ask("POST", "/v1/rerank", {"query": QUERY, "documents": ["x"]}, KEY)[0] == 200
        descriptors = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        assert descriptors < 100
    finally:
        for connection in held:
            connection.close()


def test_headers_have_their_time(small):
    first = "import lastrerank.server.limits as l; l.Limits.__init__.__defaults__ = (*l.Limits.__init__.__defaults__[:4], 1.0, *l.Limits.__init__.__defaults__[5:])"  # noqa: E501
    with serving("--model", str(small), first=first) as (address, process):
        server = Server(address, process)
        for start in (b"", b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\n"):
            with server.raw(start) as connection:
                started = time.perf_counter()
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1000) == b""
                assert 0.5 < time.perf_counter() - started < 20
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for _ in range(2):
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.status == 200 and response.read() == b'{"status":"ok"}'
            time.sleep(2)  # kept alive longer than headers may take
        connection.close()


def test_documents_come_back_as_they_came(server):
    deep = "[" * 200 + "]" * 200
    sent = ['{"text": "a", "n": 1e999, "deep": ' + deep + "}", '{ "text":"b","t":"\\u00e9\\ud83d\\ude00" }']
    body = '{"query": "q", "documents": [' + ",".join(sent) + ', "c"]}'
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/rerank", body, KEY)
    text = connection.getresponse().read().decode()
    assert all(document in text for document in sent) and '"document":{"text":"c"}' in text
    for extra in ('"\\ud83d"', "NaN", "[" * 500_000 + "]" * 500_000, '{"\\udc00": 1}'):
        odd = '{"query": "q", "documents": [{"text": "a", "x": ' + extra + "}]}"
        assert server.ask("POST", "/v1/rerank", odd.encode(), KEY)[0] in (400, 422)
    assert server.ask("GET", "/metrics")[2].count(b'status="500"') == 0


def test_ids_and_redirects(server):
    _, headers, _ = server.ask("GET", "/health", headers={"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    for odd in ("a" * 500, "\u00e9", "with space"):
        _, headers, _ = server.ask("GET", "/health", headers={"x-request-id": odd.encode("latin-1")})
        assert headers["x-request-id"] != odd and len(headers["x-request-id"]) == 32
    status, headers, _ = server.ask("GET", "/health/", headers={"host": "evil.example", **KEY})
    assert status == 404 and "location" not in headers
    assert server.ask("HEAD", "/health")[0] == 200
    assert server.ask("POST", "/health", {}, KEY)[0] == 405


SLOW_LAYERS = """
import time
from lastrerank import Reranker
real = Reranker.read_rows
Reranker.read_rows = lambda self, blocks, on_layer=None: real(
    self, blocks, on_layer=lambda n: (time.sleep(0.4), on_layer and on_layer(n)))
"""


def test_draining_is_bounded_and_told(small, documents):
    """Requests that take longer than there is time for are answered with an error of the usual shape."""
    options = ["--model", str(small), "--max-batch-tokens", "100", "--max-queue-tokens", "100000"]
    options += ["--drain-timeout", "1"]
    with serving(*options, first=SLOW_LAYERS) as (address, process):
        server = Server(address, process)
        answers = []
        body = {"query": QUERY, "documents": documents[:30], "block_size": 2}
        threads = [
            threading.Thread(target=lambda: answers.append(server.ask("POST", "/v1/rerank", body))) for _ in range(3)
        ]
        [thread.start() for thread in threads]
        time.sleep(1)
        started = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        [thread.join() for thread in threads]
        process.wait(20)
        assert time.perf_counter() - started < 6
        assert [status for status, _, _ in answers] == [503] * 3
        for _, _, answer in answers:
            assert answer["error"]["type"] == "unavailable" and answer["error"]["message"] == "the server is closing"


def test_who_is_still_sending_when_the_server_ends_is_told(small):
    with serving("--model", str(small), "--drain-timeout", "1") as (address, process):
        server = Server(address, process)
        with server.raw(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{") as connection:
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            answer = b""
            with contextlib.suppress(OSError):
                while piece := connection.recv(4000):
                    answer += piece
        assert b" 503 " in answer and b'"type":"unavailable"' in answer
        process.wait(20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--root-path", "/ü"], "--root-path"),
        (["--drain-timeout", "1e11"], "--drain-timeout"),
        (["--threads", "99999"], "threads"),
        (["--ssl-certfile", __file__, "--ssl-keyfile", __file__], "no certificate and key"),
        (["--port", "99999"], "port is 99999"),
        (["--max-body", "0"], "max-body"),
        (["--request-timeout", "nan"], "request_seconds is nan"),
        (["--request-timeout", "-1"], "request_seconds is -1"),
        (["--keep-alive", "inf"], "--keep-alive is inf"),
        (["--drain-timeout", "-3"], "--drain-timeout is -3"),
        (["--ssl-certfile", "/nowhere"], "expected both or none"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
        (["--uds", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--threads", "0"], "threads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_options_are_one_line(options, message):
    done = subprocess.run(
        [sys.executable, "-m", "lastrerank", "serve", *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and message in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(("key", "said"), [(" ", True), ("secret", False)])
def test_a_blank_key_is_said(key, said):
    done = subprocess.run(
        [sys.executable, "-m", "lastrerank", "serve", "--port", "0", "--model", "/nowhere"], capture_output=True,
        text=True, timeout=120, env=os.environ | {"LASTRERANK_API_KEY": key},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert done.returncode == 2
    assert [line["level"] for line in lines if "set and blank" in line["message"]] == ["warning"] * said


def test_fewer_connections_than_wanted_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(listen.resource, "getrlimit", lambda kind: (1000, 1000))
    monkeypatch.setattr(listen.resource, "setrlimit", lambda kind, limits: None)
    monkeypatch.setattr(listen, "log", lambda entry, level: said.append(entry))
    assert listen.possible_connections(800) == 800 and not said
    assert listen.possible_connections(10_000) == 872
    assert said[0]["max_connections"] == 872 and "872 connections instead of 10000" in said[0]["message"]


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_a_unix_socket_of_another_server_stays(tmp_path):
    path = str(tmp_path / "socket")
    first = listen.bind("", 0, path)
    second = listen.bind("", 0, path)  # the first one doesn't listen: nobody can tell it from a dead one's
    assert not first.is_there and second.is_there
    listen.release(first)
    assert second.is_there
    listen.release(second)
    assert not (tmp_path / "socket").exists()
    done = subprocess.run(
        [sys.executable, "-m", "lastrerank", "serve", "--uds", path, "--model", "/nowhere"], capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "socket").exists()


def test_a_taken_port_shows_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "lastrerank", "serve", "--port", str(port), "--model", "/nowhere"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2 and f"port {port}" in done.stderr and "nowhere" not in done.stderr


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_a_unix_socket_goes_with_its_server(tmp_path):
    """And all that the server says is of one format."""
    path = tmp_path / "socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "lastrerank", "serve", "--uds", str(path)], stderr=subprocess.PIPE, text=True
    )
    try:
        ready = json.loads(next(line for line in process.stderr if '"ready"' in line))
        assert ready["address"] == str(path)
        with socket.socket(socket.AF_UNIX) as client:
            deadline = time.monotonic() + 60
            while client.connect_ex(str(path)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        lines = [ready, *map(json.loads, process.communicate(timeout=60)[1].splitlines())]
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
        assert not path.exists()
    finally:
        process.kill()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_a_unix_socket_goes_with_a_server_that_is_ended_while_it_loads(tmp_path):
    path = tmp_path / "socket"
    code = (
        "import sys, time\nfrom lastrerank import Reranker\nfrom lastrerank.cli import main\n"
        "Reranker.from_pretrained = lambda *a, **k: print('loading', flush=True) or time.sleep(60)\n"
        f"sys.argv = ['lastrerank', 'serve', '--uds', {str(path)!r}]\nmain()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "loading\n" and path.exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM and not path.exists()
    finally:
        process.kill()


def test_a_server_answers_to_the_name_it_was_started_with(tmp_path):
    """And what is said while it loads is a line of its log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lastrerank", "serve", "--port", "0", "--model", "lastrerank-13m"],
        stderr=subprocess.PIPE, text=True,
    )
    try:
        lines = []
        while not lines or lines[-1]["message"] != "ready":
            lines.append(json.loads(process.stderr.readline()))
        assert any("lastrerank-13m" in line["message"] and line["level"] == "warning" for line in lines)
        assert lines[-1]["model"] == ["lastrerank-43m", "lastrerank-13m"]
        body = {"query": "q", "documents": ["a"], "model": "lastrerank-13m"}
        assert httpx.post(f"{lines[-1]['address']}/v1/rerank", json=body, timeout=60).status_code == 200
    finally:
        process.kill()


def test_a_ready_line_names_the_scheme():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert listen.address(bound).startswith("http://127.0.0.1:")
        assert listen.address(bound, has_tls=True).startswith("https://127.0.0.1:")
