"""Whether this machine computes with the compiled kernels what the reference computes, found out before they are used.

`auto` takes kernels only after a check of this model's shape and dtype in a process of its own, with a time limit: a
crash or an illegal access there takes no service with it. The verdict is kept in the user's cache folder under a key
of everything that may change it. `LASTRERANK_SELF_CHECK=0` makes no check: `auto` then stays with the reference.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from lastrerank.config import ModelConfig
from lastrerank.isolation import isolated
from lastrerank.kept import digest, write_file
from lastrerank.ops import BACKENDS, Operations, Prefixes
from lastrerank.ops.reference import ReferenceOperations

logger = logging.getLogger("lastrerank")

LIMIT_S = 180
SWITCH = "LASTRERANK_SELF_CHECK"
# Lengths of the checks' sequences: one token, around a tile's edge, several tiles and a rest, neighbours on both sides.
LENGTHS = (1, 63, 64, 1025, 65, 129)
_REPETITIONS, _TIMED_TOKENS, _BUCKET = 50, 2048, 512
# Beside twice the plain implementation's own error: so many roundings of the largest value. In fp32 that one is the
# truth here, and another order of summation is no error.
_ROUNDINGS = {torch.float32: 64}


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


class _FailedError(Exception):
    """A check found something else than it should have."""


class _SlowError(Exception):
    """The kernels are slower than what they stand for; or something else was running."""


def is_off() -> bool:
    """Whether the environment says that no check is to be made."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "off", "false", "no")


