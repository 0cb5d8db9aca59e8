"""The check that compiled kernels pass before `auto` takes them: what it finds, how it ends, what is kept of it."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace

import pytest
import torch

from lastrerank import Reranker, checks, doctor, ops, selfcheck
from lastrerank.checkpoint import BUNDLED, open_checkpoint
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.reranker import CAPTURABLE
from lastrerank.show import report_lines

LENGTHS = (1, 63, 130, 65)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(selfcheck.SWITCH, raising=False)
    ops._warn_once.cache_clear()


@pytest.fixture(scope="module")
def config(tiny_windowed):
    return replace(open_checkpoint(tiny_windowed).config, layer_windows=(None, 100))


def check(operations, config, dtype=torch.bfloat16):
    doing = []
    checks.check(operations, config, CPU, dtype, doing.append, LENGTHS)
    return doing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_the_reference_passes(config, dtype):
    doing = check(ReferenceOperations(), config, dtype)
    assert doing == ["norms and the gate ran", "rotary embeddings ran", "attention ran, window None",
                     "attention ran, window 100", "the readouts ran", "two layers ran"]  # fmt: skip


def test_another_implementation_passes(config):
    """Not the reference itself: sums in another order, as a GPU has them."""
    from lastrerank.ops.native import NativeOperations

    check(NativeOperations(), config, torch.float32)


class Planted(ReferenceOperations):
    """The reference with one fault."""

    def __init__(self, name, fault):
        self.name, self.fault = name, fault

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if name != "name" and name == object.__getattribute__(self, "name"):
            return lambda *arguments, **keywords: self.fault(found, *arguments, **keywords)
        return found


def a_little_off(call, *arguments, **keywords):
    return call(*arguments, **keywords) * 1.05


def no_window(call, q, k, v, cu, seqlens, window, *rest, **keywords):
    return call(q, k, v, cu, seqlens, None, *rest, **keywords)


def leaking(call, q, k, v, cu, seqlens, window, scale, rows=None, out=None, **keywords):
    """What 0 times a neighbour's NaN would do."""
    result = call(q, k, v, cu, seqlens, window, scale, rows, out, **keywords)
    if rows is None:
        for end in cu[1:-1].tolist():
            result[end - 1] += 0 * v[end].repeat_interleave(result.shape[1] // v.shape[1], 0)
    return result


def not_in_place(call, q, *rest, out=None, **keywords):
    return call(q, *rest, **keywords) + (0.01 if out is q else 0)


def wrong_rows(call, q, k, v, cu, seqlens, window, scale, rows=None, **keywords):
    shifted = rows if rows is None else (rows - 1).clamp(min=0)
    return call(q, k, v, cu, seqlens, window, scale, shifted, **keywords)


def no_prefix(call, *arguments, prefixes=None, **keywords):
    return call(*arguments, **keywords)


def no_sum(call, residual, x, weight, eps):
    return residual, call(residual.clone(), x, weight, eps)[1]


def halves_swapped(call, gate_up):
    return call(gate_up.roll(gate_up.shape[1] // 2, 1))


def keys_not_rotated(call, qkv, q_weight, k_weight, cos, sin, positions, heads, kv_heads, eps):
    before = qkv.clone()
    result = call(qkv, q_weight, k_weight, cos, sin, positions, heads, kv_heads, eps)
    width = before.shape[1] // (heads + 2 * kv_heads)
    result[:, heads * width :] = before[:, heads * width :]
    return result


def another_query(call, hidden, doc_rows, query_rows, *rest):
    return call(hidden, doc_rows, query_rows.roll(1), *rest)


@pytest.mark.parametrize(("operation", "fault", "message"), [
    ("rms_norm", a_little_off, "rms_norm is off by"),
    ("add_rms_norm", no_sum, "sum isn't the sum|off by"),
    ("swiglu", halves_swapped, "swiglu is off by"),
    ("qk_norm_rope", keys_not_rotated, "qk_norm_rope is off by"),
    ("attention", no_window, r"attention \(window 100\) is off by"),
    ("attention", leaking, "beside NaN is not"),
    ("attention", not_in_place, "in place is not"),
    ("attention", wrong_rows, "of read rows is off by"),
    ("attention", no_prefix, "of what continues is off by"),
    ("score", another_query, "query vectors is off by"),
    ("logit", a_little_off, "logit is off by"),
    ("linear", a_little_off, "state after two layers is off by"),
])  # fmt: skip
def test_a_planted_fault_is_named(config, operation, fault, message):
    with pytest.raises(checks.FailedError, match=message):
        check(Planted(operation, fault), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_compiled_kernels_pass_in_the_emulator(config, dtype):
    """What a GPU would be given: two heads of one KV head, a window, one token and more than a tile."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if sys.platform != "linux":
        pytest.skip("Triton compiles on Linux")
    from emulator import emulating

    from lastrerank.ops.float8 import Float8Operations
    from lastrerank.ops.triton import TritonOperations

    operations = TritonOperations() if dtype == torch.bfloat16 else Float8Operations()
    small = replace(config, num_heads=2, num_kv_heads=1, layer_windows=(50,), intermediate_size=128)
    with emulating("sm_90") as launches:
        checks.check(operations, small, CPU, dtype, lambda what: None, (1, 70))
    assert {launch.kernel for launch in launches} >= {
        "_attention_kernel", "_hopper_attention_kernel", "_rms_norm_kernel", "_swiglu_kernel"
    }  # fmt: skip


# The process of its own.


def stand_in(code):
    return (sys.executable, "-c", textwrap.dedent(code))


def verdict(config, code=None, **options):
    command = {} if code is None else {"command": stand_in(code)}
    return selfcheck.verdict("reference", config, CPU, torch.float32, **command, **options)


def test_a_verdict_is_made_once_and_kept(config, monkeypatch):
    first = verdict(config)
    assert first.ok and first.reason is None and first.seconds > 0
    monkeypatch.setattr(selfcheck, "_run", None)  # would fail
    assert verdict(config) == first
    [kept] = selfcheck.cache_folder().glob("*.json")
    assert kept.stem == first.key and json.loads(kept.read_text())["of"]["shape"]["windows"] == [-1, 100]


def test_what_may_change_a_result_changes_the_key(config, monkeypatch):
    def key(backend="triton", config=config, dtype=torch.bfloat16):
        return selfcheck.digest(selfcheck.facts(backend, config, CPU, dtype))

    keys = {key(), key("reference"), key(dtype=torch.float16), key(config=replace(config, layer_windows=(None,))),
            key(config=replace(config, num_kv_heads=1))}  # fmt: skip
    assert key() in keys and len(keys) == 5
    assert key(config=replace(config, vocab_size=7)) == key()  # no kernel sees it
    monkeypatch.setattr(selfcheck, "device_facts", lambda device: {"name": "another", "driver": 1})
    assert key() not in keys


def test_facts_of_a_gpu_ask_no_more_than_is_there(config, monkeypatch):
    """What `auto` reads before anything is computed: the driver's version, or that there is none."""

    class Driver:
        def __init__(self, name):
            assert "cuda" in name

        @staticmethod
        def cuDriverGetVersion(found):
            found._obj.value = 13000
            return 0

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def no_driver(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(selfcheck.ctypes, "CDLL", no_driver)
    assert selfcheck.facts("reference", config, device, torch.bfloat16)["device"]["driver"] is None
    monkeypatch.setattr(selfcheck.ctypes, "CDLL", Driver)
    found = selfcheck.facts("reference", config, device, torch.bfloat16)
    assert found["device"]["driver"] == 13000 and found["device"]["capability"] == [9, 0]
    Driver.cuDriverGetVersion = staticmethod(lambda found: 1)
    assert selfcheck.driver_version() is None


@pytest.mark.parametrize(("code", "message"), [
    ("import os, json; print(json.dumps({'checking': 'attention ran'}), flush=True); os.abort()",
     r"ended with status -6, when attention ran"),
    # A device that is lost ends the process badly once it has said what is wrong.
    ("import json, os; print(json.dumps({'ok': False, 'reason': 'wrong', 'lasting': True}), flush=True); os.abort()",
     "^wrong$"),
    ("import json; print(5); print('null'); print(json.dumps({'ok': False, 'reason': 'wrong', 'lasting': True}))",
     "^wrong$"),
    ("import json; print('a library speaks'); print(json.dumps({'ok': False, 'reason': 'wrong', 'lasting': True}))",
     "^wrong$"),
])  # fmt: skip
def test_how_a_check_may_end(config, code, message):
    found = verdict(config, code)
    assert not found.ok
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.reason)
    assert verdict(config, "import json; print(json.dumps({'ok': True}))") == found  # kept


CUDA_ADVICE = "\nCUDA kernel errors might be reported later.\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions.\n"


class CompilationError(Exception):
    """As Triton's: the source first, then what is wrong with it."""

    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(("error", "reason", "lasting"), [
    (checks.FailedError("logit is off by 2"), "logit is off by 2", True),
    (checks.SlowError("it takes 2 ms"), "it takes 2 ms", False),
    (RuntimeError("CUDA error: an illegal memory access was encountered" + CUDA_ADVICE),
     "RuntimeError when attention ran: CUDA error: an illegal memory access was encountered", True),
    (RuntimeError("CUDA error: misaligned address" + CUDA_ADVICE),
     "RuntimeError when attention ran: CUDA error: misaligned address", True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
     "RuntimeError when attention ran: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
     False),
    (RuntimeError("Triton Error [CUDA]: out of memory"),
     "RuntimeError when attention ran: Triton Error [CUDA]: out of memory", False),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
     "OutOfMemoryError when attention ran: CUDA out of memory. Tried to allocate 2 GiB.", False),
    (CompilationError("at 9:4:\n    gl.warp_specialize([\n    ^\nmissing 3 required positional arguments"),
     "CompilationError when attention ran: missing 3 required positional arguments", True),
    (TypeError("got an unexpected keyword"), "TypeError when attention ran: got an unexpected keyword", True),
    (subprocess.CalledProcessError(1, ["gcc"]), r"CalledProcessError when attention ran: Command '['gcc']' returned "
     "non-zero exit status 1.", False),
])  # fmt: skip
def test_what_a_check_meets_lasts_if_it_is_of_the_kernels(config, error, reason, lasting, monkeypatch, capsys):
    """What lasts is kept, and a chip with an attention kernel of its own then tries the portable one."""

    def meets(operations, config, device, dtype, begin):
        begin("attention ran")
        raise error

    specification = {"backend": "reference", "config": asdict(config), "device": "cpu", "dtype": "torch.float32"}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(specification)))
    monkeypatch.setattr(selfcheck, "check", meets)
    selfcheck.main()
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"ok": False, "reason": reason, "lasting": lasting}


