"""Measuring: peak memory, and the machine in every result. Timing is `lastrerank.speed`'s."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# Modules whose versions decide a figure, and what they are installed as.
_PACKAGES = (
    ("transformers", "transformers"), ("triton", "triton"), ("openvino", "openvino"), ("nncf", "nncf"),
    ("onnxruntime", "onnxruntime"), ("llama_cpp", "llama-cpp-python"), ("torchao", "torchao"),
    ("sentence_transformers", "sentence-transformers"),
)  # fmt: skip
_COMMIT = ("git", "describe", "--always", "--dirty", "--exclude=*")


def machine() -> dict[str, Any]:
    """Processor, threads, device and versions, of peers those that have been imported."""
    cpu, kind = platform.processor() or platform.machine(), []
    flags: list[str] = []
    try:
        info = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
        said = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
        kind = [int(value) for name, value in said.items() if name.strip() in ("cpu family", "model")]
        known = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
        listed = next(line for line in info.splitlines() if line.startswith("flags")).split()
        flags = [flag for flag in known if flag in listed]
    except (OSError, StopIteration):
        pass
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(_COMMIT, capture_output=True, text=True).stdout.strip()
    facts = {
        "cpu": cpu, "family_and_model": kind, "flags": flags, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "commit": commit, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    facts |= {package: importlib.metadata.version(package) for module, package in _PACKAGES if module in sys.modules}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class PeakMemory:
    """Peak resident memory of this process above what it had on entry, in bytes, sampled every 2 ms.

    Freed memory that the C library holds back is given to the system first, or a pass would seem to need none.
    """

    def __enter__(self) -> PeakMemory:
        give_back_freed()
        self._stop, self.start, self.peak = threading.Event(), resident(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def give_back_freed() -> None:
    """Give freed memory that the C library holds back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(process: int | str = "self") -> int:
    """Bytes of a process in memory, shared pages included."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_results(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write `results/<name>.json`, and the same on stdout as the last line."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    report = {"machine": machine(), "command": " ".join(["python", "-m", *_command()]), "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return path


def _command() -> list[str]:
    """What was run; of absolute paths only the last part, which says as much on another machine."""
    main = sys.modules["__main__"].__spec__
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return [main.name if main else sys.argv[0], *arguments]
