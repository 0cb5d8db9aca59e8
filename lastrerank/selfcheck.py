"""Whether this machine computes with the compiled kernels what the reference computes, found out before they are used.

`auto` takes kernels only after a check of this model's shape and dtype (`lastrerank.checks`) in a process of its own,
with a time limit: a crash or an illegal access there takes no service with it. The verdict is kept in the user's cache
folder under a key of everything that may change it. `LASTRERANK_SELF_CHECK=0` makes no check: `auto` then stays with
the reference.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lastrerank.checks import FailedError, SlowError, check
from lastrerank.config import ModelConfig
from lastrerank.kept import digest, write_file
from lastrerank.ops import BACKENDS

logger = logging.getLogger("lastrerank")

LIMIT_S = 180
SWITCH = "LASTRERANK_SELF_CHECK"


@dataclass(frozen=True)
class Verdict:
    """reason: what failed, None if nothing did. seconds: the check took. key: digest of what it holds for. lasting: it
    is kept, which only right and wrong numbers and a crash are: whatever else stopped a check may be gone the next
    time."""

    ok: bool
    reason: str | None
    seconds: float
    key: str
    lasting: bool = True


def is_off() -> bool:
    """Whether the environment says that no check is to be made."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "off", "false", "no")


def facts(backend: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything a verdict depends on, as JSON can hold it."""
    import lastrerank.kernels

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    sources = sorted(path for folder in lastrerank.kernels.__path__ for path in Path(folder).glob("*.py"))
    return {
        "backend": backend, "dtype": str(dtype), "shape": _shape(config), "kernels": digest(*sources),
        "lastrerank": installed("lastrerank"), "torch": torch.__version__, "triton": installed("triton"),
        "device": device_facts(device),
    }  # fmt: skip


def device_facts(device: torch.device) -> dict[str, Any]:
    """Of a GPU, what its results may depend on."""
    if device.type != "cuda":
        return {"name": device.type}
    return {
        "name": torch.cuda.get_device_name(device), "capability": list(torch.cuda.get_device_capability(device)),
        "runtime": torch.version.cuda or torch.version.hip, "driver": driver_version(),
    }  # fmt: skip


def driver_version() -> int | None:
    """Of CUDA, as the driver has it (13000 is 13.0): asked of the driver itself, as PyTorch's own way to ask comes and
    goes with its versions. None where there is no such driver (AMD's)."""
    found = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return None if failed else found.value


def _shape(config: ModelConfig) -> dict[str, Any]:
    """What kernels see of a model."""
    names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta",
             "attention_bias", "output_bias", "qk_norm")  # fmt: skip
    windows = {-1 if window is None else window for window in config.layer_windows}
    return {name: getattr(config, name) for name in names} | {"windows": sorted(windows)}


def cache_folder() -> Path:
    """Where verdicts are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # as it is where there is no home
    return Path(base) / "lastrerank" / "selfcheck"


def kept_verdict(key: str) -> Verdict | None:
    """One that was found before; None if there is none that can be read."""
    try:
        return Verdict(**json.loads((cache_folder() / f"{key}.json").read_text())["verdict"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def verdict(
    backend: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, *,
    limit: float = LIMIT_S, command: Sequence[str] = (),
) -> Verdict:  # fmt: skip
    """The verdict on a backend for a model's shape, from the cache or from a check now.

    Args:
        dtype: as in `lastrerank.ops.select`.
        limit: seconds.
        command: what makes the check, of a specification on its standard input; default: `main`, by this Python.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = facts(backend, config, device, dtype)
    key = digest(found)
    kept = kept_verdict(key)
    if kept is not None:
        return kept
    with _one_at_a_time(key):
        kept = kept_verdict(key)  # which another process may have found meanwhile
        if kept is not None:
            return kept
        logger.info("checking the backend %s for this model's shape, once", backend)
        specification = {"backend": backend, "config": asdict(config), "device": str(device), "dtype": str(dtype)}
        started = time.monotonic()
        try:
            reason, lasting = _run(command or _command(), json.dumps(specification), limit)
        except OSError as error:  # no process could be started
            reason, lasting = f"the check could not be started: {error}", False
        new = Verdict(reason is None, reason, round(time.monotonic() - started, 1), key, lasting)
        if lasting:
            try:
                content = json.dumps({"verdict": asdict(new), "of": found}, indent=1)
                write_file(cache_folder() / f"{key}.json", content)
            except OSError as error:  # a home that can't be written to
                logger.info("the verdict on %s isn't kept: %s", backend, error)
        return new


@contextmanager
def _one_at_a_time(key: str) -> Iterator[None]:
    """Workers that start together check once: on one GPU several checks would disturb each other's time."""
    import fcntl

    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        file = (cache_folder() / f".{key}.lock").open("a")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _command() -> Sequence[str]:
    """This Python with this process's own path, and nothing of the folder it stands in."""
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\nfrom lastrerank.selfcheck import main\nmain()"
    return (sys.executable, "-I", "-c", code, json.dumps(sys.path))


def _run(command: Sequence[str], specification: str, limit: float) -> tuple[str | None, bool]:
    """What failed, or None, and whether that lasts."""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=errors, text=True, start_new_session=True
        )
        ended = True
        try:
            process.communicate(specification, timeout=limit)
        except subprocess.TimeoutExpired:  # with the compilers that it may have started; a driver may hold it longer
            ended = False
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        output.seek(0)
        errors.seek(0)
        said = _objects(output.read())
        last_error = (errors.read().strip().splitlines() or [""])[-1]
    doing = next((entry["checking"] for entry in reversed(said) if "checking" in entry), "it started")
    if not ended:
        return f"no end within {limit:g} s, when {doing}", False
    result = said[-1] if said and "ok" in said[-1] else None
    if result is None or process.returncode:
        crashed = process.returncode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL)
        illegal = crashed or "illegal" in last_error  # access or instruction: an error of the device, by its name
        return f"the check ended with status {process.returncode}, when {doing}: {last_error:.200}", illegal
    return (None, True) if result["ok"] else (result["reason"], result["lasting"])


def _objects(text: str) -> list[dict[str, Any]]:
    """Lines that are JSON objects; libraries may have their own words between them."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found


# In the process of its own.


def main() -> None:
    """Read a specification, check, and say so: JSON lines of what is being checked, the verdict last."""
    given = json.loads(sys.stdin.read())
    fields: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in given["config"].items()}
    config = ModelConfig(**fields)
    device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"].removeprefix("torch."))

    def begin(what: str) -> None:
        print(json.dumps({"checking": what}), flush=True)

    try:
        begin("it looked for a compiler")
        missing = None if device.type == "cpu" else missing_for_triton()
        if missing is not None:
            print(json.dumps({"ok": False, "reason": missing, "lasting": False}))
            return
        check(BACKENDS[given["backend"]](device, dtype), config, device, dtype, begin)
    except FailedError as error:
        print(json.dumps({"ok": False, "reason": str(error), "lasting": True}))
    except (SlowError, torch.cuda.OutOfMemoryError) as error:
        print(json.dumps({"ok": False, "reason": str(error), "lasting": False}))
    else:
        print(json.dumps({"ok": True}))


def missing_for_triton() -> str | None:
    """Triton builds its launcher with a C compiler and Python's headers at the first launch."""
    import sysconfig

    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler was found (gcc, clang, or what CC names), which Triton needs"
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)  # as Triton has it
    headers = Path(paths["include"]) / "Python.h"
    return None if headers.is_file() else f"{headers} is missing, which Triton needs (python3-dev)"