def test_who_is_interrupted_leaves_no_check_behind(config, tmp_path, monkeypatch):
    """Ctrl-C while a check runs: it has a session of its own, and would go on."""
    started = subprocess.Popen
    made = []

    class Interrupted(started):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

        def communicate(self, *arguments, **options):
            raise KeyboardInterrupt

    monkeypatch.setattr(selfcheck.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        verdict(config, "import time; time.sleep(60)")
    assert made[0].poll() == -signal.SIGKILL


def test_a_cache_without_locks_is_used_without(config, monkeypatch):
    import fcntl

    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert verdict(config, "import json; print(json.dumps({'ok': True}))").ok


def test_a_check_that_hangs_is_stopped(config):
    hangs = "import json, time; print(json.dumps({'checking': 'attention ran'}), flush=True); time.sleep(60)"
    found = verdict(config, hangs, limit=1.5)
    assert not found.ok and found.reason == "no end within 1.5 s, when attention ran" and found.seconds < 30
    assert verdict(config, "import json; print(json.dumps({'ok': True}))").ok  # a loaded machine is no reason for ever


@pytest.mark.parametrize("code", ["print('no verdict')", "import nothing_of_this_name", "import sys; sys.exit(3)"])
def test_what_says_nothing_of_the_kernels_is_not_kept(config, code):
    assert "ended with status" in verdict(config, code).reason
    assert verdict(config, "import json; print(json.dumps({'ok': True}))").ok


def test_a_check_that_can_not_be_started_is_no_crash(config):
    found = selfcheck.verdict("reference", config, CPU, torch.float32, command=("/no/such/python",))
    assert not found.ok and "could not be started" in found.reason and not found.lasting


def test_workers_that_start_together_check_once(config, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    code = f"import json, time; open({str(tmp_path / 'made')!r}, 'a').write('x'); time.sleep(0.5)\n"
    code += "print(json.dumps({'ok': True}))"
    with ThreadPoolExecutor(3) as pool:
        assert all(found.ok for found in pool.map(lambda _: verdict(config, code), range(3)))
    assert (tmp_path / "made").read_text() == "x"


def test_a_missing_compiler_is_named_and_looked_for_again(config, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(selfcheck.shutil, "which", lambda name: None)
    assert "no C compiler" in selfcheck.missing_for_triton()
    gone = "import json; print(json.dumps({'ok': False, 'reason': 'no C compiler', 'lasting': False}))"
    assert not verdict(config, gone).ok
    assert verdict(config, "import json; print(json.dumps({'ok': True}))").ok


def test_a_damaged_file_is_no_verdict(config):
    first = verdict(config)
    (selfcheck.cache_folder() / f"{first.key}.json").write_text('{"verdict": {"ok"')
    assert selfcheck.kept_verdict(first.key) is None and verdict(config).ok


def test_a_cache_that_can_not_be_written_costs_a_check_each_time(config, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert verdict(config, "import json; print(json.dumps({'ok': True}))").ok


# What `auto` makes of it, with a device that is none.


@pytest.fixture
def a_gpu(monkeypatch):
    """Where "triton" serves the CPU, as a GPU's backend would a GPU; its class is there to be recognised."""

    class Kernels(ReferenceOperations):
        pass

    monkeypatch.setitem(ops.BACKENDS, "native", lambda device, dtype: (_ for _ in ()).throw(RuntimeError("no CPU")))
    monkeypatch.setitem(ops.BACKENDS, "triton", lambda device, dtype: Kernels())
    return Kernels


def test_auto_takes_kernels_that_passed(a_gpu, config, monkeypatch):
    asked = []
    monkeypatch.setattr(selfcheck, "verdict", lambda *a: asked.append(a) or selfcheck.Verdict(True, None, 1.0, "k"))
    name, found = ops.select("auto", CPU, torch.float32, config)
    assert name == "triton" and isinstance(found, a_gpu) and asked == [("triton", config, CPU, torch.float32)]


def test_auto_falls_back_with_one_warning(a_gpu, tiny, monkeypatch, caplog):
    monkeypatch.setattr(selfcheck, "verdict", lambda *a: selfcheck.Verdict(False, "logit is off by 1e9", 1.0, "k"))
    monkeypatch.setitem(ops._FASTEST, "cpu", ops._FASTEST["cuda"])
    for _ in range(2):
        assert Reranker.from_pretrained(tiny, device="cpu").backend == "reference"
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "slower than it need be: plain PyTorch computes, since triton: it failed its check: logit is off by 1e9"
    ]


def test_a_chip_whose_own_kernel_fails_goes_on_with_the_portable_one(a_gpu, config, monkeypatch, caplog):
    """A fault of the one kernel costs what that one gives, not all of them."""

    class Portable(ReferenceOperations):
        pass

    monkeypatch.setitem(ops.BACKENDS, "triton-portable", lambda device, dtype: Portable())
    monkeypatch.setitem(ops._FASTEST, "cpu", ops._FASTEST["cuda"])
    verdicts = {"triton": selfcheck.Verdict(False, "attention is off by 2.0", 1.0, "a" * 20),
                "triton-portable": selfcheck.Verdict(True, None, 2.0, "b" * 20)}  # fmt: skip
    monkeypatch.setattr(selfcheck, "verdict", lambda name, *others: verdicts[name])
    name, found = ops.select("auto", CPU, torch.float32, config)
    assert name == "triton-portable" and isinstance(found, Portable) and name in CAPTURABLE
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "slower than it need be: triton-portable computes, since triton: it failed its check: attention is off by 2.0"
    ]
    shown = doctor._kernels(CPU, torch.float32, BUNDLED)
    assert (shown["backend"], shown["ok"], shown["refused"]["reason"]) == (name, True, "attention is off by 2.0")
    report = {"versions": {}, "device": "cuda", "backends": {}, "products": None, "kernels": shown,
              "self_check": {"ok": True, "difference": {}, "failed": {}}}  # fmt: skip
    assert [line.split(": ")[1] for line in report_lines(report)[-2:]] == ["REFUSED", "right (2 s, bbbbbbbbbbbb)"]

    verdicts["triton-portable"] = selfcheck.Verdict(False, "swiglu is off by 3.0", 1.0, "c" * 20)
    assert ops.select("auto", CPU, torch.float32, config)[0] == "reference"
    assert doctor._kernels(CPU, torch.float32, BUNDLED)["reason"] == "swiglu is off by 3.0"

    # What a busy GPU has not given time for says nothing of the one kernel.
    verdicts["triton"] = selfcheck.Verdict(False, "no end within 180 s", 180.0, "a" * 20, lasting=False)
    verdicts["triton-portable"] = None
    assert ops.select("auto", CPU, torch.float32, config)[0] == "reference"
    assert doctor._kernels(CPU, torch.float32, BUNDLED)["reason"] == "no end within 180 s"


def test_the_portable_kernel_is_a_backend_of_chips_with_their_own_alone(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ops.select("triton-portable", device, torch.bfloat16)[1]._portable
    assert not ops.select("triton", device, torch.bfloat16)[1]._portable
    with pytest.raises(RuntimeError, match="for float32"):
        ops.select("triton-portable", device, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match="no attention kernel of its own"):
        ops.select("triton-portable", device, torch.bfloat16)


def test_kernels_are_launched_on_their_tensors_device(monkeypatch):
    """Triton launches on the current one, which is each thread's own."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from contextlib import nullcontext
    from types import SimpleNamespace

    from lastrerank.ops.triton import on_its_device

    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    launch = on_its_device(lambda first, second: (list(entered), second))
    first = SimpleNamespace(device=torch.device("cuda", 1))
    assert launch(first, 5) == ([first.device], 5)
    assert launch(torch.zeros(1), 5) == ([first.device], 5)  # on a CPU nothing is entered


def test_the_check_can_be_switched_off(a_gpu, config, monkeypatch):
    monkeypatch.setenv(selfcheck.SWITCH, "0")
    monkeypatch.setattr(selfcheck, "verdict", None)
    assert ops.select("auto", CPU, torch.float32, config)[0] == "reference"
    assert ops.select("triton", CPU, torch.float32, config)[0] == "triton"  # by name: no check


def test_without_a_model_nothing_is_taken_unchecked(a_gpu):
    assert ops.select("auto", CPU, torch.float32)[0] == "reference"


def test_a_shape_that_kernels_do_not_serve_is_refused_at_load(config, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from lastrerank.ops.triton import TritonOperations

    monkeypatch.setitem(ops.BACKENDS, "triton", lambda device, dtype: TritonOperations())
    with pytest.raises(RuntimeError, match=r"head_dim is 96, its kernels serve \(64, 128\)"):
        ops.select("triton", CPU, torch.float32, replace(config, head_dim=96))
    with pytest.raises(RuntimeError, match="32 query heads a key head, its kernels serve 16"):
        ops.select("triton", CPU, torch.float32, replace(config, num_heads=32, num_kv_heads=1))


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_are_refused(capability, served, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = ops.availability(torch.device("cuda"), torch.float16)["triton"]
    assert (reason is None) == served
    assert served or "compute capability 8.0" in reason


def test_doctor_shows_the_verdict():
    report = {"versions": {}, "device": "cuda", "backends": {}, "products": None,
              "self_check": {"ok": True, "difference": {}, "failed": {}}}  # fmt: skip
    kernels = {"backend": "triton", "model": "a-model", "ok": False, "reason": "wrong", "seconds": 12.5,
               "key": "abc" * 9}  # fmt: skip
    assert report_lines(report | {"kernels": kernels})[-1].split(maxsplit=1)[1] == (
        "triton for the shape of a-model: REFUSED: wrong (12.5 s, abcabcabcabc)"
    )
    unchecked = report_lines(report | {"kernels": {"unchecked": f"{selfcheck.SWITCH} says so"}})
    assert "not checked: LASTRERANK" in unchecked[-1]