def facts(backend: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything a verdict depends on."""
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
        "flash-attn": installed("flash-attn") if backend == "flash-attn" else None, "device": device_facts(device),
    }  # fmt: skip


def device_facts(device: torch.device) -> dict[str, Any]:
    """Of a GPU, what its results may depend on."""
    if device.type != "cuda":
        return {"name": device.type}
    return {
        "name": torch.cuda.get_device_name(device), "capability": list(torch.cuda.get_device_capability(device)),
        "runtime": torch.version.cuda or torch.version.hip, "driver": getattr(torch._C, "_cuda_getDriverVersion")(),  # noqa: B009 (no public name)
    }  # fmt: skip


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
    except _FailedError as error:
        print(json.dumps({"ok": False, "reason": str(error), "lasting": True}))
    except (_SlowError, torch.cuda.OutOfMemoryError) as error:
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


def check(
    operations: Operations,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    begin: Callable[[str], None],
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Every operation of this model's shape against the reference, two layers end to end; on a GPU also repetitions
    beside a busy stream, a graph's replay, and the time.

    Args:
        dtype: as in `ops.select`.
        begin: called with what comes next.

    Raises:
        _FailedError: with what is wrong, and by how much.
    """
    with isolated(device):
        _check(operations, config, device, dtype, begin, lengths)


def _check(
    operations: Operations, config: ModelConfig, device: torch.device, dtype: torch.dtype,
    begin: Callable[[str], None], lengths: Sequence[int],
) -> None:  # fmt: skip
    kind = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    context = _Context(operations, config, device, kind, torch.Generator(device).manual_seed(0))
    begin("norms and the gate ran")
    _check_rows(context, quantised=dtype != kind)
    begin("rotary embeddings ran")
    _check_rotary(context)
    for window in dict.fromkeys(config.layer_windows):
        begin(f"attention ran, window {window}")
        _check_attention(context, window, lengths)
    begin("the readouts ran")
    _check_readouts(context)
    begin("two layers ran")
    models = _check_model(context, lengths, quantised=dtype != kind)
    if device.type == "cuda":
        begin("attention was repeated beside another stream")
        _check_repetitions(context, lengths)
        begin("a graph was replayed")
        _check_graph(context, models[0])
        begin("time was taken")
        _check_time(context, *models)


_REFERENCE = ReferenceOperations()


@dataclass(frozen=True)
class _Context:
    operations: Operations
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator
    reference: Operations = _REFERENCE

    def randn(self, *size: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        drawn = torch.randn(size, generator=self.generator, device=self.device)
        return (drawn * scale + offset).to(self.dtype)

    def compare(self, what: str, found: torch.Tensor, call: Callable[..., torch.Tensor], *tensors: Any) -> None:
        """The error rule: at most twice what the reference's own is in this dtype, and a few roundings."""
        exact = call(*(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors))
        plain = call(*tensors)
        allowed = 2 * _distance(plain, exact)
        allowed += _ROUNDINGS.get(self.dtype, 4) * torch.finfo(self.dtype).eps * float(exact.abs().max())
        self.expect(what, _distance(found, exact), allowed)

    def expect(self, what: str, error: float, allowed: float) -> None:
        if not error <= allowed:  # a NaN is none either
            raise _FailedError(f"{what} is off by {error:.1e}, allowed {allowed:.1e}")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _check_rows(context: _Context, quantised: bool) -> None:
    config, own, reference, eps = context.config, context.operations, context.reference, context.config.rms_norm_eps
    for rows in (1, 63, 257):
        x, y = (context.randn(rows, config.hidden_size, scale=3) for _ in range(2))
        weight = context.randn(config.hidden_size, scale=0.1, offset=1)
        wide = context.randn(rows, 2 * config.intermediate_size, scale=2)
        if quantised:
            _check_quantised(context, x, weight, wide)
            continue
        context.compare("rms_norm", own.rms_norm(x, weight, eps), lambda a, w: reference.rms_norm(a, w, eps), x, weight)
        total, normed = own.add_rms_norm(x.clone(), y, weight, eps)
        if not torch.equal(total, x + y):
            raise _FailedError("add_rms_norm's sum isn't the sum")
        context.compare("add_rms_norm", normed, lambda a, w: reference.rms_norm(a, w, eps), x + y, weight)
        context.compare("swiglu", own.swiglu(wide), reference.swiglu, wide)


def _check_quantised(context: _Context, x: torch.Tensor, weight: torch.Tensor, wide: torch.Tensor) -> None:
    """Rows that only `linear` understands: the product of both, whose error e4m3's three bits of fraction bound."""
    config, own, reference, eps = context.config, context.operations, context.reference, context.config.rms_norm_eps
    for what, rows, exact in (
        ("the quantised norm", own.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps)),
        ("the quantised gate", own.swiglu(wide), reference.swiglu(wide)),
    ):
        matrix = context.randn(config.hidden_size, exact.shape[1], scale=exact.shape[1] ** -0.5)
        product = exact.float() @ matrix.float().t()
        found = own.linear(rows, own.prepare(matrix))
        context.expect(what, _distance(found, product), 0.05 * float(product.abs().max()))


def _check_rotary(context: _Context) -> None:
    config, eps = context.config, context.config.rms_norm_eps
    rows, half = 63, config.head_dim // 2
    positions = torch.arange(rows, device=context.device) * 7
    table = torch.rand(int(positions.max()) + 1, half, generator=context.generator, device=context.device)
    weight = context.randn(config.head_dim, scale=0.1, offset=1) if config.qk_norm else None
    for heads, kv_heads in (
        (config.num_heads, config.num_kv_heads), (config.num_heads, 0), (0, config.num_kv_heads)
    ):  # fmt: skip
        qkv = context.randn(rows, (heads + 2 * kv_heads) * config.head_dim, scale=2)

        def rotate(
            operations: Operations, x: torch.Tensor, w: torch.Tensor | None, heads: int = heads, kv: int = kv_heads
        ) -> torch.Tensor:
            return operations.qk_norm_rope(x.clone(), w, w, table, table, positions, heads, kv, eps)

        found = rotate(context.operations, qkv, weight)
        context.compare("qk_norm_rope", found, partial(rotate, context.reference), qkv, weight)


def _packed(context: _Context, lengths: Sequence[int], behind: int = 64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v in one projection with NaN behind the last row and beside every row; starts."""
    config = context.config
    rows = sum(lengths)
    wide = torch.full((rows + behind, config.qkv_size + 64), float("nan"), dtype=context.dtype, device=context.device)
    wide[:rows, : config.qkv_size] = context.randn(rows, config.qkv_size)
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q, k, v, _ = wide.split([q_size, kv_size, kv_size, 64], 1)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=context.device)
    return [x.unflatten(1, (-1, config.head_dim)) for x in (q, k, v)], starts


def _check_attention(context: _Context, window: int | None, lengths: Sequence[int]) -> None:
    config, reference, own = context.config, context.reference, context.operations
    (q, k, v), cu = _packed(context, lengths)
    rows, scale, sizes = sum(lengths), config.head_dim**-0.5, tuple(lengths)
    what = f"attention (window {window})"

    def exact(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Any = None, prefixes: Any = None
    ) -> torch.Tensor:
        return reference.attention(q, k, v, cu, sizes, window, scale, rows, prefixes=prefixes)

    found = own.attention(q, k, v, cu, sizes, window, scale)[:rows]
    inner = [x[:rows] for x in (q, k, v)]
    context.compare(what, found, exact, *inner)

    read = torch.tensor(sorted({*(int(x) - 1 for x in cu[1:]), rows // 2}), device=context.device)
    some = own.attention(q[read].contiguous(), k, v, cu, sizes, window, scale, rows=read)
    context.compare(f"{what} of read rows", some, partial(exact, rows=read), q[read].contiguous(), k, v)

    # All others continue the longest.
    longest = max(range(len(lengths)), key=lambda n: lengths[n])
    before = (sum(lengths[:longest]), lengths[longest])
    host = tuple((0, 0) if n == longest else before for n in range(len(lengths)))
    prefixes = Prefixes(torch.tensor(host, dtype=torch.int32, device=context.device), host)
    continued = own.attention(q, k, v, cu, sizes, window, scale, prefixes=prefixes)[:rows]
    context.compare(f"{what} of what continues", continued, partial(exact, prefixes=prefixes), *inner)

    # Neighbours of the longest sequence are NaN: nothing of it changes. Then over the queries themselves.
    alone = slice(before[0], before[0] + before[1])
    expected = found[alone].clone()
    for x in (q, k, v):
        x[: alone.start], x[alone.stop : rows] = float("nan"), float("nan")
    for target in (None, q):
        again = own.attention(q, k, v, cu, sizes, window, scale, out=target)[alone]
        if not torch.equal(again, expected):
            where = "beside NaN" if target is None else "in place"
            raise _FailedError(f"{what} {where} is not what it was before")


def _check_readouts(context: _Context) -> None:
    config, reference, own, eps = context.config, context.reference, context.operations, context.config.rms_norm_eps
    width = config.hidden_size
    hidden, norm = context.randn(9, width, scale=2), context.randn(width, scale=0.1, offset=1)
    w1, w2 = context.randn(128, width, scale=width**-0.5), context.randn(64, 128, scale=128**-0.5)
    docs, queries, of_docs, of_sequences = (
        torch.tensor(x, device=context.device)
        for x in ([0, 1, 3, 4, 6, 7], [2, 5, 8], [0, 0, 1, 1, 2, 2], [0, 0, 1])
    )

    def score(operations: Operations) -> tuple[torch.Tensor, ...]:
        return operations.score(hidden, docs, queries, of_docs, of_sequences, norm, w1, w2, eps)

    # In fp32 whatever the dtype of states and weights is.
    names = ("document vectors", "query vectors", "the score of documents")
    for name, found_part, exact in zip(names, score(own), score(reference), strict=True):
        context.expect(name, _distance(found_part, exact), 1e-3 * float(exact.abs().max()))
    vector = torch.randn(width, generator=context.generator, device=context.device) * width**-0.5
    exact = reference.logit(hidden, norm, vector, eps)
    context.expect("logit", _distance(own.logit(hidden, norm, vector, eps), exact), 1e-3 * float(exact.abs().max()))


def _two_layers(context: _Context, operations: Operations, tensors: Mapping[str, torch.Tensor]) -> Any:
    from lastrerank.model import LastLayerProjections, LayerWeights, Model, ModelWeights

    config = replace(context.config, num_layers=2, layer_windows=_two_windows(context.config))
    q_size = config.num_heads * config.head_dim

    def layer(index: int, qkv: torch.Tensor | None) -> LayerWeights:
        bias = tensors[f"{index} bias"] if config.attention_bias else None
        head = tensors[f"{index} head"] if config.qk_norm else None
        return LayerWeights(
            input_norm=tensors[f"{index} norm"], qkv=None if qkv is None else operations.prepare(qkv), qkv_bias=bias,
            q_norm=head, k_norm=head, o=operations.prepare(tensors[f"{index} o"]), o_bias=None,
            post_norm=tensors[f"{index} post"], gate_up=operations.prepare(tensors[f"{index} gate_up"]),
            down=operations.prepare(tensors[f"{index} down"]),
        )  # fmt: skip

    last = tensors["1 qkv"]
    projections = LastLayerProjections(operations.prepare(last[:q_size]), operations.prepare(last[q_size:]))
    layers = (layer(0, tensors["0 qkv"]), layer(1, None))
    return Model(config, ModelWeights(tensors["embedding"], layers, projections, tensors["final"]), operations)


def _two_windows(config: ModelConfig) -> tuple[int | None, ...]:
    kinds = tuple(dict.fromkeys(config.layer_windows))
    return (kinds * 2)[:2]


def _check_model(context: _Context, lengths: Sequence[int], quantised: bool) -> tuple[Any, Any]:
    """The model by these operations and by the reference, in this dtype."""
    from lastrerank.packing import PackedBatch

    config, width = context.config, context.config.hidden_size
    tensors = {"embedding": context.randn(512, width), "final": context.randn(width, scale=0.1, offset=1)}
    attended = config.num_heads * config.head_dim
    for index in range(2):
        for name, out, inner in (
            ("qkv", config.qkv_size, width), ("o", width, attended), ("gate_up", 2 * config.intermediate_size, width),
            ("down", width, config.intermediate_size),
        ):  # fmt: skip
            tensors[f"{index} {name}"] = context.randn(out, inner, scale=inner**-0.5)
        tensors[f"{index} bias"] = context.randn(config.qkv_size, scale=0.1)
        tensors[f"{index} head"] = context.randn(config.head_dim, scale=0.1, offset=1)
        for name in ("norm", "post"):
            tensors[f"{index} {name}"] = context.randn(width, scale=0.1, offset=1)
    own = _two_layers(context, context.operations, tensors)
    plain = _two_layers(context, context.reference, tensors)
    exact = _two_layers(context, context.reference, {name: x.float() for name, x in tensors.items()})
    rows = sum(lengths)
    starts = torch.tensor([0, *accumulate(lengths)], device=context.device)
    batch = PackedBatch(
        ids=torch.randint(512, (rows,), generator=context.generator, device=context.device),
        positions=torch.cat([torch.arange(n, device=context.device) for n in lengths]), cu_seqlens=starts.int(),
        seqlens=tuple(lengths), read_rows=starts[1:] - 1, max_positions=max(lengths),
    )  # fmt: skip
    truth = exact.hidden_states(batch)
    error, allowed = _distance(own.hidden_states(batch), truth), 2 * _distance(plain.hidden_states(batch), truth)
    largest = float(truth.abs().max())
    allowed += (0.1 if quantised else _ROUNDINGS.get(context.dtype, 4) * torch.finfo(context.dtype).eps) * largest
    context.expect("the state after two layers", error, allowed)
    return own, plain


def _check_repetitions(context: _Context, lengths: Sequence[int]) -> None:
    (q, k, v), cu = _packed(context, lengths)
    config, rows, sizes = context.config, sum(lengths), tuple(lengths)
    q, k, v = q[:rows], k[:rows], v[:rows]
    tiles = context.operations.attention_tiles(
        cu, sizes, config.num_heads, config.num_kv_heads, config.head_dim, context.dtype
    )
    busy, noise = torch.cuda.Stream(context.device), context.randn(2048, 2048)
    busy.wait_stream(torch.cuda.current_stream(context.device))
    for window in dict.fromkeys(config.layer_windows):

        def attend(window: int | None = window) -> torch.Tensor:
            return context.operations.attention(
                q, k, v, cu, sizes, window, config.head_dim**-0.5, tiles=tiles
            ).clone()

        first = attend()
        for number in range(_REPETITIONS):
            with torch.cuda.stream(busy):
                for _ in range(20):
                    torch.mm(noise, noise)
            if not torch.equal(attend(), first):
                raise _FailedError(f"attention gives other bits at repetition {number + 1}")
    torch.cuda.synchronize(context.device)


def _batch_of(context: _Context, tokens: int) -> Any:
    from lastrerank.packing import PackedBatch

    return PackedBatch(
        ids=torch.randint(512, (tokens,), generator=context.generator, device=context.device),
        positions=torch.arange(tokens, device=context.device), seqlens=(tokens,), max_positions=tokens,
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32, device=context.device),
        read_rows=torch.tensor([tokens // 2, tokens - 1], device=context.device),
    )  # fmt: skip


def _check_graph(context: _Context, own: Any) -> None:
    from lastrerank.graphs import GraphedModel, empty_bucket, fill

    batch, bucket = _batch_of(context, _BUCKET - 100), empty_bucket(_BUCKET, context.device)
    fill(bucket, batch)
    eager = own.hidden_states(bucket)[: len(batch.read_rows)]
    graphed = GraphedModel(own, context.device, (_BUCKET,)).hidden_states(batch)
    if graphed is None or not torch.equal(graphed, eager):
        raise _FailedError("a graph's replay is not what its passes compute")


def _check_time(context: _Context, own: Any, plain: Any) -> None:
    batch = _batch_of(context, _TIMED_TOKENS)

    def seconds(model: Any) -> float:
        times = []
        for _ in range(4):  # the first compiles and fills caches
            torch.cuda.synchronize(context.device)
            started = time.perf_counter()
            model.hidden_states(batch)
            torch.cuda.synchronize(context.device)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    ours, theirs = seconds(own), seconds(plain)
    if ours > 1.2 * theirs:  # two layers are short: launches, and a list of tiles that a whole pass makes once
        raise _SlowError(f"it takes {ours * 1e3:.2f} ms where the reference takes {theirs * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
