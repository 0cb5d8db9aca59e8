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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
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
    is kept, since it says something of the kernels: whatever else stopped a check may be gone the next time."""

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

    try:
        import triton
    except ImportError:
        triton = None
    here = Path(__file__).parent
    sources = [path for folder in lastrerank.kernels.__path__ for path in Path(folder).glob("*.py")]
    sources += [here / f"{name}.py" for name in ("checks", "graphs", "isolation", "model")]
    return {
        "backend": backend, "dtype": str(dtype), "shape": _shape(config),
        "sources": digest(*sorted([*sources, *here.glob("ops/*.py")])), "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),  # whatever its distribution is called (AMD's has another name)
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

    with ExitStack() as held:
        with suppress(OSError):  # a home that can't be written to, or that knows no locks
            cache_folder().mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context((cache_folder() / f".{key}.lock").open("a")), fcntl.LOCK_EX)
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
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            if process.poll() is None:  # late, or whoever waits is interrupted
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it may have started
                with suppress(subprocess.TimeoutExpired):  # a driver may hold it longer
                    process.wait(5)
        output.seek(0)
        errors.seek(0)
        said = _objects(output.read())
        last_error = (errors.read().strip().splitlines() or [""])[-1]
    doing = next((entry["checking"] for entry in reversed(said) if "checking" in entry), "it started")
    if not ended:
        return f"no end within {limit:g} s, when {doing}", False
    result = said[-1] if said and "ok" in said[-1] else {}
    if result.get("ok") is False:  # a device that is lost may make the process end badly after it has said so
        return result["reason"], result["lasting"]
    if not result or process.returncode:
        crashed = process.returncode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL)
        return f"the check ended with status {process.returncode}, when {doing}: {last_error:.200}", crashed
    return None, True


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

    doing = "it looked for a compiler"

    def begin(what: str) -> None:
        nonlocal doing
        doing = what
        print(json.dumps({"checking": what}), flush=True)

    begin(doing)
    try:
        missing = None if device.type == "cpu" else missing_for_triton()
        if missing is not None:
            print(json.dumps({"ok": False, "reason": missing, "lasting": False}))
            return
        check(BACKENDS[given["backend"]](device, dtype), config, device, dtype, begin)
    except (FailedError, SlowError) as error:
        print(json.dumps({"ok": False, "reason": str(error), "lasting": isinstance(error, FailedError)}))
    except Exception as error:
        reason = f"{type(error).__name__} when {doing}: {line_that_says_it(error):.200}"
        print(json.dumps({"ok": False, "reason": reason, "lasting": is_of_the_kernels(error)}))
    else:
        print(json.dumps({"ok": True}))


# What a driver calls a fault of a kernel, where all else is the machine's.
_FAULTS = (
    "illegal", "misaligned", "launch failure", "invalid program counter", "invalid address space", "no kernel image",
    "invalid device function", "device-side assert",
)  # fmt: skip


def is_of_the_kernels(error: Exception) -> bool:
    """Whether an error says something of the kernels and of what compiles them, so that it would come again: not a lack
    of memory or of a C compiler, nor what else may ail a device."""
    text = str(error)
    if isinstance(error, (OSError, MemoryError, subprocess.SubprocessError)) or "out of memory" in text.lower():
        return False
    if any(driver in text for driver in ("CUDA error", "HIP error", "Triton Error")):
        return any(fault in text for fault in _FAULTS)
    return True


def line_that_says_it(error: Exception) -> str:
    """Of an error's message: Triton quotes the source before it, PyTorch adds advice behind."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return lines[-1 if type(error).__module__.startswith("triton") else 0].strip()


def missing_for_triton() -> str | None:
    """Triton builds its launcher with a C compiler and Python's headers at the first launch."""
    import sysconfig

    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler was found (gcc, clang, or what CC names), which Triton needs"
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)  # as Triton has it
    headers = Path(paths["include"]) / "Python.h"
    return None if headers.is_file() else f"{headers} is missing, which Triton needs (python3-dev)"
