"""`lastrerank serve` as a process of its own, for whatever measures or tests it from outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def serving(*options: str, first: str = "", key: str = "") -> Iterator[tuple[str, subprocess.Popen[Any]]]:
    """A server on a free port of loopback: its address once it is ready, and its process.

    Args:
        options: of `lastrerank serve`.
        first: Python that the process runs first.
        key: API key that it wants; none by default.

    Raises:
        RuntimeError: the process ended before it was ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"{first}\nimport sys; from lastrerank.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", script, "serve", "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"LASTRERANK_API_KEY": key})
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/ready"):
                break
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}: {' '.join(options)}")
            time.sleep(0.05)
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
