"""Files that are kept: digests, replacement in one step, records after a crash, locks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from lastrerank.kept import FileState, digest, locked, read_records, write_file, write_records


def test_digests_tell_everything_apart(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    found = {
        digest(), digest("a", "b"), digest("ab"), digest(["a", "b"]), digest({"a": 1}), digest({"a": "1"}), digest(1.0),
        digest(1), digest(None), digest(path), digest("content"),
    }  # fmt: skip
    assert len(found) == 11 and digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    path.write_bytes(b"other")
    assert digest(path) not in found


def test_a_file_state_knows_replacement_from_overwriting(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    state = FileState.of(path)
    assert state.is_current() and state.now() is None
    write_file(path, "two")
    assert not state.is_current() and state.now() is None
    state = FileState.of(path)
    with path.open("ab") as file:
        file.write(b"!")
    assert not state.is_current() and state.now() == FileState.of(path)
    path.unlink()
    assert not state.is_current() and state.now() is None


def test_a_file_is_replaced_or_left(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 3, "lo', b"\0" * 300, b'{"step": 3}\0\0\0', b"garbage\n", b"[1]\n", b"\xff\xfe\n"],
    ids=repr,
)
def test_what_a_crash_leaves_is_cut_off(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    write_records(path, [{"step": 1}, {"step": 2, "text": "\u2028"}])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert read_records(path) == [{"step": 1}, {"step": 2, "text": "\u2028"}]
    assert path.read_bytes() == whole
    assert read_records(tmp_path / "nothing") == []


def test_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl:2: damaged"):
        read_records(path)


def test_a_lock_keeps_other_processes_out(tmp_path):
    code = (
        "import sys; from lastrerank.kept import locked\n"
        f"try:\n with locked({str(tmp_path / 'run')!r}, 'this run'): print('taken')\n"
        "except ValueError as error: print(error)"
    )

    def other():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip()

    with locked(tmp_path / "run", "this run"):
        assert other() == f"this run is in use by another process: {tmp_path / 'run'}"
    assert other() == "taken"
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '[".run.lock"]'
